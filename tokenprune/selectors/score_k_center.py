"""score-k-center: tokens far from each other, weighted by the CLS token's attention (SCoRe)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from tokenprune.errors import OptionError
from tokenprune.numerics import power
from tokenprune.selectors.cls_attention import mean_over_heads
from tokenprune.selectors.divprune import pick_diverse
from tokenprune.selectors.token_vectors import TokenVectors
from tokenprune.tokens import TokenBatch


@dataclass(frozen=True)
class ScoreKCenter(TokenVectors):
    """Greedy k-center over encoder features v, each distance weighted by the token's score.

    With s_i the CLS token's attention to token i, the mean over heads, the first token is that of
    largest s, and then always

        argmax_i  s_i^alpha * min_{j taken} (1 - cos(v_i, v_j)).

    A token that is taken is not taken again, the lowest index wins a tie, and tokens of score 0
    come after all others.

    Source: SCoRe, CVPR 2026. A reconstruction from a description of the paper: it was not checked
    against the authors' code. O(K * N * C) time.

    Parameters
    ----------
    alpha
        How much scores count; 0 leaves the distances alone, but for tokens of score 0. The paper
        has values from 0.6 to 1.
    """

    name: ClassVar[str] = "score-k-center"
    summary: ClassVar[str] = "distances between the encoder's features, times CLS attention"
    paper: ClassVar[str] = "SCoRe, CVPR 2026 (a reconstruction)"
    needs: ClassVar[tuple[str, ...]] = ("features", "cls_attention")

    alpha: float = 1.0
    taken: str = field(default="before", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0:
            raise OptionError(
                f"option alpha={self.alpha!r} of method {self.name!r} must be at least 0; the "
                "paper has 0.6 to 1."
            )

    def score(self, tokens: TokenBatch) -> Tensor:
        """Return float32 [B, N]: the CLS token's attention, averaged over heads."""
        return mean_over_heads(tokens.require("cls_attention"))

    def pick(self, tokens: TokenBatch, scores: Tensor, keep: int) -> Tensor:
        """Return LongTensor [B, K], ascending."""
        weights = scores
        if self.alpha != 1:
            # Rounded, as the last bits of a power depend on who computes it.
            raised = power(scores.double(), self.alpha).float()
            weights = raised.masked_fill(scores == 0, 0.0)  # with alpha 0 it is 1
        first = scores.argmax(dim=-1)
        return pick_diverse(self.vectors(tokens), keep, weights, first)
