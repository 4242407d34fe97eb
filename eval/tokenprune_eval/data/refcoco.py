"""RefCOCO, RefCOCO+ and RefCOCOg (arXiv 1608.00272, 1511.02283): the box of what a phrase means.

Sources. Parquet: the card of ``lmms-lab/RefCOCO`` (question_id, image with its bytes, question,
answer as the list of phrases, segmentation, bbox, iscrowd, file_name), and
``lmms_eval/tasks/refcoco/utils_rec.py`` of ``EvolvingLMMs-Lab/lmms-eval``: bbox is left, top, width
and height in pixels, and every phrase is a question. JSON lines: ``refcoco_val.jsonl`` and its
like, which Qwen-VL's and InternVL's evaluations read (image as a path, sent, bbox as left, top,
right and bottom in pixels, height, width): ``internvl_chat/eval/refcoco/evaluate_grounding.py`` of
``OpenGVLab/InternVL``. The question is InternVL's and LLaVA's; the unit of the box is asked for
behind it. Certain: card and scripts were read; the files themselves were not at hand. The authors'
own pickles are not read: they may run code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from tokenprune_eval.data.files import inside
from tokenprune_eval.data.question import DataSet, Question
from tokenprune_eval.data.tables import NoAnswerError, Source, Table

NAME = "refcoco"
LINE_COLUMNS = frozenset({"image", "sent", "bbox", "height", "width"})
PARQUET_COLUMNS = frozenset({"question_id", "image", "answer", "bbox", "file_name"})

QUESTION = "Please provide the bounding box coordinate of the region this sentence describes: {}"

Four = Annotated[list[float], Field(min_length=4, max_length=4)]


class Line(BaseModel):
    """One line: a phrase, and its box."""

    model_config = ConfigDict(extra="ignore")

    image: str
    sent: str
    bbox: Four | None
    height: int
    width: int


class Row(BaseModel):
    """One row: an object, and phrases for it."""

    model_config = ConfigDict(extra="ignore", coerce_numbers_to_str=True)

    image: Any
    answer: list[str]
    bbox: Four | None


def load(source: Source) -> DataSet:
    """Read phrases and boxes.

    Parameters
    ----------
    source
        JSON lines with the folder of COCO's pictures, in which those named ``…/train2014/x.jpg``
        are looked for as ``train2014/x.jpg``, by default the first there is of ``coco`` and
        ``data/coco``, beside it or up to two folders above it; or parquet.

    Returns
    -------
    DataSet
        Named after the file of JSON lines. A question for each phrase, without types; the answer
        is ``[left, top, right, bottom]`` in pixels, which is also the evidence.

    Raises
    ------
    DataSetError, MissingPackageError
        See `Table` and its `questions`.
    """
    table = Table(source)
    lines = "sent" in table.columns
    folder = source.folder(["coco", "data/coco"], above=2)

    def make_of_line(number: int, record: dict[str, Any]) -> Iterator[Question]:
        line = Line.model_validate(record)
        if line.bbox is None:
            raise NoAnswerError("the box is missing")
        path = inside(folder, str(PurePosixPath(*PurePosixPath(line.image).parts[-2:])))
        box = (line.bbox[0], line.bbox[1], line.bbox[2], line.bbox[3])
        yield _question(f"{number}", path, line.sent, box, (line.width, line.height))

    def make_of_row(number: int, record: dict[str, Any]) -> Iterator[Question]:
        row = Row.model_validate(record)
        if row.bbox is None:
            raise NoAnswerError("the box is missing")
        picture = source.pictures.put(row.image)
        left, top, width, height = row.bbox
        for turn, phrase in enumerate(row.answer, start=1):
            box = (left, top, left + width, top + height)
            yield _question(f"{number}-{turn}", picture.path, phrase, box, picture.size)

    return table.questions(
        source.file.stem if lines else NAME,
        LINE_COLUMNS if lines else PARQUET_COLUMNS,
        make_of_line if lines else make_of_row,
        "Give a file with boxes.",
    )


def _question(
    name: str,
    path: Path,
    phrase: str,
    box: tuple[float, float, float, float],
    size: tuple[int, int],
) -> Question:
    if not phrase.strip():
        raise ValueError("the phrase is empty")
    left, top, right, bottom = box
    return Question(
        id=name,
        kind="image",
        path=path,
        question=QUESTION.format(phrase.strip()),
        answer=json.dumps([round(value, 2) for value in box]),
        scoring="box",
        size=size,
        evidence=((math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)),),
    )
