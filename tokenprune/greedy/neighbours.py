"""The largest cosine of tokens to others, for thousands of questions about one item.

Up to `ALL_PAIRS` tokens all cosines are held; above, those of each token to the ones most like it,
so that memory stays linear.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenprune.greedy.rows import IntegerRows

_LISTED = 64  # tokens most like each one that are held
_BLOCK_ENTRIES = 2**21  # float64 cosines of a block: 16 MiB


class AllCosines:
    """All cosines of items of up to `ALL_PAIRS` tokens; see `objectives.NearestCosine`.

    Parameters
    ----------
    products
        float64 [B, N, N], exact products of all rows.
    inverse_norms
        float64 [B, N]; see `IntegerRows`.
    """

    def __init__(self, products: Tensor, inverse_norms: Tensor) -> None:
        norms = inverse_norms[:, :, None] * inverse_norms[:, None]
        self._cosines = (products * norms).float().flatten(1)
        self._total = products.shape[-1]

    def __call__(self, tokens: Tensor, others: Tensor) -> Tensor:
        """Return float32 [B, m] for LongTensors [B, m] and [B, n]."""
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

    def __init__(self, rows: IntegerRows) -> None:
        self._rows, self._inverse = rows.rows[0], rows.inverse_norms[0]
        self._listed_of = 2 * len(self._rows) + 1  # no lists yet

    def __call__(self, tokens: Tensor, others: Tensor) -> Tensor:
        """Return float32 [1, m] for LongTensors [1, m] and [1, n]."""
        if 2 * (tokens.shape[1] + others.shape[1]) <= self._listed_of:
            self._list(torch.cat([tokens[0], others[0]]))
        asked = torch.zeros(len(self._rows), dtype=torch.bool, device=tokens.device)
        asked[others[0]] = True
        near = self._near[tokens[0]]
        found = self._cosine[tokens[0]].masked_fill(~asked[near], -math.inf).amax(dim=1)
        for few in self._blocks((found == -math.inf).nonzero()[:, 0], others.shape[1]):
            found[few] = self._cosines(tokens[0, few], others[0]).amax(dim=1)
        return found[None]

    def _list(self, tokens: Tensor) -> None:
        """List for each of some tokens [R] those of them that are most like it."""
        count = min(_LISTED, len(tokens))
        self._listed_of = len(tokens)
        self._near = tokens.new_zeros(len(self._rows), count)
        self._cosine = self._rows.new_zeros(len(self._rows), count, dtype=torch.float32)
        for some in self._blocks(tokens, len(tokens)):
            # Which of equal cosines are listed changes no maximum.
            highest = self._cosines(some, tokens).topk(count, dim=1)
            self._cosine[some], self._near[some] = highest.values, tokens[highest.indices]

    def _blocks(self, tokens: Tensor, others: int) -> tuple[Tensor, ...]:
        """Split tokens [m] so that a block's cosines to so many others fit."""
        return tokens.split(max(1, _BLOCK_ENTRIES // max(1, others))) if len(tokens) else ()

    def _cosines(self, tokens: Tensor, others: Tensor) -> Tensor:
        dots = self._rows[tokens] @ self._rows[others].T
        return dots.mul_(self._inverse[tokens, None] * self._inverse[others]).float()
