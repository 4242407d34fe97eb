"""id-selection: the highest score, again and again, while what is like it loses (ID-Selection)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from tokenprune.errors import OptionError
from tokenprune.greedy.engine import Some, pick, scaled
from tokenprune.greedy.items import Items
from tokenprune.selectors.cls_attention import mean_over_heads
from tokenprune.selectors.token_vectors import TokenVectors
from tokenprune.tokens import TokenBatch


@dataclass(frozen=True)
class IdSelection(TokenVectors):
    """Importance, from which similar tokens that were taken before are subtracted softly.

    With s_i the CLS token's attention to token i, the mean over heads, scaled to [0, 1] in each
    item, and x the encoder's features: K times take ``i = argmax s`` of those left, and let

        s_j = max(0, s_j - exp(-sharpness * (1 - cos(x_i, x_j))²) * s_i)   for all others j.

    The lowest index wins a tie, also among tokens whose score has fallen to 0.

    Source: ID-Selection, arXiv 2604.05601. A reconstruction from a description of the paper, whose
    sharpness is 20: it was not checked against the authors' code, and that scores are attention
    and cosines those of features is our reading. O(K * N * C) time.

    Parameters
    ----------
    sharpness
        How fast the loss fades with the distance. Above 0; a high one spares all but the most
        similar tokens.
    """

    name: ClassVar[str] = "id-selection"
    summary: ClassVar[str] = "CLS attention, of which tokens like those taken lose a share"
    paper: ClassVar[str] = "ID-Selection, arXiv 2604.05601 (a reconstruction)"
    needs: ClassVar[tuple[str, ...]] = ("features", "cls_attention")

    sharpness: float = 20.0
    taken: str = field(default="before", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sharpness > 0:
            raise OptionError(
                f"option sharpness={self.sharpness!r} of method {self.name!r} must be above 0; the "
                "paper has 20."
            )

    def score(self, tokens: TokenBatch) -> Tensor:
        """Return float32 [B, N]: the CLS token's attention, averaged over heads."""
        return mean_over_heads(tokens.require("cls_attention"))

    def pick(self, tokens: TokenBatch, scores: Tensor, keep: int) -> Tensor:
        """Return LongTensor [B, K], ascending."""
        importance, _ = scaled(scores)

        def choose(items: Items, some: Some) -> Tensor:
            return items.soft_suppress(importance[some], self.sharpness)

        return pick(self.vectors(tokens), keep, choose)
