"""OCRBench (arXiv 2305.07895): 1,000 questions about text in images, ten types.

Sources. JSON: ``OCRBench/json_files/OCRBench.json`` of ``Yuliang-Liu/MultimodalOCR`` (dataset_name,
id, image_path, question, answers as one text or a list, type); ids repeat, as each source has its
own. Parquet: the card of ``echo840/OCRBench`` (dataset, question, question_type, answer as a list,
image with its bytes) and the script that made it, ``lmms_eval/tasks/ocrbench/upload_ocrbench.py``
of ``EvolvingLMMs-Lab/lmms-eval``. Scoring: ``OCRBench/example.py`` of the authors. Certain: the
JSON and the script were read, the parquet itself was not at hand. The question is put as it is, as
the authors and lmms-eval do; these allow 128 new tokens.

OCRBench v2 has the same keys and other rules. It is told by its types and refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict

from tokenprune_eval.data.files import inside
from tokenprune_eval.data.question import DataSet, Question
from tokenprune_eval.data.tables import NoAnswerError, Source, Table

NAME = "ocrbench"
JSON_COLUMNS = frozenset({"dataset_name", "image_path", "question", "answers", "type"})
PARQUET_COLUMNS = frozenset({"dataset", "question", "question_type", "answer", "image"})

FORMULAS = "HME100k"
"""The source whose answers are formulas."""

TYPES = (
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
    "Scene Text-centric VQA",
    "Doc-oriented VQA",
    "Key Information Extraction",
    "Handwritten Mathematical Expression Recognition",
)


class Entry(BaseModel):
    """The keys that are used, of the JSON file."""

    model_config = ConfigDict(extra="ignore", coerce_numbers_to_str=True)

    dataset_name: str
    image_path: str = ""
    question: str
    answers: str | list[str] | None = None
    type: str
    image: Any = None


_JSON_NAMES = {"dataset": "dataset_name", "question_type": "type", "answer": "answers"}


def load(source: Source) -> DataSet:
    """Read OCRBench.

    Parameters
    ----------
    source
        ``OCRBench.json`` with the folder ``OCRBench_Images``, by default beside it; or parquet.

    Returns
    -------
    DataSet
        Types are the ten of the authors. Ids are the numbers of the entries.

    Raises
    ------
    DataSetError, MissingPackageError
        See `Table` and its `questions`.
    """
    table = Table(source)
    embedded = "image" in table.columns
    folder = source.folder(["OCRBench_Images", "."])

    def make(number: int, record: dict[str, Any]) -> Iterator[Question]:
        entry = Entry.model_validate(
            {_JSON_NAMES.get(key, key): value for key, value in record.items()}
            if embedded
            else record
        )
        if entry.type not in TYPES:
            raise ValueError(
                f"the type {entry.type!r} is none of OCRBench's ten. OCRBench v2 has other rules "
                "and is not read"
            )
        answers = [entry.answers] if isinstance(entry.answers, str) else entry.answers or []
        if not answers:
            raise NoAnswerError("the answer is missing")
        yield Question(
            id=f"{NAME}-{number}",
            kind="image",
            path=source.pictures.put(entry.image).path
            if embedded
            else inside(folder, entry.image_path),
            question=entry.question.strip(),
            answer=answers[0],
            answers=tuple(answers),
            scoring="formula" if entry.dataset_name == FORMULAS else "contains",
            type=entry.type,
        )

    return table.questions(
        NAME,
        PARQUET_COLUMNS if embedded else JSON_COLUMNS,
        make,
        "Give the published file, which has them.",
    )
