"""One question about one image, whichever set it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels of the image; right and bottom are exclusive."""


@dataclass(frozen=True)
class Question:
    """A question, its answer, and where in the image the answer is to be seen.

    Attributes
    ----------
    id
        Unique within its set.
    image
        Path of the image file.
    question
        The text put to the model.
    answer
        The right answer, one word.
    type
        What is asked about, for example ``"kind"`` or ``"yes/no"``.
    evidence
        Boxes of the items the answer depends on; empty where the set does not say.
    """

    id: str
    image: Path
    question: str
    answer: str
    type: str
    evidence: tuple[Box, ...]
