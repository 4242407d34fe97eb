"""Proportional attention: a kept token counts as many times as there are tokens it stands for.

log n is added to the logits of a key that stands for n tokens, in every layer and for every query
that sees it, by the model's own fused attention; see `tokenprune.masks.weighted`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import UnsupportedModelError
from tokenprune.masks.weighted import weighted
from tokenprune_hf.attached import ThreadState
from tokenprune_hf.interface import AttentionModule, Interception, Plain, check_logits
from tokenprune_hf.layout import decoder_of
from tokenprune_hf.prefix import sliding_window

_WHAT = "proportional attention"
"""As refusals name it."""


class _Logs(ThreadState):
    """What keys count for in the call that is running in a thread."""

    logs: Tensor | None = None


class ProportionalAttention:
    """Stands in the attention of a decoder's layers until `remove`.

    Parameters
    ----------
    model
        A vision-language model of transformers.

    Attributes
    ----------
    logs
        float32 [B, S], log n of each of the prompt's columns, for the call that is running in this
        thread; None where attention is left to the model. Rows of a call are the B prompts, each
        as often as beams or returned sequences need, one after another.

    Raises
    ------
    UnsupportedModelError
        If the decoder's attention is not softmax(q kᵀ) v over all that stands before.
    """

    def __init__(self, model: Any) -> None:
        self._thread = _Logs()
        self._decoder = decoder_of(model)
        modules = [layer.self_attn for layer in self._decoder.layers]
        check_logits(modules, _WHAT)
        for module in modules:
            if sliding_window(module) is not None:
                raise UnsupportedModelError(
                    f"the attention {type(module).__name__} has a sliding window, whose cache "
                    "forgets which columns of the prompt it holds. Prune this model without "
                    f"{_WHAT}."
                )
        self._interception = Interception(modules, self._attend)

    @property
    def logs(self) -> Tensor | None:
        """What the keys of this thread's call count for."""
        return self._thread.logs

    @logs.setter
    def logs(self, logs: Tensor | None) -> None:
        self._thread.logs = logs

    def remove(self) -> None:
        """Give the layers their own attention back."""
        self._interception.remove()

    def check_call(self) -> None:
        """Raise where layers would run without it; see `Interception.check_call`."""
        self._interception.check_call(self._decoder, _WHAT)

    def _attend(
        self,
        module: AttentionModule,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        plain: Plain,
    ) -> tuple[Tensor, Tensor | None]:
        of_prompt = self._thread.logs
        if of_prompt is None:
            return plain()
        # Tokens that came after the prompt stand for themselves: log 1 = 0.
        batch, _, columns, _ = key.shape
        logs = of_prompt.to(key.device).repeat_interleave(batch // len(of_prompt), dim=0)
        logs = torch.nn.functional.pad(logs, (0, columns - logs.shape[1]))
        output, weights = plain(*weighted(query, key, value, logs[:, None], scale))
        return output[..., : value.shape[-1]], weights
