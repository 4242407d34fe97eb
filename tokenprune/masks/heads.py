"""HeadCategories: which of BlindSight's masks each head of a model has, and the file with them.

`tokenprune calibrate-heads` writes the file, and `tokenprune_hf.sparse` reads it. It is JSON, and
names the model that it was made for, as categories do not apply to another model's heads.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tokenprune.errors import InputFileError, LayoutError, reason_of
from tokenprune.files import write_whole
from tokenprune.formats import KEY, check_format
from tokenprune.masks.layout import ImageSpan, PromptLayout
from tokenprune.masks.patterns import CATEGORIES, Category

FORMAT = 1
"""Raised when the file's meaning changes."""

_AGAIN = "Make one with: tokenprune calibrate-heads MODEL --data DATA --out heads.json"
"""What to do about a file that cannot be read."""

_SAMPLE = 64
"""Weights that tell one model from another."""


@dataclass(frozen=True)
class ModelIdentity:
    """What a heads file knows about its model.

    Attributes
    ----------
    model_type
        As in the model's config.
    layers, heads, key_heads
        Of the language model: decoder layers, and query and key heads of each.
    hidden_size
        Width of the language model.
    sample
        A few weights of its embeddings, so that two models of one shape are told apart; they are
        not quantized where other weights are.
    """

    model_type: str
    layers: int
    heads: int
    key_heads: int
    hidden_size: int
    sample: tuple[float, ...]

    def differences(self, other: ModelIdentity) -> list[str]:
        """Return what differs from another identity, in words; nothing if they are one model's.

        Weights that were rounded to bfloat16, or fine-tuned a little, are the same model's.
        """
        differing = [
            f"{field.name} is {getattr(self, field.name)!r}, not {getattr(other, field.name)!r}"
            for field in fields(self)
            if field.name != "sample" and getattr(self, field.name) != getattr(other, field.name)
        ]
        # Not `cosine < 0.98`, which NaN is not: a sample that is not finite belongs to no model.
        if not differing and not _cosine(self.sample, other.sample) >= 0.98:
            differing.append("its weights are others")
        return differing


