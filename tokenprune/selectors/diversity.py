"""Greedy diversity: take one token after another, each unlike those taken before.

`zeroth-order` and `divprune` share it. Every cosine is computed from exact integer products, see
`IntegerRows`, so it is the same number in any batch, at any position and on any device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_ROW_ENTRIES = 2**27  # float64 entries held at once: 1 GiB, unless a single item needs more
_BLOCK_ENTRIES = 2**24  # entries of a block of cosines: 128 MiB


@dataclass(frozen=True, eq=False)
class IntegerRows:
    """Rows scaled and rounded to integers small enough for every dot product to be exact.

    With b bits each and D terms, a partial sum in any order is an integer of at most
    D * 2**(2b) <= 2**52, which float64 holds exactly. So the dot product does not depend on the
    order of summation, that is on batch, position, library or device, and equal rows tie exactly.
    For D = 4096 b is 20; the cosine is then off by less than 1e-6, as it is in float32.

    Attributes
    ----------
    rows
        float64 [B, N, D], whole numbers.
    squares
        float64 [B, N], ||row||^2, whole numbers.
    inverse_norms
        float64 [B, N], 1 / ||row||, or 0 for a row of zeros: its cosine to anything is 0.
    scales
        float64 [B, N], what a row is multiplied by to be the embedding again.
    """

    rows: Tensor
    squares: Tensor
    inverse_norms: Tensor
    scales: Tensor

    @classmethod
    def from_embeddings(cls, embeddings: Tensor) -> IntegerRows:
        """Round the rows of `embeddings`, floating point [B, N, D]."""
        bits = (52 - math.ceil(math.log2(max(embeddings.shape[-1], 2)))) // 2
        # The largest entry and not the norm: a maximum is exact in any order.
        largest = torch.linalg.vector_norm(embeddings, ord=math.inf, dim=-1, keepdim=True).double()
        rows = embeddings.to(torch.float64, copy=True)
        largest.masked_fill_(largest == 0, 1.0)  # a row of zeros stays one
        rows.div_(largest).mul_(2.0**bits).round_()
        squares: Tensor = torch.linalg.vecdot(rows, rows)
        norms = squares.sqrt()
        inverse = norms.reciprocal().masked_fill_(norms == 0, 0.0)
        return cls(rows, squares, inverse, largest.squeeze(-1).div_(2.0**bits))

    def squared_norms(self) -> Tensor:
        """Return float64 [B, N], ||embedding||^2."""
        return self.squares * self.scales.square()

    def products_with(self, picked: Tensor) -> Tensor:
        """Return float64 [B, m, N], the products of rows `picked` (LongTensor [B, m]) with all."""
        return self._products(picked, self.scales)

    def cosines_to(self, picked: Tensor) -> Tensor:
        """Return float32 [B, N], each row's cosine to row `picked` (LongTensor [B]) of its item."""
        return self._products(picked[:, None], self.inverse_norms)[:, 0].float()

    def _products(self, picked: Tensor, scales: Tensor) -> Tensor:
        """Return float64 [B, m, N], the products of rows `picked`, each row times its scale."""
        item = torch.arange(len(picked), dtype=torch.int64, device=picked.device)[:, None]
        dots = torch.bmm(self.rows, self.rows[item, picked].transpose(1, 2)).transpose(1, 2)
        return dots.mul_(scales[:, None] * scales[item, picked, None])

    def nearest_distances(self) -> Tensor:
        """Return float32 [B, N], 1 - cosine of each row to the other row most like it.

        O(N * N * D) time, in blocks of at most D rows, so O(N * D) memory. With a single row the
        distance is 0.
        """
        total, width = self.rows.shape[1:]
        # No more rows than D, so that a block of cosines is no larger than the rows themselves.
        step = max(1, min(width, _BLOCK_ENTRIES // total))
        distances = []
        for rows, norms in zip(self.rows, self.inverse_norms, strict=True):
            for start in range(0, total, step):
                stop = min(start + step, total)
                dots = rows[start:stop] @ rows.T
                distance = dots.mul_(norms[start:stop, None] * norms).float().neg_().add_(1.0)
                # Of the two smallest the first is the row's distance to itself.
                two = distance.clamp_(min=0.0).topk(min(2, total), dim=-1, largest=False).values
                distances.append(two[:, -1])
        return torch.cat(distances).view(self.inverse_norms.shape)


def pick_diverse(
    embeddings: Tensor, keep: int, weights: Tensor | None = None, first: Tensor | None = None
) -> Tensor:
    """Take `keep` tokens of each item: always the one of highest weight * distance to the taken.

    A token's distance to those taken is ``1 - max cosine``; it is kept up to date with one
    matrix-vector product a step, O(K * N * D) time and O(N * D) memory. The lowest index wins a
    tie, and a taken token is never taken again. Tokens of weight 0 come after all others, lowest
    index first.

    Parameters
    ----------
    embeddings
        Floating point [B, N, D].
    keep
        K, between 1 and N.
    weights
        float32 [B, N], at least 0; None for the same weight everywhere.
    first
        LongTensor [B], the token each item starts with; None for the token farthest from its
        nearest neighbour (DivPrune's start).

    Returns
    -------
    Tensor
        LongTensor [B, K], ascending.
    """
    size, total, width = embeddings.shape
    if keep == total:
        every = torch.arange(total, dtype=torch.int64, device=embeddings.device)
        return every.expand(size, -1)
    step = max(1, _ROW_ENTRIES // (total * width))
    kept = []
    for start in range(0, size, step):
        items = slice(start, start + step)
        rows = IntegerRows.from_embeddings(embeddings[items])
        begin = rows.nearest_distances().argmax(dim=-1) if first is None else first[items]
        kept.append(_greedy(rows, keep, None if weights is None else weights[items], begin))
    return torch.cat(kept).sort(dim=-1).values


def _greedy(rows: IntegerRows, keep: int, weights: Tensor | None, first: Tensor) -> Tensor:
    """Return LongTensor [B, K] in the order taken. torch.argmax gives the first of equal values."""
    kept = first.new_empty(first.numel(), keep)
    kept[:, 0] = first
    closest = rows.cosines_to(first)
    taken = torch.zeros_like(closest, dtype=torch.bool).scatter_(1, first[:, None], True)
    for step in range(1, keep):
        # A cosine that rounds to above 1 must not put a duplicate behind tokens of weight 0.
        score = (1.0 - closest).clamp_(min=0.0)
        if weights is not None:
            score.mul_(weights).masked_fill_(weights == 0, -1.0)
        pick = score.masked_fill_(taken, -math.inf).argmax(dim=-1)
        kept[:, step] = pick
        taken.scatter_(1, pick[:, None], True)
        if step + 1 < keep:
            # The largest cosine to any taken one is that to the earlier ones or to the last.
            torch.maximum(closest, rows.cosines_to(pick), out=closest)
    return kept
