"""The files of a run's folder that the runner writes: run.json, items.jsonl and records.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from tokenprune.errors import InputFileError, reason_of
from tokenprune.formats import check_format
from tokenprune_eval.results.records import Condition, Record
from tokenprune_eval.results.summary import QuestionInfo
from tokenprune_eval.shared.output import write_whole

FORMAT = 1
"""Of a run's folder; rises when the meaning of its files changes. It stands in ``run.json``."""

RUN, ITEMS, RECORDS = "run.json", "items.jsonl", "records.jsonl"

_Line = TypeVar("_Line", bound=BaseModel)


@dataclass(frozen=True)
class StoredRun:
    """What a run left.

    Attributes
    ----------
    folder
        Where it is.
    about
        ``run.json``.
    questions, conditions, records
        See `summarise`, which takes all but the folder.
    """

    folder: Path
    about: dict[str, Any]
    questions: list[QuestionInfo]
    conditions: list[Condition]
    records: list[Record]


def write_questions(folder: Path, questions: Sequence[QuestionInfo]) -> None:
    """Write ``items.jsonl`` as a whole.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    write_whole(
        folder / ITEMS, "".join(question.model_dump_json() + "\n" for question in questions)
    )


def read_run(folder: Path) -> StoredRun:
    """Read a run's folder, finished or not.

    A last line of ``records.jsonl`` that an interruption cut off is left out.

    Parameters
    ----------
    folder
        Holds ``run.json``, ``items.jsonl`` and ``records.jsonl``.

    Raises
    ------
    InputFileError
        If a file is missing or holds something else.
    """
    file = folder / RUN
    content = _read(file)
    try:
        about = json.loads(content)
    except ValueError as error:
        raise InputFileError(
            f"{file} is no JSON ({reason_of(error)}). Give the folder of a run."
        ) from None
    if isinstance(about, dict):
        about = check_format(about, FORMAT, file, "Or run the evaluation anew in another folder.")
    listed = about.get("conditions") if isinstance(about, dict) else None
    if not isinstance(listed, list):
        raise InputFileError(
            f"{file} does not list the run's conditions. Give the folder of a run."
        )
    try:
        conditions = [Condition.model_validate(one) for one in listed]
    except ValidationError as error:
        raise _damaged(f"{file}, conditions", error) from None
    return StoredRun(
        folder=folder,
        about=about,
        questions=list(_lines(folder / ITEMS, QuestionInfo)),
        conditions=conditions,
        records=list(_lines(folder / RECORDS, Record, may_be_cut=True)),
    )


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputFileError(
            f"{file} cannot be read: {reason_of(error)}. Give the folder of a run."
        ) from None


def _lines(file: Path, kind: type[_Line], may_be_cut: bool = False) -> Iterator[_Line]:
    *lines, last = _read(file).split(b"\n")
    for number, line in enumerate([*lines, last] if last else lines, 1):
        try:
            yield kind.model_validate_json(line)
        except ValidationError as error:
            if may_be_cut and number > len(lines):
                return
            raise _damaged(f"{file}, line {number}", error) from None


def _damaged(place: str, error: ValidationError) -> InputFileError:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    return InputFileError(
        f"{place} is damaged{f' at {field}' if field else ''}: {first['msg']}. Copy the folder "
        "again, or run the evaluation anew in another one."
    )
