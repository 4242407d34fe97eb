"""TallyQA (arXiv 1810.12440): how many there are, in simple and complex questions.

Sources. ``test.json`` of ``tallyqa.zip``: the README of ``manoja328/TallyQA_dataset`` (a list of
answer as a number, data_source, image as ``VG_100K_2/2410408.jpg`` or a file of COCO, image_id,
issimple, question, question_id). Accuracy and the root of the mean squared error by kind of
question are what the authors report. Certain: the README was read; the file itself was not at hand,
so ids are the numbers of the entries. The authors' models take no instruction; it is that of other
sets with short answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from tokenprune_eval.data.files import inside
from tokenprune_eval.data.question import DataSet, Question
from tokenprune_eval.data.tables import NoAnswerError, Source, Table
from tokenprune_eval.data.textvqa import SHORT_ANSWER

NAME = "tallyqa"
COLUMNS = frozenset({"image", "question", "question_id", "data_source", "answer"})


class Entry(BaseModel):
    """The keys that are used."""

    model_config = ConfigDict(extra="ignore")

    image: str
    question: str
    answer: int | None = Field(default=None, ge=0)
    issimple: bool | None = None


def load(source: Source) -> DataSet:
    """Read TallyQA.

    Parameters
    ----------
    source
        ``test.json`` with the folder of ``VG_100K``, ``VG_100K_2`` and COCO's folders, by default
        ``images`` beside it, or its own folder.

    Returns
    -------
    DataSet
        Types are ``simple`` and ``complex``.

    Raises
    ------
    DataSetError
        See `Table` and its `questions`.
    """
    table = Table(source)
    folder = source.folder(["images", "."])
    kinds = {True: "simple", False: "complex", None: ""}

    def make(number: int, record: dict[str, Any]) -> Iterator[Question]:
        entry = Entry.model_validate(record)
        if entry.answer is None:
            raise NoAnswerError("the answer is missing")
        yield Question(
            id=f"{source.file.stem}-{number}",
            kind="image",
            path=inside(folder, entry.image),
            question=entry.question.strip(),
            answer=str(entry.answer),
            scoring="count",
            instruction=SHORT_ANSWER,
            type=kinds[entry.issimple],
        )

    return table.questions(NAME, COLUMNS, make, "Give the published file, which has them.")
