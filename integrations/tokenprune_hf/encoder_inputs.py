"""What a vision encoder is called with, and what that says of each image and video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from tokenprune.errors import PromptError
from tokenprune.families.base import Family
from tokenprune.families.llava import LlavaNext
from tokenprune.families.minicpm import NemotronOmni
from tokenprune.families.molmo import Molmo2, pooled_media
from tokenprune.tower.layouts import Grid, Medium, Sides, grids_by_position
from tokenprune.transfer import to_host

_TARGET_SIZES = {"image": "target_sizes", "video": "target_sizes_videos"}
"""What MiniCPM-V calls the rows and columns of patches of each picture; Nemotron VL says
``image_grid_hw``."""

VIDEO_FRAMES = "video_frames"
"""The argument in which a caller says which pictures are the frames of one video."""


_FEW = 2**12
"""Numbers of an argument, no whole ones, that are read at most: times of frames, and no pixels."""


@dataclass
class EncoderInputs:
    """The arguments with which the encoder of one modality is called.

    Attributes
    ----------
    modality
        ``"image"`` or ``"video"``.
    arguments
        Arguments of ``get_image_features`` or ``get_video_features``.
    video_frames
        How many of the pictures, in order, make one video each, where the inputs do not tell.
    placeholders
        BoolTensor [B, L], where the prompts have the modality's, for models without a family.
    on_host
        Those of the arguments that say how rows lie, on the CPU; see `arguments_on_host`.
    """

    modality: str
    arguments: dict[str, Any] = field(default_factory=dict)
    video_frames: Sequence[int] | None = None
    placeholders: Tensor | None = None
    on_host: dict[str, Any] = field(default_factory=dict)

    @property
    def told(self) -> dict[str, Any]:
        """The arguments, those on the CPU that are known there."""
        return {**self.arguments, **self.on_host}

    @property
    def pixels(self) -> Tensor:
        """The pixel values, in whatever shape the family has them."""
        names = (name for name in self.arguments if name.startswith("pixel_values"))
        pixels: Tensor = self.arguments[next(names)]
        return pixels


def arguments_on_host(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call's arguments with all that is read of them copied to the CPU, in one wait.

    These are ids, masks, sizes and the like: whole numbers, and the few others that there are of
    an image. Before the encoder runs, a device has nothing to do that would be waited for.

    Parameters
    ----------
    arguments
        By name.
    """
    read = {
        name: value
        for name, value in arguments.items()
        if isinstance(value, Tensor)
        and not name.startswith("pixel_values")
        and (not value.is_floating_point() or value.numel() <= _FEW)
    }
    return {**arguments, **dict(zip(read, to_host(read.values()), strict=True))}


def media_of(family: Family, inputs: EncoderInputs, sizes: Sequence[int]) -> list[Medium]:
    """Return every image or video that was encoded, in prompt order.

    Parameters
    ----------
    family
        The model's.
    inputs
        What the encoder was called with.
    sizes
        Rows of each tensor that the encoder returned.

    Raises
    ------
    PromptError
        If ``video_frames`` does not add up.
    """
    media = _without_rows(family, inputs, len(sizes))
    if len(sizes) == len(media):
        return [replace(medium, rows=rows) for medium, rows in zip(media, sizes, strict=True)]
    # The encoder returned one tensor for each frame, or for all pictures of a prompt.
    per_picture = sum(sizes) // sum(medium.pictures for medium in media)
    return [replace(medium, rows=medium.pictures * per_picture) for medium in media]


