"""Answers that come in a file of their own, as for test splits."""

from __future__ import annotations

from pathlib import Path

from tokenprune_eval.data.errors import DataSetError, Problems
from tokenprune_eval.data.files import load_json

_IDS = ("question_id", "id")


def read_answers(file: Path) -> dict[str, str]:
    """Read a JSON file that says the answer to each question.

    Parameters
    ----------
    file
        An object of id: answer, or a list of objects with ``question_id`` or ``id``, and
        ``answer``.

    Returns
    -------
    dict of str to str
        The answer by id, as it stands there.

    Raises
    ------
    DataSetError
        If it is neither, or an answer is no text, or an id is there twice.
    """
    content = load_json(file)
    if isinstance(content, dict):
        pairs = [(f"key {key!r}", key, answer) for key, answer in content.items()]
    elif isinstance(content, list):
        pairs = []
        for number, entry in enumerate(content, start=1):
            known = entry if isinstance(entry, dict) else {}
            name = next((known[key] for key in _IDS if key in known), None)
            pairs.append((f"entry {number}", name, known.get("answer")))
    else:
        raise DataSetError(f"{file} holds no answers: an object or a list is needed.")
    problems = Problems(file)
    answers: dict[str, str] = {}
    for place, name, answer in pairs:
        if not isinstance(name, str) or not isinstance(answer, str):
            problems.add(place, "an id (question_id or id) and an answer, both text, are needed")
        elif name in answers:
            problems.add(place, f"the id {name!r} is there twice")
        else:
            answers[name] = answer
    problems.check()
    return answers