def sampled(weights: int) -> slice:
    """Return which of a model's embeddings, row by row in one list, `ModelIdentity.sample` holds.

    Parameters
    ----------
    weights
        How many there are.
    """
    step = max(1, weights // _SAMPLE)
    return slice(step // 2, step // 2 + step * min(_SAMPLE, weights), step)


@dataclass(frozen=True)
class Thresholds:
    """Thresholds that map a head's attention share inside each mask to its category.

    BlindSight names such values and publishes none: all of these are reconstructions.

    Attributes
    ----------
    alpha
        For each layer, the share of the attention of image tokens, in one prompt, that a mask must
        hold for the head to get its category there.
    dense, sink, intra
        Over the prompts: a head is dense if more than the share `dense` of them say so; else it is
        of the first category out of sink and intra that at least that share of them names; else
        ``intra+sink``.
    """

    alpha: tuple[float, ...]
    dense: float
    sink: float
    intra: float


@dataclass(frozen=True)
class HeadCategories:
    """The mask of every head of a model, and how it was found.

    Parameters
    ----------
    model
        Whose heads they are.
    categories
        For each layer, each head's category.
    sinks
        Places of an image's sinks among its tokens: 0 is the first one, -1 the last.
    thresholds
        What the categories were chosen with.
    density
        Share of the causal blocks that is computed, the mean over the calibration prompts, the
        layers and the heads.
    block
        Queries, and keys, of a block, for that density.
    prompts
        How many prompts were measured.

    Raises
    ------
    LayoutError
        If there are not as many layers, heads or alphas as the model has, or a category is unknown.
    """

    model: ModelIdentity
    categories: tuple[tuple[Category, ...], ...]
    sinks: tuple[int, ...]
    thresholds: Thresholds
    density: float
    block: int
    prompts: int

    def __post_init__(self) -> None:
        shape = [len(layer) for layer in self.categories]
        if shape != [self.model.heads] * self.model.layers:
            raise LayoutError(
                f"there are categories for {shape} heads in each layer, and the model has "
                f"{self.model.layers} layers of {self.model.heads}. Give one for every head."
            )
        if len(self.thresholds.alpha) != self.model.layers:
            raise LayoutError(
                f"there are {len(self.thresholds.alpha)} alphas, and the model has "
                f"{self.model.layers} layers. Give one for every layer."
            )
        unknown = {category for layer in self.categories for category in layer} - set(CATEGORIES)
        if unknown:
            raise LayoutError(
                f"{sorted(unknown)} are no categories. Allowed: {', '.join(CATEGORIES)}."
            )

    def layout(self, length: int, images: Sequence[ImageSpan]) -> PromptLayout:
        """Return the layout of a prompt of `length` tokens with these images, sinks included."""
        return layout_with_sinks(length, images, self.sinks)

    def counts(self) -> dict[Category, int]:
        """Return how many heads have each category."""
        heads_of = Counter(category for layer in self.categories for category in layer)
        return {category: heads_of[category] for category in CATEGORIES}

    def save(self, path: str | Path) -> None:
        """Write the file, all of it or nothing.

        Raises
        ------
        OutputError
            If it cannot be written; what was there before is untouched.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({KEY: FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> HeadCategories:
        """Read a file that `save` wrote.

        Raises
        ------
        InputFileError
            If it cannot be read, is no heads file, or does not fit together.
        """
        try:
            text = Path(path).read_text("utf-8")
        except (OSError, ValueError) as error:
            raise InputFileError(
                f"{path} cannot be read as JSON: {reason_of(error)}. {_AGAIN}"
            ) from error
        return cls.read(text, path)

    @classmethod
    def read(cls, text: str, path: str | Path) -> HeadCategories:
        """Read what is in a file that `save` wrote.

        Parameters
        ----------
        text
            All of it.
        path
            What to call the file in an error.

        Raises
        ------
        InputFileError
            If it is no heads file, or does not fit together.
        """
        again = _AGAIN
        try:
            values: Any = json.loads(text)
        except ValueError as error:
            raise InputFileError(
                f"{path} cannot be read as JSON: {reason_of(error)}. {again}"
            ) from error
        if not isinstance(values, dict) or not {KEY, "categories"} & set(values):
            raise InputFileError(f"{path} is no heads file. {again}")
        values = check_format(values, FORMAT, path, again)
        try:
            model = values.pop("model")
            thresholds = values.pop("thresholds")
            shape = {name: _whole(model[name]) for name in _SHAPE}
            shares = {name: float(thresholds[name]) for name in ("dense", "sink", "intra")}
            return cls(
                model=ModelIdentity(**{**model, **shape, "sample": _numbers(model["sample"])}),
                categories=tuple(tuple(layer) for layer in values.pop("categories")),
                sinks=tuple(_whole(place) for place in values.pop("sinks")),
                thresholds=Thresholds(
                    **{**thresholds, **shares, "alpha": _numbers(thresholds["alpha"])}
                ),
                density=float(values.pop("density")),
                block=_whole(values.pop("block")),
                prompts=_whole(values.pop("prompts")),
                **values,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputFileError(
                f"{path} is a damaged heads file ({type(error).__name__}: {reason_of(error)}). "
                f"{again}"
            ) from error


def layout_with_sinks(
    length: int, images: Sequence[ImageSpan], sinks: Sequence[int]
) -> PromptLayout:
    """Return the layout of a prompt in whose images the tokens at some places are sinks.

    Parameters
    ----------
    length
        L, tokens of the prompt.
    images
        Spans of image tokens, in order.
    sinks
        Places in an image: 0 is its first token, -1 its last. Images that are shorter have none.
    """
    positions = {
        span.start + place if place >= 0 else span.stop + place
        for span in images
        for place in sinks
        if -len(span) <= place < len(span)
    }
    return PromptLayout(length, tuple(images), tuple(sorted(positions)))


def _numbers(values: Sequence[Any]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


_SHAPE = ("layers", "heads", "key_heads", "hidden_size")


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r} is no whole number")
    return value


def _cosine(sample: Sequence[float], other_sample: Sequence[float]) -> float:
    if len(sample) != len(other_sample):
        return 0.0
    if not any(sample) and not any(other_sample):
        return 1.0
    norms = math.hypot(*sample) * math.hypot(*other_sample)
    return (
        math.fsum(a * b for a, b in zip(sample, other_sample, strict=True)) / norms
        if norms
        else 0.0
    )
