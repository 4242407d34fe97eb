"""LLaVA-1.5 (Pixtral towers too), LLaVA-NeXT, LLaVA-OneVision and Video-LLaVA."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenprune.errors import UnsupportedModelError
from tokenprune.families.base import Family
from tokenprune.tower.attention import mean_of_blocks
from tokenprune.tower.layouts import Crops, Medium, Segment, Sides, check_rows, one_segment
from tokenprune.transfer import to_device


class Llava(Family):
    """LLaVA-1.5: one image, one grid of patches, each a token.

    A Pixtral tower packs images of any sizes into one sequence; their sizes come with the pixels.
    """

    model_types: ClassVar[tuple[str, ...]] = ("llava",)

    @property
    def packed(self) -> bool:
        """Whether the tower is a Pixtral one."""
        return bool(getattr(self.config.vision_config, "model_type", None) == "pixtral")

    def patch_sides(self, medium: Medium) -> Sides | None:
        """Return the patches of an image, whose own size counts where the tower packs images."""
        if not self.packed or medium.size is None:
            return super().patch_sides(medium)
        patch = int(self.config.vision_config.patch_size)
        return medium.size[0] // patch, medium.size[1] // patch

    def packed_lengths(self, medium: Medium) -> list[int]:
        """Return the patches of an image."""
        return [medium.rows]

    def row_count(self, medium: Medium) -> int | None:
        """Return the patches of an image of its own size."""
        sides = self.patch_sides(medium)
        return math.prod(sides) if self.packed and sides is not None else None

    def segments(self, medium: Medium) -> Sequence[Segment]:
        """Return the whole image; a CLS token among the rows ("full") always stays."""
        sides = self.patch_sides(medium)
        cls = 0 if sides is None else medium.rows - math.prod(sides)
        if sides is None or cls not in (0, 1):
            return [Segment(torch.arange(medium.rows), None)]
        return [one_segment((1, *sides), first=cls)]


class VideoLlava(Llava):
    """Video-LLaVA: images as in LLaVA-1.5; a video's frames each bring a CLS token, which stays."""

    model_types: ClassVar[tuple[str, ...]] = ("video_llava",)
    videos_by_frame: ClassVar[bool] = True

    def tower(self, model: Any, modality: str) -> nn.Module:
        """Return the image or the video tower."""
        module: nn.Module = model.video_tower if modality == "video" else model.image_tower
        return module

    def segments(self, medium: Medium) -> Sequence[Segment]:
        """Return the whole image, or the whole video over all its frames."""
        if medium.modality == "image":
            return super().segments(medium)
        sides = self.token_sides(medium)
        per_frame = 1 + math.prod(sides)
        check_rows(medium, medium.pictures * per_frame, "frames of {} x {} and one".format(*sides))
        rows = torch.arange(medium.rows).view(medium.pictures, per_frame)[:, 1:].flatten()
        return [Segment(rows, (medium.pictures, *sides))]


