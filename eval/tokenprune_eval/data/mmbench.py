"""MMBench (arXiv 2307.06281): questions with two to four choices, each asked in several orders.

Sources. Tab-separated text: ``MMBench_DEV_EN.tsv`` and its like, as
``vlmeval/dataset/image_base.py`` and ``image_mcq.py`` of ``open-compass/VLMEvalKit`` read them
(index, question, hint, A to D, answer, category, image in base64 or as the index of the row that
has it, source, l2-category, split). Parquet: the cards of ``lmms-lab/MMBench`` and
``lmms-lab/MMBench_EN`` (the same columns, image with its bytes); what is missing there is null or
``"nan"``, see ``lmms_eval/tasks/mmbench/en_utils.py`` of ``EvolvingLMMs-Lab/lmms-eval``. Rotated
copies of a question have its index and a million for each, and a question is right if all are:
``mmbench_evals.py`` there. Certain: all of these agree; the files themselves were not at hand. The
hint stands before the question, as in both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from tokenprune_eval.data.files import check_choices
from tokenprune_eval.data.pictures import Pictures
from tokenprune_eval.data.question import LETTERS, DataSet, Question
from tokenprune_eval.data.tables import NoAnswerError, Source, Table

NAME = "mmbench"
COLUMNS = frozenset({"index", "question", "A", "B", "answer", "category", "image"})

ROTATED = 1_000_000
"""Added to the index of a question for each of its rotated copies."""

_REFERENCE = 64
"""An image of no more signs is the index of the row that has it."""

_LETTERS = LETTERS[:8]


class Row(BaseModel):
    """The columns that are used, besides the choices."""

    model_config = ConfigDict(extra="ignore")

    index: int = Field(ge=0)
    question: str
    hint: str | None = None
    answer: str | None = None
    category: str | None = None
    image: Any


def load(source: Source) -> DataSet:
    """Read MMBench.

    Parameters
    ----------
    source
        Tab-separated text or parquet.

    Returns
    -------
    DataSet
        Types are the categories. Copies of a question with rotated choices are a group.

    Raises
    ------
    DataSetError, MissingPackageError
        See `Table` and its `questions`.
    """
    table = Table(source)
    paths: dict[int, Path] = {}
    if source.file.suffix.lower() == ".tsv" and table.columns >= COLUMNS:
        paths = _pictures_of(table, source.pictures)

    def make(number: int, record: dict[str, Any]) -> Iterator[Question]:
        row = Row.model_validate({key: _known(value) for key, value in record.items()})
        if row.answer is None:
            raise NoAnswerError("the answer is missing")
        choices = []
        for letter in _LETTERS:
            text = _known(record.get(letter))
            if text is None:
                break
            choices.append(str(text).strip())
        check_choices(choices)
        if row.answer not in LETTERS[: len(choices)]:
            raise ValueError(
                f"the answer {row.answer!r} is no letter from A to {LETTERS[len(choices) - 1]}"
            )
        question = row.question.strip()
        yield Question(
            id=str(row.index),
            kind="image",
            path=_path(row.image, paths, source.pictures),
            question=f"{row.hint.strip()}\n{question}" if row.hint else question,
            answer=row.answer,
            choices=tuple(choices),
            type=row.category or "",
            group=str(row.index % ROTATED),
        )

    return table.questions(
        NAME,
        COLUMNS,
        make,
        "Those of the test split are not published: give the dev split.",
    )


def _known(value: Any) -> Any:
    """Return a value, None where it is one of the ways in which these files lack it."""
    # Only "not a number" differs from itself.
    return None if value in ("", "nan") or value != value else value


def _pictures_of(table: Table, pictures: Pictures) -> dict[int, Path]:
    """Return the picture of each row that has one; what is wrong with a row is said later."""
    paths: dict[int, Path] = {}
    for _, record in table:
        index, image = record.get("index", ""), record.get("image", "")
        if index.isdecimal() and len(image) > _REFERENCE:
            with suppress(ValueError):
                paths[int(index)] = pictures.put(image).path
    return paths


def _path(image: Any, paths: Mapping[int, Path], pictures: Pictures) -> Path:
    if not isinstance(image, str) or len(image) > _REFERENCE:
        return pictures.put(image).path
    if not image.isdecimal() or int(image) not in paths:
        raise ValueError(
            f"the image {image!r} is neither a picture nor the index of a row with one"
        )
    return paths[int(image)]
