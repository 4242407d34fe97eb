"""Items of rows that an objective chooses from, whoever computes it."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from tokenprune.greedy import objectives
from tokenprune.greedy.neighbours import AllCosines, ListedCosines
from tokenprune.greedy.rows import ALL_PAIRS, IntegerRows


class Items(ABC):
    """Items of rows, and how many rows of each stay.

    What there is for each row has the shape [B, N]. What is chosen has the shape [B, K], ascending.
    Where items differ, N and K are the largest, and 0 stands behind an item's own K.
    """

    @abstractmethod
    def deviating(self) -> Tensor:
        """Return 1 plus `IntegerRows.deviations`, float64."""

    @abstractmethod
    def changes(self, per_frame: int) -> Tensor:
        """Return `IntegerRows.changes`, float64."""

    @abstractmethod
    def most_variance(self, multiple: Tensor, noise: float) -> Tensor:
        """Choose by `objectives.most_variance`, of `objectives.factors_of`."""

    @abstractmethod
    def most_volume(self, variances: Tensor) -> Tensor:
        """Choose by `objectives.most_variance`, of `objectives.factors_to`."""

    @abstractmethod
    def farthest(self, weights: Tensor | None, first: Tensor | None) -> Tensor:
        """Choose by `objectives.farthest`; without `first` from DivPrune's start.

        That is the token farthest from its nearest neighbour.
        """

    @abstractmethod
    def suppress(
        self, scores: Tensor, threshold: Tensor, groups: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Choose by `objectives.suppress`; what is chosen is in the order taken."""

    @abstractmethod
    def soft_suppress(self, scores: Tensor, sharpness: float) -> Tensor:
        """Choose by `objectives.soft_suppress`."""

    @abstractmethod
    def thin_out(self, order: Tensor, fixed: int, per_round: int) -> Tensor:
        """Choose by `objectives.thin_out` from all rows, in an order LongTensor [B, N].

        The first `fixed` of the order stay in any case, and are not compared.
        """


class TorchItems(Items):
    """Items of one size, and the objectives in torch.

    Parameters
    ----------
    embeddings
        Floating point [B, N, D].
    keep
        K.
    """

    def __init__(self, embeddings: Tensor, keep: int) -> None:
        self._rows = IntegerRows.from_embeddings(embeddings)
        self._keep = keep

    def deviating(self) -> Tensor:
        """Return float64 [B, N]; see `Items`."""
        return 1.0 + self._rows.deviations()

    def changes(self, per_frame: int) -> Tensor:
        """Return float64 [B, N]; see `Items`."""
        return self._rows.changes(per_frame)

    def most_variance(self, multiple: Tensor, noise: float) -> Tensor:
        """Return LongTensor [B, K]; see `Items`."""
        return self._most_variance(
            objectives.factors_of(self._rows.squared_norms(), multiple, noise)
        )

    def most_volume(self, variances: Tensor) -> Tensor:
        """Return LongTensor [B, K]; see `Items`."""
        return self._most_variance(objectives.factors_to(self._rows.squared_norms(), variances))

    def _most_variance(self, weighed: objectives.Weighed) -> Tensor:
        return _ascending(objectives.most_variance(self._rows, weighed, self._keep))

    def farthest(self, weights: Tensor | None, first: Tensor | None) -> Tensor:
        """Return LongTensor [B, K]; see `Items`."""
        begin = self._rows.nearest_distances().argmax(dim=-1) if first is None else first
        return _ascending(objectives.farthest(self._rows, self._keep, weights, begin))

    def suppress(
        self, scores: Tensor, threshold: Tensor, groups: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return LongTensor [B, K] and [B]; see `Items`."""
        return objectives.suppress(self._rows, scores, threshold, self._keep, groups)

    def soft_suppress(self, scores: Tensor, sharpness: float) -> Tensor:
        """Return LongTensor [B, K]; see `Items`."""
        return _ascending(objectives.soft_suppress(self._rows, scores, sharpness, self._keep))

    def thin_out(self, order: Tensor, fixed: int, per_round: int) -> Tensor:
        """Return LongTensor [B, K]; see `Items`."""
        whole = self._rows.rows
        if whole.shape[1] <= ALL_PAIRS:
            products = torch.bmm(whole, whole.transpose(1, 2))
            nearest = AllCosines(products, self._rows.inverse_norms)
            return thinned_out(nearest, order, fixed, self._keep, per_round)
        # Of long items one at a time: their lists have lengths of their own.
        alone = [
            thinned_out(ListedCosines(rows), order[item, None], fixed, self._keep, per_round)
            for item, rows in enumerate(self._rows.each())
        ]
        return torch.cat(alone)


def thinned_out(
    nearest: objectives.NearestCosine, order: Tensor, fixed: int, keep: int, per_round: int
) -> Tensor:
    """Return LongTensor [B, K], ascending: the first `fixed` of an order and what is left.

    Parameters
    ----------
    nearest, order, per_round
        See `objectives.thin_out`.
    fixed
        How many of the order stay in any case.
    keep
        K, at least `fixed`.
    """
    rest = objectives.thin_out(nearest, order[:, fixed:], keep - fixed, per_round)
    return _ascending(torch.cat([order[:, :fixed], rest], dim=1))


def _ascending(taken: Tensor) -> Tensor:
    return taken.sort(dim=-1).values
