"""Which vision tokens a prompt keeps, and what a cross-attention layer is given of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokenprune.errors import PromptError


@dataclass(frozen=True, eq=False)
class Choice:
    """What was chosen for the B rows of one prompt.

    Attributes
    ----------
    kept
        LongTensor [B, K], ascending in each row and filled up with 0 at its end.
    real
        BoolTensor [B, K], False where `kept` is filled up.
    total
        N, before trimming.
    drops
        Whether any row has fewer than N.
    lengths
        How many tokens each cross-attention layer is given.
    """

    kept: Tensor
    real: Tensor
    total: int
    drops: bool
    lengths: tuple[int, ...]

    @classmethod
    def of_prompts(
        cls, kept: list[Tensor], rows: int, total: int, layers: int, *, first_is_full: bool
    ) -> Choice:
        """Join what single prompts keep, each for its prompt's rows.

        Parameters
        ----------
        kept
            LongTensor [K] of each prompt, ascending; K may differ.
        rows
            B, a multiple of the number of prompts.
        total
            N.
        layers
            How many cross-attention layers there are.
        first_is_full
            Whether the first of them is given all N.
        """

        def of_rows(of_prompts: list[Tensor]) -> Tensor:
            padded = pad_sequence(of_prompts, batch_first=True)
            return padded.repeat_interleave(rows // len(of_prompts), dim=0)

        real = [torch.ones_like(indices, dtype=torch.bool) for indices in kept]
        longest, shortest = max(map(len, kept)), min(map(len, kept))
        lengths = (total if first_is_full else longest, *[longest] * (layers - 1))
        return cls(of_rows(kept), of_rows(real), total, shortest < total, lengths)

    @property
    def rows(self) -> int:
        """B."""
        return len(self.kept)

    def of_rows(self, rows: Tensor) -> Choice:
        """Return what was chosen for some rows, LongTensor [C]."""
        rows = rows.to(self.kept.device)
        return replace(self, kept=self.kept[rows], real=self.real[rows])

    def trimmed_arguments(self, named: Mapping[str, Any]) -> dict[str, Tensor | None]:
        """Return what a cross-attention layer is given in place of its arguments with all N tokens.

        Parameters
        ----------
        named
            The layer's arguments; without states where the cache has them.
        """
        vision, row = named["cross_attention_states"], named["full_text_row_masked_out_mask"]
        if vision is not None:
            vision = vision.reshape(self.rows, self.total, -1)
            columns = self.kept.to(vision.device)[..., None].expand(-1, -1, vision.shape[-1])
            vision = vision.gather(1, columns)
        mask = mask_of(named, self.rows, self.total)
        columns = self.kept.to(mask.device)[:, None, None].expand(-1, 1, mask.shape[2], -1)
        real = self.real.to(mask.device)[:, None, None]
        # Where unions were filled up, index 0 stands again: without `real` it would count twice.
        seen = (mask.gather(-1, columns) == 0) & real
        if row is not None:
            seen = seen & row.bool()
        sees = seen.any(dim=-1, keepdim=True)
        # transformers leaves a row that has nothing to see unmasked, and its MLP out. A softmax
        # over nothing would be NaN.
        shown = torch.where(sees, seen, real)
        masked = torch.zeros_like(shown, dtype=mask.dtype)  # 0 is added to logits that are shown
        return {
            "cross_attention_states": vision,
            "cross_attention_mask": masked.masked_fill(~shown, torch.finfo(mask.dtype).min),
            "full_text_row_masked_out_mask": sees.to(mask.dtype),
        }


def mask_of(named: Mapping[str, Any], rows: int, total: int) -> Tensor:
    """Return a layer's mask [B, 1, S, N], 0 where a row of the text sees a token.

    Where none was passed every row sees everything. It has to be said: transformers' sdpa takes a
    missing mask for a causal one, by which the third row would see three tokens.
    """
    text, mask = named["hidden_states"], named["cross_attention_mask"]
    if mask is None:
        return torch.zeros(rows, 1, text.shape[1], total, dtype=text.dtype, device=text.device)
    if len(mask) != rows or mask.shape[-1] != total:
        raise PromptError(
            f"cross_attention_mask is that of {len(mask)} prompts with {mask.shape[-1]} vision "
            f"tokens each, and there are {rows} with {total}. Pass it as the processor returned "
            "it; for further tokens repeat its last row."
        )
    return cast(Tensor, mask)


def seen_tokens(named: Mapping[str, Any], attended: Tensor | None, total: int) -> Tensor:
    """Return BoolTensor [B, S, N]: which tokens a row of the text sees, and none from padding.

    Parameters
    ----------
    named
        The layer's arguments.
    attended
        BoolTensor [B, S], False for padding, or None for no padding.
    total
        N.
    """
    row = named["full_text_row_masked_out_mask"]
    seen = mask_of(named, len(named["hidden_states"]), total)[:, 0] == 0
    if row is not None:
        seen = seen & row[:, 0].bool()
    if attended is not None:
        seen = seen & attended[..., None].to(seen.device)
    return seen


def query_key(layer: Any, text: Tensor, vision: Tensor) -> tuple[Tensor, Tensor]:
    """Return a cross-attention layer's q [B, S, H, d] and k [B, N, G, d]."""
    attention = layer.cross_attn
    query = attention.q_proj(layer.input_layernorm(text)).unflatten(-1, (-1, attention.head_dim))
    key = attention.k_proj(vision).unflatten(-1, (-1, attention.head_dim))
    return attention.q_norm(query), attention.k_norm(key)


def attended_text(mask: Any, text: Tensor) -> Tensor | None:
    """Return BoolTensor [B, S], which of a call's rows of text are no padding; None for all."""
    if mask is None:
        return None
    rows, length = text.shape[:2]
    matrix = isinstance(mask, Tensor) and mask.ndim == 2
    if not matrix or len(mask) != rows or mask.shape[1] < length:
        given = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise PromptError(
            f"attention_mask is {given}; together with images that are to be trimmed it has one "
            f"value per token: {[rows, length]}. Pass the mask that the processor returned."
        )
    return cast(Tensor, mask)[:, -length:].bool()
