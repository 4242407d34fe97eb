"""sparsevlm: raters among the text rank tokens in three layers, and dropped ones are recycled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.errors import OptionError
from tokenprune.greedy.engine import folded_sum
from tokenprune.greedy.rows import IntegerRows
from tokenprune.inside.base import Asked, InsideMethod, Stage, StagePicks, layers_of, rounded
from tokenprune.merging import Merge
from tokenprune.numerics import full_precision
from tokenprune.selectors.base import ascending
from tokenprune.selectors.fastvid import density_peaks

PUBLISHED = {64: (66, 30, 17), 96: (238, 48, 26), 128: (303, 110, 36), 192: (300, 200, 110)}
"""Tokens of 576 that stay behind each stage, by the average over layers that the paper names them
by."""

LAYERS, DEPTH, TOKENS = (2, 6, 15), 32, 576
"""The layers that rank in the published code, and the model and the image that its numbers are
for."""

_RECYCLED, _OF_A_CLUSTER = 0.3, 10
"""The share of dropped tokens that is recycled, and how many of them make a cluster."""


@dataclass(frozen=True)
class SparseVLM(InsideMethod):
    """Leave out what the text's raters attend to least, and merge the best of it into clusters.

    1. *Raters.* With V the language model's inputs at the item's tokens and T those at the text
       behind it, ``r_j = mean over i of softmax_j(V Tᵀ)_ij``. Text tokens whose r is above the mean
       of r are the raters; all are where none is.
    2. *Ranking.* ``s_i = mean over heads and raters of softmax(q kᵀ / sqrt(d))_i``. Tokens leave
       behind the layer that ranks.
    3. *Recycling.* Of D tokens that leave, the ``m = int(0.3 D) + 1`` of highest s are cut into
       ``c = int(m / 10) + 1`` clusters by density peaks (`tokenprune.selectors.fastvid`; c nearest
       neighbours) of their hidden states. Others go to the nearest centre. The mean of a cluster
       takes the place and the position of its centre.

    Ties go to the lowest index.

    Source: Zhang et al., "SparseVLM", ICML 2025, arXiv 2410.04417, and its released code; of the
    recycling, a port of it. Reconstructions:

    - Other depths than 32 rank in layers of the same relative depth.
    - The counts of other budgets than the published ones lie between theirs: the shares of tokens
      behind the first stages go piecewise linearly with that behind the last, from nothing over the
      published ones to everything.
    - `keep` counts what is there behind the last stage, clusters included. The published counts
      leave clusters out, and are named by an average over layers: 17, 26, 36 and 110 of 576 are
      those of the budgets 64, 96, 128 and 192.
    - Where `keep` is too small for a token and all clusters there are fewer clusters.

    Not taken over are the noise of 1e-6 that there decides between equal densities, and that
    clusters stand behind all kept tokens. There all visual tokens of a prompt are one set; here
    each image, video or crop has `keep` tokens of its own.

    Parameters
    ----------
    layers
        The layers that rank: from 0 (``"2,6,15"``), or as fractions of the depth. None for the
        published ones, scaled to the depth. Three of them: the published counts have as many.
    recycle
        Whether dropped tokens are merged into clusters; if not, `keep` tokens stay as they are.
    """

    layers: str | None = None
    recycle: bool = True

    name: ClassVar[str] = "sparsevlm"
    summary: ClassVar[str] = "attention of text tokens that fit the image; dropped ones are merged"
    paper: ClassVar[str] = "SparseVLM, arXiv 2410.04417"
    asked: ClassVar[Asked] = "text"
    merges: ClassVar[bool] = True
    weighs_text: ClassVar[bool] = True
    reads_states: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            layers_of(self.name, "layers", self.layers)
        if self.layers is not None and self.layers.count(",") != len(LAYERS) - 1:
            raise OptionError(
                f"option layers={self.layers!r} of method {self.name!r} must name three layers, as "
                "the published counts are for three stages, such as '2,6,15'."
            )

    def stages(self, depth: int) -> tuple[Stage, ...]:
        """Return the stages; each is ranked in the layer in front of it."""
        if self.layers is None:
            ranking = [rounded(layer * depth / DEPTH) for layer in LAYERS]
        else:
            ranking = layers_of(self.name, "layers", self.layers, depth)
        return self._stages_behind([layer + 1 for layer in ranking], depth, ranked=1)

    def counts(self, total: int, keep: int) -> tuple[int, ...]:
        """Return what stays behind each stage, interpolated between the published counts."""
        known = [(0, 0, 0), *sorted(PUBLISHED.values(), key=lambda of: of[-1]), (TOKENS,) * 3]
        last = keep * TOKENS / total
        above = next(place for place, of in enumerate(known) if of[-1] >= last)
        low, high = known[above - 1], known[above]
        part = (last - low[-1]) / (high[-1] - low[-1])
        shares = [one + part * (other - one) for one, other in zip(low, high, strict=True)]
        second = max(keep, rounded(shares[1] * total / TOKENS))
        first = max(second, rounded(shares[0] * total / TOKENS))
        return min(first, total), min(second, total), keep

    def text_weights(self, visual: Tensor, text: Tensor) -> Tensor:
        """Return 1 for raters and 0 for other text, float32 [Q]."""
        ratings = rater_scores(visual, text)
        raters = ratings > folded_sum(ratings, dim=0) / len(ratings)
        return torch.where(raters.any(), raters, torch.ones_like(raters)).float()

    def pick(self, scores: Tensor, keep: int, states: Callable[[], Tensor]) -> StagePicks:
        """Return the highest scores, and as the rest of `keep` the centres of clusters."""
        total = len(scores)
        clusters = clusters_of(total, keep) if self.recycle else 0
        order = scores.sort(descending=True, stable=True).indices
        best = order[: keep - clusters]
        if not clusters:
            return StagePicks(ascending(best))
        dropped = total - len(best)
        # In the order of tokens, so that the lowest index wins a tie among equal states.
        recycled = ascending(order[len(best) : len(best) + int(_RECYCLED * dropped) + 1])
        centres, cluster = density_clusters(states()[recycled], clusters)
        kept = ascending(torch.cat([best, recycled[centres]]))
        into = torch.searchsorted(kept, recycled[centres])[cluster]
        sizes = torch.zeros(clusters, device=scores.device).index_add_(
            0, cluster, torch.ones(len(cluster), device=scores.device)
        )
        return StagePicks(kept, Merge(into, recycled, 1.0 / sizes[cluster]))


def rater_scores(visual: Tensor, text: Tensor) -> Tensor:
    """Return how much the visual tokens speak of each text token; step 1 of `SparseVLM`.

    Parameters
    ----------
    visual
        [N, D].
    text
        [Q, D].

    Returns
    -------
    Tensor
        float32 [Q]; they add up to 1.
    """
    with full_precision(visual.device):
        shares = (visual.float() @ text.float().T).softmax(dim=-1)
    return folded_sum(shares, dim=0) / len(shares)


def clusters_of(total: int, keep: int) -> int:
    """Return how many of `keep` places are those of clusters.

    With k best tokens ``m = int(0.3 (total - k)) + 1`` are recycled into ``c = int(m / 10) + 1``. k
    is the largest with ``k + c = keep``, and at least 1: then there are fewer clusters.

    Parameters
    ----------
    total
        n, how many tokens there are.
    keep
        Between 1 and n.
    """
    for best in range(keep, 0, -1):
        dropped = total - best
        clusters = (int(_RECYCLED * dropped) + 1) // _OF_A_CLUSTER + 1 if dropped else 0
        if best + clusters == keep:
            return clusters
    return keep - 1


def density_clusters(rows: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Cut rows into clusters by density peaks (DPC-KNN); step 3 of `SparseVLM`.

    The centres are the rows of highest ``delta * rho`` (`density_peaks`, as many neighbours as
    there are clusters); every other row goes to the centre of least Euclidean distance.

    Parameters
    ----------
    rows
        [m, D].
    clusters
        c, from 1 to m.

    Returns
    -------
    centres
        LongTensor [c], ascending.
    cluster
        LongTensor [m], counted among the c.
    """
    scores = density_peaks(rows[None], clusters)[0]
    centres = ascending(scores.sort(descending=True, stable=True).indices[:clusters])
    whole = IntegerRows.from_embeddings(rows[None])
    # |x|² is the same for all centres, so that |c|² - 2 x c ranks as the distance does.
    products = whole.products_with(centres[None])[0]
    lengths = whole.squared_norms()[0][centres, None]
    cluster = (lengths - 2.0 * products).argmin(dim=0)
    return centres, cluster.scatter(0, centres, torch.arange(clusters, device=rows.device))
