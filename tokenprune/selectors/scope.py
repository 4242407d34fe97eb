"""scope: keep the tokens that cover all others best, weighted by attention (SCOPE)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from tokenprune.errors import OptionError
from tokenprune.greedy.covering import Targets, cover
from tokenprune.greedy.engine import folded_sum
from tokenprune.numerics import power
from tokenprune.selectors.base import Picks
from tokenprune.selectors.token_vectors import TokenVectors
from tokenprune.tokens import TokenBatch


@dataclass(frozen=True)
class Scope(TokenVectors):
    """Set coverage of the encoder's features, each gain weighted by the CLS token's attention.

    With ``S_ij = cos(x_i, x_j)`` of the features, ``a`` the attention summed over heads, and
    ``c_i`` how well token i is covered so far (0 at first),

        g_j = sum_i max(0, S_ij - c_i)
        take the token of largest g_j * a_j ** alpha, or g_j + a_j ** alpha,
        c_i = max(c_i, S_ij),

    keep times; the lowest index wins a tie. A cosine below 0 covers nothing. Once every token is
    covered all gains are 0, and tokens follow in their order, with ``combine="add"`` by attention.

    Source: "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs" and its
    released code: features and attention of layer -2 without the CLS token, the sum of heads and
    not their mean, which matters where it is added. An attention that comes without heads is
    taken as that sum. On LLaVA-NeXT the authors give each crop ``int(k / crops)`` tokens; here the
    budget is each crop's own. Similarities are whole multiples of a power of two, so that sums of
    them are exact and a choice is the same in any batch.

    O(N * N * C) time and, up to 4,096 tokens, O(N * N) memory; above that linear memory.

    Parameters
    ----------
    alpha
        The exponent of the attention.
    combine
        How gain and attention are put together: ``"multi"``, the paper's, multiplies them, so that
        the attention's scale does not matter; ``"add"`` adds them.

    Raises
    ------
    OptionError
        On construction, for an alpha below 0.
    """

    alpha: float = 1.0
    combine: Literal["multi", "add"] = "multi"
    taken: str = field(default="before", kw_only=True)

    name: ClassVar[str] = "scope"
    summary: ClassVar[str] = "coverage of all features, times the CLS token's attention"
    paper: ClassVar[str] = "SCOPE, arXiv 2510.24214"
    needs: ClassVar[tuple[str, ...]] = ("features", "cls_attention")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0:
            raise OptionError(
                f"option alpha={self.alpha!r} of method {self.name!r} must be at least 0; the "
                "paper has 1.0."
            )

    def select(self, tokens: TokenBatch, keep: int) -> Picks:
        """Return LongTensor [B, K], ascending; there are no scores."""
        features = self.vectors(tokens)
        salience = self._salience(tokens.require("cls_attention"))
        multiplied = self.combine == "multi"
        kept = cover(
            [Targets(features, features)],
            keep,
            weights=salience if multiplied else None,
            bonus=None if multiplied else salience,
        )
        return Picks(kept)

    def _salience(self, attention: Tensor) -> Tensor:
        """Return float64 [B, N], the sum over heads to the power of alpha."""
        summed = folded_sum(attention.double(), 1) if attention.ndim == 3 else attention.double()
        return summed if self.alpha == 1 else power(summed, self.alpha)
