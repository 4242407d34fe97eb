"""TextVQA (arXiv 1904.08920): questions about text in photographs, ten annotators' answers to each.

Sources. JSON: ``TextVQA_0.5.1_val.json`` (an object with ``data``: question, image_id, question_id,
set_name, answers, sizes and URLs) and images ``<image_id>.jpg`` in ``train_images``: the script
``textvqa.py`` of ``facebook/textvqa`` and ``mmpretrain/datasets/textvqa.py`` of
``open-mmlab/mmpretrain``. Parquet: the card of ``lmms-lab/textvqa`` (image_id, question_id,
question, image with its bytes, answers, set_name, ocr_tokens, …). Scoring: the evaluation of
``facebookresearch/mmf``. The question with a capital letter and the instruction:
``lmms_eval/tasks/textvqa`` of ``EvolvingLMMs-Lab/lmms-eval``. Certain: all of these agree; the
files themselves were not at hand. OCR tokens are not put into the prompt, so results compare to
those without them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict

from tokenprune_eval.data.files import inside
from tokenprune_eval.data.question import DataSet, Question
from tokenprune_eval.data.tables import NoAnswerError, Source, Table

NAME = "textvqa"
COLUMNS = frozenset({"image_id", "question_id", "question", "set_name"})

SHORT_ANSWER = "Answer the question using a single word or phrase."
"""What LLaVA, and lmms-eval after it, put behind questions with short answers."""


class Entry(BaseModel):
    """The keys that are used."""

    model_config = ConfigDict(extra="ignore", coerce_numbers_to_str=True)

    image_id: str
    question_id: str
    question: str
    answers: list[str] | None = None
    image: Any = None


def load(source: Source) -> DataSet:
    """Read TextVQA.

    Parameters
    ----------
    source
        ``TextVQA_0.5.1_val.json`` with the folder of ``<image_id>.jpg``, by default the first there
        is of ``train_images``, ``train_val_images/train_images`` and ``images`` beside it; or
        parquet.

    Returns
    -------
    DataSet
        Without types. The answer of a question is the one most annotators gave.

    Raises
    ------
    DataSetError, MissingPackageError
        See `Table` and its `questions`.
    """
    table = Table(source)
    embedded = "image" in table.columns
    folder = source.folder(["train_images", "train_val_images/train_images", "images"])

    def make(number: int, record: dict[str, Any]) -> Iterator[Question]:
        entry = Entry.model_validate(record)
        if not entry.answers:
            raise NoAnswerError("the answers are missing")
        asked = entry.question.strip()
        yield Question(
            id=entry.question_id,
            kind="image",
            path=source.pictures.put(entry.image).path
            if embedded
            else inside(folder, f"{entry.image_id}.jpg"),
            question=asked[:1].upper() + asked[1:],
            answer=Counter(entry.answers).most_common(1)[0][0],
            answers=tuple(entry.answers),
            scoring="vqa",
            instruction=SHORT_ANSWER,
        )

    return table.questions(
        NAME,
        COLUMNS,
        make,
        "Those of the test split are not published: give the validation split.",
    )
