"""Scenes: a few small coloured items scattered over dimmed photographs, and questions about them.

Each scene of the test set is a picture of 224 x 224 pixels with three to five items of 44 to 54
pixels: handwritten digits (scikit-learn), drawn shapes and garments (Fashion-MNIST), each in one of
seven colours, on a dimmed crop of one of scikit-image's photographs. Kinds, colours and places are
all different within a scene, so every question has one answer, and the answer to most of them is to
be seen in one item alone: a few of the image's visual tokens. `STYLES` has scenes that look
different.

Nothing that can be recognised is shared between the splits: an item's picture belongs to exactly
one of them, and so does every region of every photograph.

The test set is rendered and committed (``scenes/``); `load_scenes` reads it and needs none
of the packages that rendering needs.
"""

from __future__ import annotations

import gzip
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from tokenprune.errors import MissingPackageError
from tokenprune.files import numbered_lines, parse_json
from tokenprune_eval.bundled.errors import BundledModelError
from tokenprune_eval.bundled.questions import Box, Question

Split = Literal["train", "validation", "test"]
Floats = npt.NDArray[np.float32]

IMAGE_SIZE = 224
"""Side of a scene, pixels."""

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (230, 35, 35),
    "green": (40, 185, 50),
    "blue": (50, 85, 250),
    "yellow": (245, 220, 40),
    "pink": (250, 110, 205),
    "cyan": (50, 220, 230),
    "white": (245, 245, 245),
}
"""The colours an item can have, RGB in 0..255."""

PLACES = (
    "top-left",
    "top",
    "top-right",
    "left",
    "center",
    "right",
    "bottom-left",
    "bottom",
    "bottom-right",
)
"""The cells of a 3 x 3 grid, row by row; one item at most in each."""

SHAPES = ("circle", "square", "triangle", "star", "cross")
DIGITS = ("2", "3", "4", "5", "6", "7")
# Fashion-MNIST's classes that can be told apart at this size.
GARMENTS = {"trousers": 1, "dress": 3, "bag": 8, "boot": 9}
KINDS = SHAPES + DIGITS + tuple(GARMENTS)
"""Everything an item can be."""

COUNTS = ("3", "4", "5")
"""How many items a scene can have."""

# Photographs that scikit-image's wheel ships. Microscopy of uniform texture and scanned pages are
# left out: they are not what a camera sees.
PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "moon.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package `dataset-fashion-mnist` puts its files."""


@dataclass(frozen=True)
class Style:
    """What scenes look like; the defaults are those of the bundled test set.

    Attributes
    ----------
    image_size
        Side of the scene, pixels.
    items
        Fewest and most items of a scene; at most as many as there are colours.
    side
        Smallest and largest side of an item's picture, pixels.
    cells
        Rows and columns of the grid that holds one item at most in each cell.
    one_row
        All items side by side in one row of the grid, like a line of text.
    families
        What the items are: equally often one of each.
    plain
        Share of the scenes on one plain colour instead of a photograph.
    types
        What may be asked, out of `TYPES`.
    """

    image_size: int = IMAGE_SIZE
    items: tuple[int, int] = (3, 5)
    side: tuple[int, int] = (44, 54)
    cells: tuple[int, int] = (3, 3)
    one_row: bool = False
    families: tuple[tuple[str, ...], ...] = (SHAPES, DIGITS, tuple(GARMENTS))
    plain: float = 0.0
    types: tuple[str, ...] = ("kind", "color", "place", "exists", "count")


STYLES = {
    "standard": Style(),
    # What published methods are weak at.
    "many-items": Style(items=(6, 7), types=("kind", "color", "place", "exists")),
    "digit-rows": Style(
        items=(4, 5),
        side=(38, 43),
        cells=(5, 5),
        one_row=True,
        families=(DIGITS,),
        types=("kind", "color", "exists"),
    ),
    "plain": Style(plain=1.0),
    # What other models than the bundled one are trained on.
    "small": Style(image_size=168, side=(33, 41), families=(SHAPES, DIGITS)),
    "large": Style(image_size=280, items=(3, 7), plain=0.3),
    # A smaller picture loses something: its smallest items are a patch or less at a quarter of the
    # tokens.
    "fine": Style(image_size=448, items=(3, 7), side=(40, 104)),
}
"""Name -> style: of sets that look different from the bundled one, and of other models' scenes."""

TEST_SET = Path(__file__).with_name("scenes")
"""Folder of the committed test set."""

TEST_SCENES = 400

