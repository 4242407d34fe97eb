"""divprune: keep the tokens that lie farthest from each other (DivPrune)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokenprune.selectors.base import Picks, Selector
from tokenprune.selectors.diversity import pick_diverse
from tokenprune.tokens import TokenBatch


@dataclass(frozen=True)
class DivPrune(Selector):
    """Max-min diversity over the projected tokens, distance ``1 - cos``.

    Starts with the token whose nearest neighbour is farthest (the second smallest entry of its
    column of distances), then takes the token whose smallest distance to those taken is largest.
    The paper keeps a share of 0.098.

    Source: Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal
    Models", arXiv 2503.02175, and its released code. Unlike there, a token that is taken is
    masked: exact duplicates and half precision could otherwise pick one index twice. The start
    costs O(N * N * D) time, the rest O(K * N * D); memory is O(N * D).
    """

    name: ClassVar[str] = "divprune"
    summary: ClassVar[str] = "distances between the projected tokens"
    paper: ClassVar[str] = "DivPrune, arXiv 2503.02175"
    needs: ClassVar[tuple[str, ...]] = ("embeddings",)

    def select(self, tokens: TokenBatch, keep: int) -> Picks:
        """Return LongTensor [B, K], ascending; there are no scores."""
        return Picks(pick_diverse(tokens.require("embeddings"), keep))
