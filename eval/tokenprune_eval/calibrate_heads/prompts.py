"""The prompts that heads are calibrated on: several pictures, and a question about them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokenprune.errors import ConfigError, InputFileError
from tokenprune.files import read_json_lines
from tokenprune.media.images import load_image
from tokenprune_eval.shared.left_out import LeftOut, around

QUESTION = "What differs between the pictures?"
"""Asked about pictures that come without a question."""

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif", ".jp2")
) | {".tga"}
"""What counts as a picture in a folder."""


@dataclass(frozen=True)
class Prompt:
    """Pictures, and the question that comes after them.

    Attributes
    ----------
    images
        Two or more files.
    question
        The text.
    """

    images: tuple[Path, ...]
    question: str

    @property
    def name(self) -> str:
        """What to call it in a message."""
        return f"the prompt about {', '.join(str(file) for file in self.images)}"


def read_prompts(
    data: Sequence[Path],
    images: int = 4,
    prompts: int = 32,
    *,
    question: str = QUESTION,
    seed: int = 0,
) -> list[Prompt]:
    """Read prompts from files, and make prompts of the pictures in folders.

    Parameters
    ----------
    data
        JSON Lines files of ``{"images": [path, ...], "question": text}``, paths relative to the
        file; and folders, whose pictures are drawn without replacement.
    images
        How many pictures a prompt gets that is made.
    prompts
        The most prompts; of more than these some are drawn.
    question
        Asked about drawn pictures.
    seed
        Of both draws.

    Returns
    -------
    list of Prompt
        At least one. Pictures are not opened here: see `check_pictures`.

    Raises
    ------
    ConfigError
        If a number is too small.
    InputFileError
        If a file, or a line of it, cannot be read, or a folder has too few pictures.
    """
    for name, value, least in (("images", images, 2), ("prompts", prompts, 1), ("seed", seed, 0)):
        if value < least:
            raise ConfigError(f"{name}={value} is too small. Give at least {least}.")
    generator = np.random.default_rng(seed)
    found: list[Prompt] = []
    for path in data:
        if os.path.isdir(path):  # of a name that is too long: False
            files = _pictures(path, images)
            order = generator.permutation(len(files)).tolist()
            for start in range(0, len(files) - images + 1, images):
                chosen = tuple(files[place] for place in order[start : start + images])
                found.append(Prompt(chosen, question))
        else:
            found += _read_lines(path)
    if len(found) > prompts:
        kept = sorted(generator.choice(len(found), prompts, replace=False).tolist())
        found = [found[place] for place in kept]
    return found


def _pictures(folder: Path, images: int) -> list[Path]:
    files = sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
    )
    if len(files) < images:
        raise InputFileError(
            f"{folder}: there are {len(files)} pictures in it, and a prompt needs {images}. Give a "
            f"folder with more of them, or fewer --images (2 or more)."
        )
    return files


def _read_lines(file: Path) -> list[Prompt]:
    found = []
    advice = "Give a JSON Lines file of prompts, or a folder of pictures."
    for line in read_json_lines(file, "data", advice):
        images, question = line.fields.get("images"), line.fields.get("question")
        if not (
            isinstance(images, list)
            and len(images) >= 2
            and all(isinstance(image, str) and image for image in images)
            and isinstance(question, str)
            and question.strip()
        ):
            raise InputFileError(
                f'{line.place}: a line is {{"images": [PATH, PATH, ...], "question": TEXT}} with '
                f"two or more images, not {line.text[:120]}."
            )
        found.append(Prompt(tuple(file.parent / image for image in images), question))
    if not found:
        raise InputFileError(f"{file}: there is no prompt in it. Write one a line.")
    return found


def check_pictures(
    prompts: Sequence[Prompt],
    on_picture: Callable[[], None] | None = None,
    left_out: LeftOut | None = None,
) -> list[Prompt]:
    """Open every picture once, so that a broken one is found before anything is measured.

    Parameters
    ----------
    prompts
        Whose pictures.
    on_picture
        Called after each picture.
    left_out
        Notes pictures that cannot be read; None: the first one is an error.

    Returns
    -------
    list of Prompt
        Those all of whose pictures can be read.

    Raises
    ------
    InputFileError
        Naming the first that cannot be read.
    """
    good: set[Path] = set()
    for file in dict.fromkeys(file for prompt in prompts for file in prompt.images):
        with around(left_out, str(file)):
            load_image(file)
            good.add(file)
        if on_picture is not None:
            on_picture()
    return [prompt for prompt in prompts if good.issuperset(prompt.images)]
