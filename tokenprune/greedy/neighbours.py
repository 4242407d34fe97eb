"""The largest cosine of tokens to others, for thousands of questions about one item.

Up to `ALL_PAIRS` tokens all cosines are held; above, those of each token to the ones most like it,
so that memory stays linear.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.greedy.rows import IntegerRows, bits_of
from tokenprune.numerics import square_root

_LISTED = 64  # tokens most like each one that are held
_BLOCK_ENTRIES = 2**21  # float64 cosines of a block: 16 MiB


@dataclass(frozen=True, eq=False)
class FineRows:
    """Rows as two whole numbers, whose cosines are exact to about 1e-12, and the same anywhere.

    A row is ``high + low / 2**bits``, with the row of `IntegerRows` as `high`. For choices that are
    made of thousands of comparisons, one of which may turn all that follow: there cosines as exact
    as those of float32 are not enough.

    Attributes
    ----------
    high, low
        float64 [B, N, D], whole numbers.
    inverse_norms
        float64 [B, N], 1 / ||row||, or 0 for a row of zeros.
    """

    high: Tensor
    low: Tensor
    inverse_norms: Tensor

    @classmethod
    def from_embeddings(cls, embeddings: Tensor) -> FineRows:
        """Round the rows of `embeddings`, floating point [B, N, D], with a rest."""
        high = IntegerRows.from_embeddings(embeddings)
        unit = 2.0 ** bits_of(embeddings.shape[-1])
        largest = high.scales * unit
        whole = embeddings.double() / largest.masked_fill(largest == 0, 1.0)[..., None]
        low = ((whole * unit - high.rows) * unit).round_()
        squares = high.squares + 2.0 * torch.linalg.vecdot(high.rows, low) / unit
        norms = square_root(squares)
        inverse = norms.reciprocal().masked_fill_(norms == 0, 0.0)
        return cls(high.rows, low, inverse)

    def cosines(self, tokens: Tensor | slice, others: Tensor | slice) -> Tensor:
        """Return float64 [B, m, n] of tokens (a slice, or LongTensor [m]) to others (likewise)."""
        unit = 2.0 ** bits_of(self.high.shape[-1])
        high, low = self.high[:, tokens], self.low[:, tokens]
        other_high, other_low = self.high[:, others].mT, self.low[:, others].mT
        # Whole numbers below 2**53, each product and their sum; that of both rests is next to none.
        rest = (high @ other_low).add_(low @ other_high)
        dots = (high @ other_high).add_(rest.div_(unit))
        return dots.mul_(self.inverse_norms[:, tokens, None] * self.inverse_norms[:, None, others])


class AllCosines:
    """All cosines of items of up to `ALL_PAIRS` tokens; see `objectives.NearestCosine`.

    Parameters
    ----------
    rows
        Of B items.
    """

    def __init__(self, rows: FineRows) -> None:
        every = slice(None)
        self._cosines = rows.cosines(every, every).flatten(1)
        self._total = rows.high.shape[1]

    def __call__(self, tokens: Tensor, others: Tensor) -> Tensor:
        """Return float64 [B, m] for LongTensors [B, m] and [B, n]."""
        pairs = (tokens * self._total)[:, :, None] + others[:, None]
        return self._cosines.gather(1, pairs.flatten(1)).view(pairs.shape).amax(dim=2)


class ListedCosines:
    """Cosines of one item to the tokens most like each; see `objectives.NearestCosine`.

    A token none of whose listed ones is asked for is compared with all that are. The lists are
    made anew whenever half of the tokens have gone, so that this stays rare. The result is that of
    `AllCosines`.

    Parameters
    ----------
    rows
        Of one item.
    """

    def __init__(self, rows: FineRows) -> None:
        self._rows, self._total = rows, rows.high.shape[1]
        self._listed_of = 2 * self._total + 1  # no lists yet

    def __call__(self, tokens: Tensor, others: Tensor) -> Tensor:
        """Return float64 [1, m] for LongTensors [1, m] and [1, n]."""
        if 2 * (tokens.shape[1] + others.shape[1]) <= self._listed_of:
            self._list(torch.cat([tokens[0], others[0]]))
        asked = torch.zeros(self._total, dtype=torch.bool, device=tokens.device)
        asked[others[0]] = True
        near = self._near[tokens[0]]
        found = self._cosine[tokens[0]].masked_fill(~asked[near], -math.inf).amax(dim=1)
        for few in self._blocks((found == -math.inf).nonzero()[:, 0], others.shape[1]):
            found[few] = self._rows.cosines(tokens[0, few], others[0])[0].amax(dim=1)
        return found[None]

    def _list(self, tokens: Tensor) -> None:
        """List for each of some tokens [R] those of them that are most like it."""
        count = min(_LISTED, len(tokens))
        self._listed_of = len(tokens)
        self._near = tokens.new_zeros(self._total, count)
        self._cosine = self._rows.high.new_zeros(self._total, count)
        for some in self._blocks(tokens, len(tokens)):
            # Which of equal cosines are listed changes no maximum.
            highest = self._rows.cosines(some, tokens)[0].topk(count, dim=1)
            self._cosine[some], self._near[some] = highest.values, tokens[highest.indices]

    def _blocks(self, tokens: Tensor, others: int) -> tuple[Tensor, ...]:
        """Split tokens [m] so that a block's cosines to so many others fit."""
        return tokens.split(max(1, _BLOCK_ENTRIES // max(1, others))) if len(tokens) else ()
