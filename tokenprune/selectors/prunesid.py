"""prunesid: groups of tokens by principal components, and the salient ones of each (PruneSID)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenprune.greedy import engine
from tokenprune.selectors.base import Picks
from tokenprune.selectors.token_vectors import TokenVectors
from tokenprune.tokens import TokenBatch
from tokenprune.transfer import to_device, to_host

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class PruneSID(TokenVectors):
    """Principal components group the tokens; in each group alike ones are suppressed.

    For k tokens, with x the features and a the CLS token's attention summed over heads:

    1. V are the right singular vectors of sigmoid(x)ᵀ, channels being the samples and each token's
       mean taken off; a token's group is the one of the first ``int(k / 4)`` in which it has its
       largest ``|V_ic|``.
    2. Suppression in each group: always the token of highest a, which drops those whose cosine to
       it is above ``(k / 32) * mean cosine of all pairs``. Those taken are the group's survivors.
    3. Quotas: ``low = min(1, size)`` and ``up = min(5 * ceil(k / 64), size, survivors)``, all up
       raised by 1 together, at most to the sizes, until they add up to k. A group has low and its
       part of ``k - sum low`` by its share of the survivors (differences of ``round(cumsum)``,
       halves to the even), at most up; what is missing goes to the groups of most survivors, as
       much as up allows. In a group survivors stay in the order taken, then the others by a.

    The lowest index wins a tie.

    Source: "Prune Redundancy, Preserve Essence: Vision Token Compression in VLMs via Synergistic
    Importance-Diversity" (PruneSID) and its released code for LLaVA: features and attention of
    layer -2. Where it differs from that:

    - The authors take `torch.pca_lowrank`, which is random: it shares 77 % of the tokens with
      itself under another seed. Here the decomposition is exact, in float64, from the eigenvectors
      of the smaller of the two matrices of products. Components that hold nothing but rounding
      group no tokens.
    - At least one group, and no more than there are components; the authors' code fails for k
      below 4 or above four times the width.
    - Theirs counts the CLS token as one of k. Here all `keep` are patches, see `cls_counts`.

    The authors' other form, for Qwen2-VL, has other scores and thresholds and is not this one. On a
    GPU the host waits for the decomposition and for the groups' sizes. O(N * N * C) time; up to
    4,096 tokens all pairs' cosines may be held on a GPU, otherwise memory is O(N * C).

    Parameters
    ----------
    cls_counts
        Take all numbers from ``k = keep + 1``, one of which is the CLS token: what the authors'
        code keeps of patches at k.
    """

    cls_counts: bool = False
    taken: str = field(default="before", kw_only=True)

    name: ClassVar[str] = "prunesid"
    summary: ClassVar[str] = "groups by principal components, salient and unlike tokens of each"
    paper: ClassVar[str] = "PruneSID, ICLR 2026"
    needs: ClassVar[tuple[str, ...]] = ("features", "cls_attention")

    def select(self, tokens: TokenBatch, keep: int) -> Picks:
        """Return LongTensor [B, K], ascending; there are no scores."""
        features, attention = self.vectors(tokens), tokens.require("cls_attention")
        size, total, width = features.shape
        if keep == total:
            every = torch.arange(total, dtype=torch.int64, device=features.device)
            return Picks(every.expand(size, -1))
        published = keep + self.cls_counts
        count = max(1, min(published // 4, total, width))
        groups = torch.stack([_components(item, count) for item in features])
        # Rounding must not put a copy into another group than the first of its kind.
        groups = groups.gather(1, engine.first_equal_rows(features))
        salience = attention.double()
        salience = engine.folded_sum(salience, 1) if attention.ndim == 3 else salience
        threshold = mean_cosine(features) * (published / 32)
        order, survivors = engine.suppress(
            features, _rising(salience), threshold.float(), total, groups
        )
        return Picks(_within_quotas(groups, order, survivors, keep, published, count))


def _components(features: Tensor, count: int) -> Tensor:
    """Return LongTensor [N], in which of the first `count` components each token is largest.

    Parameters
    ----------
    features
        Floating point [N, C].
    count
        At most the smaller of N and C.
    """
    # A copy of its own: memory that starts elsewhere may be multiplied in another order.
    values = features.to(torch.float64, copy=True).contiguous().sigmoid_()
    values -= values.mean(dim=1, keepdim=True)
    total, width = values.shape
    if total <= width:
        squares, vectors = torch.linalg.eigh(values @ values.T)
    else:
        squares, of_channels = torch.linalg.eigh(values.T @ values)
        # Each is as long as its singular value.
        vectors = values @ of_channels
        vectors /= squares.clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    squares, vectors = squares.flip(0)[:count], vectors.flip(1)[:, :count]
    nothing = squares <= squares[:1] * max(total, width) * torch.finfo(torch.float64).eps
    groups: Tensor = vectors.abs().masked_fill_(nothing, 0.0).argmax(dim=1)
    return groups


def mean_cosine(rows: Tensor) -> Tensor:
    """Return float64 [B], the mean cosine of all pairs of an item's rows [B, N, C]; inf for one.

    All pairs' cosines are the square of the sum of rows of length 1: O(N * C) time.
    """
    total = rows.shape[1]
    whole = engine.integer_rows(rows)
    units = whole.rows * whole.inverse_norms[..., None]
    summed = engine.folded_sum(engine.folded_sum(units, 1).square(), 1)
    own = engine.folded_sum(whole.squares * whole.inverse_norms.square(), 1)
    pairs = total * (total - 1)
    return (summed - own) / pairs if pairs else torch.full_like(summed, math.inf)


def _rising(scores: Tensor) -> Tensor:
    """Return float32 [B, N] in the order of scores [B, N], in which all are apart.

    The first of equal ones is highest.
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    # Whole numbers that float32 holds exactly.
    falling = torch.arange(
        scores.shape[1], 0, -1, dtype=torch.float32, device=scores.device
    ).expand_as(order)
    return torch.empty_like(scores, dtype=torch.float32).scatter_(1, order, falling)