_SEEDS: dict[str, int] = {"train": 11, "validation": 12, "test": 13}
# Each photograph is cut across its longer side into three bands, one a split.
_BANDS: dict[str, tuple[float, float]] = {
    "train": (0.0, 0.55),
    "validation": (0.55, 0.72),
    "test": (0.72, 1.0),
}
_SHAPE_VARIANTS = {"train": range(0, 400), "validation": range(400, 450), "test": range(450, 550)}


@dataclass(frozen=True)
class Picture:
    """One item's picture before it is coloured and scaled.

    Attributes
    ----------
    source
        Where it comes from, for example ``"digits/123"``; unique.
    kind
        One of `KINDS`.
    values
        ``[S, S]`` uint8: 0 is background, 255 the brightest part of the item.
    """

    source: str
    kind: str
    values: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Item:
    """One item of a scene: what it is, its colour, its place, its tight box and its picture."""

    kind: str
    color: str
    place: str
    box: Box
    source: str


@dataclass(frozen=True)
class Scene:
    """A rendered scene.

    Attributes
    ----------
    pixels
        ``[224, 224, 3]`` uint8, RGB.
    items
        In reading order.
    photograph
        File name of the photograph behind the items.
    crop
        The region of that photograph that was used, its pixels.
    """

    pixels: npt.NDArray[np.uint8]
    items: tuple[Item, ...]
    photograph: str
    crop: Box


# --- the items' pictures ------------------------------------------------------------------------


@cache
def pictures(split: Split, fashion: Path | None = FASHION_FOLDER) -> dict[str, tuple[Picture, ...]]:
    """Every item picture of one split, by kind.

    Parameters
    ----------
    split
        ``"train"``, ``"validation"`` or ``"test"``; no picture is in two of them.
    fashion
        Folder of the four Fashion-MNIST files, or None to do without garments.

    Returns
    -------
    dict of str to tuple of Picture

    Raises
    ------
    MissingPackageError
        If scikit-learn is not installed.
    BundledModelError
        If the split is unknown or `fashion` does not hold the files.
    """
    if split not in _SEEDS:
        raise BundledModelError(f"unknown split {split!r}; there are {', '.join(_SEEDS)}.")
    found: dict[str, list[Picture]] = {}
    for picture in [*_digits(split), *_shapes(split), *(_garments(split, fashion))]:
        found.setdefault(picture.kind, []).append(picture)
    return {kind: tuple(found[kind]) for kind in KINDS if kind in found}


def _digits(split: Split) -> list[Picture]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingPackageError(
            "rendering scenes needs scikit-learn's handwritten digits. Install it with: "
            "pip install scikit-learn"
        ) from None
    data: Any = load_digits()
    # Of every ten digits two are for the test, one is for validation, seven are for training.
    of_remainder = {0: "test", 1: "test", 2: "validation"}
    return [
        Picture(f"digits/{number}", str(label), np.round(image * (255 / 16)).astype(np.uint8))
        for number, (image, label) in enumerate(zip(data.images, data.target, strict=True))
        if str(label) in DIGITS and of_remainder.get(number % 10, "train") == split
    ]


