"""Which tokens show the answer, how many of them a method kept, and the oracle that keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.errors import TokensError
from tokenprune.selectors.base import Picks, Selector
from tokenprune.tokens import TokenBatch
from tokenprune_eval.bundled.questions import Box

COVERED = 0.25
"""A token is evidence if a box covers at least this share of the token's cell of the image.

Half would leave out the cells that show an item's edge, and with it most of a thin item; any
overlap at all would count cells with one row of its pixels.
"""


def evidence_mask(
    boxes: Sequence[Box],
    size: tuple[int, int],
    grid: tuple[int, int],
    covered: float = COVERED,
) -> Tensor:
    """Return which tokens show what the boxes enclose.

    Parameters
    ----------
    boxes
        Left, top, right, bottom in pixels; right and bottom are exclusive.
    size
        Width and height of the image the boxes were drawn in, pixels.
    grid
        Rows and columns of tokens; together they cover the whole image evenly.
    covered
        The least share of a cell that a box covers.

    Returns
    -------
    Tensor
        BoolTensor [rows * columns]: the cells covered by at least `covered` by one box, and for a
        box too small for that the cell it covers most. All False without boxes.
    """
    width, height = size
    rows, columns = grid
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for left, top, right, bottom in boxes:
        shares = torch.outer(
            _overlap(top / height * rows, bottom / height * rows, rows),
            _overlap(left / width * columns, right / width * columns, columns),
        )
        mask |= shares >= min(covered, float(shares.max()))
    return mask.flatten()


def _overlap(start: float, end: float, cells: int) -> Tensor:
    """Return float64 [cells]: how much of each cell [i, i + 1] the interval covers."""
    edges = torch.arange(cells + 1, dtype=torch.float64)
    return (edges[1:].clamp(max=end) - edges[:-1].clamp(min=start)).clamp(min=0.0)


@dataclass(frozen=True, eq=False)
class Oracle(Selector):
    """Keep just the evidence of each question of one batch: what a knowing method could reach.

    It is told where the answer is to be seen, so it is no method itself. `keep` has to be the
    number of tokens in each row of `evidence`.

    Parameters
    ----------
    evidence
        LongTensor [B, K], ascending in each row; row b belongs to the b-th item of the batch.

    Raises
    ------
    TokensError
        By `select`, if it is asked about another number of items or of tokens.
    """

    evidence: Tensor

    name: ClassVar[str] = "oracle"
    summary: ClassVar[str] = "where the answer is to be seen (no method)"
    needs: ClassVar[tuple[str, ...]] = ()
    of_place: ClassVar[bool] = True

    def select(self, tokens: TokenBatch, keep: int) -> Picks:
        """Return the evidence."""
        if self.evidence.shape != (tokens.size, keep):
            raise TokensError(
                f"the oracle knows the evidence of {list(self.evidence.shape)} (items, tokens) and "
                f"was asked for {[tokens.size, keep]}. Make one for each batch."
            )
        return Picks(self.evidence.to(tokens.device))