def _within_quotas(
    groups: Tensor, order: Tensor, survivors: Tensor, keep: int, published: int, count: int
) -> Tensor:
    """Return LongTensor [B, K], ascending: of each group as many as its quota, in the order given.

    Parameters
    ----------
    groups
        LongTensor [B, N].
    order
        LongTensor [B, N], all tokens, survivors in front.
    survivors
        LongTensor [B], how many they are.
    keep, published, count
        K, the k of the published numbers, and how many groups there are.
    """
    total = groups.shape[1]
    of_order = groups.gather(1, order)
    place = torch.arange(total, dtype=torch.int64, device=groups.device)
    ones = torch.ones_like(groups)
    sizes = torch.zeros_like(groups[:, :1]).repeat(1, count).scatter_add(1, groups, ones)
    survives = (place < survivors[:, None]).long()
    surviving = torch.zeros_like(sizes).scatter_add_(1, of_order, survives)
    of_host = zip(*(each.numpy() for each in to_host([sizes, surviving])), strict=True)
    quotas = np.stack([group_quotas(own, alive, keep, published) for own, alive in of_host])
    given = to_device(torch.from_numpy(quotas), groups.device)
    # Groups side by side, each in its order: a token's place in its group is known then.
    by_group = of_order.sort(dim=-1, stable=True)
    first = sizes.cumsum(dim=1) - sizes
    rank = place - first.gather(1, by_group.values)
    out = rank >= given.gather(1, by_group.values)
    dropped = torch.zeros_like(out).scatter_(1, order.gather(1, by_group.indices), out)
    # Kept ones come first, in their order: the sort is stable.
    return dropped.byte().sort(dim=-1, stable=True).indices[:, :keep]


def group_quotas(sizes: Counts, survivors: Counts, keep: int, published: int) -> Counts:
    """Return how many tokens of each group stay; they add up to `keep`.

    Parameters
    ----------
    sizes, survivors
        int64 [G], how many tokens a group has, and how many survived.
    keep, published
        How many tokens stay, and the k of the published numbers, no more than there are tokens.
    """
    low = np.minimum(1, sizes)
    up = np.minimum(np.minimum(5 * math.ceil(published / 64), sizes), survivors)
    while up.sum() < published:
        up = np.minimum(up + 1, sizes)
    rest = keep - int(low.sum())
    parts = np.round(np.cumsum(survivors / max(1, survivors.sum())) * rest).astype(np.int64)
    quotas: Counts = np.minimum(low + np.diff(parts, prepend=0), up)
    for group in np.argsort(-survivors, kind="stable"):
        quotas[group] += min(up[group] - quotas[group], keep - quotas.sum())
    return quotas
