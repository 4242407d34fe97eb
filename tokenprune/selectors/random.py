"""random: keep tokens blindly. The baseline every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.errors import OptionError
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
        Seed of the method's own generator, between 0 and 2**63 - 1.

    Raises
    ------
    OptionError
        On construction, for another seed.
    """

    seed: int = 0

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "nothing: a fixed random draw (baseline)"
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.seed < 2**63:
            raise OptionError(
                f"option seed={self.seed} of method {self.name!r} must be between 0 and 2**63 - 1."
            )

    def score(self, tokens: TokenBatch) -> Tensor:
        """Return float32 [B, N]: the same permutation of 0 .. N-1 for every item."""
        # The device is named because a default device may be set, which draws otherwise or fails.
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        order = torch.randperm(tokens.total, generator=generator, device="cpu").float()
        return order.to(tokens.device).expand(tokens.size, -1)