def _garments(split: Split, fashion: Path | None) -> list[Picture]:
    if fashion is None:
        return []
    stem = "t10k" if split == "test" else "train"
    files = [fashion / f"{stem}-images-idx3-ubyte.gz", fashion / f"{stem}-labels-idx1-ubyte.gz"]
    if not all(file.is_file() for file in files):
        raise BundledModelError(
            f"Fashion-MNIST is not in {fashion}. Install Debian's package dataset-fashion-mnist, "
            "give the folder of its files, or render without garments."
        )
    images = np.frombuffer(gzip.decompress(files[0].read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress(files[1].read_bytes()), np.uint8, offset=8)
    images = images.reshape(-1, 28, 28)
    if split == "train":
        chosen = range(0, 55_000)
    else:
        chosen = range(55_000, 60_000) if split == "validation" else range(10_000)
    names = {number: name for name, number in GARMENTS.items()}
    return [
        Picture(f"fashion-{stem}/{number}", names[int(labels[number])], images[number])
        for number in chosen
        if int(labels[number]) in names
    ]


def _shapes(split: Split) -> list[Picture]:
    return [
        Picture(f"shape/{kind}/{variant}", kind, _draw_shape(kind, variant))
        for kind in SHAPES
        for variant in _SHAPE_VARIANTS[split]
    ]


def _draw_shape(kind: str, variant: int) -> npt.NDArray[np.uint8]:
    """Draw one variant of a shape: its own tilt, size and proportions; ``[56, 56]`` uint8."""
    rng = np.random.default_rng([21, SHAPES.index(kind), variant])
    side = 56 * 4  # drawn four times larger, then averaged, for smooth edges
    radius = side / 2 * rng.uniform(0.86, 0.97)
    tilt = rng.uniform(-0.22, 0.22)
    image = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(image)

    def ring(radii: Sequence[float], start: float) -> list[tuple[float, float]]:
        step = 2 * math.pi / len(radii)
        return [
            (
                side / 2 + r * math.sin(start + tilt + i * step),
                side / 2 - r * math.cos(start + tilt + i * step),
            )
            for i, r in enumerate(radii)
        ]

    if kind == "circle":
        squeeze = rng.uniform(0.9, 1.0)
        half = (radius, radius * squeeze)
        draw.ellipse(
            (side / 2 - half[0], side / 2 - half[1], side / 2 + half[0], side / 2 + half[1]),
            fill=255,
        )
    elif kind == "square":
        draw.polygon(ring([radius * 1.1] * 4, math.pi / 4), fill=255)
    elif kind == "triangle":
        draw.polygon(ring([radius] * 3, 0.0), fill=255)
    elif kind == "star":
        inner = radius * rng.uniform(0.38, 0.48)
        draw.polygon(ring([radius, inner] * 5, 0.0), fill=255)
    else:
        arm = radius * rng.uniform(0.24, 0.34)
        corner = math.atan2(arm, radius)
        points: list[tuple[float, float]] = []
        for quarter in range(4):
            turn = quarter * math.pi / 2 + tilt
            far = math.hypot(radius, arm)
            near = math.hypot(arm, arm)
            for r, angle in (
                (far, turn - corner),
                (far, turn + corner),
                (near, turn + math.pi / 4),
            ):
                points.append((side / 2 + r * math.sin(angle), side / 2 - r * math.cos(angle)))
        draw.polygon(points, fill=255)
    if variant not in _SHAPE_VARIANTS["train"]:
        # Another tilt or size alone can give the very same 56 x 56 pixels (a circle has no tilt at
        # all), so the held-out shapes are also squeezed along a direction of their own, by more
        # than any training shape is.
        image = _squeeze(image, rng.uniform(0.78, 0.88), rng.uniform(0, math.pi))
    return np.asarray(image.resize((56, 56), Image.Resampling.BOX))


def _squeeze(image: Image.Image, factor: float, direction: float) -> Image.Image:
    """Shrink a square image to `factor` of its size along one direction, about its centre."""
    c, s = math.cos(direction), math.sin(direction)
    grow = 1 / factor - 1  # Pillow asks where each output pixel comes from
    xx, xy, yy = 1 + grow * c * c, grow * c * s, 1 + grow * s * s
    half = image.width / 2
    move = (half - xx * half - xy * half, half - xy * half - yy * half)
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        (xx, xy, move[0], xy, yy, move[1]),
        Image.Resampling.BILINEAR,
    )


# --- rendering ----------------------------------------------------------------------------------


@cache
def _photograph(name: str) -> Image.Image:
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise MissingPackageError(
            "rendering scenes needs scikit-image's photographs. Install it with: "
            "pip install scikit-image"
        )
    with Image.open(Path(spec.origin).parent / "data" / name) as image:
        return image.convert("RGB")


def photograph_region(name: str, split: Split) -> Box:
    """Return the region of a photograph that backgrounds of one split are cropped from.

    Parameters
    ----------
    name
        One of `PHOTOGRAPHS`.
    split
        The regions of different splits do not overlap.

    Returns
    -------
    Box
        In the photograph's pixels.
    """
    width, height = _photograph(name).size
    start, end = _BANDS[split]
    if width >= height:
        return (round(start * width), 0, round(end * width), height)
    return (0, round(start * height), width, round(end * height))


def _background(
    split: Split, rng: np.random.Generator, image_size: int = IMAGE_SIZE
) -> tuple[Floats, str, Box]:
    """Crop and dim: ``[S, S, 3]`` float32 in 0..255, the photograph's name, the region."""
    name = PHOTOGRAPHS[int(rng.integers(len(PHOTOGRAPHS)))]
    left, top, right, bottom = photograph_region(name, split)
    side = int(min(right - left, bottom - top) * rng.uniform(0.75, 1.0))
    x = int(rng.integers(left, right - side + 1))
    y = int(rng.integers(top, bottom - side + 1))
    crop = (x, y, x + side, y + side)
    square = _photograph(name).resize((image_size, image_size), Image.Resampling.BICUBIC, box=crop)
    pixels = np.asarray(square, dtype=np.float32)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    # Bright photographs are dimmed further, so that white and cyan items stay visible on snow.
    dim = rng.uniform(0.35, 0.6) * min(1.0, 110.0 / max(float(pixels.mean()), 1.0))
    return pixels * np.float32(dim), name, crop


