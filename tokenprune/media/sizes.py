"""How small a picture or video has to be so that a model reads a wanted number of tokens.

Processors have few ways to make fewer tokens of a medium. Each way is a row of values, and what a
value comes to is counted by whoever knows the processor: `tokenprune_hf.resizing` with that of
transformers, `tokenprune_vllm.resizing` with vLLM's. Here is what both search for and how; nothing
is known of how a family cuts pictures, and no formula of a processor is repeated.
"""

from __future__ import annotations

import bisect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenprune.budget import Keep, check_keep, keeps_all, tokens_kept
from tokenprune.errors import BudgetError, PromptError, TokenPruneError
from tokenprune.media.video import Video
from tokenprune.remembered import Remembered

Content = Image.Image | Video | NDArray[np.uint8]
"""A picture, or a video, also as frames uint8 [T, H, W, 3]."""

_EVERY = 64
"""Values of a way up to which every one is tried; of longer rows, those that halving takes."""

_LEAST_SIDE = 4
"""Pixels of the shorter side to which pictures are shrunk at least."""

_FEWEST_PIXELS = 0.25
"""Of a patch, for each token: pictures with fewer are enlarged by the processor, and not read as
they are. How they are cut then hangs on the rounding of their sides."""

_REMEMBERED = 8192
"""Sizes and budgets that are remembered: a server meets any number of them."""

_MANY = 1024
_NEAR = 0.97
"""Of so many tokens and more, this share of a budget is near enough."""


@dataclass(frozen=True)
class Counted:
    """What a processor made of a medium: placeholders, and the tokens of each item."""

    placeholders: int
    items: tuple[int, ...]

    @cached_property
    def tokens(self) -> int:
        """Of all items."""
        return sum(self.items)


@dataclass(frozen=True)
class Shape:
    """Of a picture (no frames) or a video, all that its number of tokens depends on."""

    width: int
    height: int
    frames: int | None = None

    @classmethod
    def of(cls, content: Content) -> Shape:
        """Return the shape of a medium.

        Raises
        ------
        PromptError
            If it is no picture and no video.
        """
        if isinstance(content, Image.Image):
            return cls(*content.size)
        frames = content.frames if isinstance(content, Video) else content
        if not isinstance(frames, np.ndarray) or frames.ndim != 4:
            shape = getattr(frames, "shape", None)
            of_shape = "" if shape is None else f" of shape {list(shape)}"
            raise PromptError(
                f"a {type(frames).__name__}{of_shape} cannot be made smaller. Pass a picture "
                "(PIL.Image), what tokenprune_hf.read_video returned, or frames as an array "
                "[T, H, W, 3]."
            )
        return cls(frames.shape[2], frames.shape[1], len(frames))

    @property
    def longest(self) -> int:
        """The longer side."""
        return max(self.width, self.height)

    def shrunk(self, longest: int) -> Shape:
        """Return it with that longer side, and the aspect ratio as it is."""
        share = longest / self.longest
        width, height = (max(1, round(side * share)) for side in (self.width, self.height))
        return replace(self, width=width, height=height)

    def blank(self) -> Content:
        """Return a medium of this shape."""
        if self.frames is None:
            return Image.new("RGB", (self.width, self.height))
        return np.zeros((self.frames, self.height, self.width, 3), np.uint8)

    def fitted(self, content: Content) -> Content:
        """Return a medium made as small as this."""
        if isinstance(content, Image.Image):
            return _smaller(content, self)
        frames = content.frames if isinstance(content, Video) else content
        chosen = frames_taken(len(frames), self.frames or 1)
        if (self.height, self.width) != frames.shape[1:3]:
            pictures = [Image.fromarray(frames[number]) for number in chosen]
            taken = np.stack([np.asarray(_smaller(picture, self)) for picture in pictures])
        else:
            taken = frames[chosen]
        if not isinstance(content, Video):
            return taken
        times, indices = content.times[chosen], content.indices[chosen]
        return replace(content, frames=taken, times=times, indices=indices)


def frames_taken(count: int, wanted: int) -> list[int]:
    """Return which of `count` frames are taken to have `wanted`, evenly from first to last.

    As `read_video` spreads its sample; one alone is the first, as there.
    """
    return [math.floor(place + 0.5) for place in np.linspace(0, count - 1, wanted).tolist()]


