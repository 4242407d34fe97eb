"""What to prune: the server's configuration, and what a single request makes of it.

The server's configuration lies in the model's config under the key ``tokenprune``, where vLLM's
front end (which sizes the prompt) and its workers (which select) both find it. A request may
bring ``mm_processor_kwargs={"tokenprune": {...}}``.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from tokenprune import formats
from tokenprune.baselines import RESIZE, behind_resize, resizes
from tokenprune.budget import Keep, check_keep, keeps_all
from tokenprune.config import FORMAT, Application, PruningConfig
from tokenprune.errors import (
    ConfigError,
    InputFileError,
    TokenPruneError,
    UnsupportedModelError,
    did_you_mean,
    reason_of,
)
from tokenprune.registry import find, inside_methods
from tokenprune_vllm.architectures import reads_prompt

if TYPE_CHECKING:
    from tokenprune.masks import HeadCategories, PooledBlocks

KEY = "tokenprune"
"""Where the configuration lies in the model's config, and in a request's mm_processor_kwargs."""

MARK = (1, 1, 1)
"""The config's ``mrope_section`` where a model with one axis keeps original positions.

With it vLLM asks for the positions of prompts. The rotary embedding does not read it there.
"""

INTERLEAVED = "use_audio_in_video"
"""What requests to omni models may ask of their processor."""


UNPRUNED = PruningConfig("uniform", 1.0, "compact")
"""The default of a server that was given masks and no method: every token stays."""


POOLED = "pooled"
"""What stands in the place of a heads file where blocks are chosen from the data."""


class RequestError(TokenPruneError, ValueError):
    """A request asks for a pruning that is not offered; vLLM answers it with HTTP 400."""


@dataclass(frozen=True)
class HeadsFile:
    """The heads file that a server reads prompts with.

    Attributes
    ----------
    path
        Where it is, for every process of the server.
    digest
        Of what is in it.
    text
        What is in it, where it travels inside a checkpoint; None where it is read at `path`.
    """

    path: str
    digest: str
    text: str | None = None

    @classmethod
    def of(cls, path: str | os.PathLike[str], inside: bool = False) -> HeadsFile:
        """Return what a server is told of a file.

        Parameters
        ----------
        path
            Where it is.
        inside
            Whether what is in it is to travel inside a checkpoint.

        Raises
        ------
        InputFileError
            If it cannot be read, or is no heads file.
        """
        absolute = Path(path).absolute()
        _heads_in(absolute)
        if inside:
            text = absolute.read_text("utf-8")
            return cls(absolute.name, _digest(absolute), text)
        return cls(str(absolute), _digest(absolute))

    def load(self) -> HeadCategories:
        """Return what is in the file.

        Raises
        ------
        InputFileError
            If it cannot be read, or is another one now.
        """
        if self.text is not None:
            return _heads_of(self.path, self.text)
        heads = _heads_in(Path(self.path))
        if _digest(Path(self.path)) != self.digest:
            raise InputFileError(
                f"{self.path} is another file than the one the server was started with. Start the "
                "server again, and leave the file as it is meanwhile."
            )
        return heads


@dataclass(frozen=True)
class Pooled:
    """Blocks that are chosen from the data: `tokenprune.masks.PooledBlocks`, as a config has them.

    Attributes
    ----------
    options
        Of `PooledBlocks`.
    """

    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, blocks: PooledBlocks) -> Pooled:
        """Return what a server is told of them."""
        return cls(asdict(blocks))

    @classmethod
    def parse(cls, text: str) -> Pooled:
        """Return what ``pooled``, ``pooled:0.25`` or ``pooled:keep=0.25,mass=0.9`` names.

        Raises
        ------
        ConfigError
            If it names no option of `PooledBlocks`, or a value that is none.
        OptionError
            If a value cannot be.
        """
        from tokenprune.masks import PooledBlocks

        allowed = [one.name for one in fields(PooledBlocks)]
        options: dict[str, Any] = {}
        _, colon, given = text.partition(":")
        for part in given.split(",") if colon else ():
            name, equals, value = part.rpartition("=")
            name = name if equals else "keep"
            if not part or name in options:
                what = f"says {name} twice" if part else "has nothing behind its colon, or a comma"
                raise ConfigError(
                    f"{text!r} {what}. Give a share of the blocks, as in pooled:0.25; or options, "
                    "each once, as in pooled:keep=null,mass=0.9; or pooled alone, for the defaults."
                )
            if name not in allowed:
                raise ConfigError(
                    f"{text!r}: blocks chosen from the data have no option {name!r}. "
                    f"{did_you_mean(name, allowed)}"
                )
            try:
                options[name] = json.loads(value)
            except ValueError:
                raise ConfigError(
                    f"{text!r}: {value!r} is no value of {name}. Give a number, true, false or "
                    "null, as in pooled:0.25 or pooled:keep=null,mass=0.9."
                ) from None
        return cls.of(PooledBlocks(**options))

    @property
    def digest(self) -> str:
        """What tells them apart in hashes."""
        return json.dumps({POOLED: dict(self.options)}, sort_keys=True)

    def load(self) -> PooledBlocks:
        """Return them."""
        from tokenprune.masks import PooledBlocks

        return PooledBlocks(**self.options)


Source = HeadsFile | Pooled
"""What masks are made of."""


def source_of(masks: object, inside: bool = False) -> Source | None:
    """Return what a server is told of masks that a user names.

    Parameters
    ----------
    masks
        The path of a heads file, ``"pooled"``, ``"pooled:..."`` (see `Pooled.parse`), or
        `tokenprune.masks.PooledBlocks`; None for none.
    inside
        See `HeadsFile.of`.

    Raises
    ------
    ConfigError, OptionError, InputFileError
        If it is none of them, or cannot be read.
    """
    from tokenprune.masks import PooledBlocks

    if masks is None:
        return None
    if isinstance(masks, PooledBlocks):
        return Pooled.of(masks)
    if not isinstance(masks, str | os.PathLike):
        raise ConfigError(
            f"masks is a {type(masks).__name__}. Give the path of a heads file, 'pooled:KEEP' or a "
            "PooledBlocks."
        )
    name = os.fspath(masks)
    if isinstance(name, str) and name.partition(":")[0] == POOLED and not Path(name).exists():
        return Pooled.parse(name)
    return HeadsFile.of(masks, inside)


def _source_in(values: Mapping[str, Any] | None) -> Source | None:
    """Return what `ServerSettings.to_dict` wrote down."""
    if values is None:
        return None
    return Pooled(values[POOLED]) if POOLED in values else HeadsFile(**values)


@dataclass(frozen=True)
class ServerSettings:
    """What a server prunes by default, and what its requests may ask for.

    Attributes
    ----------
    default
        The pruning of a request that asks for nothing.
    methods
        Every method that requests may name, with its options; the default's is one of them, but
        for `UNPRUNED`.
    only_tokenprune
        Whether a request's mm_processor_kwargs may hold nothing but ``tokenprune``. vLLM opens
        all of them or none; a server that opens them for budgets alone keeps the rest closed.
    resize
        Whether requests may ask for smaller pictures, alone or with one of the methods.
    masks
        The sparse masks under which prompts are read; None for none.
    application
        ``"drop"``, or ``"mask"``: tokens that are not selected stay in the prompt, and are hidden.
    proportional
        Whether kept tokens count as often as there are tokens that they stand for.
    """

    default: PruningConfig
    methods: Mapping[str, dict[str, Any]]
    only_tokenprune: bool = False
    resize: bool = False
    masks: Source | None = None
    application: Application = "drop"
    proportional: bool = False

    @classmethod
    def build(
        cls,
        default: PruningConfig,
        request_methods: Mapping[str, Mapping[str, Any]] | None = None,
        only_tokenprune: bool = False,
        masks: Source | None = None,
        application: Application = "drop",
        proportional: bool = False,
    ) -> ServerSettings:
        """Return the settings of a server.

        Parameters
        ----------
        default
            See `ServerSettings`.
        request_methods
            Methods beside the default's that requests may name, with their options; ``"resize"``
            may be among them.
        only_tokenprune, masks, application, proportional
            See `ServerSettings`.

        Raises
        ------
        UnknownMethodError
            If there is no such method.
        UnsupportedModelError
            If one of them has tokens leave inside the language model.
        ConfigError
            If the default prunes nothing and there are no masks, ``resize`` is asked for in
            another way than by itself, or tokens cannot be hidden or counted so.
        """
        _check_hiding(default, application, proportional)
        named = dict(request_methods or {})
        resize = _takes_resize(named, default)
        for name in (default.method, *named):
            _check_kind(name)
        if keeps_all(default.keep) and masks is None:
            raise ConfigError(
                "keep=1.0 keeps every token, so this server would prune nothing. Give a smaller "
                "fraction or a number of tokens, or serve the model without tokenprune."
            )
        methods = {} if default == UNPRUNED else {default.method: dict(default.options)}
        for name, options in named.items():
            methods.setdefault(name, dict(options))
            replace(default, method=name, options=methods[name])  # raises for an unknown name
        return cls(default, methods, only_tokenprune, resize, masks, application, proportional)

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
                if name != self.default.method or self.default == UNPRUNED
            }
            | ({RESIZE: {}} if self.resize else {}),
            "only_tokenprune": self.only_tokenprune,
            **self._attention(),
        }

    def _attention(self) -> dict[str, Any]:
        """Return what is said of attention, where it is not the engine's own."""
        said: dict[str, Any] = {}
        if isinstance(self.masks, Pooled):
            said["masks"] = {POOLED: dict(self.masks.options)}
        elif self.masks is not None:
            said["masks"] = {
                name: value for name, value in asdict(self.masks).items() if value is not None
            }
        if self.application != "drop":
            said["apply"] = self.application
        if self.proportional:
            said["proportional_attention"] = True
        return said

    @property
    def weighs(self) -> bool:
        """Whether a key may count several times, or not at all."""
        return self.proportional or self.application == "mask"

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
        masks = _source_in(values.pop("masks", None))
        application: Application = values.pop("apply", "drop")
        proportional = bool(values.pop("proportional_attention", False))
        default = PruningConfig.from_dict(values)
        return cls.build(default, methods, only, masks, application, proportional)

    def request(self, mm_processor_kwargs: Mapping[str, object]) -> RequestSettings:
        """Return the pruning that one request gets.

        Parameters
        ----------
        mm_processor_kwargs
            The request's, perhaps with a key ``tokenprune``: a dict with ``keep``, ``method``,
            ``off``, ``masks``, ``apply``, ``proportional_attention``.

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
            return replace(self._usual(), masks=self.masks)
        allowed = ("keep", "method", "off", "masks", "apply", "proportional_attention")
        if not isinstance(asked, Mapping):
            raise RequestError(
                f"{KEY}={asked!r} in mm_processor_kwargs is not an object with "
                f"{', '.join(allowed)}."
            )
        for name in asked:
            if name not in allowed:
                raise RequestError(
                    f"{KEY} in mm_processor_kwargs has no key {name!r}. "
                    f"{did_you_mean(str(name), allowed)}"
                )
        off = asked.get("off", False)
        if not isinstance(off, bool):
            raise RequestError(f"{KEY}.off={off!r} in mm_processor_kwargs is not true or false.")
        if off and {"keep", "method"} & set(asked):
            raise RequestError(
                f"{KEY} in mm_processor_kwargs says off and also {', '.join(sorted(asked))}. "
                "Ask for one or the other."
            )
        attention: dict[str, Any] = {
            "masks": self._masks(asked.get("masks", self.masks is not None)),
            "application": self._application(asked.get("apply", self.application)),
            "proportional": self._proportional(
                asked.get("proportional_attention", self.proportional)
            ),
        }
        if off or not {"keep", "method"} & set(asked):
            return RequestSettings(None if off else self.default, **attention)
        if "method" not in asked and self.default == UNPRUNED:
            raise RequestError(
                f"{KEY}.keep in mm_processor_kwargs asks for pruning, and this server prunes "
                f"nothing by itself. Name a method; it loads: {', '.join(self.methods) or 'none'}."
            )
        found = self._asked(asked.get("method", self.default.method), asked)
        return replace(found, **attention)

    def _usual(self) -> RequestSettings:
        """Return what a request gets that asks for nothing, but for masks."""
        return RequestSettings(
            self.default, application=self.application, proportional=self.proportional
        )

    def _application(self, asked: object) -> Application:
        """Return what becomes of tokens in a request that asks for it so.

        Raises
        ------
        RequestError
            If it asks for what there is not, or what the server cannot do.
        """
        if asked not in get_args(Application):
            raise RequestError(
                f"{KEY}.apply={asked!r} in mm_processor_kwargs is not a way to apply a selection. "
                f"{did_you_mean(str(asked), get_args(Application))}"
            )
        if asked == "mask" and self.application != "mask":
            raise RequestError(
                f"{KEY}.apply in mm_processor_kwargs asks for tokens to be hidden, and this server "
                "drops them. Leave it out, or start the server with --apply mask."
            )
        return "mask" if asked == "mask" else "drop"

    def _proportional(self, asked: object) -> bool:
        """Return whether tokens are counted in a request that asks for it so.

        Raises
        ------
        RequestError
            If it asks for what the server does not do.
        """
        name = f"{KEY}.proportional_attention"
        if not isinstance(asked, bool):
            raise RequestError(f"{name}={asked!r} in mm_processor_kwargs is not true or false.")
        if asked and not self.proportional:
            raise RequestError(
                f"{name} in mm_processor_kwargs asks for counted tokens, and this server counts "
                "none. Leave it out, or start the server with --proportional-attention."
            )
        return asked

    def _asked(self, named: object, asked: Mapping[str, Any]) -> RequestSettings:
        """Return what a request gets that names a method, perhaps the default's, and a budget."""
        offered: dict[str, tuple[str | None, bool]] = {name: (name, False) for name in self.methods}
        if self.resize:
            offered[RESIZE] = (None, True)
            offered |= {f"{RESIZE}+{name}": (name, True) for name in self.methods}
        if not isinstance(named, str) or named not in offered:
            raise RequestError(
                f"{KEY}.method={named!r} in mm_processor_kwargs is not loaded by this server. "
                f"{did_you_mean(str(named), offered)}"
            )
        method, smaller = offered[named]
        keep = asked.get("keep", self.default.keep)
        try:
            if method is None:
                return RequestSettings(None, check_keep(keep))
            config = replace(
                self.default, method=method, keep=keep, options=dict(self.methods[method])
            )
        except TokenPruneError as error:
            raise RequestError(f"{KEY} in mm_processor_kwargs: {error}") from error
        return RequestSettings(config, config.keep if smaller else 1.0)

    def _masks(self, asked: object) -> Source | None:
        """Return the masks that a request gets which asks for them so.

        Raises
        ------
        RequestError
            If it asks for masks that are not there.
        """
        if not isinstance(asked, bool):
            raise RequestError(
                f"{KEY}.masks={asked!r} in mm_processor_kwargs is not true or false."
            )
        if asked and self.masks is None:
            raise RequestError(
                f"{KEY}.masks in mm_processor_kwargs asks for sparse masks, and this server loaded "
                "none. Leave it out, or start the server with --masks HEADS_FILE."
            )
        return self.masks if asked else None


