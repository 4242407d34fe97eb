"""The sets that come with tokenprune: easy-VQA, scenes and needles; all are open questions."""

from __future__ import annotations

from pathlib import Path
from typing import cast, get_args

from tokenprune.errors import did_you_mean
from tokenprune_eval.bundled.easyvqa import Split as EasyVqaSplit
from tokenprune_eval.bundled.easyvqa import load_easy_vqa
from tokenprune_eval.bundled.model import default_cache_dir
from tokenprune_eval.bundled.needles import VideoQuestion, needle_set
from tokenprune_eval.bundled.questions import Question as ImageQuestion
from tokenprune_eval.bundled.scenes import Split as NeedleSplit
from tokenprune_eval.bundled.scenes import load_scenes
from tokenprune_eval.data.errors import DataSetError
from tokenprune_eval.data.question import DataSet, Question


def easy_vqa(split: str) -> DataSet:
    """Return easy-VQA; see `tokenprune_eval.bundled.easyvqa`.

    Raises
    ------
    DataSetError
        If there is no such split.
    MissingPackageError, BundledModelError
        If the package is not installed or lacks the files.
    """
    _check_split("easy-vqa", split, get_args(EasyVqaSplit))
    return _of_images("easy-vqa", split, load_easy_vqa(cast(EasyVqaSplit, split)))


def scenes(split: str) -> DataSet:
    """Return the committed scenes; see `tokenprune_eval.bundled.scenes`.

    Raises
    ------
    DataSetError
        If there is no such split.
    BundledModelError
        If the files are missing or damaged.
    """
    _check_split("scenes", split, ("test",))
    return _of_images("scenes", split, load_scenes())


def needles(split: str, work: Path | None = None, videos: int = 100) -> DataSet:
    """Return the needle videos, rendered the first time; see `tokenprune_eval.bundled.needles`.

    Parameters
    ----------
    split
        ``"train"``, ``"validation"`` or ``"test"``.
    work
        Where the H.264 files are kept; by default the folder ``needles`` of tokenprune's cache.
    videos
        How many videos of 128 frames; there are four questions about each.

    Raises
    ------
    DataSetError
        If there is no such split.
    MissingPackageError, BundledModelError
        If pictures, clips or PyAV are not installed, or files are damaged.
    """
    _check_split("needles", split, get_args(NeedleSplit))
    folder = work if work is not None else default_cache_dir() / "needles"
    asked = needle_set(folder, videos=videos, split=cast(NeedleSplit, split))
    return DataSet(_named("needles", split), [about_video(one) for one in asked])


def about_video(one: VideoQuestion) -> Question:
    """Return a question about a needle video as one of a data set."""
    return Question(one.id, "video", one.video.absolute(), one.question, one.answer, type=one.type)


def _of_images(name: str, split: str, asked: list[ImageQuestion]) -> DataSet:
    questions = [
        Question(
            one.id,
            "image",
            one.image.absolute(),
            one.question,
            one.answer,
            type=one.type,
            evidence=one.evidence,
        )
        for one in asked
    ]
    return DataSet(_named(name, split), questions)


def _named(name: str, split: str) -> str:
    return name if split == "test" else f"{name}-{split}"


def _check_split(name: str, split: str, allowed: tuple[str, ...]) -> None:
    if split not in allowed:
        raise DataSetError(f"{name} has no split {split!r}. {did_you_mean(split, allowed)}")
