"""Which picture a model reads as a wanted number of tokens: the baseline of all pruning.

Processors of transformers have few ways to make fewer tokens of a picture: limits by name (pixels,
tiles, tokens), the picture's own size, and the size of one tile. What a value of a way comes to is
counted by having the processor lay out a blank picture of the same size. The search among them is
`tokenprune.media.sizes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tokenprune.budget import Keep
from tokenprune.errors import BudgetError, UnsupportedModelError
from tokenprune.families.base import Family
from tokenprune.families.registry import FAMILIES
from tokenprune.media.sizes import (
    Content,
    Counted,
    Planner,
    Setting,
    Shape,
    Way,
    patch_side,
    shrinking,
)
from tokenprune.tower.layouts import Medium
from tokenprune_hf.encoder_inputs import EncoderInputs, media_of, sizes_of
from tokenprune_hf.loading import ask
from tokenprune_hf.resized import Resized
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

_QUESTION = "What is it?"


class Resizer(Planner):
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
        super().__init__(patch_side(self._config))
        self._processor = processor
        self._in_vllm = in_vllm
        family = FAMILIES.get(self._config.model_type)
        self._family = None if family is None else family(self._config)

    def __call__(self, content: Content, keep: Keep, *, halfway: bool = False) -> Resized:
        """Return the medium made smaller; see `resize`."""
        shape = Shape.of(content)
        plan = self.planned(shape, keep, halfway=halfway)
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
        shape = Shape.of(content)
        full = self.full(shape)
        counts = [found.tokens for _, found in self.near(shape, 0)[1]]
        return min([full.tokens, *counts])

    def refusal(
        self, shape: Shape, fewest: int, kept: int, full: int | None = None
    ) -> UnsupportedModelError | BudgetError:
        """Return the error, which says how few tokens there can be."""
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

    def stages(self, shape: Shape) -> list[list[Way]]:
        """Return the ways to make a medium smaller, those first that a model knows best."""
        if shape.frames is not None:
            fewer = Way(
                range(1, shape.frames + 1),
                lambda count: Setting(replace(shape, frames=count)),
            )
            return [[fewer], [shrinking(replace(shape, frames=1))]]
        cutting = {name: False for name in _CUTTING if self._says(name)}
        limits = self._limits(shape, {})
        uncut = self._limits(shape, cutting) if cutting else []
        if cutting:
            uncut.append(Way([0], lambda _: Setting(shape, cutting)))
        tiles = [] if self._in_vllm else self._smaller_tiles(shape)
        return [[*limits, shrinking(shape), *uncut], tiles]

    def _says(self, name: str) -> Any:
        """Return what the image processor does by default, None where it knows no such thing."""
        given: Any = getattr(self._processor, "valid_processor_kwargs", None)
        defaults = getattr(given, "_defaults", {}).get("images_kwargs", {})
        value = getattr(self._processor.image_processor, name, None)
        return defaults.get(name) if value is None or name in defaults else value

    def _limits(self, shape: Shape, more: Mapping[str, Any]) -> list[Way]:
        """Return a way for each limit that the image processor has."""
        ways = []
        size = self._says("size")
        longest = _entry(size, "longest_edge")
        if longest is not None:

            def edges(value: int) -> Setting:
                given = {"longest_edge": value}
                shortest = _entry(size, "shortest_edge")
                if shortest is not None:
                    given["shortest_edge"] = min(value, shortest)
                return Setting(shape, {**more, "size": given})

            ways.append(Way(range(1, longest + 1), edges))
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
            ) -> Setting:
                given = {**more, name: value}
                if least_name is not None and isinstance(least, int):
                    given[least_name] = min(value, least)
                return Setting(shape, given)

            values: Sequence[int] = [one for one in allowed.get(name, ()) if one <= most]
            ways.append(Way(values or range(1, most + 1), limit))
        return ways

    def _smaller_tiles(self, shape: Shape) -> list[Way]:
        """Return the way of one tile that is smaller than the tower's own, where it takes such."""
        family = self._family
        if family is None or not family.takes_smaller_tiles:
            return []
        vision = self._config.vision_config
        patch = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
        token = int(patch) * family.merged
        sides = family.token_sides(Medium("image", 0))
        cutting = {name: False for name in _CUTTING if self._says(name)}

        def tile(side: int) -> Setting:
            pixels = side * token
            arguments = {**cutting, "size": {"height": pixels, "width": pixels}}
            return Setting(shape, arguments, {"image_seq_length": side * side})

        return [Way(range(1, min(sides) + 1), tile)]

    # Counting ----------------------------------------------------------------------------------

    def laid_out(self, setting: Setting) -> Counted:
        """Have the processor lay out a blank medium, and count."""
        modality = "image" if setting.shape.frames is None else "video"
        blank = Resized(
            setting.shape.blank(), 0, 0, arguments=setting.arguments, attributes=setting.attributes
        )
        inputs = dict(ask(self._processor, _QUESTION, **{modality: blank}))
        family = self._family or Family(self._config)
        # Where videos are not told from images, a video's frames have an image's placeholders.
        kind = modality if family.tells_videos else "image"
        placeholder = placeholder_id(self._config, family, kind)
        placeholders = int((inputs["input_ids"] == placeholder).sum())
        if placeholders == 0:
            raise UnsupportedModelError(
                f"{type(self._processor).__name__} lays out no placeholder {placeholder} for a "
                f"{modality}: its tokens cannot be counted, so resize is not possible. Leave it "
                "out for this model."
            )
        return Counted(placeholders, tuple(self._items(inputs, modality, placeholders)))

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


def _entry(size: Any, name: str) -> int | None:
    """Return a size's entry, a dict's or an object's; None where it has none."""
    value = size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)
    return None if value is None else int(value)


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
