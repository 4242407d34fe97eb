"""Images and videos read beside the model: a few are always ready before they are asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from tokenprune.errors import TokenPruneError
from tokenprune_eval.data.item import Item
from tokenprune_eval.evaluation.engines.base import Asked
from tokenprune_eval.evaluation.settings import Settings
from tokenprune_hf.images import load_image
from tokenprune_hf.video import read_video

_READERS = 2


def by_media(items: Sequence[Item]) -> list[list[Item]]:
    """Return items in groups that look at the same frames of the same file, in first order."""
    groups: dict[object, list[Item]] = {}
    for item in items:
        groups.setdefault((item.kind, item.path, item.times), []).append(item)
    return list(groups.values())


def read_ahead(
    groups: Sequence[Sequence[Item]],
    settings: Settings,
    prompt_of: Callable[[Item], str],
    prepare: Callable[[Asked], None],
) -> Iterator[Asked]:
    """Yield every group, read and prepared; `Settings.ahead` of them are worked on beforehand.

    Parameters
    ----------
    groups
        Questions that share an image or video.
    settings
        How videos are sampled.
    prompt_of
        The text put to the model.
    prepare
        `Engine.prepare`.

    Yields
    ------
    Asked
        In order. What cannot be read has `error` set.
    """

    def read(group: Sequence[Item]) -> Asked:
        asked = Asked(group, [prompt_of(item) for item in group])
        first = group[0]
        try:
            if first.kind == "image":
                asked.content = load_image(first.path)
            else:
                asked.content = read_video(
                    first.path,
                    None if first.times else settings.frames,
                    fps=None if first.times else settings.fps,
                    times=first.times or None,
                    max_side=settings.max_side,
                )
            prepare(asked)
        except TokenPruneError as error:
            asked.error = str(error)
        asked.content = None
        return asked

    waiting: deque[Future[Asked]] = deque()
    with ThreadPoolExecutor(_READERS) as pool:
        try:
            for group in groups:
                waiting.append(pool.submit(read, group))
                if len(waiting) > settings.ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
