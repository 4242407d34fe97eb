"""The prompts that ``compare_selectors.py`` asks: images and videos, and questions about them.

``own``, ``many-items``, ``digit-rows`` and ``plain`` are scenes of that style (see
``tokenprune_eval.bundled.scenes``), ``own`` being the style that the model was trained on.
``easy-vqa`` has images of the package of that name; its train split, the end of which stands for
validation here, is what the models were trained on. ``two-images`` has two scenes of the model's
own style in a prompt, and questions whose key word fits an item of one of them alone. ``needles``
are the bundled model's videos, read from H.264 files, and ``still`` the same with footage that does
not move: every frame without a card is the same one.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from tokenprune_eval.bundled import needles, scenes
from tokenprune_eval.bundled.easyvqa import load_easy_vqa
from tokenprune_eval.bundled.questions import Box, Question

STYLED = ("own", "many-items", "digit-rows", "plain")
VIDEOS = ("needles", "still")
SETS = (*STYLED, "easy-vqa", "two-images", *VIDEOS)
FRAMES = 32
"""How many frames of a video are sampled."""

Pixels = npt.NDArray[np.uint8]
Split = Literal["validation", "test"]


@dataclass(frozen=True)
class Asked:
    """A question about a prompt.

    Attributes
    ----------
    question, answer, type
        As in `tokenprune_eval.bundled.questions.Question`.
    evidence
        Boxes in the prompt's only image, in its pixels; empty where they are not known.
    """

    question: str
    answer: str
    type: str
    evidence: tuple[Box, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """What stands in front of some questions.

    Attributes
    ----------
    media
        Images uint8 [H, W, 3], or one video [T, H, W, 3].
    asked
        The questions, each of which is put alone.
    """

    media: tuple[Pixels, ...]
    asked: tuple[Asked, ...]


def prompts_of(
    name: str, own: scenes.Style, split: Split, count: int, work: Path | None
) -> Iterator[Prompt]:
    """Yield the prompts of a set; the same arguments give the same prompts.

    Parameters
    ----------
    name
        One of `SETS`.
    own
        The style of the scenes that the model was trained on.
    split
        Whose pictures, photographs and footage are used.
    count
        How many images, or videos.
    work
        Where the files of videos are kept.
    """
    rng = np.random.default_rng([71, split == "test", SETS.index(name)])
    if name in STYLED:
        return _styled(styled(name, own), split, count, rng)
    if name == "easy-vqa":
        return _easy_vqa(split, count)
    if name == "two-images":
        return _pairs(own, split, max(1, count // 2), rng)
    if work is None:
        raise SystemExit("videos are kept as files: give --work")
    return _videos(work, split, count, still=name == "still")


def styled(name: str, own: scenes.Style) -> scenes.Style:
    """Return a style at a model's size, with items as large as the model knows them."""
    if name == "own":
        return own
    style = scenes.STYLES[name]
    pitch = own.image_size / max(style.cells)
    side = (min(own.side[0], int(0.85 * pitch)), min(own.side[1], int(0.97 * pitch)))
    families = tuple(family for family in style.families if family in own.families)
    return replace(style, image_size=own.image_size, side=side, families=families)


def _styled(
    style: scenes.Style, split: Split, count: int, rng: np.random.Generator
) -> Iterator[Prompt]:
    types = [*("kind", "color") * 2, *(t for t in style.types if t not in ("kind", "color"))]
    for number in range(count):
        scene = scenes.render_scene(split, number, style=style)
        asked = scenes.ask(scene, types, rng)
        yield Prompt(
            (scene.pixels,),
            tuple(Asked(one.question, one.answer, one.type, one.evidence) for one in asked),
        )


def _easy_vqa(split: Split, count: int) -> Iterator[Prompt]:
    by_image: dict[Path, list[Question]] = {}
    for question in load_easy_vqa("test" if split == "test" else "train"):
        by_image.setdefault(question.image, []).append(question)
    images = list(by_image)
    for image in images[:count] if split == "test" else images[-count:]:
        with Image.open(image) as opened:
            pixels = np.asarray(opened.convert("RGB"))
        own = by_image[image][:10]
        yield Prompt((pixels,), tuple(Asked(q.question, q.answer, q.type) for q in own))


def _pairs(
    style: scenes.Style, split: Split, count: int, rng: np.random.Generator
) -> Iterator[Prompt]:
    """Yield two scenes each, and up to eight questions that one of the two answers."""
    for number in range(count):
        pair = [scenes.render_scene(split, 2 * number + i, style=style) for i in range(2)]
        items = [item for scene in pair for item in scene.items]
        words = Counter(word for item in items for word in (item.color, item.kind))
        asked: list[scenes.Asked] = []
        for type_, key in (("kind", "color"), ("color", "kind")):
            told = [item for item in items if words[getattr(item, key)] == 1]
            if told:
                asked += scenes.ask(_of(told), [type_] * min(3, len(told)), rng)
        found = {}
        for one in scenes.ask(_of(items), ["exists"] * 6, rng):
            word = one.question.removeprefix("is there a ").removesuffix("?").removesuffix(" item")
            if words[word] <= 1:
                found[one.question] = one
        asked += list(found.values())[:2]
        yield Prompt(
            tuple(scene.pixels for scene in pair),
            tuple(Asked(one.question, one.answer, one.type) for one in asked),
        )


def _of(items: list[scenes.Item]) -> scenes.Scene:
    """Return a scene to ask about, without a picture."""
    return scenes.Scene(np.zeros((0, 0, 3), np.uint8), tuple(items), "", (0, 0, 0, 0))


def _videos(work: Path, split: Split, count: int, *, still: bool) -> Iterator[Prompt]:
    questions = needles.needle_set(work, videos=count, split=split)
    for number, (file, group) in enumerate(groupby(questions, key=lambda q: q.video)):
        shown = _still(work, split, number) if still else file
        yield Prompt(
            (needles.read_frames(shown, FRAMES),),
            tuple(Asked(one.question, one.answer, one.type) for one in group),
        )


def _still(work: Path, split: Split, number: int) -> Path:
    """Return the file of a needle video whose footage does not move; write it the first time."""
    target = work / f"still-{split}" / f"{number:04d}.mp4"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        video = needles.render_video(split, number)
        carded = np.zeros(len(video.frames), bool)
        for card in video.cards:
            carded[card.first : card.last + 1] = True
        frames = video.frames.copy()
        frames[~carded] = frames[int(np.argmin(carded))]
        part = target.with_suffix(f".{os.getpid()}")
        needles.write_h264(frames, part)
        part.rename(target)
    return target
