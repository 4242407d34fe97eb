"""What an engine is to the runner: it prepares an image or video, and answers questions about it.

`Engine.prepare` runs in threads beside the model, so that decoding and preprocessing overlap with
it; `Engine.answer` gets a few prepared media at a time and all their questions under one condition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenprune.media.video import Video
from tokenprune_eval.data.question import Question
from tokenprune_eval.results.records import Condition, Depth, ModalityIndices, Seconds


@dataclass(frozen=True)
class EngineAnswer:
    """What an engine said to one question; the fields are those of `Record`.

    Attributes
    ----------
    error
        Why there is no answer; then the rest is empty.
    cut
        Whether the engine stopped because the answer had `Settings.max_new_tokens`, or the context
        was full, and not because it had ended.
    kept
        Indices of the kept tokens, where the engine tells them.
    """

    text: str = ""
    likelihoods: dict[str, float] | None = None
    error: str | None = None
    cut: bool = False
    visual_tokens: int | None = None
    of_visual_tokens: int | None = None
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    mass_kept: float | None = None
    kv_bytes: int | None = None
    batch: int | None = None
    seconds: Seconds = field(default_factory=Seconds)
    kept: NDArray[np.int64] | None = None
    grid: tuple[int, int, int] | None = None


@dataclass
class MediaQuestions:
    """One image or video and the questions about it.

    Attributes
    ----------
    questions
        The questions.
    prompts
        Text put to the model for each, choices included.
    content
        The picture, several, or the sampled frames; None once they are not needed any more.
    prepared
        What `Engine.prepare` made of it.
    error
        Why there is no answer to any of the questions: the image or video cannot be read, prepared
        or encoded.
    unread
        Whether that is because the file cannot be read.
    """

    questions: Sequence[Question]
    prompts: Sequence[str]
    content: Image.Image | list[Image.Image] | Video | None = None
    prepared: Any = None
    error: str | None = None
    unread: bool = False


Done = Callable[[Question, EngineAnswer], None]
"""Called with each answer as soon as it is there."""


class Engine(Protocol):
    """A model that can be asked.

    Attributes
    ----------
    media_at_once
        How many images and how many videos `answer` may get at a time.
    """

    media_at_once: dict[str, int]

    def about(self) -> dict[str, Any]:
        """Return what run.json says of it: architecture, parameters, dtype."""

    def prepare(self, asked: MediaQuestions) -> None:
        """Fill in `asked.prepared`; called in a thread beside the model.

        Whatever it raises is taken for the reason why these questions cannot be put to this model,
        but for what `failure_of` names.
        """

    def begin(self, media: Sequence[MediaQuestions]) -> None:
        """Do once what all conditions share, such as encoding.

        Where that fails, `MediaQuestions.error` is set.
        """

    def answer(
        self,
        media: Sequence[MediaQuestions],
        wanted: Sequence[Question],
        condition: Condition,
        done: Done,
    ) -> None:
        """Answer the wanted ones of the media's questions under one condition.

        A question that cannot be answered is told as `EngineAnswer.error`; it ends nothing. Where a
        batch fails its questions are asked one by one.

        Raises
        ------
        EngineLostError
            If no further question can be answered.
        """

    def peak_bytes(
        self, media: Sequence[MediaQuestions], question: Question, condition: Condition
    ) -> int | None:
        """Return the most bytes held beyond the weights until the first answer token, if known."""

    def close(self) -> None:
        """Free what it holds."""


@runtime_checkable
class MeasuresDominance(Protocol):
    """An engine that can look at the attention of the answer's tokens; the others cannot tell."""

    def dominance(
        self, media: Sequence[MediaQuestions], question: Question, condition: Condition
    ) -> dict[Depth, ModalityIndices] | None:
        """Return the indices of each part of the language model while it answers one question.

        None where no generated token was read again, and where the question cannot be answered.
        """
