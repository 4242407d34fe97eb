"""visionzip: what the CLS token attends to, and the rest merged into some of it (VisionZip)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokenprune.errors import OptionError
from tokenprune.greedy.engine import folded_sum
from tokenprune.merging import Merge
from tokenprune.representation import representatives
from tokenprune.selectors.base import ByPlace, Picks, Selector, ascending
from tokenprune.selectors.cls_attention import mean_over_heads
from tokenprune.tokens import TokenBatch


@dataclass(frozen=True)
class VisionZip(Selector):
    """Dominant tokens by CLS attention, and contextual ones that the rest is merged into.

    With a the CLS token's attention, K to keep, d = int(K * dominant_ratio), at least 1, and
    c = K - d:

        dominant: the d tokens of highest a, which stay as they are
        of the R others, in their order, those at 0, s, 2 s, ..., s = R // c, are the c targets
        each token that is left goes to the target of highest cosine of their keys, the mean over
        heads; and a target's feature becomes x_target + mean(x of the tokens that go to it).

    That is a sum of two and not a mean, as published; a target that no token goes to stays as it
    is. Features are added in front of the projector, and a merged row has its target's position.

    Source: Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models",
    arXiv 2412.04467, and its released code. There the encoder's CLS token is one of the dominant
    ones; what these models hand on has no CLS token, so that there is one dominant patch more.
    The paper's pairs are 54 + 10, 108 + 20 and 162 + 30: all of them are the default ratio, as are
    27 + 5 of a crop. Other K are split alike, the contextual ones rounded up. Rows are in the order
    of the image, and not the dominant ones first.

    Parameters
    ----------
    dominant_ratio
        The share of K that is dominant, above 0 and at most 1, which merges nothing.
    """

    name: ClassVar[str] = "visionzip"
    summary: ClassVar[str] = "CLS attention; the rest is merged by likeness of keys"
    paper: ClassVar[str] = "VisionZip, arXiv 2412.04467"
    needs: ClassVar[tuple[str, ...]] = ("features", "cls_attention", "keys")
    by_place: ClassVar[ByPlace] = "place"  # every s-th token is a target
    merges: ClassVar[Literal["", "features", "embeddings"]] = "features"

    dominant_ratio: float = 54 / 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.dominant_ratio <= 1:
            raise OptionError(
                f"option dominant_ratio={self.dominant_ratio!r} of method {self.name!r} must be "
                "above 0 and at most 1; the paper has 54 of 64 tokens."
            )

    def split(self, keep: int) -> tuple[int, int]:
        """Return how many tokens are dominant and contextual if `keep` stay."""
        dominant = max(1, int(keep * self.dominant_ratio))
        return dominant, keep - dominant

    def select(self, tokens: TokenBatch, keep: int) -> Picks:
        """Return LongTensor [B, K], ascending, attention as scores, and what is merged."""
        scores = mean_over_heads(tokens.require("cls_attention"))
        dominant, contextual = self.split(keep)
        order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
        if not contextual:
            return Picks(ascending(order[:, :dominant]), scores)
        rest = ascending(order[:, dominant:])
        step = max(1, rest.shape[1] // contextual)
        targets = rest[:, ::step][:, :contextual]
        kept = ascending(torch.cat([order[:, :dominant], targets], dim=1))
        # Their sum over heads has the cosines of their mean.
        metric = folded_sum(tokens.require("keys").float(), dim=1)
        return Picks(kept, scores, _merges(metric, kept, targets, rest))


def _merges(metric: Tensor, kept: Tensor, targets: Tensor, rest: Tensor) -> list[Merge]:
    """Return the merges of each item: of all of the rest, targets included.

    Parameters
    ----------
    metric
        float32 [B, N, d], what tokens are compared by.
    kept, targets, rest
        LongTensor [B, K], [B, c] and [B, R], ascending.
    """
    nearest = representatives(metric, targets).gather(1, rest)
    into_token = targets.gather(1, nearest)
    is_target = into_token == rest
    joined = torch.zeros_like(targets).scatter_add_(1, nearest, (~is_target).long())
    share = 1.0 / joined.gather(1, nearest).float()
    weight = torch.where(is_target, 1.0, share)
    into = torch.searchsorted(kept, into_token)
    return [Merge(*parts, "features") for parts in zip(into, rest, weight, strict=True)]
