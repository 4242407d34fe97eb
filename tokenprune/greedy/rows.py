"""Rows of tokens as whole numbers, whose products are exact in any order of summation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.numerics import folded_sum, square_root

_BLOCK_ENTRIES = 2**24  # entries of a block of cosines: 128 MiB

ALL_PAIRS = 4096
"""Tokens of an item up to which the products of all pairs of its rows may be held at once."""

MEAN_BITS = 30
"""Bits of an item's largest entry in its mean row."""


def bits_of(width: int) -> int:
    """Return how many bits an entry may have for products of rows this wide to be exact."""
    return (52 - math.ceil(math.log2(max(width, 2)))) // 2


def _power_of_two(values: Tensor) -> Tensor:
    """Return the largest powers of two up to float64 values of at least 0; 1 for 0."""
    # Without the bits behind the point.
    powers = values.view(torch.int64).bitwise_and(-(2**52)).view(torch.float64)
    return powers.masked_fill(powers == 0, 1.0)


def over_mean(change: Tensor, per_frame: int) -> Tensor:
    """Return changes [B, N - per_frame] over their mean, with 1 for the first frame: [B, N]."""
    mean = folded_sum(change, dim=1)[:, None] / change.shape[1]
    shares = torch.where(mean == 0, 1.0, change / mean.masked_fill(mean == 0, 1.0))
    return torch.nn.functional.pad(shares, (per_frame, 0), value=1.0)


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
        float64 [B, N], what a row is multiplied by to be the embedding again; 0 for one of zeros.
    """

    rows: Tensor
    squares: Tensor
    inverse_norms: Tensor
    scales: Tensor

    @classmethod
    def from_embeddings(cls, embeddings: Tensor) -> IntegerRows:
        """Round the rows of `embeddings`, floating point [B, N, D]."""
        bits = bits_of(embeddings.shape[-1])
        # The largest entry and not the norm: a maximum is exact in any order.
        largest = torch.linalg.vector_norm(embeddings, ord=math.inf, dim=-1, keepdim=True).double()
        rows = embeddings.to(torch.float64, copy=True)
        scales = largest.squeeze(-1) / 2.0**bits
        largest.masked_fill_(largest == 0, 1.0)  # a row of zeros stays one
        rows.div_(largest).mul_(2.0**bits).round_()
        squares: Tensor = torch.linalg.vecdot(rows, rows)
        norms = square_root(squares)
        inverse = norms.reciprocal().masked_fill_(norms == 0, 0.0)
        return cls(rows, squares, inverse, scales)

    def squared_norms(self) -> Tensor:
        """Return float64 [B, N], ||embedding||^2."""
        return self.squares * self.scales.square()

    def products_with(self, picked: Tensor) -> Tensor:
        """Return float64 [B, m, N], the products of rows `picked` (LongTensor [B, m]) with all."""
        return self._products(picked, self.scales)

    def cosines_to(self, picked: Tensor) -> Tensor:
        """Return float32 [B, N], each row's cosine to row `picked` (LongTensor [B]) of its item."""
        return self.cosines_of(picked[:, None])[:, 0]

    def cosines_of(self, picked: Tensor) -> Tensor:
        """Return float32 [B, m, N], cosines of rows `picked` (LongTensor [B, m]) to all rows."""
        return self._products(picked, self.inverse_norms).float()

    def l1_norms(self) -> Tensor:
        """Return float64 [B, N], the sum of the absolute entries of each embedding."""
        # Whole numbers below 2**53: exact in any order.
        norms: Tensor = torch.linalg.vector_norm(self.rows, ord=1, dim=-1)
        return norms * self.scales

    def cosines_with(self, others: IntegerRows) -> Tensor:
        """Return float64 [B, M, N], the cosine of each row to each of `others`, of one width."""
        dots = torch.bmm(self.rows, others.rows.transpose(1, 2))
        # Both norms first: so a row's cosine to another is the other's cosine to it.
        return dots.mul_(self.inverse_norms[:, :, None] * others.inverse_norms[:, None])

    def some(self, places: slice) -> IntegerRows:
        """Return a range of each item's rows."""
        return IntegerRows(
            self.rows[:, places],
            self.squares[:, places],
            self.inverse_norms[:, places],
            self.scales[:, places],
        )

    def at(self, places: Tensor) -> IntegerRows:
        """Return rows `places` (LongTensor [B, m]) of each item."""
        item = torch.arange(len(places), dtype=torch.int64, device=places.device)[:, None]
        return IntegerRows(
            self.rows[item, places],
            self.squares.gather(1, places),
            self.inverse_norms.gather(1, places),
            self.scales.gather(1, places),
        )

    def _products(self, picked: Tensor, scales: Tensor) -> Tensor:
        """Return float64 [B, m, N], the products of rows `picked`, each row times its scale."""
        item = torch.arange(len(picked), dtype=torch.int64, device=picked.device)[:, None]
        dots = torch.bmm(self.rows, self.rows[item, picked].transpose(1, 2)).transpose(1, 2)
        return dots.mul_(scales[:, None] * scales[item, picked, None])

    def mean(self) -> Tensor:
        """Return float64 [B, D], the mean embedding.

        Of entries that are rounded to whole multiples of 2**-30 of the item's largest one, or less,
        so that their sum is exact in any order. N may be up to 2**21.
        """
        bits = bits_of(self.rows.shape[-1])
        # The scale is the largest entry of a row over 2**bits.
        unit = _power_of_two(self.scales.amax(dim=1, keepdim=True)) * 2.0 ** (bits - MEAN_BITS)
        whole = (self.rows * (self.scales / unit)[..., None]).round_()
        total: Tensor = whole.sum(dim=1) * unit
        return total / self.rows.shape[1]

    def deviations(self) -> Tensor:
        """Return how far each token is from the mean token, as a multiple of its own length.

        Returns
        -------
        Tensor
            float64 [B, N]; 0 for a token without length.
        """
        # As whole numbers, so that products with it are exact too.
        centre = IntegerRows.from_embeddings(self.mean()[:, None])
        products = torch.bmm(self.rows, centre.rows.transpose(1, 2)).squeeze(-1)
        products *= self.scales * centre.scales
        squared = self.squared_norms()
        # ||e||² - 2 e·m + ||m||², exact but for the last roundings; those may fall below 0.
        distances = (squared - 2.0 * products + centre.squared_norms()).clamp_(min=0.0)
        inverse = square_root(squared).reciprocal()
        return square_root(distances) * inverse.masked_fill(inverse.isinf(), 0.0)

    def changes(self, per_frame: int) -> Tensor:
        """Return how much tokens changed since the frame before, as a multiple of the mean.

        A change is 1 - the cosine to the token at the same place one frame before. The first frame
        has the mean.

        Parameters
        ----------
        per_frame
            Tokens of a frame; N is a multiple of it, and larger.

        Returns
        -------
        Tensor
            float64 [B, N]; 1 everywhere where nothing changes at all.
        """
        before, after = self.rows[:, :-per_frame], self.rows[:, per_frame:]
        inverse = self.inverse_norms
        norms = inverse[:, :-per_frame] * inverse[:, per_frame:]
        # Products of whole numbers: exact, so `vecdot` may add them in any order.
        cosine = torch.linalg.vecdot(before, after) * norms
        change = (1.0 - cosine).clamp_(min=0.0)
        return over_mean(change, per_frame)

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
