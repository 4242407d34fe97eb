"""LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision in vLLM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)

from tokenprune.errors import UnsupportedModelError
from tokenprune_vllm.families.base import Family, Fields, check_count, sizes_of
from tokenprune_vllm.model import PrunedModel
from tokenprune_vllm.processor import PruningProcessor, UnprunedLimits, register
from tokenprune_vllm.regions import Region, Segment
from tokenprune_vllm.scoring import Watched, picture_attention


class Llava(Family):
    """LLaVA-1.5: one image, one square grid of patches, each a token."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        tower = config.vision_config.model_type
        if tower == "pixtral":
            raise UnsupportedModelError(
                f"this LLaVA has a tower of the kind {tower!r}, whose images have rows of any "
                "length; tokenprune prunes LLaVA with CLIP and SigLIP towers."
            )

    def segments(self, modality: str, rows: int, fields: Fields) -> Sequence[Segment]:
        """Return the whole image; a CLS token among the rows ("full") always stays."""
        grid = self.patch_grid()
        first = int(rows == math.prod(grid) + 1)
        check_count(rows - first, grid, "an image")
        cells = torch.arange(first, rows)
        return [Segment(cells, (1, *grid), cells=cells)]

    def tokens(
        self, model: Any, watched: Watched, regions: Sequence[Region], fields: Sequence[Fields]
    ) -> list[list[tuple[Tensor, Tensor | None]]]:
        """Return each image's features and attention, which has no column for a CLS token."""
        attention = picture_attention(watched, self.heads, self.has_cls(model))
        found = []
        for index, region in enumerate(regions):
            cells = region.segments[0].rows
            score = None if attention is None else attention[index][:, cells - int(cells[0])]
            found.append([(watched.features[index, cells], score)])
        return found


