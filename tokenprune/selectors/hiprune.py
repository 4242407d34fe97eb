"""hiprune: anchors by attention in the middle of the encoder, others by attention (HiPrune)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.errors import OptionError
from tokenprune.selectors.base import ByPlace, Selector, top_k
from tokenprune.selectors.cls_attention import mean_over_heads
from tokenprune.tokens import TokenBatch
from tokenprune.transfer import to_device

_GROUP = 5  # an anchor and its neighbours


@dataclass(frozen=True)
class HiPrune(Selector):
    """Anchors of a middle layer with their neighbours, and tokens the scoring layer looks at.

    With r the attention that a token receives, the mean over heads and all queries, and K to keep:

        anchors: the round(K * alpha / 5) tokens of highest r at the middle layer
        the anchors, and of each the tokens before and after it and above and below it, stay
        the others are the tokens of highest r at the scoring layer, up to K.

    Neighbours are counted in the raster (-1, +1, -W, +W for W columns), so that those before and
    after an anchor may be in another row, and at the ends it is the first or last token. The tokens
    of a video are one raster, one frame after the other.

    Source: HiPrune, arXiv 2508.00553, and its released code, which rounds half to even. With the
    paper's alpha there is no anchor up to K = 25, one at K = 64. Unlike there, there are no more
    anchors than K // 5, which makes a difference only for an alpha near 1: anchors and neighbours
    would be more than K tokens then.

    Parameters
    ----------
    alpha
        The share of K that anchors and their neighbours may have, from 0 to 1.
    """

    name: ClassVar[str] = "hiprune"
    summary: ClassVar[str] = "attention received at a middle layer with neighbours, and at the end"
    paper: ClassVar[str] = "HiPrune, arXiv 2508.00553"
    needs: ClassVar[tuple[str, ...]] = ("middle_attention", "received_attention")
    by_place: ClassVar[ByPlace] = "place"
    needs_picture: ClassVar[bool] = True

    alpha: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise OptionError(
                f"option alpha={self.alpha!r} of method {self.name!r} must be between 0 and 1; the "
                "paper has 0.1."
            )

    def score(self, tokens: TokenBatch) -> Tensor:
        """Return float32 [B, N]: attention received at the scoring layer, averaged over heads."""
        return mean_over_heads(tokens.require("received_attention"))

    def pick(self, tokens: TokenBatch, scores: Tensor, keep: int) -> Tensor:
        """Return LongTensor [B, K], ascending."""
        anchors = min(round(keep * self.alpha / _GROUP), keep // _GROUP)
        if anchors:
            middle = mean_over_heads(tokens.require("middle_attention"))
            order = torch.sort(middle, dim=-1, descending=True, stable=True).indices
            near = _with_neighbours(order[:, :anchors], tokens.total, tokens.grid[2])
            # Ahead of all others, and few enough that all of them stay.
            scores = scores.scatter(1, near, math.inf)
        return top_k(scores, keep)


def _with_neighbours(anchors: Tensor, total: int, columns: int) -> Tensor:
    """Return LongTensor [B, 5 s], anchors [B, s] and the tokens beside them, some of them twice."""
    steps = torch.tensor([0, -1, 1, -columns, columns], dtype=torch.int64, device="cpu")
    beside = anchors[:, :, None] + to_device(steps, anchors.device)
    return beside.clamp(0, total - 1).flatten(1)