def _plain(rng: np.random.Generator, image_size: int) -> Floats:
    """One dark colour everywhere, ``[S, S, 3]`` float32 in 0..255."""
    return np.broadcast_to(rng.uniform(15, 90, size=3), (image_size, image_size, 3)).astype(
        np.float32
    )


def render_scene(
    split: Split,
    number: int,
    *,
    fashion: Path | None = FASHION_FOLDER,
    style: Style = STYLES["standard"],
) -> Scene:
    """Render one scene; the same arguments give the same scene.

    Parameters
    ----------
    split
        Whose pictures and photograph regions are used.
    number
        The scene's number within the split, from 0.
    fashion
        See `pictures`.
    style
        What it looks like.

    Returns
    -------
    Scene

    Raises
    ------
    MissingPackageError, BundledModelError
        See `pictures`.
    """
    bank = pictures(split, fashion)
    rng = np.random.default_rng([_SEEDS[split], number])
    if style.plain and rng.random() < style.plain:
        canvas, photograph, crop = _plain(rng, style.image_size), "", (0, 0, 0, 0)
    else:
        canvas, photograph, crop = _background(split, rng, style.image_size)

    count = int(rng.integers(style.items[0], style.items[1] + 1))
    # Digits, shapes and garments equally often, whatever the number of kinds in each family.
    families = [[k for k in family if k in bank] for family in style.families]
    weights = np.array([1 / len(f) for f in families if f for _ in f])
    names = [kind for family in families for kind in family]
    kinds = rng.choice(names, size=count, replace=False, p=weights / weights.sum())
    colors = rng.choice(list(COLORS), size=count, replace=False)
    rows, columns = style.cells
    if style.one_row:
        first = int(rng.integers(rows)) * columns + int(rng.integers(columns - count + 1))
        cells = np.arange(first, first + count)
    else:
        cells = np.sort(rng.choice(rows * columns, size=count, replace=False))

    items: list[Item] = []
    for kind, color, cell in zip(kinds, colors, cells, strict=True):
        choices = bank[str(kind)]
        picture = choices[int(rng.integers(len(choices)))]
        box = _paste(canvas, picture, str(color), int(cell), rng, style)
        row, column = int(cell) // columns * 3 // rows, int(cell) % columns * 3 // columns
        place = PLACES[row * 3 + column]
        items.append(Item(str(kind), str(color), place, box, picture.source))
    pixels = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    return Scene(pixels, tuple(items), photograph, crop)


def _paste(
    canvas: Floats,
    picture: Picture,
    color: str,
    cell: int,
    rng: np.random.Generator,
    style: Style = STYLES["standard"],
) -> Box:
    """Colour a picture and lay it over the canvas inside its cell; returns its tight box."""
    side = int(rng.integers(style.side[0], style.side[1] + 1))
    down, across = (style.image_size / count for count in style.cells)
    row, column = divmod(cell, style.cells[1])
    left = int(column * across + rng.uniform(0.1, 0.9) * (across - side))
    top = int(row * down + rng.uniform(0.1, 0.9) * (down - side))

    values = np.asarray(
        Image.fromarray(picture.values).resize((side, side), Image.Resampling.BICUBIC),
        dtype=np.float32,
    ) / np.float32(255)
    if picture.kind in GARMENTS:
        # Opaque wherever there is cloth; the cloth's own shading stays visible in the colour.
        alpha = np.clip(values * 5, 0, 1)
        shade = 0.45 + 0.55 * values
    else:
        alpha = np.clip((values - 0.15) * 1.8, 0, 1)
        shade = np.ones_like(values)
    tint = np.clip(np.array(COLORS[color]) + rng.integers(-10, 11, size=3), 0, 255)
    paint = shade[:, :, None] * tint.astype(np.float32)
    window = canvas[top : top + side, left : left + side]
    window += (paint - window) * alpha[:, :, None]

    rows = np.flatnonzero((alpha > 0.5).any(axis=1))
    columns = np.flatnonzero((alpha > 0.5).any(axis=0))
    return (
        left + int(columns[0]),
        top + int(rows[0]),
        left + int(columns[-1]) + 1,
        top + int(rows[-1]) + 1,
    )


# --- questions ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A question about a scene before it has an id and a file."""

    question: str
    answer: str
    type: str
    evidence: tuple[Box, ...]


