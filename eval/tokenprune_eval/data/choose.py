"""The part of a data set that a run asks: a draw, a shard of it, and what is missing of it."""

from __future__ import annotations

import random
from pathlib import Path

from tokenprune_eval.data.errors import DataSetError
from tokenprune_eval.data.item import DataSet, Item


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
    items = list(dataset.items)
    if limit is not None:
        items = _draw(items, limit, seed)
    if shard is not None:
        part, parts = shard
        if not 1 <= part <= parts:
            raise DataSetError(f"shard must be i/n with i from 1 to n, got {part}/{parts}.")
        own = set(list(dict.fromkeys(item.path for item in items))[part - 1 :: parts])
        items = [item for item in items if item.path in own]
    whole = dataset.drawn_from or len(dataset.items)
    return DataSet(dataset.name, tuple(items), None if len(items) == whole else whole)


def _draw(items: list[Item], limit: int, seed: int) -> list[Item]:
    of_path: dict[Path, list[int]] = {}
    for number, item in enumerate(items):
        of_path.setdefault(item.path, []).append(number)
    paths = list(of_path)
    drawn: list[int] = []
    for path in random.Random(seed).sample(paths, len(paths)):
        drawn += of_path[path][: limit - len(drawn)]
        if len(drawn) == limit:
            break
    return [items[number] for number in sorted(drawn)]


def missing_media(dataset: DataSet) -> list[Path]:
    """Return the images and videos of a data set that are not there, each once, in its order."""
    paths = dict.fromkeys(item.path for item in dataset.items)
    return [path for path in paths if not path.is_file()]
