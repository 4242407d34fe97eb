"""cdpruner-llm: CDPruner with relevance in the language model's own embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from tokenprune.greedy import engine
from tokenprune.selectors.base import Picks
from tokenprune.selectors.cdpruner import cosines_to_text, pick_conditional
from tokenprune.selectors.token_vectors import TokenVectors
from tokenprune.tokens import TokenBatch


@dataclass(frozen=True)
class CDPrunerLLM(TokenVectors):
    """CDPruner's determinant, with relevance measured where the language model reads.

    With z the projected tokens and t the input embeddings of the question,

        r_i = mean_m cos(z_i, t_m)
        r_i <- (r_i - min r + 1e-6) / (max r - min r), or 1 everywhere where all are equal
        K_ij = r_i cos(z_i, z_j) r_j

    and the greedy maximum of ``det K_S``, as in `tokenprune.selectors.cdpruner.CDPruner`. It reads
    the question with one look-up of its tokens: no CLIP, and no pass of the language model.

    tokenprune's own form, not a published one: the objective is that of CDPruner (arXiv
    2506.10967), whose relevance needs CLIP's joint space. There the authors take a patch of low
    cosine as relevant; in the language model's space no such inversion is known, so the sign is
    plus. That is an assumption, to be measured for each model: hence `sign`.

    Parameters
    ----------
    sign
        ``"plus"``: a token that is similar to the question is relevant. ``"minus"``: one that is
        not, as the authors have it for CLIP.
    reduction
        How the cosines to the question's tokens become one number: their ``"mean"``, or ``"max"``,
        the cosine to the nearest of them.
    """

    sign: Literal["plus", "minus"] = "plus"
    reduction: Literal["mean", "max"] = "mean"

    name: ClassVar[str] = "cdpruner-llm"
    summary: ClassVar[str] = "distances between projected tokens, weighted by the question's"
    paper: ClassVar[str] = "none: tokenprune's own form of CDPruner, arXiv 2506.10967"
    needs: ClassVar[tuple[str, ...]] = ("question_embeddings", "embeddings")
    stays_needed: ClassVar[tuple[str, ...]] = ("embeddings",)  # relevance is where text is read

    def select(self, tokens: TokenBatch, keep: int) -> Picks:
        """Return LongTensor [B, K], ascending, and the relevance float32 [B, N]."""
        vectors = self.vectors(tokens)
        cosines = cosines_to_text(
            tokens.require("embeddings"), tokens.require("question_embeddings")
        )
        sign = 1 if self.sign == "plus" else -1
        if self.reduction == "max":
            return pick_conditional(vectors, cosines.amax(dim=1), sign, keep)
        similar = engine.folded_sum(cosines, 1)
        return pick_conditional(vectors, similar, sign * cosines.shape[1], keep)
