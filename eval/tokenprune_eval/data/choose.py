"""The part of a data set that a run asks: a draw, a shard of it, and what is missing of it."""

from __future__ import annotations

import random
from pathlib import Path

from tokenprune_eval.data.errors import DataSetError
from tokenprune_eval.data.question import DataSet, Question


def choose(
    dataset: DataSet, limit: int | None, seed: int, shard: tuple[int, int] | None = None
) -> DataSet:
    """Draw questions, and take one shard of what was drawn.

    Whole images or videos are drawn, so that each is encoded for as many questions as it has.
    Questions about few videos say less about all videos than as many about different ones.

    Parameters
    ----------
    dataset
        The whole set.
    limit
        The most questions there are to be; of the media file drawn last only the first questions
        are taken, so that there are exactly as many where the set has them. None for all.
    seed
        Seed of the draw. With the same seed a smaller `limit` draws a part of what a larger one
        draws.
    shard
        (i, n): of the media files drawn, in the set's order, the i-th and every n-th after it,
        from 1. The n shards share no media file and together are what was drawn; with more shards
        than files some are empty.

    Returns
    -------
    DataSet
        In the set's own order, under its name; `drawn_from` says of how many.

    Raises
    ------
    DataSetError
        If `limit` is less than 1, or `shard` not 1 <= i <= n.
    """
    if limit is not None and limit < 1:
        raise DataSetError(
            f"limit must be at least 1, got {limit}. Leave it out for all questions."
        )
    questions = list(dataset.questions)
    if limit is not None:
        questions = _draw(questions, limit, seed)
    if shard is not None:
        part, parts = shard
        if not 1 <= part <= parts:
            raise DataSetError(f"shard must be i/n with i from 1 to n, got {part}/{parts}.")
        own = set(list(dict.fromkeys(question.paths for question in questions))[part - 1 :: parts])
        questions = [question for question in questions if question.paths in own]
    whole = dataset.drawn_from or len(dataset.questions)
    return DataSet(dataset.name, tuple(questions), None if len(questions) == whole else whole)


def _draw(questions: list[Question], limit: int, seed: int) -> list[Question]:
    of_path: dict[tuple[Path, ...], list[int]] = {}
    for number, question in enumerate(questions):
        of_path.setdefault(question.paths, []).append(number)
    paths = list(of_path)
    drawn: list[int] = []
    for path in random.Random(seed).sample(paths, len(paths)):
        drawn += of_path[path][: limit - len(drawn)]
        if len(drawn) == limit:
            break
    return [questions[number] for number in sorted(drawn)]


def choose_media(dataset: DataSet, at_least: int | None, seed: int) -> DataSet:
    """Draw whole images or videos until there are enough questions about them.

    Parameters
    ----------
    dataset
        The whole set.
    at_least
        How many questions there are to be; None for all.
    seed
        Seed of the draw. With the same seed a smaller number draws a part of what a larger one
        draws.

    Returns
    -------
    DataSet
        All questions about the images or videos drawn, one of these after the other.
    """
    of_path: dict[Path, list[Question]] = {}
    for question in dataset.questions:
        of_path.setdefault(question.path, []).append(question)
    paths = list(of_path)
    if at_least is not None:
        order = random.Random(seed).sample(paths, len(paths))
        drawn: set[Path] = set()
        count = 0
        while order and count < at_least:
            drawn.add(path := order.pop())
            count += len(of_path[path])
        paths = [path for path in paths if path in drawn]
    questions = tuple(question for path in paths for question in of_path[path])
    whole = dataset.drawn_from or len(dataset.questions)
    return DataSet(dataset.name, questions, None if len(questions) == whole else whole)


def missing_media(dataset: DataSet) -> list[Path]:
    """Return the images and videos of a data set that are not there, each once, in its order."""
    paths = dict.fromkeys(path for question in dataset.questions for path in question.paths)
    return [path for path in paths if not path.is_file()]
