"""LVBench (arXiv 2406.08035): 1,549 questions about 103 videos of an hour and more.

Sources. ``video_info.meta.jsonl`` with one line a video, ``key`` (the YouTube id) and ``qa``, each
with uid, question, answer (a letter) and question_type (a list): README, ``scripts/
construct_random_answers.py`` and ``lvbench/metrics/compute_accuracy.py`` of ``THUDM/LVBench``.
Choices as the lines "(A) ..." to "(D) ..." behind the question: a sample line, and the loader
``videomind/dataset/sub_classes/lvbench.py`` of ``cn-ryh/VideoMind``, which asserts exactly that
for every question. Certain. Where the videos lie: ``scripts/download.sh`` puts them in
``scripts/videos`` under numbers, archives elsewhere unpack to ``all_videos/<key>.mp4``; only names
by key are read here. Likely.

``time_reference`` says where the answer is to be seen; it is not used, since no model is told.
"""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from tokenprune_eval.data.errors import DataSetError, Problems
from tokenprune_eval.data.files import (
    check_choices,
    check_columns,
    finish,
    media_folder,
    read_jsonl,
    video_of,
)
from tokenprune_eval.data.question import LETTERS, DataSet, Question

NAME = "lvbench"
COLUMNS = frozenset({"key", "qa"})

_CHOICE = re.compile(r"^[ \t]*\(([A-Z])\)", re.MULTILINE)


class Asked(BaseModel):
    """The keys of a question that are used."""

    model_config = ConfigDict(extra="ignore", coerce_numbers_to_str=True)

    uid: str
    question: str
    answer: str | None = None
    question_type: list[str] = []


class Line(BaseModel):
    """The keys of a line that are used."""

    model_config = ConfigDict(extra="ignore")

    key: str
    qa: list[Asked]


def load(file: Path, media: Path | None = None) -> DataSet:
    """Read LVBench's JSON lines.

    Parameters
    ----------
    file
        ``video_info.meta.jsonl``.
    media
        Folder of the videos ``<key>.mp4``; by default the first there is of ``all_videos``,
        ``videos`` and ``video`` beside the file.

    Returns
    -------
    DataSet
        Ids are the uids. A question with several types, as most have, gets them in alphabetic
        order with commas between; the authors' script counts it under each of them.

    Raises
    ------
    DataSetError
        With everything that is wrong, by line.
    """
    problems = Problems(file)
    records = read_jsonl(file, problems)
    problems.check()
    check_columns(file, COLUMNS, records, NAME)
    home = file.absolute().parent
    folder = media_folder(media, [home / "all_videos", home / "videos", home / "video"])
    lines: list[tuple[str, Line]] = []
    for place, record in records:
        try:
            lines.append((place, Line.model_validate(record)))
        except ValidationError as error:
            problems.add_all(place, error, [])
    if lines and all(asked.answer is None for _, line in lines for asked in line.qa):
        raise DataSetError(
            f"{file} holds no answers (no key 'answer'). Give the published "
            "video_info.meta.jsonl, which has them."
        )
    questions: list[tuple[str, Question]] = []
    for place, line in lines:
        for number, asked in enumerate(line.qa, start=1):
            where = f"{place}, question {number} (uid {asked.uid})"
            try:
                text, choices = _split(asked.question)
                answer = (asked.answer or "").strip()
                letters = LETTERS[: len(choices)]
                if len(answer) != 1 or answer not in letters:
                    raise ValueError(f"the answer {answer!r} is no letter from A to {letters[-1]}")
                path = video_of(folder, line.key)
            except ValueError as error:
                problems.add(where, str(error))
                continue
            question = Question(
                id=asked.uid,
                kind="video",
                path=path,
                question=text,
                answer=answer,
                choices=choices,
                type=", ".join(sorted(asked.question_type)),
            )
            questions.append((where, question))
    return finish(NAME, file, questions, problems)


def _split(text: str) -> tuple[str, tuple[str, ...]]:
    """Part a question from the choices that stand behind it, each from the start of a line."""
    matches = list(_CHOICE.finditer(text))
    letters = "".join(match[1] for match in matches)
    if not letters or letters != LETTERS[: len(letters)]:
        raise ValueError(
            f"lines with (A), (B), ... in this order are needed behind the question, got "
            f"{', '.join(letters) or 'none'}"
        )
    ends = [match.start() for match in matches[1:]] + [len(text)]
    choices = tuple(
        text[match.end() : end].strip() for match, end in zip(matches, ends, strict=True)
    )
    check_choices(choices)
    question = text[: matches[0].start()].strip()
    if not question:
        raise ValueError("there is no question before the choices")
    return question, choices
