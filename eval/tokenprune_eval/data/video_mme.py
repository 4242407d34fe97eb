"""Video-MME (arXiv 2405.21075): 2,700 questions about 900 videos, published as one parquet file.

Sources. Columns: the dataset card of ``lmms-lab/Video-MME``, to which the authors' page points
(``dataset_info`` lists video_id, duration, domain, sub_category, url, videoID, question_id,
task_type, question, options, answer, all strings and ``options`` a list of strings). Options as
"A. Apples." and answers as a letter: ``evaluation/output_test_template.json`` and the README of
``BradyFU/Video-MME``. File names (``videomme/test-00000-of-00001.parquet``, videos
``data/<videoID>.mp4`` with ``.MP4`` and ``.mkv`` as exceptions): ``lmms_eval/tasks/videomme/
utils.py`` of ``EvolvingLMMs-Lab/lmms-eval``. Certain: all of these agree; the parquet itself was
not at hand.

Subtitles are left out, so results compare to the paper's "w/o subs".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from tokenprune_eval.data.errors import DataSetError, Problems
from tokenprune_eval.data.files import (
    check_choices,
    check_columns,
    finish,
    media_folder,
    read_parquet,
    video_of,
)
from tokenprune_eval.data.question import LETTERS, DataSet, Question

NAME = "video-mme"
COLUMNS = frozenset({"videoID", "question_id", "task_type", "question", "options", "answer"})

_LETTERED = re.compile(r"\s*([A-Z])\s*[.):]\s*")


class Row(BaseModel):
    """The columns that are used."""

    model_config = ConfigDict(extra="ignore")

    videoID: str
    question_id: str
    task_type: str
    question: str
    options: list[str]
    answer: str | None


def load(file: Path, media: Path | None = None) -> DataSet:
    """Read Video-MME's parquet file.

    Parameters
    ----------
    file
        ``videomme/test-00000-of-00001.parquet``.
    media
        Folder of the videos ``<videoID>.mp4``; by default the first there is of ``data``,
        ``video`` and ``videos`` beside the file, or beside the folder ``videomme`` it lies in.

    Returns
    -------
    DataSet
        Types are the 12 task types.

    Raises
    ------
    MissingPackageError
        If pyarrow is not installed.
    DataSetError
        With everything that is wrong, by row.
    """
    records = read_parquet(file)
    check_columns(file, COLUMNS, records, NAME)
    home = file.absolute().parent
    home = home.parent if home.name == "videomme" else home
    folder = media_folder(media, [home / "data", home / "video", home / "videos"])
    if all(record.get("answer") in (None, "") for _, record in records):
        raise DataSetError(
            f"{file} holds no answers (the column 'answer' is empty). Give the published test "
            "file, which has them."
        )
    problems = Problems(file)
    questions: list[tuple[str, Question]] = []
    for place, record in records:
        try:
            row = Row.model_validate(record)
        except ValidationError as error:
            problems.add_all(place, error, [])
            continue
        try:
            choices = _texts(row.options)
            answer = (row.answer or "").strip()
            letters = LETTERS[: len(choices)]
            if len(answer) != 1 or answer not in letters:
                raise ValueError(f"the answer {answer!r} is no letter from A to {letters[-1]}")
            path = video_of(folder, row.videoID)
        except ValueError as error:
            problems.add(f"{place} ({row.question_id})", str(error))
            continue
        question = Question(
            id=row.question_id,
            kind="video",
            path=path,
            question=row.question.strip(),
            answer=answer,
            choices=choices,
            type=row.task_type,
        )
        questions.append((place, question))
    return finish(NAME, file, questions, problems)


def _texts(options: Sequence[str]) -> tuple[str, ...]:
    """Take the letter off each option; an option without one is its own text."""
    texts: list[str] = []
    for expected, option in zip(LETTERS, options, strict=False):
        match = _LETTERED.match(option)
        if match and match[1] == expected:
            texts.append(option[match.end() :].strip())
        elif match and match[1] in LETTERS[: len(options)]:
            raise ValueError(f"option {expected} is lettered {match[1]}: {option!r}")
        else:
            texts.append(option.strip())
    if len(options) > len(LETTERS):
        raise ValueError(f"{len(options)} options, and at most {len(LETTERS)} can be told apart")
    check_choices(texts)
    return tuple(texts)
