"""The baseline `random` as it should be compared with: another draw for every image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.errors import TokensError
from tokenprune.selectors.base import Selector
from tokenprune.selectors.random import Random
from tokenprune.tokens import TokenBatch


@dataclass(frozen=True)
class RandomPerImage(Selector):
    """Method `random` with a seed of its own for each image of one batch.

    With one seed every image loses the same places, and a set's accuracy hangs on that one draw.

    Parameters
    ----------
    seeds
        One for each item of the batch.

    Raises
    ------
    TokensError
        By `score`, if it is asked about another number of items.
    """

    seeds: tuple[int, ...]

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "nothing: another random draw for every image (baseline)"
    needs: ClassVar[tuple[str, ...]] = ()
    of_place: ClassVar[bool] = True

    def score(self, tokens: TokenBatch) -> Tensor:
        """Return float32 [B, N]: in each row what `random` with that row's seed scores."""
        if tokens.size != len(self.seeds):
            raise TokensError(
                f"there are {len(self.seeds)} seeds for {tokens.size} items. Give one for each."
            )
        return torch.stack([Random(seed=seed).score(tokens)[0] for seed in self.seeds])