@dataclass(frozen=True)
class RequestSettings:
    """The pruning of one request.

    Attributes
    ----------
    config
        Method, budget and options, or None where the request asked for no pruning.
    resized_to
        The budget that pictures are made smaller for, ``1.0`` where they stay as they are. With a
        method they are made smaller half of the way, see `tokenprune_vllm.resizing`.
    masks
        The sparse masks under which it is read, or None.
    application, proportional
        See `ServerSettings`; where nothing is dropped they change nothing.
    """

    config: PruningConfig | None
    resized_to: Keep = 1.0
    masks: Source | None = None
    application: Application = "drop"
    proportional: bool = False

    @property
    def prunes(self) -> bool:
        """Whether any token may be dropped."""
        return self.config is not None and not keeps_all(self.config.keep)

    @property
    def resizes(self) -> bool:
        """Whether pictures are made smaller."""
        return not keeps_all(self.resized_to)

    @property
    def method(self) -> str:
        """What it is called in metrics: a method, ``"resize"``, both, or ``"off"``."""
        names = [RESIZE] if self.resizes else []
        names += [self.config.method] if self.prunes and self.config is not None else []
        return "+".join(names) or "off"

    @property
    def reads_prompt(self) -> bool:
        """Whether the selection depends on the prompt's text."""
        return self.prunes and self.config is not None and reads_prompt(self.config.method)

    def fingerprint(self) -> str:
        """Return what tells apart, in caches, what is made of one and the same image.

        An image is known there by what the request sent, at its full size. So the budget for which
        it is made smaller stands in here.
        """
        if not self.prunes and not self.resizes and self.masks is None:
            return "off"
        values: dict[str, Any] = {"version": _version()}
        if self.prunes and self.config is not None:
            values |= self.config.to_dict()
            if self.application != "drop":
                values["apply"] = self.application
            if self.proportional:
                values["proportional_attention"] = True
        if self.resizes:
            values[RESIZE] = self.resized_to
        if self.masks is not None:
            values["masks"] = self.masks.digest
        return json.dumps(values)


