"""MLVU (arXiv 2406.04264): nine tasks, one JSON file each, choice and open questions.

Sources. Keys of the development set (video, duration, question, candidates, answer as text,
question_type): the published ``MLVU/data/5_order.json`` and ``9_summary.json`` in
``FlagOpen/FlagEmbedding``; summaries and sub-scenes have no ``candidates``. File and folder names
(``json/1_plotQA.json`` to ``9_summary.json``, videos in ``video/1_plotQA``): ``vlmeval/dataset/
mlvu.py`` of ``open-compass/VLMEvalKit``. Test set (``test_question.json`` with ``question_id`` and
no answer): ``Evaluation_Test/test_bench.py`` of ``JUNJIE99/MLVU``, whose issue 4 says that answers
were held back. They came later as ``test-ground-truth/test_mcq_gt.json``, with the keys of the
development set and ``question_id``: seen in several users' scripts alone. Certain for the
development set, likely for the test set.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from tokenprune_eval.data.answers import read_answers
from tokenprune_eval.data.errors import DataSetError, Problems
from tokenprune_eval.data.files import (
    check_choices,
    check_columns,
    finish,
    inside,
    media_folder,
    read_json,
)
from tokenprune_eval.data.question import LETTERS, DataSet, Question

NAME = "mlvu"
COLUMNS = frozenset({"video", "question", "question_type"})


class Entry(BaseModel):
    """The keys that are used."""

    # Counts are text in the published files; a number would mean the same.
    model_config = ConfigDict(extra="ignore", coerce_numbers_to_str=True)

    video: str
    question: str
    question_type: str
    candidates: list[str] | None = None
    answer: str | None = None
    question_id: str | None = None


def load(file: Path, media: Path | None = None, answers: Path | None = None) -> DataSet:
    """Read one of MLVU's JSON files, or the folder with all of them.

    Parameters
    ----------
    file
        A task's file, a file of the test set, or the folder ``json``. Of a folder the files with
        candidates are read, in the order of their names: they are what the authors' M-Avg is
        about.
    media
        The folder ``video``; by default it is looked for beside the folder ``json``, beside the
        file, and in ``MLVU_Test`` where the test set has it. Videos of the task ``1_plotQA`` are
        in its folder ``1_plotQA`` (or ``plotQA``), or, where there is no such folder, in itself.
    answers
        For the test set: the JSON file with its answers.

    Returns
    -------
    DataSet
        Types are the ``question_type``. Without ``question_id``, ids are the file's name and the
        entry's number. Tasks without candidates are open questions; their answers are
        descriptions, which only a judge can compare.

    Raises
    ------
    DataSetError
        With everything that is wrong, by file and entry; or if there are no answers.
    """
    if not file.is_dir():
        return _load_file(file, media, answers)
    files = sorted(one for one in file.glob("*.json") if one.is_file())
    if not files:
        raise DataSetError(f"{file} holds no JSON files. Give MLVU's folder json, or a file of it.")
    questions: list[tuple[str, Question]] = []
    for one in files:
        if any("candidates" in record for _, record in read_json(one, Problems(one))):
            found = _load_file(one, media, answers).questions
            questions += [
                (f"{one.name}, question {n}", question) for n, question in enumerate(found, start=1)
            ]
    return finish(NAME, file, questions, Problems(file))


def _load_file(file: Path, media: Path | None, answers: Path | None) -> DataSet:
    problems = Problems(file)
    records = read_json(file, problems)
    problems.check()
    check_columns(file, COLUMNS, records, NAME)
    given = None if answers is None else read_answers(answers)
    if given is None and all(record.get("answer") is None for _, record in records):
        raise DataSetError(
            f"{file} holds no answers (no key 'answer'): MLVU's test questions come without. Give "
            "the published file with them as answers (test-ground-truth/test_mcq_gt.json), or "
            "load that file itself."
        )
    folder = _task_folder(media_folder(media, _usual(file.absolute().parent)), file.stem)
    questions: list[tuple[str, Question]] = []
    for number, (place, record) in enumerate(records, start=1):
        try:
            entry = Entry.model_validate(record)
        except ValidationError as error:
            problems.add_all(place, error, [])
            continue
        name = entry.question_id or f"{file.stem}-{number}"
        answer = entry.answer if given is None else given.get(name)
        choices = tuple(candidate.strip() for candidate in entry.candidates or ())
        try:
            if answer is None:
                where = file if given is None else answers
                raise ValueError(f"the question {name!r} has no answer in {where}")
            if choices:
                check_choices(choices)
                answer = _letter(answer, choices)
            path = inside(folder, entry.video)
        except ValueError as error:
            problems.add(place, str(error))
            continue
        question = Question(
            id=name,
            kind="video",
            path=path,
            question=entry.question.strip(),
            answer=answer,
            choices=choices,
            type=entry.question_type,
        )
        questions.append((place, question))
    return finish(NAME, file, questions, problems)


def _usual(home: Path) -> list[Path]:
    """Return where the videos can be, for files in `home`."""
    if home.name == "json":
        return [home.parent / "video", home / "video"]
    test = Path("MLVU_Test", "video")
    return [home / "video", home / test, home.parent / test]


def _task_folder(folder: Path, task: str) -> Path:
    """Return the folder of one task's videos, named ``1_plotQA`` or ``plotQA``, or `folder`."""
    names = (task, task.partition("_")[2]) if task[:1].isdigit() else (task,)
    return next((folder / name for name in names if name and (folder / name).is_dir()), folder)


def _letter(answer: str, choices: Sequence[str]) -> str:
    # Of two equal candidates the authors' scripts take the last.
    found = [number for number, choice in enumerate(choices) if choice == answer.strip()]
    if not found:
        raise ValueError(
            f"the answer {answer!r} is none of the candidates {list(choices)}. The authors "
            "corrected such entries in July 2024; download the file anew"
        )
    return LETTERS[found[-1]]
