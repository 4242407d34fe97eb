"""divprune: keep the tokens that lie farthest from each other (DivPrune)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokenprune.greedy.engine import Some, pick
from tokenprune.greedy.items import Items
from tokenprune.selectors.base import Picks
from tokenprune.selectors.token_vectors import TokenVectors
from tokenprune.tokens import TokenBatch


@dataclass(frozen=True)
class DivPrune(TokenVectors):
    """Max-min diversity over the projected tokens, distance ``1 - cos``.

    Starts with the token whose nearest neighbour is farthest (the second smallest entry of its
    column of distances), then takes the token whose smallest distance to those taken is largest.
    The paper keeps a share of 0.098.

    Source: Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal
    Models", arXiv 2503.02175, and its released code. Unlike there, a token that is taken is
    masked: exact duplicates and half precision could otherwise pick one index twice. On LLaVA-NeXT
    the authors choose one set from all crops and newline tokens of an image; here each item, there
    a crop, has a budget and a set of its own, or with ``scope="image"`` all crops have one
    (`tokenprune.scope`), and newlines stay: another choice under the same share. A share of N is
    rounded half to even there and half up here (`tokenprune.tokens_kept`); for the published shares
    of 576 tokens both are the same, and ``keep=round(0.098 * N)`` gives theirs for any N. The start
    costs O(N * N * D) time, the rest O(K * N * D); memory is O(N * D), and on a GPU all products of
    up to 4,096 tokens.
    """

    name: ClassVar[str] = "divprune"
    summary: ClassVar[str] = "distances between the projected tokens"
    paper: ClassVar[str] = "DivPrune, arXiv 2503.02175"
    needs: ClassVar[tuple[str, ...]] = ("embeddings",)
    takes_sizes: ClassVar[bool] = True

    def select(self, tokens: TokenBatch, keep: int) -> Picks:
        """Return LongTensor [B, K], ascending; there are no scores."""
        return Picks(pick_diverse(self.vectors(tokens), keep))

    def select_sizes(self, tokens: TokenBatch, keeps: Sequence[int]) -> Picks:
        """Return LongTensor [B, max(keeps)]; there are no scores."""
        return Picks(pick_diverse(self.vectors(tokens), keeps, sizes=tokens.sizes))


def pick_diverse(
    embeddings: Tensor,
    keep: int | Sequence[int],
    weights: Tensor | None = None,
    first: Tensor | None = None,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """Take `keep` tokens of each item: always the one of highest weight * distance to the taken.

    See `tokenprune.greedy.objectives.farthest`.

    Parameters
    ----------
    embeddings
        Floating point [B, N, D].
    keep
        K of all items or of each, between 1 and N.
    weights
        float32 [B, N], at least 0; None for the same weight everywhere.
    first
        LongTensor [B], the token each item starts with; None for the token farthest from its
        nearest neighbour (DivPrune's start).
    sizes
        How many tokens each item has of its own, if not N.

    Returns
    -------
    Tensor
        LongTensor [B, K], ascending; 0 behind an item's own K.
    """

    def choose(items: Items, some: Some) -> Tensor:
        return items.farthest(
            None if weights is None else weights[some], None if first is None else first[some[0]]
        )

    return pick(embeddings, keep, choose, sizes)
