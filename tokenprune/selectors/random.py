"""random: keep tokens blindly. The baseline every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.selectors.base import Selector
from tokenprune.tokens import TokenBatch


@dataclass(frozen=True)
class Random(Selector):
    """Score tokens with one permutation drawn from `seed` and N alone.

    The same item gets the same selection in any batch and on any engine, so every item of N
    tokens keeps the same places; draw again with another seed to average over placements.

    Parameters
    ----------
    seed
        Seed of the method's own generator.
    """

    seed: int = 0

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "nothing: a fixed random draw (baseline)"
    needs: ClassVar[tuple[str, ...]] = ()

    def score(self, tokens: TokenBatch) -> Tensor:
        """Return float32 [B, N]: the same permutation of 0 .. N-1 for every item."""
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(tokens.total, generator=generator).float()
        return order.to(tokens.device).expand(tokens.size, -1)
