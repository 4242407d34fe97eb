"""mmtok: keep the tokens that cover the question and the image best (MMTok)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from tokenprune.errors import OptionError
from tokenprune.greedy.covering import Targets, cover
from tokenprune.selectors.base import Picks
from tokenprune.selectors.token_vectors import TokenVectors
from tokenprune.tokens import TokenBatch


@dataclass(frozen=True)
class MMTok(TokenVectors):
    """Maximum coverage of two sets at once: the question's tokens and the image's.

    With t the M input embeddings of the question, z the N projected tokens and x their features,

        P = softmax_j(cos(t_i, z_j) / text_temperature) / M
        Q = softmax_j(cos(x_i, x_j) / image_temperature) / N
        C = [P; alpha * Q], of M + N rows

    keep times the token that adds most to ``sum_i max over the taken of C_ij`` is taken (facility
    location); the lowest index wins a tie. It reads the question with one look-up of its tokens,
    without a pass of the language model.

    Source: "MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs", arXiv
    2508.18264, and its released code. Where it differs from that:

    - The question is what `question_embeddings` holds, the text after the item up to the end of the
      user's turn. The authors' code for LLaVA leaves out two fixed prompts of benchmarks and 47
      stop words and tokenises what is left word by word; a selector has no tokenizer, so a caller
      who wants that passes those embeddings. Their code for Qwen has no stop words, but the text
      "Question: ..." alone.
    - The authors exclude patches of LLaVA-1.5 that are pure padding. A selector does not see
      pixels, and excludes none.
    - Similarities are whole multiples of a power of two, so that sums of them are exact. A choice
      is the same in any batch, and no token is taken twice.
    - Where the question is empty, the image alone is covered.

    O((N + M) * N * D) time and, up to 4,096 tokens, as much memory as C; above that linear memory.

    Parameters
    ----------
    text_temperature
        Of the question's similarities. The authors have 0.02 for LLaVA and 0.01 for Qwen.
    image_temperature
        Of the image's.
    alpha
        What the image counts beside the question. At the authors' temperatures a question token is
        covered by one or two picks and the image decides the rest, so it hardly matters.

    Raises
    ------
    OptionError
        On construction, for a number that is not above 0.
    """

    text_temperature: float = 0.02
    image_temperature: float = 0.2
    alpha: float = 0.5
    taken: str = field(default="before", kw_only=True)

    name: ClassVar[str] = "mmtok"
    summary: ClassVar[str] = "coverage of the question's tokens and the image's"
    paper: ClassVar[str] = "MMTok, arXiv 2508.18264"
    needs: ClassVar[tuple[str, ...]] = ("question_embeddings", "embeddings", "features")

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, published in (
            ("text_temperature", "0.02 for LLaVA, 0.01 for Qwen"),
            ("image_temperature", "0.2"),
            ("alpha", "0.5"),
        ):
            if not getattr(self, option) > 0:
                raise OptionError(
                    f"option {option}={getattr(self, option)!r} of method {self.name!r} must be "
                    f"above 0; the authors have {published}."
                )

    def select(self, tokens: TokenBatch, keep: int) -> Picks:
        """Return LongTensor [B, K], ascending; there are no scores."""
        question, vectors = tokens.require("question_embeddings"), self.vectors(tokens)
        asked = Targets(
            question,
            tokens.require("embeddings"),
            self.text_temperature,
            1 / max(1, question.shape[1]),
        )
        seen = Targets(vectors, vectors, self.image_temperature, self.alpha / vectors.shape[1])
        return Picks(cover([asked, seen], keep))
