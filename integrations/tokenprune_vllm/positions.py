"""Positions of kept tokens on their way from the selection to the rotary embedding.

Where text stands is known as soon as the prompt is: it depends on the images' sizes, not on which
of their tokens stay. Only the kept tokens' own positions wait for the selection. They ride behind
each row as a few more columns, relative to where the item begins. Columns have the model's dtype,
and bfloat16 knows whole numbers up to 256 only: a number travels as digits to the base 256.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.errors import UnsupportedModelError
from tokenprune.transfer import to_device

_BASE = 256
_POSITIONS = re.compile(
    r"^(?!.*(vision|visual|image|audio|tower|former)).*\b(wpe|embed_positions)$"
)
"""Names of tables of learned positions, those of towers left out."""

DIGITS = 3
"""Columns for each axis: offsets below 256 ** 3."""


def to_columns(offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """Return offsets [A, n], whole and not negative, as columns [n, A * DIGITS] of `dtype`."""
    digits: list[Tensor] = [(offsets // _BASE**power) % _BASE for power in range(DIGITS)]
    columns = torch.stack(digits, dim=-1).transpose(0, 1).flatten(1)
    return columns.to(dtype)


def from_columns(columns: Tensor) -> Tensor:
    """Return the LongTensor [A, n] that `to_columns` was given."""
    lowest, *higher = columns.long().unflatten(1, (-1, DIGITS)).unbind(-1)
    for power, digits in enumerate(higher, start=1):
        lowest = lowest + digits * _BASE**power
    offsets: Tensor = lowest.T
    return offsets


class RowNumbers:
    """Numbers of the tokens of one batch, which came with its rows: 0 for text.

    The buffer stays where it is and is written in place, so that a captured graph reads what was
    written for the batch at hand.

    Parameters
    ----------
    axes
        How many numbers each token has.
    tokens
        Most tokens of a batch.
    device
        Where they are read.
    """

    def __init__(self, axes: int, tokens: int, device: torch.device) -> None:
        # One column more than is used keeps a slice's strides what they are for any batch, as
        # in the engine's own buffer: compiled code relies on it.
        self._numbers = torch.zeros(axes, tokens + 1, dtype=torch.int64, device=device)
        self._written = 0

    def write(self, numbers: Tensor | None, is_row: Tensor | None, tokens: int) -> None:
        """Set the numbers of a batch.

        Parameters
        ----------
        numbers
            LongTensor [A, n] of all rows in the batch, or None where there are none.
        is_row
            BoolTensor [tokens] with n True.
        tokens
            Tokens of the batch.
        """
        self._grow(tokens)
        self._numbers[:, : max(self._written, tokens)] = 0
        self._written = 0
        if numbers is not None and is_row is not None:
            where = to_device(is_row, self._numbers.device).expand(len(self._numbers), -1)
            self._numbers[:, :tokens].masked_scatter_(where, numbers)
            self._written = tokens

    @property
    def written(self) -> bool:
        """Whether any row of the batch at hand came with numbers."""
        return self._written > 0

    def read(self, tokens: int) -> Tensor:
        """Return LongTensor [A, tokens], the numbers of a batch of so many tokens."""
        self._grow(tokens)
        return self._numbers[:, :tokens]

    def _grow(self, tokens: int) -> None:
        if tokens >= self._numbers.shape[1]:
            old = self._numbers
            self._numbers = old.new_zeros(len(old), tokens + 1)
            self._numbers[:, : old.shape[1]] = old


class PositionOffsets(RowNumbers):
    """What is added to the positions of one batch: 0 for text, each kept token its own offset.

    Parameters
    ----------
    axes
        Rows of positions that are added to.
    tokens, device
        See `RowNumbers`.
    """

    def __init__(self, axes: int, tokens: int, device: torch.device) -> None:
        super().__init__(axes, tokens, device)
        self._positions = torch.zeros_like(self._numbers)

    def add(self, positions: Tensor) -> Tensor:
        """Return positions [3, tokens] with the offsets added, as [A, tokens].

        With one axis the first row is taken: the engine counts such a prompt alike on all three.
        """
        tokens = positions.shape[-1]
        offsets = self.read(tokens)
        moved = self._positions[:, :tokens]
        torch.add(positions[: len(offsets)], offsets, out=moved)
        return moved

    def _grow(self, tokens: int) -> None:
        super()._grow(tokens)
        if self._positions.shape != self._numbers.shape:
            self._positions = torch.zeros_like(self._numbers)


def rope_types(text_config: Any) -> set[str]:
    """Return the types of a language model's rotary embeddings, as its config names them.

    Some configs have parameters for each kind of layer.
    """
    parameters = getattr(text_config, "rope_parameters", None) or {}
    each = [part for part in parameters.values() if isinstance(part, dict) and "rope_type" in part]
    return {str(part.get("rope_type", "default")) for part in each or [parameters]}


def known_positions(text_config: Any) -> int:
    """Return how many positions a language model was trained with.

    Raises
    ------
    UnsupportedModelError
        If its config does not say.
    """
    known = getattr(text_config, "max_position_embeddings", None)
    if known is None:
        raise UnsupportedModelError(
            f"the language model's config ({text_config.model_type!r}) says no "
            "max_position_embeddings, so it is not known how far tokens may stand from each other. "
            "Use positions='compact'."
        )
    return int(known)


def rotary_length(text_config: Any) -> int:
    """Return how many positions the rotary tables of a pruned model have.

    They are twice as long as the model's context, but for YaRN's, whose length is part of it.
    """
    if rope_types(text_config) == {"yarn"}:
        parameters = text_config.rope_parameters
        return int(parameters["original_max_position_embeddings"] * parameters["factor"])
    return 2 * known_positions(text_config)


def check_tables(language_model: nn.Module, text_config: Any) -> None:
    """Raise if positions are looked up in a table that has not all that pruned prompts may have.

    An engine that looks up behind the end of a rotary table reads whatever lies there. A learned
    one cannot be made longer.

    Raises
    ------
    UnsupportedModelError
        Naming the module.
    """
    needed = rotary_length(text_config)
    for name, module in language_model.named_modules():
        if isinstance(module, nn.Embedding) and _POSITIONS.search(name):
            raise UnsupportedModelError(
                f"positions are learned in this language model ({name}): there are none behind the "
                "longest prompt for tokens that stay at their own. Use positions='compact'."
            )
        table = getattr(module, "cos_sin_cache", None)
        if isinstance(table, Tensor) and len(table) < needed:
            raise UnsupportedModelError(
                f"the rotary table of {name} has {len(table)} positions, and kept tokens that stay "
                f"at their own may need {needed}. Use positions='compact'."
            )
