"""The two question sets, and the part of each that a run asks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenprune_eval.bundled.easyvqa import load_easy_vqa
from tokenprune_eval.bundled.questions import Question
from tokenprune_eval.bundled.scenes import load_scenes

SCENES, EASY_VQA = "scenes", "easy-vqa"


@dataclass(frozen=True)
class QuestionSet:
    """The questions of one set that a run asks.

    Attributes
    ----------
    name
        ``"scenes"`` or ``"easy-vqa"``.
    questions
        Grouped by image.
    of_questions, of_images
        How many the whole set has.
    """

    name: str
    questions: tuple[Question, ...]
    of_questions: int
    of_images: int

    @property
    def images(self) -> list[Path]:
        """The images, in the order of the questions."""
        return list(dict.fromkeys(question.image for question in self.questions))

    @property
    def has_evidence(self) -> bool:
        """Whether the set says where each answer is to be seen."""
        return all(question.evidence for question in self.questions)


def choose(
    name: str, questions: Sequence[Question], at_least: int | None, seed: int
) -> QuestionSet:
    """Take all questions about some images, drawn at random, so that few images are encoded.

    Parameters
    ----------
    name
        What the set is called.
    questions
        The whole set.
    at_least
        Images are drawn until there are this many questions; None for the whole set.
    seed
        Seed of the draw; the same seed gives the same images.

    Returns
    -------
    QuestionSet
        The chosen questions, in the order of the set.
    """
    by_image: dict[Path, list[Question]] = {}
    for question in questions:
        by_image.setdefault(question.image, []).append(question)
    images = list(by_image)
    if at_least is not None:
        order = random.Random(seed).sample(images, len(images))
        drawn: set[Path] = set()
        count = 0
        while order and count < at_least:
            drawn.add(image := order.pop())
            count += len(by_image[image])
        images = [image for image in images if image in drawn]
    chosen = tuple(question for image in images for question in by_image[image])
    return QuestionSet(name, chosen, len(questions), len(by_image))


def load_sets(at_least: int | None, seed: int) -> list[QuestionSet]:
    """Return scenes and easy-VQA's test split, see `choose`.

    Raises
    ------
    MissingPackageError, BundledModelError
        If a set is not there; the message says what to install.
    """
    return [
        choose(SCENES, load_scenes(), at_least, seed),
        choose(EASY_VQA, load_easy_vqa("test"), at_least, seed),
    ]
