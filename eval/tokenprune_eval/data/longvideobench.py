"""LongVideoBench (arXiv 2407.15754): 6,678 questions on 3,763 videos with subtitles.

Sources. File names (``lvb_val.json``, ``lvb_test_wo_gt.json``, videos in ``videos``) and the keys
video_path, candidates, correct_choice (an index from 0, absent from the test split), id:
``longvideobench/longvideobench_dataset.py`` and README of ``longvideobench/LongVideoBench``. The
other keys (question_category, topic_category, level, duration_group, ...): a copy of
``lvb_val.json`` in ``lwpyh/answer-entropy-zoom``, which has 4 or 5 candidates an entry. Certain.

Questions often quote subtitles. These are left out here, so that results are those of video
without subtitles, which the paper's main table is not.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, StrictInt, ValidationError

from tokenprune_eval.data.answers import read_answers
from tokenprune_eval.data.errors import DataSetError, Problems
from tokenprune_eval.data.files import (
    check_choices,
    check_columns,
    finish,
    inside,
    letter_of,
    media_folder,
    read_json,
)
from tokenprune_eval.data.question import LETTERS, DataSet, Question

NAME = "longvideobench"
COLUMNS = frozenset({"id", "video_path", "question", "candidates", "question_category"})


class Entry(BaseModel):
    """The keys that are used."""

    model_config = ConfigDict(extra="ignore", coerce_numbers_to_str=True)

    id: str
    video_path: str
    question: str
    candidates: list[str]
    question_category: str
    correct_choice: StrictInt | None = None


def load(file: Path, media: Path | None = None, answers: Path | None = None) -> DataSet:
    """Read one of LongVideoBench's JSON files.

    Parameters
    ----------
    file
        ``lvb_val.json``, or ``lvb_test_wo_gt.json`` together with `answers`.
    media
        Folder of the videos; by default ``videos`` beside the file.
    answers
        JSON file with letters or texts by id, for the test split.

    Returns
    -------
    DataSet
        Types are the 17 question categories, such as ``"T2A"``.

    Raises
    ------
    DataSetError
        With everything that is wrong, by entry; or if there are no answers.
    """
    problems = Problems(file)
    records = read_json(file, problems)
    problems.check()
    check_columns(file, COLUMNS, records, NAME)
    given = None if answers is None else read_answers(answers)
    if given is None and all(record.get("correct_choice") in (None, -1) for _, record in records):
        raise DataSetError(
            f"{file} holds no answers (no key 'correct_choice'): LongVideoBench keeps those of its "
            "test split. Use lvb_val.json, or give a file with answers."
        )
    folder = media_folder(media, [file.absolute().parent / "videos"])
    questions: list[tuple[str, Question]] = []
    for place, record in records:
        try:
            entry = Entry.model_validate(record)
        except ValidationError as error:
            problems.add_all(place, error, [])
            continue
        choices = tuple(candidate.strip() for candidate in entry.candidates)
        try:
            check_choices(choices)
            if given is None:
                answer = _letter(entry.correct_choice, len(choices))
            elif entry.id in given:
                answer = letter_of(given[entry.id], choices)
            else:
                raise ValueError(f"{answers} holds no answer")
            path = inside(folder, entry.video_path)
        except ValueError as error:
            problems.add(f"{place} ({entry.id})", str(error))
            continue
        question = Question(
            id=entry.id,
            kind="video",
            path=path,
            question=entry.question.strip(),
            answer=answer,
            choices=choices,
            type=entry.question_category,
        )
        questions.append((place, question))
    return finish(NAME, file, questions, problems)


def _letter(index: int | None, count: int) -> str:
    if index is None or not 0 <= index < count:
        raise ValueError(f"correct_choice must be 0 to {count - 1}, got {index}")
    return LETTERS[index]
