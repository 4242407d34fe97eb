"""Which picture a model reads as a wanted number of tokens: the baseline of all pruning.

Processors have few ways to make fewer tokens of a picture: limits by name (pixels, tiles, tokens),
the picture's own size, and the size of one tile. Each way is a row of values, and what a value
comes to is counted by having the processor lay out a blank picture of the same size. Nothing is
known here of how a family cuts pictures, and no formula of a processor is repeated.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from tokenprune.budget import Keep, check_keep, keeps_all, tokens_kept
from tokenprune.errors import BudgetError, PromptError, UnsupportedModelError
from tokenprune.families.base import Family
from tokenprune.families.registry import FAMILIES
from tokenprune.media.video import Video
from tokenprune.tower.layouts import Medium
from tokenprune_hf.encoder_inputs import EncoderInputs, media_of, sizes_of
from tokenprune_hf.loading import ask
from tokenprune_hf.resized import Content, Resized
from tokenprune_hf.vision import placeholder_id

_LIMITS: dict[str, str | None] = {
    "max_soft_tokens": None,
    "max_image_tokens": "min_image_tokens",
    "max_num_patches": "min_num_patches",
    "max_patches": "min_patches",
    "max_tiles": "min_tiles",
    "max_num_tiles": None,
    "max_image_tiles": None,
    "max_crops": None,
    "max_slice_nums": None,
}
"""What image processors call the most of something that a picture becomes, and the least."""

_CUTTING = ("crop_to_patches", "do_image_splitting", "split_image", "slice_mode")
"""What they call whether a large picture is cut into tiles at all."""

_EVERY = 64
"""Values of a way up to which every one is tried; of longer rows, those that halving takes."""

_LEAST_SIDE = 4
"""Pixels of the shorter side to which pictures are shrunk at least."""

_FEWEST_PIXELS = 0.25
"""Of a patch, for each token: pictures with fewer are enlarged by the processor, and not read as
they are. How they are cut then hangs on the rounding of their sides."""

_MANY = 1024
_NEAR = 0.97
"""Of so many tokens and more, this share of a budget is near enough."""

_QUESTION = "What is it?"


@dataclass(frozen=True)
class _Counted:
    """What a processor made of a medium: placeholders, and the tokens of each item."""

    placeholders: int
    items: tuple[int, ...]

    @cached_property
    def tokens(self) -> int:
        """Of all items."""
        return sum(self.items)


@dataclass(frozen=True)
class _Shape:
    """Of a picture (no frames) or a video, all that its number of tokens depends on."""

    width: int
    height: int
    frames: int | None = None

    @classmethod
    def of(cls, content: Content) -> _Shape:
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
        return max(self.width, self.height)

    def shrunk(self, longest: int) -> _Shape:
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


def _smaller(picture: Image.Image, shape: _Shape) -> Image.Image:
    size = (shape.width, shape.height)
    if picture.size == size:
        return picture
    if picture.mode not in ("RGB", "RGBA", "L"):
        picture = picture.convert("RGB")  # colours of a palette cannot be averaged
    return picture.resize(size, Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class _Setting:
    """One value of one way: how a medium is shaped, and how the processor is called."""

    shape: _Shape
    arguments: Mapping[str, Any] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> Hashable:
        return repr((self.shape, self.arguments, self.attributes))


@dataclass(frozen=True)
class _Way:
    """A row of settings, from the fewest tokens to the most.

    Attributes
    ----------
    values
        Ascending.
    at
        The setting of a value.
    """

    values: Sequence[int]
    at: Callable[[int], _Setting]


@dataclass(frozen=True)
class _Plan:
    """What was found for a shape and a budget."""

    setting: _Setting
    counted: _Counted
    full: _Counted
    keep: int | float


class Resizer:
    """Makes pictures and videos smaller for one model; remembers what a size comes to.

    Parameters
    ----------
    model
        The model, or its config.
    processor
        Its processor.
    in_vllm
        Whether vLLM reads what is made: what the processor says of itself cannot be changed there
        from one request to the next, so tiles keep their size.
    """

    def __init__(self, model: Any, processor: Any, *, in_vllm: bool = False) -> None:
        self._config: Any = getattr(model, "config", model)
        self._processor = processor
        self._in_vllm = in_vllm
        family = FAMILIES.get(self._config.model_type)
        self._family = None if family is None else family(self._config)
        self._counts: dict[Hashable, _Counted | None] = {}
        self._plans: dict[Hashable, _Plan] = {}

    def __call__(self, content: Content, keep: Keep, *, halfway: bool = False) -> Resized:
        """Return the medium made smaller; see `resize`."""
        shape = _Shape.of(content)
        key = (shape, repr(check_keep(keep)), halfway)
        if key not in self._plans:
            self._plans[key] = self._plan(shape, keep, halfway)
        plan = self._plans[key]
        return Resized(
            plan.setting.shape.fitted(content),
            plan.counted.tokens,
            plan.full.tokens,
            plan.keep,
            plan.counted.placeholders,
            plan.setting.arguments,
            plan.setting.attributes,
            plan.setting.key,
        )

    def fewest(self, content: Content) -> int:
        """Return the fewest tokens that a medium can be made to be."""
        shape = _Shape.of(content)
        full = self._full(shape)
        counts = [found.tokens for _, found in self._near(shape, 0)[1]]
        return min([full.tokens, *counts])

    # The search --------------------------------------------------------------------------------

    def _plan(self, shape: _Shape, keep: Keep, halfway: bool) -> _Plan:
        full = self._full(shape)
        kept = sum(tokens_kept(keep, tokens) for tokens in full.items)
        if kept >= full.tokens or keeps_all(keep):
            return _Plan(_Setting(shape), full, full, 1.0)
        most = kept
        if halfway:
            most = max(kept, math.floor(math.sqrt(kept * full.tokens) + 0.5))
        below, above = self._near(shape, most)
        best = max(below, key=lambda found: found[1].tokens, default=None)
        if halfway:
            # A picture of fewer tokens than are kept would leave a method nothing to do.
            if best is None or best[1].tokens < kept:
                larger = [found for found in above if found[1].tokens < full.tokens]
                if best is None and not larger:
                    raise self._fixed(shape, full.tokens, kept)
                larger.append((_Setting(shape), full))
                best = min(larger, key=lambda found: found[1].tokens)
            return _Plan(*best, full, keep_of_items(kept, best[1].items))
        if best is None:
            fewest = min([full.tokens, *(found.tokens for _, found in above)])
            raise self._fixed(shape, fewest, kept, full.tokens)
        return _Plan(*best, full, 1.0)

    def _near(
        self, shape: _Shape, most: int
    ) -> tuple[list[tuple[_Setting, _Counted]], list[tuple[_Setting, _Counted]]]:
        """Return the largest settings of at most so many tokens, and the smallest of more."""
        below: list[tuple[_Setting, _Counted]] = []
        above: list[tuple[_Setting, _Counted]] = []
        full = self._full(shape).tokens
        for ways in self._stages(shape):
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
        self, way: _Way, most: int, full: int
    ) -> tuple[tuple[_Setting, _Counted] | None, tuple[_Setting, _Counted] | None]:
        """Return the setting of a way with the most tokens up to `most`, and the next above.

        A long row is taken to rise, and of a row that does not, a setting of fewer tokens may be
        found than there is, never one of more than are allowed. Nothing above is looked for where
        enough is found below.
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
        first: tuple[_Setting, _Counted] | None = None
        next_above: tuple[_Setting, _Counted] | None = None
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
        return first, next_above

    def _fixed(
        self, shape: _Shape, fewest: int, kept: int, full: int | None = None
    ) -> UnsupportedModelError | BudgetError:
        what = f"a picture of {shape.width} x {shape.height} pixels"
        if shape.frames is not None:
            what = f"a video of {shape.frames} frames of {shape.width} x {shape.height} pixels"
        kind = type(self._processor).__name__
        takes_smaller = self._family is not None and self._family.takes_smaller_tiles
        if full is None or fewest >= full:
            engine, hint = (
                "",
                "Leave resize out for this model, and compare with random and uniform.",
            )
            if self._in_vllm and takes_smaller:
                engine = "in vLLM "
                hint = "transformers takes smaller tiles: run it with --engine hf, or leave it out."
            return UnsupportedModelError(
                f"{kind} makes {fewest} visual tokens of {what} {engine}whatever its size: resize "
                f"cannot make it fewer. {hint}"
            )
        return BudgetError(
            f"{kind} makes at least {fewest} of {full} visual tokens of {what}, and {kept} are to "
            f"be kept. Give a budget that keeps {fewest} or more, or leave resize out."
        )

    # The ways ----------------------------------------------------------------------------------

    def _stages(self, shape: _Shape) -> list[list[_Way]]:
        """Return the ways to make a medium smaller, those first that a model knows best."""
        # A side of a few pixels says nothing any more of the aspect ratio.
        first = -(-_LEAST_SIDE * shape.longest // min(shape.width, shape.height))
        longest = range(min(first, shape.longest), shape.longest + 1)
        if shape.frames is not None:
            fewer = _Way(
                range(1, shape.frames + 1),
                lambda count: _Setting(replace(shape, frames=count)),
            )
            one = replace(shape, frames=1)
            return [[fewer], [_Way(longest, lambda side: _Setting(one.shrunk(side)))]]
        shrunk = _Way(longest, lambda side: _Setting(shape.shrunk(side)))
        cutting = {name: False for name in _CUTTING if self._says(name)}
        limits = self._limits(shape, {})
        uncut = self._limits(shape, cutting) if cutting else []
        if cutting:
            uncut.append(_Way([0], lambda _: _Setting(shape, cutting)))
        tiles = [] if self._in_vllm else self._smaller_tiles(shape)
        return [[*limits, shrunk, *uncut], tiles]

    def _says(self, name: str) -> Any:
        """Return what the image processor does by default, None where it knows no such thing."""
        given: Any = getattr(self._processor, "valid_processor_kwargs", None)
        defaults = getattr(given, "_defaults", {}).get("images_kwargs", {})
        value = getattr(self._processor.image_processor, name, None)
        return defaults.get(name) if value is None or name in defaults else value

    def _limits(self, shape: _Shape, more: Mapping[str, Any]) -> list[_Way]:
        """Return a way for each limit that the image processor has."""
        ways = []
        size = self._says("size")
        longest = _entry(size, "longest_edge")
        if longest is not None:

            def edges(value: int) -> _Setting:
                given = {"longest_edge": value}
                shortest = _entry(size, "shortest_edge")
                if shortest is not None:
                    given["shortest_edge"] = min(value, shortest)
                return _Setting(shape, {**more, "size": given})

            ways.append(_Way(range(1, longest + 1), edges))
        allowed = {} if self._family is None else self._family.limits
        for name, least_name in _LIMITS.items():
            most = self._says(name)
            if not isinstance(most, int):
                continue
            least = None if least_name is None else self._says(least_name)

            def limit(
                value: int,
                name: str = name,
                least_name: str | None = least_name,
                least: Any = least,
            ) -> _Setting:
                given = {**more, name: value}
                if least_name is not None and isinstance(least, int):
                    given[least_name] = min(value, least)
                return _Setting(shape, given)

            values: Sequence[int] = [one for one in allowed.get(name, ()) if one <= most]
            ways.append(_Way(values or range(1, most + 1), limit))
        return ways

    def _smaller_tiles(self, shape: _Shape) -> list[_Way]:
        """Return the way of one tile that is smaller than the tower's own, where it takes such."""
        family = self._family
        if family is None or not family.takes_smaller_tiles:
            return []
        vision = self._config.vision_config
        patch = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
        token = int(patch) * family.merged
        sides = family.token_sides(Medium("image", 0))
        cutting = {name: False for name in _CUTTING if self._says(name)}

        def tile(side: int) -> _Setting:
            pixels = side * token
            arguments = {**cutting, "size": {"height": pixels, "width": pixels}}
            return _Setting(shape, arguments, {"image_seq_length": side * side})

        return [_Way(range(1, min(sides) + 1), tile)]

    # Counting ----------------------------------------------------------------------------------

    def _full(self, shape: _Shape) -> _Counted:
        """Return what a medium of full size comes to; what a processor refuses is its error."""
        setting = _Setting(shape)
        known = self._counts.get(setting.key)
        if known is None:
            known = self._counts[setting.key] = self._laid_out(setting)
        return known

    def _count(self, setting: _Setting) -> _Counted | None:
        """Return what a setting comes to; None where the processor cannot do it."""
        if setting.key not in self._counts:
            try:
                counted: _Counted | None = self._laid_out(setting)
            except Exception:  # a processor may raise anything on a size that it cannot take
                counted = None
            if counted is not None and self._enlarged(setting, counted):
                counted = None
            self._counts[setting.key] = counted
        return self._counts[setting.key]

    def _enlarged(self, setting: _Setting, counted: _Counted) -> bool:
        """Say whether a picture was shrunk to fewer pixels than its tokens have a use for."""
        if setting.arguments or setting.shape.frames is not None:
            return False
        patch = getattr(getattr(self._config, "vision_config", None), "patch_size", None) or 14
        side = int(patch if isinstance(patch, int) else patch[0])
        pixels = setting.shape.width * setting.shape.height
        return pixels < _FEWEST_PIXELS * side**2 * counted.tokens

    def _laid_out(self, setting: _Setting) -> _Counted:
        """Have the processor lay out a blank medium, and count."""
        modality = "image" if setting.shape.frames is None else "video"
        blank = Resized(
            setting.shape.blank(), 0, 0, arguments=setting.arguments, attributes=setting.attributes
        )
        inputs = dict(ask(self._processor, _QUESTION, **{modality: blank}))
        family = self._family or Family(self._config)
        placeholder = placeholder_id(self._config, family, modality)
        placeholders = int((inputs["input_ids"] == placeholder).sum())
        if placeholders == 0:
            raise UnsupportedModelError(
                f"{type(self._processor).__name__} lays out no placeholder {placeholder} for a "
                f"{modality}: its tokens cannot be counted, so resize is not possible. Leave it "
                "out for this model."
            )
        return _Counted(placeholders, tuple(self._items(inputs, modality, placeholders)))

    def _items(self, inputs: dict[str, Any], modality: str, placeholders: int) -> list[int]:
        """Return the tokens of each item, as `prune` counts them; of unknown families one."""
        family = self._family
        if family is None:
            return [placeholders]
        given = EncoderInputs(modality, inputs, inputs.get("video_frames"))
        # Where videos are not told from images, the encoder returns a tensor for each picture.
        if family.tells_videos:
            sizes = sizes_of(family, given, placeholders)
        else:
            pictures = given.pixels.shape[:-3].numel()
            sizes = [placeholders // pictures] * pictures
        media = media_of(family, given, sizes)
        return [len(part.rows) for medium in media for part in family.segments(medium)]


def _enough(most: int) -> int:
    """Return from how many tokens on no larger picture is looked for.

    Large pictures take long to lay out: of these one that is near enough is taken.
    """
    return most if most < _MANY else math.ceil(_NEAR * most)


def _entry(size: Any, name: str) -> int | None:
    """Return a size's entry, a dict's or an object's; None where it has none."""
    value = size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)
    return None if value is None else int(value)


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


def resize(
    model: Any, processor: Any, content: Content, keep: Keep, *, halfway: bool = False
) -> Resized:
    """Make a picture or a video smaller until the model reads as many tokens as `keep` allows.

    The baseline of all methods: the same number of tokens, and none of them chosen. A picture
    keeps its aspect ratio as far as the processor does; the most tokens are taken that do not
    exceed the budget, and of 1,024 or more the first size found with 97 % of them. Of a video
    evenly fewer frames are taken, and smaller ones only where one frame is too much. Source: as a
    baseline, VTC-Bench (ACL 2026).

    Parameters
    ----------
    model
        A vision-language model of transformers, or its config.
    processor
        Its processor, which lays out blank pictures of several sizes here.
    content
        The picture; what `read_video` returned, or frames uint8 [T, H, W, 3].
    keep
        A number of tokens (int) or a fraction (float) of each item at full size, counted as
        `prune` counts it: of a picture that is cut into tiles, of each tile.
    halfway
        Resize to about the geometric mean of all tokens and those to keep, so that a method may
        prune the rest: the most tokens up to it, and where these are fewer than are to be kept,
        the next more. `Resized.keep` is the method's budget then.

    Returns
    -------
    Resized
        For `ask`, as ``image=`` or ``video=``.

    Raises
    ------
    UnsupportedModelError
        If every picture of this shape is as many tokens whatever its size.
    BudgetError
        If it cannot be made as few tokens; the message says how few.
    PromptError
        If `content` is no picture and no video.
    """
    return Resizer(model, processor)(content, keep, halfway=halfway)
