"""The request that `tokenprune advise` measures: pictures, a question, and what is made of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tokenprune.errors import ConfigError
from tokenprune.media.images import load_image
from tokenprune.media.video import Video, read_video
from tokenprune_eval.shared.asking import laid_out
from tokenprune_hf.any_model import vision_model_of_any_type
from tokenprune_hf.loading import prompt_text

QUESTION = "What is in the picture?"

_SIZE = re.compile(r"(\d+)(?:[xX](\d+))?")
_WORD = "word"
"""What prompts are filled up with: one token in most vocabularies."""

_TRIES = 8
_LARGEST = 16_384
"""Pixels of a side, above which a size is a mistake."""

Content = Image.Image | Video | list[Image.Image]


@dataclass(frozen=True)
class Media:
    """What a request is about.

    Attributes
    ----------
    content
        An image, a video, or several images.
    name
        What it is, for people.
    """

    content: Content
    name: str

    @property
    def single(self) -> Image.Image | Video | None:
        """The one image or video; None where there are several."""
        return None if isinstance(self.content, list) else self.content


def media_of(images: Sequence[str], count: int | None, video: Path | None, frames: int) -> Media:
    """Return what the command line asks for.

    Parameters
    ----------
    images
        Files, or sizes in pixels such as ``"640x480"`` or ``"448"``.
    count
        How many images a request has; None for as many as `images` names. A single one is taken
        that often.
    video
        A video's file, in place of images.
    frames
        How many frames are read of it.

    Raises
    ------
    ConfigError
        If a size or a number does not fit.
    InputFileError
        If a file cannot be read.
    """
    if video is not None:
        read = read_video(video, frames)
        number, height, width = read.frames.shape[:3]
        return Media(read, f"a video of {number} frames, {width}x{height}")
    pictures = [_picture(one, place) for place, one in enumerate(images)]
    if count is not None and count != len(pictures):
        if len(pictures) > 1:
            raise ConfigError(
                f"--images {count} does not fit the {len(pictures)} that --image names. Name one "
                "for all, name each, or leave --images out."
            )
        pictures = [_picture(images[0], place) for place in range(count)]
    sizes = list(dict.fromkeys(f"{one.width}x{one.height}" for one in pictures))
    if len(pictures) == 1:
        return Media(pictures[0], f"1 image, {sizes[0]}")
    return Media(pictures, f"{len(pictures)} images, {' and '.join(sizes)}")


def _picture(text: str, place: int) -> Image.Image:
    """Return a file's picture, or noise of a size: what it shows makes no difference to times."""
    match = _SIZE.fullmatch(text)
    if match is None or Path(text).is_file():
        return load_image(Path(text))
    width, height = int(match[1]), int(match[2] or match[1])
    if not (0 < width <= _LARGEST and 0 < height <= _LARGEST):
        raise ConfigError(
            f"--image {text} is no size of a picture. Give 1 to {_LARGEST:,} pixels a side, such "
            "as 640x480, or a file."
        )
    pixels = np.random.default_rng(place).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def question_of_length(model: Any, processor: Any, content: Content, tokens: int) -> str:
    """Return a question that makes a prompt of that many text tokens, or as near as words come.

    Parameters
    ----------
    model, processor, content
        As for `laid_out`.
    tokens
        Text tokens wanted, the chat template's included: all that are no placeholders.

    Raises
    ------
    ConfigError
        If the template alone has more.
    """
    kind = "video" if isinstance(content, Video) else "image"

    def counted(words: int) -> int:
        # With one placeholder, whatever the content: only differences between these are used.
        text = prompt_text(processor, " ".join([_WORD] * words), kind)
        return len(processor.tokenizer(text)["input_ids"])

    whole = laid_out(model, processor, _WORD, content)["input_ids"]
    vision = vision_model_of_any_type(model)
    ids = torch.tensor([vision.token_id(modality) for modality in ("image", "video")])
    # What a picture's frame and further pictures take besides: the same for every question.
    besides = int((~torch.isin(whole, ids)).sum()) - counted(1)
    fewest = counted(1) + besides
    if tokens < fewest:
        raise ConfigError(
            f"--prompt-tokens {tokens} is too few: the chat template with one word has {fewest} "
            f"text tokens. Give at least {fewest}."
        )
    words = 1
    for _ in range(_TRIES):
        missing = tokens - counted(words) - besides
        if missing == 0:
            break
        each = max(1.0, (counted(words + 64) - counted(words)) / 64)
        step = int(missing / each)
        if step == 0:
            break
        words = max(1, words + step)
    return " ".join([_WORD] * words)