def _ask_kind(scene: Scene, item: Item, rng: np.random.Generator) -> Asked:
    texts = (f"what is the {item.color} item?", f"which item is {item.color}?")
    return Asked(texts[int(rng.integers(2))], item.kind, "kind", (item.box,))


def _ask_color(scene: Scene, item: Item, rng: np.random.Generator) -> Asked:
    texts = (f"what color is the {item.kind}?", f"what is the color of the {item.kind}?")
    return Asked(texts[int(rng.integers(2))], item.color, "color", (item.box,))


def _ask_place(scene: Scene, item: Item, rng: np.random.Generator) -> Asked:
    texts = (f"where is the {item.kind}?", f"where is the {item.color} item?")
    return Asked(texts[int(rng.integers(2))], item.place, "place", (item.box,))


def _ask_exists(scene: Scene, item: Item, rng: np.random.Generator) -> Asked:
    by_color = bool(rng.integers(2))
    present = {i.color if by_color else i.kind for i in scene.items}
    word = item.color if by_color else item.kind
    answer = "yes"
    boxes: tuple[Box, ...] = (item.box,)
    absent = [w for w in (COLORS if by_color else KINDS) if w not in present]
    # A scene of seven items has every colour.
    if rng.random() < 0.5 and absent:
        word = absent[int(rng.integers(len(absent)))]
        answer = "no"
        # Only a look at every item shows that one is missing.
        boxes = tuple(i.box for i in scene.items)
    return Asked(f"is there a {word}{' item' if by_color else ''}?", answer, "exists", boxes)


def _ask_count(scene: Scene, item: Item, rng: np.random.Generator) -> Asked:
    boxes = tuple(i.box for i in scene.items)
    return Asked("how many items are there?", str(len(scene.items)), "count", boxes)


_ASK: dict[str, Callable[[Scene, Item, np.random.Generator], Asked]] = {
    "kind": _ask_kind,
    "color": _ask_color,
    "place": _ask_place,
    "exists": _ask_exists,
    "count": _ask_count,
}

TYPES = tuple(_ASK)
"""The types of question."""


def ask(scene: Scene, types: Sequence[str], rng: np.random.Generator) -> list[Asked]:
    """Ask questions of the given types, each type about different items as far as there are any.

    Parameters
    ----------
    scene
        The scene asked about.
    types
        One of `TYPES` for each question.
    rng
        Draws items, wordings and absent things.

    Returns
    -------
    list of Asked
        One for each type, in that order.
    """
    orders = {kind: list(rng.permutation(len(scene.items))) for kind in TYPES}
    asked: list[Asked] = []
    for kind in types:
        order = orders[kind]
        item = scene.items[int(order[0])]
        order.append(order.pop(0))
        asked.append(_ASK[kind](scene, item, rng))
    return asked


def caption(scene: Scene) -> str:
    """List every item in reading order: place, colour, kind."""
    return " , ".join(f"{item.place} {item.color} {item.kind}" for item in scene.items)


# --- the committed test set ---------------------------------------------------------------------


def test_questions(scene: Scene, number: int) -> list[Asked]:
    """The questions of test scene `number`: six, and every other scene a seventh on the count."""
    types = ["kind", "kind", "color", "color", "place", "exists"] + ["count"] * (number % 2)
    return ask(scene, types, np.random.default_rng([_SEEDS["test"], number, 1]))


def load_scenes(folder: Path = TEST_SET) -> list[Question]:
    """Read the committed test set, in the order of its file.

    Parameters
    ----------
    folder
        Holds ``questions.jsonl`` and the images it names.

    Returns
    -------
    list of Question
        2,600 questions about 400 scenes.

    Raises
    ------
    BundledModelError
        If the file is missing or a line of it cannot be read.
    """
    file = folder / "questions.jsonl"
    if not file.is_file():
        raise BundledModelError(
            f"the scenes test set is not in {folder}: questions.jsonl is missing. It is part of a "
            "checkout and of the wheel; scripts/render_scenes.py renders it anew."
        )
    questions: list[Question] = []
    for number, line in numbered_lines(file.read_text("utf-8")):
        try:
            row = parse_json(line)
            evidence = tuple((int(a), int(b), int(c), int(d)) for a, b, c, d in row["evidence"])
            questions.append(
                Question(
                    id=row["id"],
                    image=folder / row["image"],
                    question=row["question"],
                    answer=row["answer"],
                    type=row["type"],
                    evidence=evidence,
                )
            )
        except (ValueError, KeyError, TypeError) as error:
            raise BundledModelError(
                f"line {number} of {file} is no question ({error!r}). Restore the file from the "
                "repository or render it anew with scripts/render_scenes.py."
            ) from None
    return questions
