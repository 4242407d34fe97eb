"""cdpruner: a determinant of diverse tokens, conditioned on CLIP's relevance (CDPruner)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokenprune.greedy import engine
from tokenprune.selectors.base import Picks
from tokenprune.selectors.token_vectors import TokenVectors
from tokenprune.tokens import TokenBatch

_LEAST = 1e-6  # added to every relevance before it is scaled: the authors'


@dataclass(frozen=True)
class CDPruner(TokenVectors):
    """Conditional determinantal point process: tokens that are diverse and relevant.

    With z the projected tokens, v_i the tokens and q_s the parts of the question in CLIP's joint
    space,

        r_i = -mean_s cos(v_i, q_s)
        r_i <- (r_i - min r + 1e-6) / (max r - min r), or 1 everywhere where all are equal
        K_ij = r_i cos(z_i, z_j) r_j

    the greedy maximum of ``det K_S``: keep times the token of most variance left given those taken
    (a pivoted Cholesky factorisation); the lowest index wins a tie. The sign is the authors': in
    CLIP a patch of low cosine to the text is taken as relevant.

    It is for callers who have a CLIP: `image_embeddings` are
    ``visual_projection(post_layernorm(hidden[-2]))`` of the patches, `text_embeddings` those of the
    prompt's segments of 77 tokens, the last one padded with zeros. The models that adapters prune
    do not carry them; `cdpruner-llm` needs neither.

    Source: "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in
    MLLMs", arXiv 2506.10967, and its released code. Where it differs from that:

    - Relevance is scaled for each item alone, so that a choice is the same in any batch. The
      authors take minimum and maximum over all crops of a batch.
    - Above the numerical rank of K their code takes roots of negative numbers and keeps fewer
      tokens. Here a token of a variance of at most 2**-40, about 1e-12, explains nothing, and the
      tokens go on by what is left.
    - Where all are equally relevant their code divides by 0.

    The scores are r. O(K * N * (D + K)) time and O(N * (D + K)) memory; on a GPU all products of up
    to 4,096 tokens are held as well.
    """

    name: ClassVar[str] = "cdpruner"
    summary: ClassVar[str] = "distances between projected tokens, weighted by CLIP's relevance"
    paper: ClassVar[str] = "CDPruner, arXiv 2506.10967"
    needs: ClassVar[tuple[str, ...]] = ("embeddings", "image_embeddings", "text_embeddings")

    def select(self, tokens: TokenBatch, keep: int) -> Picks:
        """Return LongTensor [B, K], ascending, and the relevance float32 [B, N]."""
        cosines = cosines_to_text(
            tokens.require("image_embeddings"), tokens.require("text_embeddings")
        )
        similar = engine.folded_sum(cosines, 1)
        return pick_conditional(self.vectors(tokens), similar, -cosines.shape[1], keep)


def cosines_to_text(rows: Tensor, text: Tensor) -> Tensor:
    """Return float64 [B, M, N], the cosine of each text row [B, M, D] to each row [B, N, D].

    Without a text there is one row of zeros, so that nothing is like it.
    """
    if not text.shape[1]:
        text = text.new_zeros(len(text), 1, text.shape[2])
    return engine.integer_rows(text).cosines_with(engine.integer_rows(rows))


def pick_conditional(embeddings: Tensor, similar: Tensor, divisor: int, keep: int) -> Picks:
    """Choose the tokens of largest determinant of ``r_i cos(z_i, z_j) r_j``.

    Parameters
    ----------
    embeddings
        Floating point [B, N, D], z.
    similar
        float64 [B, N], how similar tokens are to the text.
    divisor
        What that is divided by; r is it, scaled.
    keep
        K, between 1 and N.

    Returns
    -------
    Picks
        LongTensor [B, K], ascending, and the relevance as scores.
    """
    scores, variances = engine.relevance(similar, divisor, _LEAST)
    return Picks(engine.most_volume(embeddings, variances, keep), scores)
