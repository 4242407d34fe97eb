"""What a run keeps on disk: one line of JSON for each question answered under each condition.

`Condition` says how the model was pruned, `Record` what it then said and what that took. Both are
written to ``records.jsonl`` of a run's folder as soon as they are there, and everything that is
reported is worked out from them afterwards.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from tokenprune.baselines import RESIZE, resizes
from tokenprune.config import Positions

UNPRUNED = "unpruned"
"""Method of the condition that keeps every token; run once, whatever the number of methods."""


def pruned_by(method: str) -> str | None:
    """Return the selector of a condition's method, None for ``"unpruned"`` and ``"resize"``."""
    return None if method in (UNPRUNED, RESIZE) else method.removeprefix(f"{RESIZE}+")


def variant(positions: str, proportional_attention: bool) -> str:
    """Return how a method was run where that is not as usual: ``"compact, proportional"``.

    Parameters
    ----------
    positions, proportional_attention
        See `Condition`.

    Returns
    -------
    str
        Empty for original positions and plain attention.
    """
    parts = [] if positions == "original" else [positions]
    return ", ".join([*parts, "proportional"] if proportional_attention else parts)


class Condition(BaseModel):
    """One way to prune.

    Attributes
    ----------
    method
        A name out of `tokenprune.methods()`, or ``"unpruned"``, ``"resize"``, ``"resize+METHOD"``.
    keep
        Number of tokens (int) or fraction (float) of each image or video at full size; 1.0 where
        unpruned.
    positions
        How the positions of kept tokens are counted.
    proportional_attention
        Whether attention counts a kept token as often as there are tokens that it stands for, see
        `tokenprune_hf.prune`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    keep: int | float = Field(union_mode="smart")
    positions: Positions = "original"
    # Folders from before it was a setting have none.
    proportional_attention: bool = False

    @property
    def pruned_by(self) -> str | None:
        """See `pruned_by`."""
        return pruned_by(self.method)

    @property
    def resizes(self) -> bool:
        """Whether it makes the picture smaller."""
        return resizes(self.method)

    @property
    def variant(self) -> str:
        """See `variant`."""
        return variant(self.positions, self.proportional_attention)

    @property
    def key(self) -> str:
        """Short text that names the condition, for example ``"cls-attention@0.25"``."""
        if self.method == UNPRUNED:
            return UNPRUNED
        ending = f",{self.variant.replace(', ', ',')}" if self.variant else ""
        return f"{self.method}@{self.keep}{ending}"


class Seconds(BaseModel):
    """Seconds that one question took; a batch's are divided by its questions.

    Attributes
    ----------
    encode
        Vision encoder; shared by all conditions of one size of the image or video, so the same in
        each; None where an engine does not tell.
    select
        Scoring and choosing tokens, the language model's prefix included where a method has one.
    prefill
        Language model until the first answer token, without `select`.
    decode
        All further answer tokens.
    first_token
        From the input to the first answer token, encoding and selecting included. Where an engine
        tells the parts it is their sum, else it is measured as a whole, as the caller sees it.
    total
        From handing the question to the engine until the answer is there.
    """

    model_config = ConfigDict(extra="forbid")

    encode: float | None = None
    select: float | None = None
    prefill: float | None = None
    decode: float | None = None
    first_token: float | None = None
    total: float | None = None


Depth = Literal["early", "middle", "late"]
"""Parts of a language model: its first, middle and last two layers."""


class ModalityIndices(BaseModel):
    """How text and visual tokens share attention; see `tokenprune_eval.dominance.Indices`.

    Attributes
    ----------
    mdi
        Modality Dominance Index; None where it is infinite.
    aei_text, aei_visual
        Attention Efficiency Index of text and of visual tokens.
    """

    model_config = ConfigDict(extra="forbid")

    mdi: float | None = None
    aei_text: float | None = None
    aei_visual: float | None = None

    @classmethod
    def of(cls, mdi: float, aei_text: float, aei_visual: float) -> ModalityIndices:
        """Return them with None for what JSON has no number for."""
        values = {"mdi": mdi, "aei_text": aei_text, "aei_visual": aei_visual}
        return cls(
            **{name: value if math.isfinite(value) else None for name, value in values.items()}
        )


class Record(BaseModel):
    """The answer to one question under one condition.

    Attributes
    ----------
    item
        Id of the question.
    condition
        `Condition.key`.
    error
        Why there is no answer; None where there is one. All that follows is then None.
    text
        What the model said.
    choice
        The letter that `text` was read as, for questions with choices; ``""`` where none was found.
    likelihoods
        Letter -> log-probability as the first answer token, for questions with choices.
    cut
        True where the answer was cut off by its length before its text named an answer:
        `correct_by_text` is then None. None otherwise.
    correct_by_text, correct_by_likelihood
        Whether it is right, read either way; None where it was not read that way.
    correct
        The one of both that the run counts, see `Settings.choose_by`; None where that was cut.
    read, score
        What the scoring of an open question read, and its score from 0 to 1, see
        `tokenprune_eval.results.scoring`; the answer counts as right from 0.5 on. None for
        questions with choices and for scoring ``"exact"``.
    visual_tokens, of_visual_tokens
        Visual tokens the language model read, and how many there were, at full size. Where tokens
        leave inside it, the mean over its layers.
    prompt_tokens
        All tokens of the prompt that it read; likewise.
    answer_tokens
        Tokens generated.
    mass_kept
        Share of the method's scores (attention, where it scores by it) on the tokens it kept; None
        where it has no scores of one sign.
    kv_bytes
        Bytes of keys and values in the language model's cache when the answer began.
    peak_bytes
        Most bytes that torch held at one time beyond the weights; measured on some questions only.
    dominance
        Part of the language model -> mean indices of its layers while this answer was generated;
        measured on some questions only, and None where no token of the answer was read again.
    batch
        How many questions were answered together.
    seconds
        See `Seconds`.
    kept
        Indices of the kept tokens where the run was asked to note them.
    grid
        Frames, rows, columns of the visual tokens, where `kept` is noted.
    """

    model_config = ConfigDict(extra="forbid")

    item: str
    condition: str
    error: str | None = None
    text: str | None = None
    choice: str | None = None
    likelihoods: dict[str, float] | None = None
    cut: Literal[True] | None = None
    correct_by_text: bool | None = None
    correct_by_likelihood: bool | None = None
    correct: bool | None = None
    read: str | None = None
    score: float | None = None
    visual_tokens: int | None = None
    of_visual_tokens: int | None = None
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    mass_kept: float | None = None
    kv_bytes: int | None = None
    peak_bytes: int | None = None
    dominance: dict[Depth, ModalityIndices] | None = None
    batch: int | None = None
    seconds: Seconds = Seconds()
    kept: list[int] | None = None
    grid: tuple[int, int, int] | None = None
