"""Continuing: one call that goes on from a cache whose layers hold less and less of a prompt.

The decoder makes its masks by the length of one layer's cache, as if every layer held the same. So
the masks of layers behind a stage are made here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import PromptError
from tokenprune_hf.inside.left import Behind, Left, rows_with_new
from tokenprune_hf.inside.masks import form_of, in_form
from tokenprune_hf.prefix import sliding_window


class Continuing:
    """A call that reads n tokens behind a prompt whose tokens left inside.

    Parameters
    ----------
    left
        What is left of the prompts.
    cache
        Holds it.
    past
        How many tokens it holds in the layers in front of the first stage.
    shown
        The call's mask [R, past + n], 0 where there is padding.

    Raises
    ------
    PromptError
        If the cache does not hold what was left in it.
    """

    def __init__(self, left: Left, cache: Any, past: int, shown: Tensor) -> None:
        self._left = left
        self._past = past
        self._shown = shown.bool()
        self._repeats = len(shown) // len(left.stages[0].columns)
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}
        self._stored = {
            number: _stored(layer)
            for number, layer in enumerate(cache.layers)
            if left.at(number) is not None
        }
        for number, layer in enumerate(cache.layers):
            behind = left.at(number)
            if behind is None:
                continue
            held = int(layer.get_seq_length())
            if held != behind.columns.shape[1] + past - left.length:
                raise PromptError(
                    f"layer {number} of this cache holds {held} tokens and not the "
                    f"{behind.columns.shape[1] + past - left.length} that it was left with, as "
                    "tokens of its prompt left inside the language model. Cut tokens off by their "
                    "number (cache.crop(-n)) and not by the length that is to be left, or read "
                    "the prompt again without this cache."
                )

    def before(
        self, number: int, layer: Any, states: Tensor, named: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the arguments that a layer is given.

        Parameters
        ----------
        number, layer
            The layer, from 0.
        states
            [R, n, D], its input.
        named
            Its other arguments.
        """
        behind = self._left.at(number)
        if behind is None:
            return named
        mask = self._mask(number, layer, behind, states, named.get("attention_mask"))
        return {**named, "attention_mask": mask}

    def _mask(
        self, number: int, layer: Any, behind: Behind, states: Tensor, given: Any
    ) -> Tensor | None:
        form, window = form_of(layer.self_attn), sliding_window(layer.self_attn)
        total = self._past + states.shape[1]
        if window is not None and total <= window:
            window = None  # everything is in it
        if given is None and states.shape[1] == 1 and not behind.padded and window is None:
            return None  # one token that sees all there is
        if form == "columns" and window is not None:
            raise PromptError(
                f"layer {number} sees {window} tokens only, by a kernel that counts those of its "
                "cache and not those of the prompt. Call model.set_attn_implementation('sdpa'), or "
                "keep prompt and answer shorter."
            )
        keys = self._stored[number] + states.shape[1]
        key = behind.layer, keys, window
        if key not in self._masks:
            self._masks[key] = self._made(behind, states, keys, window)
        shown = self._masks[key]
        if form == "columns":
            return shown[:, 0, -1].to(torch.int64)
        return in_form(shown, form, states.dtype)

    def _made(self, behind: Behind, states: Tensor, keys: int, window: int | None) -> Tensor:
        """Return BoolTensor [R, 1, n, K]: which of a layer's K keys each token sees."""
        device = states.device
        total = self._past + states.shape[1]
        # The prompt's columns that are left, then everything that was read since.
        columns, valid = (
            one.to(device) for one in rows_with_new(behind, self._left.length, self._repeats, total)
        )
        # A layer with a window has forgotten the first of them.
        columns, valid = columns[:, -keys:], valid[:, -keys:]
        valid = valid & self._shown.to(device).gather(1, columns)
        asked = torch.arange(self._past, total, device=device)[:, None]
        seen = (columns[:, None] <= asked) & valid[:, None]
        if window is not None:
            seen &= asked - columns[:, None] < window
        # Padding among the new tokens sees itself: a softmax over nothing may be NaN.
        return (seen | (columns[:, None] == asked))[:, None]


def _stored(layer: Any) -> int:
    """Return how many tokens a layer of a cache puts in front of the next ones."""
    held = int(layer.get_seq_length())
    window = getattr(layer, "sliding_window", None) if layer.is_sliding else None
    return held if window is None else min(held, int(window) - 1)
