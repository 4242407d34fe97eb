"""DocVQA (arXiv 2007.00398): questions about pages of documents.

Sources. JSON: ``val_v1.0.json`` or ``val_v1.0_withQT.json`` of the challenge's page (an object with
``data``: questionId, question, question_types, image as ``documents/<name>.png``, docId,
ucsf_document_id, answers, data_split), as several users' loaders quote it, among them ``ds_loader``
of ``HuggingFaceM4/DocumentVQA``; users also keep the pages in ``spdocvqa_images``. Parquet: the
card of ``lmms-lab/DocVQA``, config DocVQA (the same columns, image with its bytes). Scoring,
instruction and 128 new tokens: ``lmms_eval/tasks/docvqa`` of ``EvolvingLMMs-Lab/lmms-eval``.
Certain for the columns; likely for where the pages lie. The files themselves were not at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict

from tokenprune_eval.data.files import inside
from tokenprune_eval.data.question import DataSet, Question
from tokenprune_eval.data.tables import NoAnswerError, Source, Table
from tokenprune_eval.data.textvqa import SHORT_ANSWER

NAME = "docvqa"
COLUMNS = frozenset({"questionId", "question", "image", "ucsf_document_id"})


class Entry(BaseModel):
    """The keys that are used."""

    model_config = ConfigDict(extra="ignore", coerce_numbers_to_str=True)

    questionId: str
    question: str
    question_types: list[str] | None = None
    answers: list[str] | None = None
    image: Any


def load(source: Source) -> DataSet:
    """Read DocVQA.

    Parameters
    ----------
    source
        ``val_v1.0.json`` or ``val_v1.0_withQT.json`` with the folder of the pages, by default the
        first there is of ``documents`` and ``spdocvqa_images``, beside it or beside its folder; or
        parquet.

    Returns
    -------
    DataSet
        Types are the question types, joined with commas; none where the file has none.

    Raises
    ------
    DataSetError, MissingPackageError
        See `Table` and its `questions`.
    """
    table = Table(source)
    folder = source.folder(["documents", "spdocvqa_images"], above=1)

    def page(image: Any) -> Path:
        # The name of a page is text; a page itself is an object or bytes.
        if not isinstance(image, str):
            return source.pictures.put(image).path
        name = PurePosixPath(image)
        return inside(folder, name.name if name.parent.name == "documents" else image)

    def make(number: int, record: dict[str, Any]) -> Iterator[Question]:
        entry = Entry.model_validate(record)
        if not entry.answers:
            raise NoAnswerError("the answers are missing")
        yield Question(
            id=entry.questionId,
            kind="image",
            path=page(entry.image),
            question=entry.question.strip(),
            answer=entry.answers[0],
            answers=tuple(entry.answers),
            scoring="anls",
            instruction=SHORT_ANSWER,
            type=", ".join(sorted(entry.question_types or ())),
        )

    return table.questions(
        NAME,
        COLUMNS,
        make,
        "Those of the test split are not published: give the validation split.",
    )
