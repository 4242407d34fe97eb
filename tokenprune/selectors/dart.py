"""dart: keep a few large tokens, and those least like them and the question (DART)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokenprune.errors import OptionError
from tokenprune.greedy import engine
from tokenprune.selectors.base import Picks
from tokenprune.selectors.token_vectors import TokenVectors
from tokenprune.tokens import TokenBatch
from tokenprune.transfer import to_device, to_host


@dataclass(frozen=True)
class Dart(TokenVectors):
    """Duplication matters more than importance: tokens that differ most from a few pivots.

    Pivots are the tokens of largest L1 norm, which stay, and the question's tokens of largest L1
    norm, which are no visual tokens. For each pivot in turn, those of the image first and each kind
    by its norm, the tokens of lowest cosine to it are taken among those not taken yet; the lowest
    index wins a tie. Of what is left of the budget each pivot takes an equal share, the first ones
    one more. With no more than `image_pivots` tokens to keep, these are all.

    Source: "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters
    More" (DART), arXiv 2502.11494, and its released code, read on what the language model is
    given. Where it differs from that:

    - The authors prune behind layer 2 of the language model: norms are those of its keys, and
      cosines those of its normalised hidden states. Here both are those of the embeddings.
    - Exactly `keep` tokens stay. The authors' code takes ``ceil(k // 8)`` of each of 8 pivots: for
      k = 64 it keeps 68, as ``keep=68`` does here.
    - The order of their pivots is the one that CPython gives a set of their places in the prompt,
      which decides who is taken: see `order`.
    - Their question is all text behind the image, the chat template included, whose tokens often
      have the largest norms. `question_embeddings` ends with the user's turn.
    - A question of fewer tokens than `text_pivots` gives fewer pivots.

    O(N * D) time for each pivot, and O(N * D) memory.

    Parameters
    ----------
    image_pivots, text_pivots
        How many pivots there are of each kind.
    order
        In which order pivots take tokens: ``"norm"``, or ``"set"`` for the authors', for which the
        host waits on a GPU.
    start
        The image's place in the prompt, for ``order="set"``; LLaVA-1.5's is 35. The question is
        taken to stand right behind the image.
    per_pivot
        How many tokens each pivot takes; the last one takes what is left. None for equal shares.

    Raises
    ------
    OptionError
        On construction, for a number that is too small.
    """

    image_pivots: int = 4
    text_pivots: int = 4
    order: Literal["norm", "set"] = "norm"
    start: int = 35
    per_pivot: int | None = None

    name: ClassVar[str] = "dart"
    summary: ClassVar[str] = "large tokens, and those least like them and the question"
    paper: ClassVar[str] = "DART, arXiv 2502.11494"
    needs: ClassVar[tuple[str, ...]] = ("question_embeddings", "embeddings")

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, least in (
            ("image_pivots", 1),
            ("text_pivots", 0),
            ("start", 0),
            ("per_pivot", 1),
        ):
            value = getattr(self, option)
            if value is not None and value < least:
                raise OptionError(
                    f"option {option}={value} of method {self.name!r} must be at least {least}."
                )
        if self.text_pivots and self.taken != "after":
            raise OptionError(
                f"option taken={self.taken!r} of method {self.name!r} takes the image's tokens "
                "where the question's are not, so none of those can be a pivot. Give "
                "text_pivots=0 along with it."
            )

    def select(self, tokens: TokenBatch, keep: int) -> Picks:
        """Return LongTensor [B, K], ascending; there are no scores."""
        total, question = tokens.total, tokens.require("question_embeddings")
        # All rows together: what is done to them is done once.
        vectors = self.vectors(tokens)
        together = torch.cat([vectors, question], dim=1) if self.text_pivots else vectors
        rows = engine.integer_rows(together)
        of_image = min(self.image_pivots, keep)
        of_text = min(self.text_pivots, question.shape[1])
        pivots, free = engine.pivots(rows.l1_norms(), total, of_image, of_text)
        # float32, as selectors compare cosines; the sort is stable.
        cosines = rows.cosines_of(pivots)[..., :total]
        ranked = cosines.sort(dim=-1, stable=True).indices
        if self.order == "set":
            turns = _turns_of_set(pivots, self.start)
            ranked = ranked.gather(1, turns[..., None].expand_as(ranked))
        return Picks(engine.take_in_turns(ranked, free, keep, keep - of_image, self.per_pivot))


def _turns_of_set(pivots: Tensor, start: int) -> Tensor:
    """Return LongTensor [B, P], pivots in the order of a set of their places in the prompt.

    Parameters
    ----------
    pivots
        LongTensor [B, P], counted among the image's tokens and the question's behind them.
    start
        The first one's place in the prompt.
    """
    turns = []
    for of_item in to_host([pivots])[0].tolist():
        places = [start + place for place in of_item]
        # A set of whole numbers has the same order in every process.
        turns.append([places.index(place) for place in set(places)])
    return to_device(torch.tensor(turns, dtype=torch.int64, device="cpu"), pivots.device)