class LlavaNext(Family):
    """LLaVA-NeXT: every crop is a segment with a budget of its own; newlines always stay.

    The engine's own packing is run on the patches' coordinates, so unpadding is not repeated here.
    """

    engine: ClassVar[Any] = LlavaNextForConditionalGeneration

    def segments(self, modality: str, rows: int, fields: Fields) -> Sequence[Segment]:
        """Return one segment for each crop, the whole image at low resolution first."""
        side = self._side()
        crops = len(fields["pixel_values"])
        crop = torch.arange(crops)[:, None].expand(-1, side * side)
        patch = torch.arange(side * side).expand(crops, -1)
        where = self.pack(fields, torch.stack([crop, patch], dim=-1).double())
        crop_of_row, patch_of_row = where.long().unbind(-1)
        segments = []
        for number in crop_of_row[crop_of_row >= 0].unique().tolist():
            mine = (crop_of_row == number).nonzero()[:, 0]
            in_crop = patch_of_row[mine]
            height = len((in_crop // side).unique())
            grid = (1, height, len(mine) // height)
            segments.append(Segment(mine, grid, f"crop {number}", number, in_crop))
        return segments

    def tiles(self, region: Region, fields: Fields) -> int:
        """Return the number of crops, padding included."""
        return len(fields["pixel_values"])

    def pack(self, fields: Fields, values: Tensor) -> Tensor:
        """Run the engine's packing on values [crops, P, X]; return [rows, X], -1 for newlines.

        Newlines are told by that -1, so what is packed has a column without negative values.
        """
        stand_in = SimpleNamespace(config=self.config, image_newline=self._newline(values))
        packed: Tensor = self.engine._merge_image_patch_embeddings(
            stand_in,
            sizes_of(fields, "image_sizes"),
            values,
            strategy="spatial_unpad",
            **self._packing_options(values),
        )
        return packed

    def _packing_options(self, values: Tensor) -> dict[str, Any]:
        return {}

    def _newline(self, values: Tensor) -> Tensor:
        return values.new_full((values.shape[-1],), -1.0)

    def _side(self) -> int:
        return self.patch_grid()[0]


class LlavaOnevision(LlavaNext):
    """LLaVA-OneVision: an image has two segments, the whole and its finest map; a video one.

    The high-resolution map may be resampled across crops, so crops are no segments here. Frames of
    a video are pooled after the projector; features and attention are pooled alike.
    """

    engine: ClassVar[Any] = LlavaOnevisionForConditionalGeneration

    def segments(self, modality: str, rows: int, fields: Fields) -> Sequence[Segment]:
        """Return two segments for an image (one where it is a single crop), one for a video."""
        if modality == "video":
            frames = len(fields["pixel_values_videos"])
            # vLLM pools two by two and keeps what is left over.
            height, width = (math.ceil(one / 2) for one in self.patch_grid())
            grid = check_count((rows - 1) // frames, (height, width), "a video frame")
            return [Segment(torch.arange(rows - 1), (frames, *grid))]  # the last is a newline
        side = self._side()
        crops = len(fields["pixel_values"])
        flags = self.pack(fields, torch.ones(crops, side * side, 1))[:, 0] > 0
        whole = torch.arange(side * side)
        segments = [Segment(whole, (1, side, side), "whole image")]
        high = flags.nonzero()[:, 0][side * side :]
        if len(high):
            height = int((~flags).sum())  # one newline ends each row of the map
            width = len(high) // height
            segments.append(Segment(high, (1, height, width), "high resolution"))
        return segments

    def tokens(
        self, model: Any, watched: Watched, regions: Sequence[Region], fields: Sequence[Fields]
    ) -> list[list[tuple[Tensor, Tensor | None]]]:
        """Return what the engine's packing or pooling makes of features and attention."""
        attention = picture_attention(watched, self.heads, self.has_cls(model))
        found = []
        start = 0
        for region, own in zip(regions, fields, strict=True):
            video = "pixel_values_videos" in own
            count = len(own["pixel_values_videos" if video else "pixel_values"])
            tiles = slice(start, start + count)
            start += count
            values = [watched.features[tiles].float()]
            if attention is not None:
                values.append(attention[tiles].mT)
            if video:
                rows = [model.apply_pooling(value).flatten(0, 1) for value in values]
            else:
                rows = [self.pack(own, value) for value in values]
            features, *scores = rows
            found.append(
                [
                    (features[part.rows], scores[0][part.rows].mT if scores else None)
                    for part in region.segments
                ]
            )
        return found

    def _packing_options(self, values: Tensor) -> dict[str, Any]:
        return {"image_newline": self._newline(values)}


class _LlavaInfo(UnprunedLimits, LlavaProcessingInfo):
    pass


class _LlavaProcessor(PruningProcessor, LlavaMultiModalProcessor):
    family_class = Llava


@register(_LlavaProcessor, _LlavaInfo, LlavaDummyInputsBuilder)
class TokenPruneLlavaForConditionalGeneration(PrunedModel, LlavaForConditionalGeneration):
    """LLaVA-1.5, pruned."""

    family_class = Llava


class _LlavaNextInfo(UnprunedLimits, LlavaNextProcessingInfo):
    pass


class _LlavaNextProcessor(PruningProcessor, LlavaNextMultiModalProcessor):
    family_class = LlavaNext


@register(_LlavaNextProcessor, _LlavaNextInfo, LlavaDummyInputsBuilder)
class TokenPruneLlavaNextForConditionalGeneration(PrunedModel, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT, pruned."""

    family_class = LlavaNext


class _LlavaOnevisionInfo(UnprunedLimits, LlavaOnevisionProcessingInfo):
    pass


class _LlavaOnevisionProcessor(PruningProcessor, LlavaOnevisionMultiModalProcessor):
    family_class = LlavaOnevision


@register(_LlavaOnevisionProcessor, _LlavaOnevisionInfo, LlavaOnevisionDummyInputsBuilder)
class TokenPruneLlavaOnevisionForConditionalGeneration(
    PrunedModel, LlavaOnevisionForConditionalGeneration
):
    """LLaVA-OneVision, pruned."""

    family_class = LlavaOnevision