def check_default(method: str) -> None:
    """Raise ConfigError where a server would resize by default."""
    if resizes(method):
        raise ConfigError(
            f"{method!r} cannot be a server's default: it makes pictures smaller, and is asked for "
            f"by requests. Start the server with a method that prunes, --allow-request-keep and "
            f"--request-method {RESIZE}; or make the pictures smaller before you send them."
        )


def _takes_resize(named: dict[str, Any], default: PruningConfig) -> bool:
    """Take ``resize`` out of the methods that requests may name; say whether it was there.

    Raises
    ------
    ConfigError
        If it is named together with a method, has options, or cannot be used with the default.
    """
    for name in named:
        if resizes(name) and name != RESIZE:
            raise ConfigError(
                f"{name!r} among the methods of requests: name {RESIZE} and "
                f"{behind_resize(name)} there by themselves. Requests may then ask for both as "
                f"{name!r}."
            )
    if RESIZE not in named:
        return False
    if named.pop(RESIZE):
        raise ConfigError(f"{RESIZE} has no options.")
    if default.scope != "item":
        raise ConfigError(
            f"the budget of {RESIZE} is that of each item, and scope is {default.scope!r}: leave "
            f"out {RESIZE}, or scope."
        )
    return True


def _check_kind(method: str) -> None:
    """Raise UnsupportedModelError for a method that has tokens leave inside the language model."""
    if method in inside_methods():
        raise UnsupportedModelError(
            f"method {method!r} cannot be used with vLLM: it has tokens leave inside the language "
            "model, and vLLM's cache of keys and values has one length for all layers. Use a "
            "method that prunes before the language model (see `tokenprune methods`), or the model "
            "in transformers, with tokenprune_hf.prune."
        )


def _check_hiding(default: PruningConfig, application: object, proportional: object) -> None:
    """Raise ConfigError where tokens cannot be hidden, or counted, as is asked for."""
    if application not in get_args(Application):
        raise ConfigError(
            f"apply={application!r} is not a way to apply a selection. "
            f"{did_you_mean(str(application), get_args(Application))}"
        )
    if not isinstance(proportional, bool):
        raise ConfigError(f"proportional_attention={proportional!r} must be True or False.")
    if application == "mask" and default.positions != "original":
        raise ConfigError(
            "apply='mask' leaves every token in the prompt, at the position that the engine gives "
            f"it, and positions is {default.positions!r}. Use positions='original', or apply='drop'"
            ", or the model in transformers."
        )


def _heads_of(name: str, text: str) -> HeadCategories:
    from tokenprune.masks import HeadCategories

    return HeadCategories.read(text, name)


def _heads_in(path: Path) -> HeadCategories:
    from tokenprune.masks import HeadCategories

    return HeadCategories.load(path)


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:32]
    except OSError as error:
        raise InputFileError(f"{path} cannot be read: {reason_of(error)}.") from error


@functools.cache
def _version() -> str:
    return version("tokenprune-vlm")
