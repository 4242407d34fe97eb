"""What to prune: the server's configuration, and what a single request makes of it.

The server's configuration lies in the model's config under the key ``tokenprune``, where vLLM's
front end (which sizes the prompt) and its workers (which select) both find it. A request may
bring ``mm_processor_kwargs={"tokenprune": {...}}``.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from tokenprune import formats
from tokenprune.budget import keeps_all
from tokenprune.config import FORMAT, PruningConfig
from tokenprune.errors import (
    ConfigError,
    TokenPruneError,
    UnsupportedModelError,
    did_you_mean,
)
from tokenprune.registry import find, inside_methods
from tokenprune_vllm.architectures import reads_prompt

KEY = "tokenprune"
"""Where the configuration lies in the model's config, and in a request's mm_processor_kwargs."""

MARK = (1, 1, 1)
"""The config's ``mrope_section`` where a model with one axis keeps original positions.

With it vLLM asks for the positions of prompts. The rotary embedding does not read it there.
"""

INTERLEAVED = "use_audio_in_video"
"""What requests to omni models may ask of their processor."""


class RequestError(TokenPruneError, ValueError):
    """A request asks for a pruning that is not offered; vLLM answers it with HTTP 400."""


@dataclass(frozen=True)
class ServerSettings:
    """What a server prunes by default, and what its requests may ask for.

    Attributes
    ----------
    default
        The pruning of a request that asks for nothing.
    methods
        Every method that requests may name, with its options; the default's is one of them.
    only_tokenprune
        Whether a request's mm_processor_kwargs may hold nothing but ``tokenprune``. vLLM opens
        all of them or none; a server that opens them for budgets alone keeps the rest closed.
    """

    default: PruningConfig
    methods: Mapping[str, dict[str, Any]]
    only_tokenprune: bool = False

    @classmethod
    def build(
        cls,
        default: PruningConfig,
        request_methods: Mapping[str, Mapping[str, Any]] | None = None,
        only_tokenprune: bool = False,
    ) -> ServerSettings:
        """Return the settings of a server.

        Parameters
        ----------
        default
            See `ServerSettings`.
        request_methods
            Methods beside the default's that requests may name, with their options.
        only_tokenprune
            See `ServerSettings`.

        Raises
        ------
        UnknownMethodError
            If there is no such method.
        UnsupportedModelError
            If one of them has tokens leave inside the language model.
        ConfigError
            If the default prunes nothing.
        """
        for name in (default.method, *(request_methods or {})):
            _check_kind(name)
        if keeps_all(default.keep):
            raise ConfigError(
                "keep=1.0 keeps every token, so this server would prune nothing. Give a smaller "
                "fraction or a number of tokens, or serve the model without tokenprune."
            )
        methods = {default.method: dict(default.options)}
        for name, options in (request_methods or {}).items():
            methods.setdefault(name, dict(options))
            replace(default, method=name, options=methods[name])  # raises for an unknown name
        return cls(default, methods, only_tokenprune)

    @property
    def reads_prompt(self) -> bool:
        """Whether any method that requests may name chooses by the prompt's text."""
        return any(reads_prompt(method) for method in self.methods)

    @property
    def readers(self) -> list[str]:
        """The methods among them that run the model's own first layers."""
        return [name for name in self.methods if "query_attention" in find(name).needs]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, as they stand in a config.json."""
        return {
            formats.KEY: FORMAT,
            **self.default.to_dict(),
            "request_methods": {
                name: options
                for name, options in self.methods.items()
                if name != self.default.method
            },
            "only_tokenprune": self.only_tokenprune,
        }

    @classmethod
    def from_config(cls, hf_config: Any) -> ServerSettings:
        """Read the settings out of a model's config.

        Raises
        ------
        ConfigError
            If there are none, or they hold a key or a format that this version does not know.
        """
        values = getattr(hf_config, KEY, None)
        if not isinstance(values, dict):
            raise ConfigError(
                f"the model's config has no {KEY!r} in it, so there is nothing to say how to "
                "prune. Start the server with `tokenprune serve`, build the engine with "
                "tokenprune_vllm.engine_args, or write the checkpoint with `tokenprune export`."
            )
        values = dict(values)
        methods: dict[str, dict[str, Any]] = values.pop("request_methods", {})
        only = bool(values.pop("only_tokenprune", False))
        default = PruningConfig.from_dict(values)
        return cls.build(default, methods, only)

    def request(self, mm_processor_kwargs: Mapping[str, object]) -> RequestSettings:
        """Return the pruning that one request gets.

        Parameters
        ----------
        mm_processor_kwargs
            The request's, perhaps with a key ``tokenprune``: a dict with ``keep``, ``method``,
            ``off``.

        Raises
        ------
        RequestError
            For anything that is not offered.
        """
        if self.only_tokenprune:
            other = sorted(set(mm_processor_kwargs) - {KEY})
            if other:
                raise RequestError(
                    f"mm_processor_kwargs holds {', '.join(other)}. This server lets requests set "
                    f"{KEY!r} there and nothing else."
                )
        if mm_processor_kwargs.get(INTERLEAVED):
            raise RequestError(
                f"{INTERLEAVED} puts the sound of a video among its tokens, which tokenprune does "
                "not prune. Leave it out, and send the sound as audio of its own."
            )
        asked = mm_processor_kwargs.get(KEY)
        if asked is None:
            return RequestSettings(self.default)
        if not isinstance(asked, Mapping):
            raise RequestError(
                f"{KEY}={asked!r} in mm_processor_kwargs is not an object with keep, method, off."
            )
        allowed = ("keep", "method", "off")
        for name in asked:
            if name not in allowed:
                raise RequestError(
                    f"{KEY} in mm_processor_kwargs has no key {name!r}. "
                    f"{did_you_mean(str(name), allowed)}"
                )
        off = asked.get("off", False)
        if not isinstance(off, bool):
            raise RequestError(f"{KEY}.off={off!r} in mm_processor_kwargs is not true or false.")
        if off and len(asked) > 1:
            raise RequestError(
                f"{KEY} in mm_processor_kwargs says off and also {', '.join(sorted(asked))}. "
                "Ask for one or the other."
            )
        method = asked.get("method", self.default.method)
        if not isinstance(method, str) or method not in self.methods:
            raise RequestError(
                f"{KEY}.method={method!r} in mm_processor_kwargs is not loaded by this server. "
                f"{did_you_mean(str(method), self.methods)}"
            )
        try:
            config = replace(
                self.default,
                method=method,
                keep=asked.get("keep", self.default.keep),
                options=dict(self.methods[method]),
            )
        except TokenPruneError as error:
            raise RequestError(f"{KEY} in mm_processor_kwargs: {error}") from error
        return RequestSettings(None if off else config)


@dataclass(frozen=True)
class RequestSettings:
    """The pruning of one request.

    Attributes
    ----------
    config
        Method, budget and options, or None where the request asked for no pruning.
    """

    config: PruningConfig | None

    @property
    def prunes(self) -> bool:
        """Whether any token may be dropped."""
        return self.config is not None and not keeps_all(self.config.keep)

    @property
    def reads_prompt(self) -> bool:
        """Whether the selection depends on the prompt's text."""
        return self.prunes and self.config is not None and reads_prompt(self.config.method)

    def fingerprint(self) -> str:
        """Return what tells selections apart in caches that know images by their hash."""
        if not self.prunes or self.config is None:
            return "off"
        return json.dumps({"version": _version(), **self.config.to_dict()})


def _check_kind(method: str) -> None:
    """Raise UnsupportedModelError for a method that has tokens leave inside the language model."""
    if method in inside_methods():
        raise UnsupportedModelError(
            f"method {method!r} cannot be used with vLLM: it has tokens leave inside the language "
            "model, and vLLM's cache of keys and values has one length for all layers. Use a "
            "method that prunes before the language model (see `tokenprune methods`), or the model "
            "in transformers, with tokenprune_hf.prune."
        )


@functools.cache
def _version() -> str:
    return version("tokenprune-vlm")
