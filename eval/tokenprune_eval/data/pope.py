"""POPE (arXiv 2305.10355): whether an object is in a photograph, yes or no, in three samplings.

Sources. JSON lines: ``output/coco/coco_pope_random.json``, ``…_popular.json`` and
``…_adversarial.json`` of ``AoiDragon/POPE`` (question_id, image, text, label), whose README says
how other sets are named. Parquet: the columns that ``lmms_eval/tasks/pope/utils.py`` of
``EvolvingLMMs-Lab/lmms-eval`` reads of ``lmms-lab/POPE``, and the cards of its copies (id,
question_id, question, answer, image_source, image with its bytes, category). Scoring:
``evaluate.py`` of the authors, who report F1 and the share of yes. Instruction: LLaVA's and
lmms-eval's. Certain: the JSON lines were read; likely for the parquet, which was not at hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict

from tokenprune_eval.data.files import inside
from tokenprune_eval.data.question import DataSet, Question
from tokenprune_eval.data.tables import NoAnswerError, Source, Table
from tokenprune_eval.data.textvqa import SHORT_ANSWER

NAME = "pope"
LINE_COLUMNS = frozenset({"question_id", "image", "text", "label"})
PARQUET_COLUMNS = frozenset({"question_id", "question", "answer", "image", "image_source"})

_CATEGORY = re.compile(r"adversarial|popular|random")


class Line(BaseModel):
    """The keys that are used, under their names in the authors' files."""

    model_config = ConfigDict(extra="ignore", coerce_numbers_to_str=True)

    question_id: str
    image: Any
    text: str
    label: str | None = None
    category: str = ""


_LINE_NAMES = {"question": "text", "answer": "label"}


def load(source: Source) -> DataSet:
    """Read one of POPE's files, or all three of a parquet version.

    Parameters
    ----------
    source
        ``coco_pope_adversarial.json``, ``…_popular.json`` or ``…_random.json`` with the folder of
        the images, by default the first there is of ``val2014`` and ``images``, beside it or up to
        two folders above it; or parquet.

    Returns
    -------
    DataSet
        Named after the sampling, ``pope-adversarial``, where the file has one. Types are the
        samplings.

    Raises
    ------
    DataSetError, MissingPackageError
        See `Table` and its `questions`.
    """
    table = Table(source)
    lines = "text" in table.columns
    told = _CATEGORY.search(source.file.stem) if lines else None
    sampling = told[0] if told else ""
    folder = source.folder(["val2014", "images"], above=2)

    def make(number: int, record: dict[str, Any]) -> Iterator[Question]:
        line = Line.model_validate(
            record
            if lines
            # Its numbers of questions repeat in every sampling; its ids do not.
            else {_LINE_NAMES.get(key, key): value for key, value in record.items()}
            | ({"question_id": record["id"]} if record.get("id") is not None else {})
        )
        if not line.label:
            raise NoAnswerError("the label is missing")
        yield Question(
            id=line.question_id,
            kind="image",
            path=inside(folder, str(line.image)) if lines else source.pictures.put(line.image).path,
            question=line.text.strip(),
            answer=line.label.strip().lower(),
            scoring="yes-no",
            instruction=SHORT_ANSWER,
            type=sampling or line.category,
        )

    return table.questions(
        f"{NAME}-{sampling}" if sampling else NAME,
        LINE_COLUMNS if lines else PARQUET_COLUMNS,
        make,
        "Give the published file, which has them.",
    )
