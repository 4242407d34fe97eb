"""MMMU (arXiv 2311.16502): questions of thirty college subjects with one to seven images.

Sources. Columns: the cards of ``lmms-lab/MMMU`` and ``HuggingFaceM4/MMMU``, copies of ``MMMU/MMMU``
(id, question, options as the text of a Python list, explanation, image_1 to image_7 with their
bytes or null, img_type, answer, topic_difficulty, question_type, subfield). Ids as
``validation_Accounting_1``, open answers as a text or the text of a list, and which images are
shown, those that question or options name as ``<image 1>``: ``lmms_eval/tasks/mmmu/utils.py`` of
``EvolvingLMMs-Lab/lmms-eval``, which has the authors' own evaluation in it. Certain: all of these
agree; the parquet itself was not at hand.

The images stand before the question in their order; their places in it stay as ``<image 1>``. Open
answers are read as those of other data sets, which asks for more than the authors, who look for the
right answer in parts of the text. A choice that cannot be read names nothing, where they draw one.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict

from tokenprune_eval.data.files import check_choices
from tokenprune_eval.data.question import LETTERS, DataSet, Question
from tokenprune_eval.data.tables import NoAnswerError, Source, Table
from tokenprune_eval.data.textvqa import SHORT_ANSWER

NAME = "mmmu"
COLUMNS = frozenset({"id", "question", "options", "question_type", "answer", "image_1"})

_IMAGES = range(1, 8)
_NAMED = re.compile(r"<image (\d)>")
_SUBJECT = re.compile(r"[^_]+_(.+)_\d+")


class Row(BaseModel):
    """The columns that are used, besides the images."""

    model_config = ConfigDict(extra="ignore")

    id: str
    question: str
    options: str | list[str]
    question_type: str
    answer: str | None
    subfield: str = ""


def load(source: Source) -> DataSet:
    """Read MMMU.

    Parameters
    ----------
    source
        Parquet: a file, or a folder with those of a split, of one subject or of all in folders of
        their own.

    Returns
    -------
    DataSet
        Types are the subjects.

    Raises
    ------
    DataSetError, MissingPackageError
        See `Table` and its `questions`.
    """
    table = Table(source)

    def make(number: int, record: dict[str, Any]) -> Iterator[Question]:
        row = Row.model_validate(record)
        if not row.answer or row.answer.strip() == "?":
            raise NoAnswerError("the answer is missing")
        options = tuple(option.strip() for option in _list(row.options))
        there = [one for one in _IMAGES if record.get(f"image_{one}") is not None]
        named = {int(one) for one in _NAMED.findall(" ".join((row.question, *options)))}
        shown = [one for one in there if one in named] or there
        if missing := sorted(named - set(there)):
            raise ValueError(f"image {missing[0]} is named and not there")
        if not shown:
            raise ValueError("there is no image")
        choice = row.question_type == "multiple-choice"
        if choice:
            check_choices(options)
        letter = row.answer.strip()
        if choice and letter not in LETTERS[: len(options)]:
            raise ValueError(
                f"the answer {letter!r} is no letter from A to {LETTERS[len(options) - 1]}"
            )
        answers = () if choice else tuple(_list(row.answer))
        first, *further = (source.pictures.put(record[f"image_{one}"]).path for one in shown)
        subject = _SUBJECT.fullmatch(row.id)
        yield Question(
            id=row.id,
            kind="image",
            path=first,
            further=tuple(further),
            question=row.question.strip(),
            answer=letter if choice else answers[0],
            answers=answers,
            choices=options if choice else (),
            instruction="" if choice else SHORT_ANSWER,
            type=(subject[1] if subject else row.subfield).replace("_", " "),
        )

    return table.questions(
        NAME,
        COLUMNS,
        make,
        "Those of the test split are not published: give the validation split.",
    )


def _list(text: str | list[str]) -> list[str]:
    """Return the texts of a Python list written as text; any other text is one by itself."""
    if isinstance(text, list):
        return text
    stripped = text.strip()
    if not stripped.startswith("["):
        return [stripped] if stripped else []
    try:
        # Reads literals and runs nothing.
        values = ast.literal_eval(stripped)
        if isinstance(values, list) and all(isinstance(one, str | int | float) for one in values):
            return [str(one) for one in values]
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        pass
    raise ValueError(f"{stripped[:60]!r} is no list of texts")