def sizes_of(family: Family, inputs: EncoderInputs, total: int) -> list[int]:
    """Return how many rows the encoder returns for each image or video, without running it.

    Parameters
    ----------
    family, inputs
        See `media_of`; images that touch each other in the prompt.
    total
        How many rows there are in all.
    """
    media = _without_rows(family, inputs, 0)
    # Where a family does not say, all are equally large.
    return [family.row_count(medium) or total // len(media) for medium in media]


def _without_rows(family: Family, inputs: EncoderInputs, returned: int) -> list[Medium]:
    """Return the images or videos, whose rows are not filled in yet."""
    modality, arguments = inputs.modality, inputs.told
    grids = arguments.get(f"{modality}_grid_thw")
    if grids is not None:
        return [Medium(modality, 0, grid=_grid(grid)) for grid in grids.tolist()]
    if modality == "video" and isinstance(family, NemotronOmni):
        return family.videos(inputs.pixels.shape)
    patches = arguments.get(_TARGET_SIZES[modality], arguments.get("image_grid_hw"))
    if patches is not None:
        return [Medium(modality, 0, grid=(1, *_sides(sides))) for sides in patches.tolist()]
    by_patch = arguments.get(f"{modality}_position_ids")
    if by_patch is not None:
        frames = arguments.get("num_frames_per_video") if modality == "video" else None
        pictures = [1] * len(by_patch) if frames is None else [int(count) for count in frames]
        return [Medium(modality, 0, grid=grid) for grid in grids_by_position(by_patch, pictures)]
    pooling = arguments.get(f"{modality}_token_pooling")
    if pooling is not None and isinstance(family, Molmo2):
        grids = arguments[f"{modality}_grids"].tolist()
        crops = inputs.pixels.flatten(0, -3).shape[0]
        return pooled_media(modality, grids, pooling, family.patches_per_crop, crops)
    shapes = arguments.get("spatial_shapes")
    if shapes is not None:
        return [Medium(modality, 0, shapes=(_sides(shape),)) for shape in shapes.tolist()]
    pixels = inputs.pixels
    sides = _sides(pixels.shape[-2:])
    if not family.tells_videos:
        counts = _pictures(inputs, returned)
        return [Medium("image" if count == 1 else "video", 0, count, sides) for count in counts]
    if modality == "video":
        return [Medium(modality, 0, pixels.shape[1], sides) for _ in range(len(pixels))]
    image_sizes = arguments.get("image_sizes")
    if image_sizes is None:
        # A packed tower reads images that were padded to one size.
        size = sides if family.packed else None
        tiles = pixels.shape[1] if pixels.ndim == 5 else 1  # PerceptionLM's, as many of each image
        return [Medium(modality, 0, tiles, sides, size) for _ in range(len(pixels))]
    if isinstance(image_sizes, Tensor):
        image_sizes = image_sizes.tolist()  # one wait for the device, not one for each image
    sizes = [_sides(size) for size in image_sizes]
    if not isinstance(family, LlavaNext):
        return [Medium(modality, 0, 1, sides, size) for size in sizes]
    whole = [False] * len(sizes)
    per_prompt = arguments.get("batch_num_images")
    if per_prompt is not None:  # several images in one prompt are not cut into crops
        whole = [int(count) > 1 for count in per_prompt for _ in range(int(count))]
    ratio = arguments.get("vision_aspect_ratio")
    return [
        Medium(
            modality,
            0,
            1 if uncut else family.crops(size).pictures,
            sides,
            size,
            aspect_ratio=ratio,
        )
        for size, uncut in zip(sizes, whole, strict=True)
    ]


def _pictures(inputs: EncoderInputs, total: int) -> list[int]:
    """Return how many pictures each image or video has."""
    if inputs.video_frames is None:
        return [1] * total
    counts = [int(count) for count in inputs.video_frames]
    if sum(counts) != total or min(counts, default=0) < 1:
        raise PromptError(
            f"video_frames={list(inputs.video_frames)} adds up to {sum(counts)} pictures and the "
            f"processor made {total}. Give the number of frames of each video and a 1 for each "
            "picture of an image, in the order of the prompt."
        )
    return counts


def _sides(pair: Any) -> Sides:
    height, width = pair
    return int(height), int(width)


def _grid(triple: Any) -> Grid:
    frames, rows, columns = triple
    return int(frames), int(rows), int(columns)
