"""Images and videos read beside the model: a few are always ready before they are asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from tokenprune.media.images import load_image
from tokenprune.media.video import read_video
from tokenprune_eval.data.question import Question
from tokenprune_eval.evaluation.engines.base import MediaQuestions
from tokenprune_eval.evaluation.failures import failure_of
from tokenprune_eval.evaluation.settings import Settings

_READERS = 2


def by_media(questions: Sequence[Question]) -> list[list[Question]]:
    """Return questions in groups that look at the same files or frames, in first order."""
    groups: dict[object, list[Question]] = {}
    for question in questions:
        groups.setdefault((question.kind, question.paths, question.times), []).append(question)
    return list(groups.values())


def read_ahead(
    groups: Sequence[Sequence[Question]],
    settings: Settings,
    prompt_of: Callable[[Question], str],
    prepare: Callable[[MediaQuestions], None],
) -> Iterator[MediaQuestions]:
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
    MediaQuestions
        In order. What cannot be read or prepared has `error` set; where only some questions of a
        group cannot be prepared, each of these comes on its own.

    Raises
    ------
    TokenPruneError
        For what is not about one image, video or question; see `failure_of`.
    """

    def read(group: Sequence[Question]) -> list[MediaQuestions]:
        asked = MediaQuestions(group, [prompt_of(question) for question in group])
        first = group[0]
        try:
            if first.kind == "image":
                images = [load_image(path) for path in first.paths]
                asked.content = images[0] if len(images) == 1 else images
            else:
                asked.content = read_video(
                    first.path,
                    None if first.times else settings.frames,
                    fps=None if first.times else settings.fps,
                    times=first.times or None,
                    max_side=settings.max_side,
                    allow_truncated=settings.allow_truncated,
                )
        except Exception as error:  # a decoder may raise anything on a damaged file
            asked.error, asked.unread = failure_of(error), True
            return [asked]
        parts = _prepared(asked, prepare)
        for part in parts:
            part.content = None
        return parts

    waiting: deque[Future[list[MediaQuestions]]] = deque()
    with ThreadPoolExecutor(_READERS) as pool:
        try:
            for group in groups:
                waiting.append(pool.submit(read, group))
                if len(waiting) > settings.ahead:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _prepared(
    asked: MediaQuestions, prepare: Callable[[MediaQuestions], None]
) -> list[MediaQuestions]:
    """Prepare the questions about one image or video; those that cannot be come on their own."""
    _try_to_prepare(asked, prepare)
    if asked.error is None or len(asked.questions) == 1:
        return [asked]
    # The image or video may be the reason, or one question: each is tried alone.
    alone = [
        replace(asked, questions=[question], prompts=[prompt], prepared=None, error=None)
        for question, prompt in zip(asked.questions, asked.prompts, strict=True)
    ]
    for one in alone:
        _try_to_prepare(one, prepare)
    good = [one for one in alone if one.error is None]
    if not good:
        return [asked]
    # The others share one encoding again.
    together = replace(
        asked,
        questions=[one.questions[0] for one in good],
        prompts=[one.prompts[0] for one in good],
        prepared=None,
        error=None,
    )
    _try_to_prepare(together, prepare)
    parts = [together] if together.error is None else good
    return [*parts, *(one for one in alone if one.error is not None)]


def _try_to_prepare(asked: MediaQuestions, prepare: Callable[[MediaQuestions], None]) -> None:
    try:
        prepare(asked)
    except Exception as error:  # a processor may raise anything on what it cannot take
        asked.error = failure_of(error)
