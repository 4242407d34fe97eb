"""prumerge-plus: outliers of attention and an even grid, each merged with its like (PruMerge+)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from tokenprune.errors import OptionError, TokensError
from tokenprune.merging import Merge
from tokenprune.representation import nearest_tokens
from tokenprune.selectors.base import ByPlace, Picks, Selector, ascending
from tokenprune.tokens import TokenBatch


@dataclass(frozen=True)
class PruMergePlus(Selector):
    """PruMerge+ with a fixed count: tokens by attention, others evenly spread, and merged rows.

    With a the CLS token's attention as one head over the full width, k the keys over the full
    width, x the features, and K to keep:

        m = K - 1 tokens (one for K = 1): the m // 4 of highest a, at least one; and of the R
        others, in their order, those at i * R // n for the n that are missing, i = 0 .. n - 1
        the row of each is x_i + sum over its `neighbours` nearest tokens j by cosine of k, kept or
        not, of a_j x_j, whose weights do not add up to 1
        one more row is the sum over all dropped tokens of a_j x_j; it has the place of the dropped
        token of highest a, the largest part of it.

    Features are added in front of the projector.

    Source: Shang et al., "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal
    Models", arXiv 2403.15388, and its released code. As published, the number of tokens depends on
    the image: `adaptive_tokens` has them and `adaptive_count` says how many rows that are, to be
    used as K. A prompt whose placeholders are counted before the image is encoded needs a fixed
    count, which is ours: as published about a quarter of the tokens are there for their attention
    and three quarters for their place. The extra row is last and has no place in the released code,
    whose other rows are in the order of attention; here all rows are in the order of the image.

    Parameters
    ----------
    neighbours
        How many tokens are added to each, at least 0. All others where there are fewer.
    """

    name: ClassVar[str] = "prumerge-plus"
    summary: ClassVar[str] = "attention over the full width and an even grid, with rows merged"
    paper: ClassVar[str] = "LLaVA-PruMerge, arXiv 2403.15388"
    needs: ClassVar[tuple[str, ...]] = ("features", "keys", "wide_attention")
    by_place: ClassVar[ByPlace] = "place"
    merges: ClassVar[Literal["", "features", "embeddings"]] = "features"

    neighbours: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neighbours < 0:
            raise OptionError(
                f"option neighbours={self.neighbours} of method {self.name!r} must be at least 0; "
                "the authors have 32."
            )

    def select(self, tokens: TokenBatch, keep: int) -> Picks:
        """Return LongTensor [B, K], ascending, attention as scores, and what is merged."""
        scores = tokens.require("wide_attention").to(torch.float32, copy=True)
        if keep == tokens.total:  # nothing is dropped, and no row merged
            every = torch.arange(keep, device=scores.device)
            return Picks(every.expand(tokens.size, -1), scores)
        chosen, dropped = _split(scores, max(1, keep - 1))
        # The row of all that is dropped has the place of the first, that of highest attention.
        kept = ascending(torch.cat([chosen, dropped[:, : keep - chosen.shape[1]]], dim=1))
        count = min(self.neighbours, tokens.total - 1)
        keys = tokens.require("keys").movedim(1, 2).flatten(2)
        near = nearest_tokens(keys, chosen, count).flatten(1)
        into = [chosen, chosen.repeat_interleave(count, dim=1)]
        of = [chosen, near]
        weight = [torch.ones_like(chosen, dtype=torch.float32), scores.gather(1, near)]
        if keep > 1:
            into.append(dropped[:, :1].expand_as(dropped))
            of.append(dropped)
            weight.append(scores.gather(1, dropped))
        places = torch.searchsorted(kept, torch.cat(into, dim=1))
        parts = zip(places, torch.cat(of, dim=1), torch.cat(weight, dim=1), strict=True)
        return Picks(kept, scores, [Merge(*of_item, "features") for of_item in parts])


def _split(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the tokens that stay, LongTensor [B, count], and the others, by score, highest first.

    Parameters
    ----------
    scores
        float32 [B, N].
    count
        Below N.
    """
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    important = max(1, count // 4)
    others = order[:, important:]
    total, spread = others.shape[1], count - important
    if not spread:
        return order[:, :important], others
    in_order = ascending(others)
    places = torch.arange(spread, device=scores.device) * total // spread
    even = in_order[:, places]
    is_even = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, even, True)
    # A stable sort keeps the order of those that are dropped, behind which the even ones go.
    last = is_even.gather(1, others).byte().sort(dim=-1, stable=True).indices
    dropped = others.gather(1, last)[:, : total - spread]
    return torch.cat([order[:, :important], even], dim=1), dropped


def adaptive_tokens(attention: Tensor) -> Tensor:
    """Return the tokens that PruMerge+ keeps of an image as published, whatever their number.

    With r the share of tokens whose attention is above Q3 + 1.5 (Q3 - Q1), the quartiles
    interpolated linearly: the int(N r) of highest attention, in that order, and then the places 0,
    s, 2 s, ... below N - 1 that are not among them, s = int(int(1 / r) / 3). The last place is
    never added, as the released code has 575 for 576 tokens. The row that is made of all dropped
    tokens comes on top of these.

    Parameters
    ----------
    attention
        Floating point [N]; see `VisualTokens.wide_attention`.

    Returns
    -------
    Tensor
        LongTensor on the CPU, in the published order.

    Raises
    ------
    TokensError
        If no token is an outlier, or more than a third are: the published step is infinite or 0.
    """
    values = attention.detach().to("cpu", torch.float64).numpy()
    low, high = np.percentile(values, [25, 75])
    outliers = int((values > high + 1.5 * (high - low)).sum())
    if not 0 < 3 * outliers <= len(values):
        raise TokensError(
            f"{outliers} of {len(values)} tokens are outliers of attention. PruMerge+ as published "
            "is defined where there is one, and where they are no more than a third. Give a number "
            "of tokens to keep instead."
        )
    ratio = outliers / len(values)
    by_attention = np.argsort(-values, kind="stable")[: int(len(values) * ratio)]
    even = np.arange(0, len(values) - 1, int(int(1 / ratio) / 3))
    added = even[~np.isin(even, by_attention)]
    return torch.from_numpy(np.concatenate([by_attention, added]).astype(np.int64))


def adaptive_count(attention: Tensor) -> int:
    """Return how many rows PruMerge+ as published makes of an image; see `adaptive_tokens`.

    One more than tokens are kept, for the row that is made of all others.

    Parameters
    ----------
    attention
        Floating point [N]; see `VisualTokens.wide_attention`.

    Raises
    ------
    TokensError
        As `adaptive_tokens`.
    """
    return len(adaptive_tokens(attention)) + 1
