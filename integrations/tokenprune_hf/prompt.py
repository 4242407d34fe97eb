"""Shortening a batch of prompts: the placeholders of dropped tokens go, everything else stays.

Placeholders are found by token id, never by offset, so text before, between and after images is
never touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import PromptError

TYPE_IDS = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
"""Arguments that say of each prompt token what it is."""

FILL = {"attention_mask": 0, "labels": -100, "position_ids": 0, **dict.fromkeys(TYPE_IDS, 0)}
"""Arguments with one value per prompt token, and what stands in them at padding."""


@dataclass(frozen=True)
class ShortPrompt:
    """Which columns of a batch of prompts are left, and where.

    Attributes
    ----------
    columns
        LongTensor [B, S], for each column of the short prompt its column in the full one.
    valid
        BoolTensor [B, S], False where the short prompt is padding.
    full_length
        L, columns of the full prompt.
    """

    columns: Tensor
    valid: Tensor
    full_length: int

    @classmethod
    def of(cls, staying: Tensor, length: int, padded_right: bool) -> ShortPrompt:
        """Work out the short prompts; padding is laid anew, on the side the caller used.

        Parameters
        ----------
        staying
            BoolTensor [B, L], False where a placeholder is dropped, and at the caller's padding.
        length
            How many columns stay of the longest prompt. It is told, as whoever chose knows it
            before the device does.
        padded_right
            The side.
        """
        length = max(length, 1)
        # Prompts lose different numbers of tokens, so new padding levels them.
        # The sort is stable: it moves what goes to the padded side and leaves the rest in order.
        order = torch.sort(staying.to(torch.uint8), dim=1, stable=True, descending=padded_right)
        left = slice(None, length) if padded_right else slice(-length, None)
        return cls(order.indices[:, left], order.values[:, left].bool(), staying.shape[1])

    @property
    def length(self) -> int:
        """S, columns of the short prompt."""
        return self.columns.shape[1]

    def take(self, values: Tensor, fill: int) -> Tensor:
        """Return [..., B, S] of values [..., B, L], with `fill` at padding."""
        columns = self.columns.expand(*values.shape[:-1], -1)
        return values.gather(-1, columns).masked_fill(~self.valid, fill)

    def new_column(self, column: int) -> Tensor:
        """Return LongTensor [B]: where a column of the full prompt went, or -1 where it is gone."""
        is_column = (self.columns == column) & self.valid
        return torch.where(is_column.any(dim=1), is_column.long().argmax(dim=1), -1)


def pads_right(attention_mask: Tensor) -> bool:
    """Say whether a mask [B, L] on the CPU has padding behind prompts, and in front of none."""
    return bool(attention_mask[:, -1].amin() < 1 <= attention_mask[:, 0].amin())


def check_attention_mask(
    input_ids: Tensor, attention_mask: Any, pad_token_id: int | None
) -> Tensor:
    """Return the caller's 2-D attention mask, or all ones where none was given and none is needed.

    Parameters
    ----------
    input_ids
        LongTensor [B, L].
    attention_mask
        What the caller passed, or None.
    pad_token_id
        The token that stands for padding and nothing else, or None.

    Raises
    ------
    PromptError
        If the mask is not [B, L], or is missing though the prompt holds padding.
    """
    if attention_mask is None:
        # All ones would have padding counted as text, and attended to.
        if pad_token_id is not None and pad_token_id in input_ids:
            raise PromptError(
                f"the prompt holds padding (token {pad_token_id}) and no attention_mask says "
                "where. Pass the attention_mask that the processor returned."
            )
        return torch.ones_like(input_ids)
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != input_ids.shape:
        shape = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else attention_mask
        raise PromptError(
            f"attention_mask has shape {shape}; pruning needs one value per prompt token: "
            f"{list(input_ids.shape)}."
        )
    return attention_mask
