"""Needles: the pictures that are hidden in a video, and what is asked about them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from tokenprune.errors import InputFileError
from tokenprune.files import read_json_lines
from tokenprune.media.images import load_image

_SIDE = 448
_CARD = (232, 230, 224)
_DRAWN = (
    ("circle", "red", (214, 32, 32)),
    ("square", "blue", (28, 66, 214)),
    ("triangle", "green", (24, 150, 50)),
    ("star", "yellow", (244, 196, 12)),
    ("cross", "black", (16, 16, 16)),
    ("rectangle", "pink", (240, 110, 170)),
)


@dataclass(frozen=True, eq=False)
class Needle:
    """A picture that takes the place of a frame, and what is asked about it.

    Attributes
    ----------
    image
        RGB, of any size.
    question
        The text after the video.
    name
        What to call it in a result.
    """

    image: Image.Image
    question: str
    name: str


def drawn_needles() -> list[Needle]:
    """Return six needles: a coloured shape on a plain card each, and the question for its colour.

    The questions are short and in lower case, so that small tokenizers know their words.
    """
    return [
        Needle(_card(shape, colour), f"what color is the {shape}?", f"a {name} {shape}")
        for shape, name, colour in _DRAWN
    ]


def _card(shape: str, colour: tuple[int, int, int]) -> Image.Image:
    image = Image.new("RGB", (_SIDE, _SIDE), _CARD)
    draw = ImageDraw.Draw(image)
    centre, low, high = _SIDE / 2, 0.18 * _SIDE, 0.82 * _SIDE
    if shape == "circle":
        draw.ellipse((low, low, high, high), fill=colour)
    elif shape == "square":
        draw.rectangle((low, low, high, high), fill=colour)
    elif shape == "rectangle":
        draw.rectangle((0.1 * _SIDE, 0.32 * _SIDE, 0.9 * _SIDE, 0.68 * _SIDE), fill=colour)
    elif shape == "triangle":
        draw.polygon([(centre, low), (high, high), (low, high)], fill=colour)
    elif shape == "cross":
        draw.rectangle((low, 0.4 * _SIDE, high, 0.6 * _SIDE), fill=colour)
        draw.rectangle((0.4 * _SIDE, low, 0.6 * _SIDE, high), fill=colour)
    else:
        points = []
        for corner in range(10):
            reach = (high - low) / 2 * (1.1 if corner % 2 == 0 else 0.44)
            angle = math.pi * corner / 5
            points.append((centre + reach * math.sin(angle), centre - reach * math.cos(angle)))
        draw.polygon(points, fill=colour)
    return image


def read_needles(path: Path) -> list[Needle]:
    """Read a JSONL file of needles.

    Parameters
    ----------
    path
        One object a line, ``{"image": "card.png", "question": "what is on the card?"}``; paths of
        images are relative to the file.

    Raises
    ------
    InputFileError
        If the file, a line of it or an image cannot be read; the message names it.
    """
    needles = []
    lines = read_json_lines(
        path, "needles", "Give a JSONL file with an image and a question in each line."
    )
    for line in lines:
        image, question = line.fields.get("image"), line.fields.get("question")
        if not (
            isinstance(image, str) and isinstance(question, str) and image and question.strip()
        ):
            raise InputFileError(
                f"{line.place}: this is no needle. A line is an object such as "
                '{"image": "card.png", "question": "what is on the card?"}.'
            )
        needles.append(Needle(load_image(path.parent / image), question, image))
    if not needles:
        raise InputFileError(f"{path}: there is no needle in it. Write one a line.")
    return needles
