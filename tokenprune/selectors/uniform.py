"""uniform: keep an even grid in space and time. A baseline."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.utils.rnn import pad_sequence

from tokenprune.selectors.base import ByPlace, Picks, Selector
from tokenprune.tokens import TokenBatch
from tokenprune.transfer import to_device


@dataclass(frozen=True)
class Uniform(Selector):
    """Spread exactly `keep` tokens evenly over frames, then rows, then columns.

    Each axis is cut into equal parts and the middle of each part is kept. Frames differ by at
    most one token, and so do the rows used in a frame. Tokens that have no places in a picture
    (`VisualTokens.is_picture`) are one axis, in their order: every so many stays.
    """

    name: ClassVar[str] = "uniform"
    summary: ClassVar[str] = "nothing: an even grid in space and time (baseline)"
    needs: ClassVar[tuple[str, ...]] = ()
    by_place: ClassVar[ByPlace] = "place"
    takes_sizes: ClassVar[bool] = True

    def select(self, tokens: TokenBatch, keep: int) -> Picks:
        """Return the same LongTensor [K] for every item; there are no scores."""
        index = torch.tensor(_spread(tokens.grid, keep), dtype=torch.long, device="cpu")
        return Picks(to_device(index, tokens.device).expand(tokens.size, -1))

    def select_sizes(self, tokens: TokenBatch, keeps: Sequence[int]) -> Picks:
        """Return LongTensor [B, max(keeps)]; there are no scores."""
        grids = tokens.grids or (tokens.grid,) * tokens.size
        rows = [
            torch.tensor(_spread(grid, keep), dtype=torch.long, device="cpu")
            for grid, keep in zip(grids, keeps, strict=True)
        ]
        return Picks(to_device(pad_sequence(rows, batch_first=True), tokens.device))


@functools.lru_cache(maxsize=64)
def _spread(grid: tuple[int, int, int], keep: int) -> tuple[int, ...]:
    """Return the indices that stay of a grid (T, R, W), ascending."""
    frames, rows, columns = grid
    used = min(keep, frames)
    return tuple(
        (frame * rows + row) * columns + column
        for frame, in_frame in zip(_middles(used, frames), _shares(keep, used), strict=True)
        for row, column in _spread_in_frame(in_frame, rows, columns)
    )


def _middles(parts: int, length: int) -> list[int]:
    """Return the middle index of each of `parts` equal parts of range(length), ascending."""
    return [(2 * part + 1) * length // (2 * parts) for part in range(parts)]


def _shares(total: int, parts: int) -> list[int]:
    """Split `total` into `parts` whole numbers that differ by at most one."""
    return [(part + 1) * total // parts - part * total // parts for part in range(parts)]


def _spread_in_frame(keep: int, rows: int, columns: int) -> list[tuple[int, int]]:
    """Return `keep` places (row, column) spread evenly over one frame, in raster order."""
    square = round(math.sqrt(keep * rows / columns))  # as many rows as make the cells square
    used = min(rows, keep, max(square, math.ceil(keep / columns), 1))
    return [
        (row, column)
        for row, in_row in zip(_middles(used, rows), _shares(keep, used), strict=True)
        for column in _middles(in_row, columns)
    ]
