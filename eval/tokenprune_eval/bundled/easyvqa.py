"""easy-VQA (Victor Zhou, MIT licence): the questions and images of the PyPI package `easy-vqa`.

5,000 images of 64 x 64 pixels with one shape each, 48,248 questions, 13 possible answers, and the
package's own split into train and test. About half of the answers are yes or no, so accuracy is
best reported per type.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from tokenprune.errors import MissingPackageError
from tokenprune_eval.bundled.errors import BundledModelError
from tokenprune_eval.bundled.questions import Question
from tokenprune_eval.bundled.shipped import shipped_file

PACKAGE = "easy-vqa"

Split = Literal["train", "test"]

_SHAPES = frozenset({"circle", "rectangle", "triangle"})


def easy_vqa_folder(split: Split) -> Path:
    """Find the folder inside the installed package that holds one split.

    The package is found through its metadata and not imported.

    Raises
    ------
    MissingPackageError
        If `easy-vqa` is not installed.
    BundledModelError
        If `split` is not ``"train"`` or ``"test"``, or the installed package lacks the files.
    """
    if split not in ("train", "test"):
        raise BundledModelError(f"easy-VQA has the splits 'train' and 'test', not {split!r}.")
    install = f"pip install {PACKAGE}==1.0"
    absent = MissingPackageError(
        f"the question set easy-VQA comes from the package {PACKAGE}, which is not installed. "
        f"Install it with: {install}"
    )
    return shipped_file(PACKAGE, f"easy_vqa/data/{split}/questions.json", install, absent).parent


def load_easy_vqa(split: Split) -> list[Question]:
    """Read one split of easy-VQA, in the package's order.

    Parameters
    ----------
    split
        ``"train"`` (4,000 images, 38,575 questions) or ``"test"`` (1,000 images, 9,673).

    Returns
    -------
    list of Question
        Types ``"yes/no"``, ``"shape"`` and ``"color"``, after the answer; no evidence boxes.

    Raises
    ------
    MissingPackageError, BundledModelError
        See `easy_vqa_folder`.
    """
    folder = easy_vqa_folder(split)
    rows: list[tuple[str, str, int]] = json.loads((folder / "questions.json").read_text("utf-8"))
    return [
        Question(
            id=f"easy-vqa-{split}-{number}",
            image=folder / "images" / f"{image}.png",
            question=text,
            answer=answer,
            type=_type_of(answer),
            evidence=(),
        )
        for number, (text, answer, image) in enumerate(rows)
    ]


def _type_of(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in _SHAPES else "color"
