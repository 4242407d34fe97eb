"""Region: what one image or video takes up in a prompt, before and after pruning.

vLLM puts a region of token ids in the place of each image: placeholders, one for each row that
the vision encoder will return, and for some models text around and between them (``<img>``, time
stamps). This module says how such a region shrinks. It is worked out once, where the prompt is
made, and travels to the worker with the image, so both ends count alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokenprune.budget import Keep, tokens_kept
from tokenprune.tower.layouts import Grid, Segment

_TEXT, _STAYS = -1, -2


@dataclass(frozen=True)
class Region:
    """One image's or video's part of the unpruned prompt.

    Attributes
    ----------
    token_ids
        LongTensor [L].
    is_row
        BoolTensor [L]: where the encoder's rows go; the rest is text.
    segments
        The rows that may be dropped. Rows in no segment (newlines, a CLS token) always stay.
    """

    token_ids: Tensor
    is_row: Tensor
    segments: tuple[Segment, ...]

    @property
    def length(self) -> int:
        """L, the number of prompt tokens, text included."""
        return len(self.token_ids)

    @property
    def total(self) -> int:
        """Rows of the encoder."""
        return int(self.is_row.sum())

    def text(self) -> Tensor:
        """Return LongTensor, the ids of the text inside."""
        return self.token_ids[~self.is_row]

    def ends_in_text(self) -> bool:
        """Say whether text comes after the last row."""
        return not bool(self.is_row[-1])

    def kept(self, keep: Keep) -> int:
        """Return how many of the rows stay."""
        dropped = sum(
            len(segment.rows) - tokens_kept(keep, len(segment.rows)) for segment in self.segments
        )
        return self.total - dropped

    def joined(self) -> Region:
        """Return the same with all segments as one, whose rows lie in no grid."""
        rows = torch.cat([segment.rows for segment in self.segments]).sort().values
        return replace(self, segments=(Segment(rows, None),))

    def rows_move(self) -> bool:
        """Say whether text stands between the rows of some segment.

        Then nobody knows, before the scores are there, how many rows will stand on which side of
        that text.
        """
        run = self._run_of_row()
        return any(
            bool((run[segment.rows] != run[segment.rows[0]]).any()) for segment in self.segments
        )

    def shrink(self, keep: Keep) -> tuple[Tensor, Tensor | None]:
        """Return the pruned region: token ids, and where the rows go.

        Returns
        -------
        token_ids
            LongTensor [L'].
        is_row
            BoolTensor [L'], or None where the worker fills the whole region, text included,
            because rows move against the text.
        """
        if self.rows_move():
            # The worker writes over these ids; only their number counts.
            first = int(self.is_row.nonzero()[0])
            rows = self.token_ids[first].expand(self.kept(keep))
            text = self.text()
            return torch.cat([text[:first], rows, text[first:]]), None
        run = self._run_of_row()
        counts = torch.bincount(run)
        staying = counts.clone()
        for segment in self.segments:
            count = len(segment.rows)
            staying[run[segment.rows[0]]] -= count - tokens_kept(keep, count)
        # The first tokens of each run stay; which rows they stand for is settled by the scores.
        place_in_run = torch.arange(len(run)) - (counts.cumsum(0) - counts)[run]
        stays = torch.ones_like(self.is_row)
        stays[self.is_row] = place_in_run < staying[run]
        return self.token_ids[stays], self.is_row[stays]

    def _run_of_row(self) -> Tensor:
        """Return LongTensor [rows], in which unbroken run of rows each row stands."""
        before = torch.cat([torch.zeros(1, dtype=torch.bool), self.is_row[:-1]])
        starts = self.is_row & ~before
        return (starts.long().cumsum(0) - 1)[self.is_row]

    # The way to the worker ---------------------------------------------------------------------

    def pack(self) -> Tensor:
        """Return the region as one int32 tensor [2, L]: id and segment of each token."""
        packed = torch.zeros(2, self.length, dtype=torch.int32)
        packed[0] = self.token_ids
        columns = self.is_row.nonzero()[:, 0]
        packed[1] = _TEXT
        packed[1, columns] = _STAYS
        for number, segment in enumerate(self.segments):
            packed[1, columns[segment.rows]] = number
        return packed

    @classmethod
    def unpack(
        cls, packed: Tensor, grids: Sequence[Sequence[int] | None], labels: Sequence[str]
    ) -> Region:
        """Return what `pack` packed; grids and labels of the segments travel beside it."""
        token_ids, number = packed.long()
        is_row = number != _TEXT
        of_row = number[is_row]
        segments = []
        for index, (grid, label) in enumerate(zip(grids, labels, strict=True)):
            rows = (of_row == index).nonzero()[:, 0]
            segments.append(Segment(rows, None if grid is None else _grid(grid), label))
        return cls(token_ids, is_row, tuple(segments))


def _grid(numbers: Sequence[int]) -> Grid:
    frames, rows, columns = numbers
    return frames, rows, columns
