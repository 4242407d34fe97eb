"""feature-norm: keep the tokens whose encoder features are longest. A baseline."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from tokenprune.greedy.engine import folded_sum
from tokenprune.selectors.token_vectors import TokenVectors
from tokenprune.tokens import TokenBatch


@dataclass(frozen=True)
class FeatureNorm(TokenVectors):
    """Score s_i = ||x_i||_2 of the encoder's output, before the projector."""

    taken: str = field(default="before", kw_only=True)

    name: ClassVar[str] = "feature-norm"
    summary: ClassVar[str] = "L2 norm of the encoder's features (baseline)"
    needs: ClassVar[tuple[str, ...]] = ("features",)
    takes_sizes: ClassVar[bool] = True

    def score(self, tokens: TokenBatch) -> Tensor:
        """Return float32 [B, N]: the norm of each row of `features`."""
        features = self.vectors(tokens).float()
        return folded_sum(features.square(), dim=-1).sqrt()