class LlavaNext(Llava):
    """LLaVA-NeXT: every crop is a segment with a budget of its own; newlines always stay."""

    model_types: ClassVar[tuple[str, ...]] = ("llava_next",)

    def crops(self, size: Sides) -> Crops:
        """Return how an image of a size is cut."""
        vision = self.config.vision_config
        return Crops.of(
            size,
            self.config.image_grid_pinpoints,
            int(vision.image_size),
            int(vision.image_size) // int(vision.patch_size),
        )

    def row_count(self, medium: Medium) -> int | None:
        """Return the rows of an image with its newlines; those of a video are not known here."""
        if medium.modality == "video":
            return None
        if medium.pictures == 1:
            return self._per_crop + 1
        height, width = self.map_sides(medium)
        return self._per_crop + height * (width + 1)

    def segments(self, medium: Medium) -> Sequence[Segment]:
        """Return one segment for each crop, the whole image at low resolution first."""
        self._check_image(medium)
        patch_of_row = self._patches(medium)
        crop_of_row = patch_of_row.div(self._per_crop, rounding_mode="floor")
        segments = []
        for crop in crop_of_row[crop_of_row >= 0].unique().tolist():
            rows = (crop_of_row == crop).nonzero()[:, 0]
            # The image may end inside a crop: its columns are as many in every row that is left.
            height = len((patch_of_row[rows] // self._side).unique())
            segments.append(Segment(rows, (1, height, len(rows) // height), f"crop {crop}"))
        return segments

    def lay_out(self, medium: Medium, values: Tensor) -> Tensor:
        """Put the patches of all crops where the map has them."""
        patches = self._patches(medium).clamp(min=0)
        return values.flatten(0, 1)[to_device(patches, values.device)]

    def _patches(self, medium: Medium) -> Tensor:
        """Return LongTensor [rows]: of each row its patch among all crops' patches, -1: newline."""
        patches = torch.arange(medium.pictures * self._per_crop).view(medium.pictures, -1, 1)
        return self.pack(medium, patches, newline=-1)[:, 0]

    def pack(self, medium: Medium, values: Tensor, newline: float = 0) -> Tensor:
        """Lay out values [pictures, P, X] as rows: the whole image, then the map with newlines."""
        if medium.pictures == 1:
            return nn.functional.pad(values[0], (0, 0, 0, 1), value=newline)
        crops = self._crops_of(medium)
        whole_map = self.resized(medium, crops.map_of(values[1 : crops.pictures]))
        whole_map = nn.functional.pad(whole_map, (0, 1), value=newline)
        return torch.cat([values[0], whole_map.flatten(1).T])

    def resized(self, medium: Medium, whole_map: Tensor) -> Tensor:
        """Return the map [X, rows, columns] as the model resamples it; here it does not."""
        return whole_map

    def map_sides(self, medium: Medium) -> Sides:
        """Return the rows and columns of the map as the model reads it."""
        return self._crops_of(medium).map_sides

    def _check_image(self, medium: Medium) -> None:
        rows = self.row_count(medium) or 0
        check_rows(medium, rows, f"{rows} tokens")

    def _crops_of(self, medium: Medium) -> Crops:
        if medium.size is None:
            raise UnsupportedModelError(
                "the inputs do not say how large an image was before it was cut (image_sizes): "
                "pass on everything that the processor returned."
            )
        return self.crops(medium.size)

    @property
    def _side(self) -> int:
        vision = self.config.vision_config
        return int(vision.image_size) // int(vision.patch_size)

    @property
    def _per_crop(self) -> int:
        return self._side**2


class LlavaNextVideo(LlavaNext):
    """LLaVA-NeXT-Video: images as in LLaVA-NeXT; a video's frames are pooled before projection."""

    model_types: ClassVar[tuple[str, ...]] = ("llava_next_video",)

    def segments(self, medium: Medium) -> Sequence[Segment]:
        """Return one segment for each crop of an image, or one for a video."""
        if medium.modality == "image":
            return super().segments(medium)
        rows, columns = (side // self._stride for side in self.token_sides(medium))
        segment = one_segment((medium.pictures, rows, columns))
        check_rows(medium, len(segment.rows), f"frames of {rows} x {columns}")
        return [segment]

    def lay_out(self, medium: Medium, values: Tensor) -> Tensor:
        """Put the patches of all crops where the map has them; frames lie one after another."""
        return (
            values.flatten(0, 1) if medium.modality == "video" else super().lay_out(medium, values)
        )

    def _per_token(self, medium: Medium, attention: Tensor, tokens: int) -> Tensor:
        """Return scores of tokens, each the mean of the patches that are pooled."""
        if medium.modality == "image":
            return super()._per_token(medium, attention, tokens)
        sides = self.token_sides(medium)
        rows, columns = (side - side % self._stride for side in sides)  # pooling leaves the rest
        whole = attention.unflatten(-1, sides)[..., :rows, :columns].flatten(-2)
        return mean_of_blocks(whole, (rows, columns), self._stride)

    @property
    def _stride(self) -> int:
        return int(self.config.spatial_pool_stride)


class LlavaOnevision(LlavaNext):
    """LLaVA-OneVision: an image has two segments, the whole and its finest map; a video one.

    The high-resolution map may be resampled across crops, so crops are no segments here. Frames of
    a video are pooled after the projector; features and attention are pooled alike.
    """

    model_types: ClassVar[tuple[str, ...]] = ("llava_onevision",)
    reference_layers: ClassVar[Mapping[tuple[int, int], int]] = {
        (28, 3584): 19,  # LLaVA-Video-7B
        (80, 8192): 60,  # LLaVA-Video-72B
    }

    def segments(self, medium: Medium) -> Sequence[Segment]:
        """Return two segments for an image (one where it is a single crop), one for a video."""
        if medium.modality == "video":
            sides = self._pooled(medium)
            grid = (medium.pictures, *sides)
            if math.prod(grid) + 1 != medium.rows:
                return [Segment(torch.arange(medium.rows - 1), None)]
            return [one_segment(grid)]  # behind it stands a newline
        self._check_image(medium)
        side = self._side
        segments = [Segment(torch.arange(side**2), (1, side, side), "whole image")]
        if medium.pictures > 1:
            height, width = self.map_sides(medium)
            behind = torch.arange(side**2, medium.rows).view(height, width + 1)
            in_map = behind[:, :-1].flatten()  # the last of each row is a newline
            segments.append(Segment(in_map, (1, height, width), "high resolution"))
        return segments

    def lay_out(self, medium: Medium, values: Tensor) -> Tensor:
        """Pack or pool values as the model packs crops and pools frames."""
        values = values.float()
        if medium.modality == "image":
            return self.pack(medium, values)
        sides = self.patch_sides(medium)
        maps = values.mT.unflatten(2, sides or (self._side, self._side)).contiguous()
        pooled = nn.functional.interpolate(maps, size=self._pooled(medium), mode="bilinear")
        return nn.functional.pad(pooled.flatten(2).mT.flatten(0, 1), (0, 0, 0, 1))

    def resized(self, medium: Medium, whole_map: Tensor) -> Tensor:
        """Return the map no larger than the config (or the call) allows."""
        sides = self._largest(medium, (whole_map.shape[1], whole_map.shape[2]))
        if sides == tuple(whole_map.shape[1:]):
            return whole_map
        return nn.functional.interpolate(whole_map[None], size=sides, mode="bilinear")[0]

    def _pooled(self, medium: Medium) -> Sides:
        """Return the sides of a pooled frame: two by two patches, and what is left over."""
        rows, columns = self.token_sides(medium)
        return math.ceil(rows / 2), math.ceil(columns / 2)

    def map_sides(self, medium: Medium) -> Sides:
        """Return the rows and columns of the map, no more than the model reads."""
        return self._largest(medium, self._crops_of(medium).map_sides)

    def _largest(self, medium: Medium, sides: Sides) -> Sides:
        """Return the sides of a map as the model reads it, which has a limit."""
        told = medium.aspect_ratio or getattr(self.config, "vision_aspect_ratio", "anyres_max_9")
        most_crops = int(str(told).removeprefix("anyres_max_"))
        ratio = math.sqrt(math.prod(sides) / (most_crops * self._side**2))
        # A little more than the limit is let through: the models are trained so.
        return sides if ratio <= 1.1 else (int(sides[0] // ratio), int(sides[1] // ratio))