def _smaller(picture: Image.Image, shape: Shape) -> Image.Image:
    size = (shape.width, shape.height)
    if picture.size == size:
        return picture
    if picture.mode not in ("RGB", "RGBA", "L"):
        picture = picture.convert("RGB")  # colours of a palette cannot be averaged
    return picture.resize(size, Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class Setting:
    """One value of one way: how a medium is shaped, and how the processor is called."""

    shape: Shape
    arguments: Mapping[str, Any] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> Hashable:
        """Names it; equal settings have equal keys."""
        return repr((self.shape, self.arguments, self.attributes))


@dataclass(frozen=True)
class Way:
    """A row of settings, from the fewest tokens to the most.

    Attributes
    ----------
    values
        Ascending.
    at
        The setting of a value.
    """

    values: Sequence[int]
    at: Callable[[int], Setting]


@dataclass(frozen=True)
class Plan:
    """What was found for a shape and a budget."""

    setting: Setting
    counted: Counted
    full: Counted
    keep: int | float


class Planner(ABC):
    """Finds how small a medium has to be; remembers what a size comes to.

    Parameters
    ----------
    patch
        Pixels of a side of the tower's patches, see `patch_side`.
    """

    def __init__(self, patch: int) -> None:
        self._patch = patch
        # In a tuple, as there may be None: the processor cannot do it.
        self._counts: Remembered[Hashable, tuple[Counted | None]] = Remembered(_REMEMBERED)
        self._plans: Remembered[Hashable, Plan] = Remembered(_REMEMBERED)

    @abstractmethod
    def stages(self, shape: Shape) -> list[list[Way]]:
        """Return the ways to make a medium smaller, those first that a model knows best."""

    @abstractmethod
    def laid_out(self, setting: Setting) -> Counted:
        """Have the processor lay out a blank medium, and count; it may raise anything."""

    @abstractmethod
    def refusal(
        self, shape: Shape, fewest: int, kept: int, full: int | None = None
    ) -> TokenPruneError:
        """Return the error for a medium that cannot be made small enough.

        Parameters
        ----------
        shape
            Of the medium.
        fewest
            The fewest tokens that it can be made to be.
        kept
            How many were to be kept.
        full
            Its tokens at full size; None where no size makes fewer.
        """

    def planned(self, shape: Shape, keep: Keep, *, halfway: bool = False) -> Plan:
        """Return the setting of most tokens that a budget allows, see `tokenprune_hf.resize`.

        Raises
        ------
        TokenPruneError
            What `refusal` returns, if there is none.
        """
        key = (shape, repr(check_keep(keep)), halfway)
        return self._plans.made(key, lambda: self._plan(shape, keep, halfway))

    # The search --------------------------------------------------------------------------------

    def _plan(self, shape: Shape, keep: Keep, halfway: bool) -> Plan:
        full = self.full(shape)
        kept = sum(tokens_kept(keep, tokens) for tokens in full.items)
        if kept >= full.tokens or keeps_all(keep):
            return Plan(Setting(shape), full, full, 1.0)
        most = kept
        if halfway:
            most = max(kept, math.floor(math.sqrt(kept * full.tokens) + 0.5))
        below, above = self.near(shape, most)
        best = max(below, key=lambda found: found[1].tokens, default=None)
        if halfway:
            # A picture of fewer tokens than are kept would leave a method nothing to do.
            if best is None or best[1].tokens < kept:
                larger = [found for found in above if found[1].tokens < full.tokens]
                if best is None and not larger:
                    raise self.refusal(shape, full.tokens, kept)
                larger.append((Setting(shape), full))
                best = min(larger, key=lambda found: found[1].tokens)
            return Plan(*best, full, keep_of_items(kept, best[1].items))
        if best is None:
            fewest = min([full.tokens, *(found.tokens for _, found in above)])
            raise self.refusal(shape, fewest, kept, full.tokens)
        return Plan(*best, full, 1.0)

    def near(
        self, shape: Shape, most: int
    ) -> tuple[list[tuple[Setting, Counted]], list[tuple[Setting, Counted]]]:
        """Return the largest settings of at most so many tokens, and the smallest of more."""
        below: list[tuple[Setting, Counted]] = []
        above: list[tuple[Setting, Counted]] = []
        full = self.full(shape).tokens
        for ways in self.stages(shape):
            for way in ways:
                under, over = self._search(way, most, full)
                below += [] if under is None else [under]
                above += [] if over is None else [over]
                if under is not None and under[1].tokens >= _enough(most):
                    return below, above
            if below:  # a later stage is for what is too large even so
                return below, above
        return below, above

    def _search(
        self, way: Way, most: int, full: int
    ) -> tuple[tuple[Setting, Counted] | None, tuple[Setting, Counted] | None]:
        """Return the setting of a way with the most tokens up to `most`, and the next above.

        A long row is taken to rise, and of a row that does not, a setting of fewer tokens may be
        found than there is, or none; never one of more than are allowed. Nothing above is looked
        for where enough is found below.
        """
        settings = [way.at(value) for value in way.values] if len(way.values) <= _EVERY else None
        if settings is not None:
            found = [
                (setting, counted)
                for setting in settings
                if (counted := self._count(setting)) is not None
            ]
            under = [one for one in found if one[1].tokens <= most]
            over = [one for one in found if one[1].tokens > most]
            # Of equals the last: more of the picture is left.
            best = max(enumerate(under), key=lambda one: (one[1][1].tokens, one[0]), default=None)
            least = min(over, key=lambda one: one[1].tokens, default=None)
            return (None if best is None else best[1]), least
        first: tuple[Setting, Counted] | None = None
        next_above: tuple[Setting, Counted] | None = None
        low, high = 0, len(way.values)
        halves = False
        while low < high:
            middle = (low + high) // 2
            if not halves:
                # Tokens grow about as values do. Every second step halves, come what may.
                fewer = 0 if first is None else first[1].tokens
                more = max(full if next_above is None else next_above[1].tokens, most + 1)
                middle = min(high - 1, low + (high - low) * (most - fewer) // (more - fewer))
            halves = not halves
            setting = way.at(way.values[middle])
            counted = self._count(setting)
            if counted is None or counted.tokens <= most:  # None: too small for the processor
                low = middle + 1
                first = first if counted is None else (setting, counted)
                if first is not None and first[1].tokens >= _enough(most):
                    break
            else:
                high = middle
                next_above = (setting, counted)
        if first is None and next_above is not None and next_above[1].tokens < full:
            # The row does not rise everywhere: before none is found, some of all it has are tried.
            for value in way.values[:: -(-len(way.values) // _EVERY)]:
                setting = way.at(value)
                counted = self._count(setting)
                if counted is None:
                    continue
                if counted.tokens > most:
                    next_above = min(next_above, (setting, counted), key=_tokens_of)
                elif first is None or counted.tokens > first[1].tokens:
                    first = (setting, counted)
        return first, next_above

    # Counting ----------------------------------------------------------------------------------

    def full(self, shape: Shape) -> Counted:
        """Return what a medium of full size comes to; what a processor refuses is its error."""
        setting = Setting(shape)
        known = self._counts.get(setting.key)
        if known is not None and known[0] is not None:
            return known[0]
        counted = self.laid_out(setting)
        self._counts.put(setting.key, (counted,))
        return counted

    def _count(self, setting: Setting) -> Counted | None:
        """Return what a setting comes to; None where the processor cannot do it."""
        return self._counts.made(setting.key, lambda: (self._tried(setting),))[0]

    def _tried(self, setting: Setting) -> Counted | None:
        try:
            counted = self.laid_out(setting)
        except Exception:  # a processor may raise anything on a size that it cannot take
            return None
        return None if self._enlarged(setting, counted) else counted

    def _enlarged(self, setting: Setting, counted: Counted) -> bool:
        """Say whether a picture was shrunk to fewer pixels than its tokens have a use for."""
        if setting.arguments or setting.shape.frames is not None:
            return False
        pixels = setting.shape.width * setting.shape.height
        return pixels < _FEWEST_PIXELS * self._patch**2 * counted.tokens


def shrinking(shape: Shape) -> Way:
    """Return the way of a smaller picture, whose aspect ratio stays as far as pixels allow."""
    # A side of a few pixels says nothing any more of the aspect ratio.
    first = -(-_LEAST_SIDE * shape.longest // min(shape.width, shape.height))
    longest = range(min(first, shape.longest), shape.longest + 1)
    return Way(longest, lambda side: Setting(shape.shrunk(side)))


def patch_side(config: Any) -> int:
    """Return the pixels of a side of a tower's patches, 14 where a model's config has none."""
    patch = getattr(getattr(config, "vision_config", None), "patch_size", None) or 14
    return int(patch if isinstance(patch, int) else patch[0])


def _tokens_of(found: tuple[Setting, Counted]) -> int:
    return found[1].tokens


def _enough(most: int) -> int:
    """Return from how many tokens on no larger picture is looked for.

    Large pictures take long to lay out: of these one that is near enough is taken.
    """
    return most if most < _MANY else math.ceil(_NEAR * most)


def keep_of_items(kept: int, items: Sequence[int]) -> int | float:
    """Return the largest budget that keeps at most `kept` tokens of all items together.

    Parameters
    ----------
    kept
        At least as many as there are items.
    items
        Tokens of each; of one item the budget is the number `kept`.
    """
    if len(items) == 1:
        return kept
    # From one of these shares to the next, some item keeps one token more.
    shares = sorted({1.0, *((step + 0.5) / tokens for tokens in items for step in range(tokens))})

    def total(share: float) -> int:
        return sum(tokens_kept(share, tokens) for tokens in items)

    place = bisect.bisect_right(shares, kept, key=total)
    if place == 0:
        raise BudgetError(
            f"{kept} tokens cannot be kept of {len(items)} parts of a picture, of each at least "
            "one. Give a larger budget."
        )
    return shares[place - 1]
