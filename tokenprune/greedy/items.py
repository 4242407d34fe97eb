"""Items of rows that an objective chooses from, whoever computes it."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from tokenprune.greedy import objectives
from tokenprune.greedy.rows import IntegerRows


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


def _ascending(taken: Tensor) -> Tensor:
    return taken.sort(dim=-1).values
