"""vispruner: what the CLS token attends to, and of the rest what is least alike (VisPruner)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.errors import OptionError
from tokenprune.greedy.engine import thin_out
from tokenprune.selectors.base import ByPlace
from tokenprune.selectors.cls_attention import mean_over_heads
from tokenprune.selectors.token_vectors import TokenVectors
from tokenprune.tokens import TokenBatch


@dataclass(frozen=True)
class VisPruner(TokenVectors):
    """Important tokens by CLS attention, and diverse ones that are left when duplicates have gone.

    With a the CLS token's attention, the mean over heads, and K to keep:

        important: the int(K * important_ratio) tokens of highest a
        the others in the order of a, highest first, are a list; while it is too long, its even
        places are compared with its odd ones, s_i = max_j cos(x_i, x_j) of the features x, and the
        per_round even ones of highest s go; the list is then the even ones that are left, highest s
        first, and the odd ones.

    Source: Zhang et al., "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token
    Pruning in VLMs", arXiv 2412.01818 v2, and its released code. That code fails where the list
    has an odd length, or less than `per_round` pairs while more than one must go. Here the even
    places are one more than the odd ones then, and no more than all of them go in a round. The
    result is in the order of the image, as there. Which of exact copies stays depends on their
    places in the list.

    About N / per_round rounds, each with the cosines of all pairs of two halves of the list. All
    cosines of up to 4,096 tokens are held; of more, those of each token to the 64 most like it.

    Parameters
    ----------
    important_ratio
        The share of K that goes by attention, from 0 to 1. The authors' README has 0.5, and 0.75
        for 64 tokens on MME.
    per_round
        How many tokens go in a round, at least 1.
    """

    name: ClassVar[str] = "vispruner"
    summary: ClassVar[str] = "CLS attention, and what is least alike of the rest"
    paper: ClassVar[str] = "VisPruner, arXiv 2412.01818"
    needs: ClassVar[tuple[str, ...]] = ("features", "cls_attention")
    by_place: ClassVar[ByPlace] = "place"  # even and odd places of a list

    important_ratio: float = 0.5
    per_round: int = 8
    taken: str = field(default="before", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.important_ratio <= 1:
            raise OptionError(
                f"option important_ratio={self.important_ratio!r} of method {self.name!r} must be "
                "between 0 and 1; the authors have 0.5."
            )
        if self.per_round < 1:
            raise OptionError(
                f"option per_round={self.per_round} of method {self.name!r} must be at least 1; "
                "the authors have 8."
            )

    def score(self, tokens: TokenBatch) -> Tensor:
        """Return float32 [B, N]: the CLS token's attention, averaged over heads."""
        return mean_over_heads(tokens.require("cls_attention"))

    def pick(self, tokens: TokenBatch, scores: Tensor, keep: int) -> Tensor:
        """Return LongTensor [B, K], ascending."""
        important = int(keep * self.important_ratio)
        # Stable, as torch leaves the order of equal scores open otherwise.
        order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
        return thin_out(self.vectors(tokens), order, important, keep, self.per_round)
