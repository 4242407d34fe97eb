"""The questions that ``compare_selectors.py`` asks, as data sets of tokenprune's own format.

``own``, ``many-items``, ``digit-rows`` and ``plain`` are scenes of that style (see
``tokenprune_eval.bundled.scenes``), ``own`` being the style that the model was trained on.
``easy-vqa`` has images of the package of that name; its train split, the end of which stands for
validation here, is what the models were trained on. ``two-images`` has two scenes of the model's
own style in a prompt, and questions whose key word fits an item of one of them alone. ``needles``
are the bundled model's videos, H.264 files, and ``still`` the same with footage that does not move:
every frame without a card is the same one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from tokenprune.files import making_folder
from tokenprune_eval.bundled import needles, scenes
from tokenprune_eval.bundled.easyvqa import load_easy_vqa
from tokenprune_eval.bundled.questions import Question

STYLED = ("own", "many-items", "digit-rows", "plain")
VIDEOS = ("needles", "still")
SETS = (*STYLED, "easy-vqa", "two-images", *VIDEOS)
VIDEO_FRAMES, FPS = 128, 25
"""Of a needle video's file."""

FRAMES = 32
"""How many frames of a video are sampled."""

Pixels = npt.NDArray[np.uint8]
Split = Literal["validation", "test"]


Prompt = tuple[Sequence[Pixels] | Path, Sequence[Any]]
"""Images uint8 [H, W, 3] or the file of a video, and what is asked, each with its question, answer
and type."""


def written(folder: Path, name: str, own: scenes.Style, split: Split, count: int) -> Path:
    """Return the JSON lines file of a set, which is rendered the first time.

    The same arguments give the same questions about the same pixels.

    Parameters
    ----------
    folder
        Where sets are kept, one subfolder each.
    name
        One of `SETS`.
    own
        The style of the scenes that the model was trained on.
    split
        Whose pictures, photographs and footage are used.
    count
        How many images, or videos.
    """
    target = folder / f"{name}-{split}-{count}-{own.image_size}"
    file = target / f"{name}.jsonl"
    if file.is_file():
        return file
    folder.mkdir(parents=True, exist_ok=True)
    with making_folder(target, known_by=file.name) as made:
        lines = []
        for number, (media, asked) in enumerate(_prompts(made, name, own, split, count)):
            shown = _media(made, number, media)
            for one in asked:
                line = {"question": one.question, "answer": one.answer, "type": one.type}
                if "image" in shown and (boxes := getattr(one, "evidence", ())):
                    line["evidence"] = boxes
                lines.append(json.dumps({**shown, **line}))
        (made / file.name).write_text("\n".join(lines) + "\n", "utf-8")
    return file


def _media(folder: Path, number: int, media: Sequence[Pixels] | Path) -> dict[str, Any]:
    """Write the images of a prompt; return what a line says of them."""
    if isinstance(media, Path):
        # The frames that transformers' InternVL video processor chooses, and not `read_video`.
        times = [frame / FPS for frame in needles.sample(VIDEO_FRAMES, FRAMES)]
        return {"video": str(media.relative_to(folder)), "times": times}
    names = [f"{number:04d}-{place}.png" for place in range(len(media))]
    for name, pixels in zip(names, media, strict=True):
        Image.fromarray(pixels).save(folder / name)
    return {"image": names[0]} if len(names) == 1 else {"images": names}


def _prompts(
    folder: Path, name: str, own: scenes.Style, split: Split, count: int
) -> Iterator[Prompt]:
    """Yield the prompts of a set; videos are written into the folder."""
    rng = np.random.default_rng([71, split == "test", SETS.index(name)])
    if name in STYLED:
        return _styled(styled(name, own), split, count, rng)
    if name == "easy-vqa":
        return _easy_vqa(split, count)
    if name == "two-images":
        return _pairs(own, split, max(1, count // 2), rng)
    return _videos(folder, split, count, still=name == "still")


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
        yield [scene.pixels], scenes.ask(scene, types, rng)


def _easy_vqa(split: Split, count: int) -> Iterator[Prompt]:
    by_image: dict[Path, list[Question]] = {}
    for question in load_easy_vqa("test" if split == "test" else "train"):
        by_image.setdefault(question.image, []).append(question)
    images = list(by_image)
    for image in images[:count] if split == "test" else images[-count:]:
        with Image.open(image) as opened:
            pixels = np.asarray(opened.convert("RGB"))
        yield [pixels], by_image[image][:10]


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
        yield [scene.pixels for scene in pair], asked


def _of(items: list[scenes.Item]) -> scenes.Scene:
    """Return a scene to ask about, without a picture."""
    return scenes.Scene(np.zeros((0, 0, 3), np.uint8), tuple(items), "", (0, 0, 0, 0))


def _videos(folder: Path, split: Split, count: int, *, still: bool) -> Iterator[Prompt]:
    questions = needles.needle_set(folder, videos=count, frames=VIDEO_FRAMES, split=split)
    for number, (file, group) in enumerate(groupby(questions, key=lambda one: one.video)):
        if still:
            needles.write_h264(_still(split, number), file)
        yield file, list(group)


def _still(split: Split, number: int) -> Pixels:
    """Return a needle video whose footage does not move, uint8 [T, H, W, 3]."""
    video = needles.render_video(split, number)
    carded = np.zeros(len(video.frames), bool)
    for card in video.cards:
        carded[card.first : card.last + 1] = True
    frames = video.frames.copy()
    frames[~carded] = frames[int(np.argmin(carded))]
    return frames
