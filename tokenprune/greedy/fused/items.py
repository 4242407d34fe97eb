"""Items whose rows, weights and choices are computed by kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenprune.greedy.fused import kernels
from tokenprune.greedy.items import Items, TorchItems
from tokenprune.greedy.objectives import Weighed, factors_of, factors_to
from tokenprune.greedy.rows import over_mean

_BLOCK_ENTRIES = 2**24  # float64 products held at once of a long item: 128 MiB


class FusedItems(Items):
    """Items of up to `ALL_PAIRS` rows each: a few launches for all of them, whatever K.

    Parameters
    ----------
    embeddings
        Floating point [B, N, D].
    keeps, totals
        K and number of rows of each item; rows behind them may be any.
    chunk
        Tokens that a program looks at together; another number changes no result.
    """

    def __init__(
        self,
        embeddings: Tensor,
        keeps: Sequence[int],
        totals: Sequence[int],
        chunk: int = kernels.CHUNK,
    ) -> None:
        self._shape = embeddings.shape[:2]
        self._layout = kernels.Layout.of(self._shape[1], totals, keeps, embeddings.device)
        self._rows, self._scales, self._squares, self._inverse = kernels.whole_rows(
            embeddings.flatten(0, 1)
        )
        self._chunk = chunk

    def deviating(self) -> Tensor:
        """Return float64 [B, N]; see `Items`."""
        found = kernels.deviations(self._layout, self._rows, self._scales, self._squares)
        return found.view(self._shape)

    def changes(self, per_frame: int) -> Tensor:
        """Return float64 [B, N]; see `Items`."""
        found = kernels.changes(self._layout, self._rows, self._inverse, per_frame)
        kernels.over_mean(self._layout, found, per_frame)
        return found.view(self._shape)

    def most_variance(self, multiple: Tensor, noise: float) -> Tensor:
        """Return LongTensor [B, K]; see `Items`."""
        return self._log_determinant(multiple, noise)

    def most_volume(self, variances: Tensor) -> Tensor:
        """Return LongTensor [B, K]; see `Items`."""
        return self._log_determinant(variances, None)

    def _log_determinant(self, given: Tensor, noise: float | None) -> Tensor:
        weighed = kernels.weigh(
            self._layout, self._squares, self._scales, given.contiguous(), noise
        )
        products = kernels.all_products(self._layout, self._rows)
        return kernels.log_determinant(self._layout, products, self._scales, weighed, self._chunk)

    def farthest(self, weights: Tensor | None, first: Tensor | None) -> Tensor:
        """Return LongTensor [B, K]; see `Items`."""
        products = kernels.all_products(self._layout, self._rows)
        if first is None:
            first = kernels.nearest_distances(self._layout, products, self._inverse, self._chunk)
        given = None if weights is None else weights.contiguous()
        return kernels.max_min(self._layout, products, self._inverse, given, first, self._chunk)

    def suppress(
        self, scores: Tensor, threshold: Tensor, groups: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return LongTensor [B, K] and [B]; see `Items`."""
        products = kernels.all_products(self._layout, self._rows)
        given = None if groups is None else groups.contiguous()
        return kernels.suppress(
            self._layout, products, self._inverse, scores.contiguous(), threshold, given,
            self._chunk,
        )  # fmt: skip

    def soft_suppress(self, scores: Tensor, sharpness: float) -> Tensor:
        """Return LongTensor [B, K]; see `Items`."""
        products = kernels.all_products(self._layout, self._rows)
        given = scores.contiguous()
        return kernels.soft_suppress(
            self._layout, products, self._inverse, given, sharpness, self._chunk
        )


class LongItems(Items):
    """Items of one size and of any number of rows: one launch for each row taken, and a few more.

    Parameters
    ----------
    embeddings
        Floating point [B, N, D].
    keep
        K.
    """

    def __init__(self, embeddings: Tensor, keep: int) -> None:
        size, total, _ = embeddings.shape
        self._layout = kernels.Layout.of(total, [total] * size, [keep] * size, embeddings.device)
        self._rows, self._scales, self._squares, self._inverse = kernels.whole_rows(
            embeddings.flatten(0, 1)
        )
        self._size, self._keep, self._embeddings = size, keep, embeddings

    def deviating(self) -> Tensor:
        """Return float64 [B, N]; see `Items`."""
        found = kernels.deviations(self._layout, self._rows, self._scales, self._squares)
        return found.view(self._size, -1)

    def changes(self, per_frame: int) -> Tensor:
        """Return float64 [B, N]; see `Items`."""
        found = kernels.changes(self._layout, self._rows, self._inverse, per_frame)
        # A program cannot hold an item this long to fold it.
        return over_mean(found.view(self._size, -1)[:, per_frame:], per_frame)

    def most_variance(self, multiple: Tensor, noise: float) -> Tensor:
        """Return LongTensor [B, K]; see `Items`."""
        return self._log_determinant(factors_of(self._squared_norms(), multiple, noise))

    def most_volume(self, variances: Tensor) -> Tensor:
        """Return LongTensor [B, K]; see `Items`."""
        return self._log_determinant(factors_to(self._squared_norms(), variances))

    def _squared_norms(self) -> Tensor:
        return (self._squares * self._scales.square()).view(self._size, -1)

    def _log_determinant(self, weighed: Weighed) -> Tensor:
        rows = self._rows.view(self._size, -1, self._rows.shape[1])
        return kernels.log_determinant_by_steps(rows, self._scales, weighed, self._keep)

    def farthest(self, weights: Tensor | None, first: Tensor | None) -> Tensor:
        """Return LongTensor [B, K]; see `Items`."""
        if first is None:
            first = kernels.nearest_distances_in_blocks(
                self._layout, self._rows, self._inverse, _BLOCK_ENTRIES, kernels.CHUNK
            )
        return kernels.max_min_by_steps(
            self._rows.view(self._size, -1, self._rows.shape[1]),
            self._inverse,
            None if weights is None else weights.contiguous(),
            first,
            self._keep,
        )

    def suppress(
        self, scores: Tensor, threshold: Tensor, groups: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return LongTensor [B, K] and [B]; see `Items`. In torch: some launches for each row."""
        return TorchItems(self._embeddings, self._keep).suppress(scores, threshold, groups)

    def soft_suppress(self, scores: Tensor, sharpness: float) -> Tensor:
        """Return LongTensor [B, K]; see `Items`. In torch, as `suppress`."""
        return TorchItems(self._embeddings, self._keep).soft_suppress(scores, sharpness)


def chooses_alike(device: torch.device) -> bool:
    """Say whether kernels choose on a device what torch chooses on the CPU.

    Kernels are tested in an interpreter, which is no GPU: so a process that has one looks itself,
    at two items with copies and a row of zeros among them.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    rows = torch.randn(2, 70, 96, generator=generator, device="cpu")
    rows[:, 5], rows[:, 7] = rows[:, 40], 0
    keep = 24
    fused = FusedItems(rows.to(device), [keep] * 2, [rows.shape[1]] * 2)
    return all(
        torch.equal(one.cpu(), other)
        for one, other in zip(_chosen(fused), _chosen(TorchItems(rows, keep)), strict=True)
    )


def _chosen(items: Items) -> tuple[Tensor, Tensor]:
    return items.most_variance(items.deviating(), noise=0.2), items.farthest(None, None)
