"""One question of a data set, and the data set itself."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenprune_eval.bundled.questions import Box

LETTERS = string.ascii_uppercase
"""Names of the choices, in their order."""

Scoring = Literal["exact", "contains", "formula", "vqa", "anls", "yes-no", "count", "box"]
"""How the answer to an open question is read and scored; see `tokenprune_eval.results.scoring`."""

BoxUnit = Literal["fraction", "thousandth", "pixel"]
"""What the numbers of a box in an answer count: parts of the picture's width and height from 0 to
1, or from 0 to 1000, or its pixels."""


@dataclass(frozen=True)
class Question:
    """A question about one video, or about one or several images.

    Attributes
    ----------
    id
        Unique within its data set.
    kind
        ``"image"`` or ``"video"``.
    path
        The file; of several images, the first.
    question
        The text put to the model, without the choices.
    answer
        The right answer: its text, or, where there are choices, the letter of the right one.
    choices
        Texts of the choices A, B, …; empty for an open question.
    type
        What is asked about, for the tables by type; may be empty.
    times
        Seconds of the frames to look at, where the data set says so; rising. Empty: sampled.
    evidence
        Boxes in the image, in its pixels, of what the answer depends on; empty where the data set
        does not say.
    further
        The images that come after the first, in the order of the prompt.
    scoring
        How the answer to an open question is read and scored.
    answers
        All right answers to an open question, where there are several; with scoring ``"vqa"`` those
        of all annotators, equal ones as often as they were given. Empty: `answer` alone.
    instruction
        What the authors' evaluation puts behind the question, on a line of its own; for an open
        question.
    size
        Width and height of the image in pixels, for scoring ``"box"``, whose `answer` is
        ``[left, top, right, bottom]`` in these pixels.
    group
        Name of the questions that are one question with its choices in other orders; empty where
        the question stands for itself.
    """

    id: str
    kind: Literal["image", "video"]
    path: Path
    question: str
    answer: str
    choices: tuple[str, ...] = ()
    type: str = ""
    times: tuple[float, ...] = ()
    evidence: tuple[Box, ...] = ()
    further: tuple[Path, ...] = ()
    scoring: Scoring = "exact"
    answers: tuple[str, ...] = ()
    instruction: str = ""
    size: tuple[int, int] | None = None
    group: str = ""

    @property
    def accepted(self) -> tuple[str, ...]:
        """All right answers, one at least."""
        return self.answers or (self.answer,)

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files."""
        return (self.path, *self.further)


@dataclass(frozen=True)
class DataSet:
    """Questions under a name.

    Attributes
    ----------
    name
        As it stands in tables.
    questions
        In the data set's own order; ids are unique.
    drawn_from
        Of how many questions these were drawn; None where they are all.
    """

    name: str
    questions: Sequence[Question]
    drawn_from: int | None = None
