"""Arguments of `generate` that count the caller's prompt, put in terms of the short one."""

from __future__ import annotations

import copy
from typing import Any, Protocol

from torch import Tensor

from tokenprune.errors import PromptError

_REFUSED = {
    "assistant_model": "a draft model would read the unpruned prompt",
    "custom_generate": "its own loop would bypass the pruned prompt",
    "prefill_chunk_size": "chunks would cut images apart from their placeholders",
    "negative_prompt_ids": "the second prompt would need a pruning of its own",
}


def setting(arguments: dict[str, Any], name: str, model: Any) -> Any:
    """Return a setting as the call's arguments, its config or else the model's config have it."""
    if arguments.get(name) is not None:
        return arguments[name]
    config = arguments.get("generation_config") or model.generation_config
    return getattr(config, name, None)


def refuse(arguments: dict[str, Any]) -> None:
    """Raise for arguments that cannot work on a pruned prompt.

    Raises
    ------
    PromptError
        Saying why.
    """
    for name, reason in _REFUSED.items():
        value = arguments.get(name)
        if value is None and arguments.get("generation_config") is not None:
            value = getattr(arguments["generation_config"], name, None)
        if value is not None:
            raise PromptError(
                f"generate({name}=...) is not supported with pruned images: {reason}. Leave it "
                "out, or call it without pruning."
            )


def shift_lengths(arguments: dict[str, Any], full_length: int, removed: int, model: Any) -> None:
    """Let `max_length` and `min_length` count the caller's prompt and not the short one.

    Parameters
    ----------
    arguments
        The call's, by name; they are changed.
    full_length
        Tokens of the caller's prompt.
    removed
        By how many the short one is shorter.
    model
        Its config says what the call does not.

    Raises
    ------
    PromptError
        If they leave no room for an answer: the engine would say so of the short prompt.
    """
    # Where a number of new tokens is given, transformers makes the length from it.
    lengths = {
        name: setting(arguments, name, model) or None
        for name, by_new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens"))
        if setting(arguments, by_new, model) is None
    }
    longest, shortest = lengths.get("max_length"), lengths.get("min_length")
    if longest is not None and longest <= full_length:
        raise PromptError(
            f"the prompt has {full_length} tokens and max_length={longest} counts them, so "
            "nothing is left for an answer. Raise it or, better, give max_new_tokens."
        )
    if longest is not None and shortest is not None and shortest > longest:
        raise PromptError(
            f"min_length={shortest} is above max_length={longest}. Lower it, or give "
            "min_new_tokens and max_new_tokens."
        )
    for name, length in lengths.items():
        if length is None:
            continue
        if arguments.get("generation_config") is None or name in arguments:
            arguments[name] = max(length - removed, 0)
        else:
            # transformers takes a config or arguments, not both; the caller's stays.
            arguments["generation_config"] = copy.deepcopy(arguments["generation_config"])
            setattr(arguments["generation_config"], name, max(length - removed, 0))


class Streamer(Protocol):
    """What `generate` passes tokens to as they come: transformers' `BaseStreamer`."""

    def put(self, value: Tensor) -> None:
        """Take the prompt [B, L] at first, then the next token of each prompt."""

    def end(self) -> None:
        """Learn that nothing more comes."""


class FullPromptStreamer:
    """Passes a streamer the caller's prompt in place of the short one, then every new token."""

    def __init__(self, streamer: Streamer, input_ids: Tensor) -> None:
        self._streamer = streamer
        self._prompt: Tensor | None = input_ids

    def put(self, value: Tensor) -> None:
        """Pass on what was generated; the first value is the prompt."""
        if self._prompt is not None:
            value, self._prompt = self._prompt.cpu(), None
        self._streamer.put(value)

    def end(self) -> None:
        """Pass on the end."""
        self._streamer.end()
