"""InternVL in vLLM, in transformers' format and in its own (InternVLChatModel)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.model_executor.models.interns1 import (
    InternS1DummyInputsBuilder,
    InternS1ForConditionalGeneration,
    InternS1MultiModalProcessor,
    InternS1ProcessingInfo,
)
from vllm.model_executor.models.internvl import (
    InternVLChatModel,
    InternVLDummyInputsBuilder,
    InternVLMultiModalProcessor,
    InternVLProcessingInfo,
)

from tokenprune.projectors import MLPProjector
from tokenprune_vllm.families.base import Family, Fields, check_count
from tokenprune_vllm.model import PrunedModel
from tokenprune_vllm.processor import PruningProcessor, UnprunedLimits, register
from tokenprune_vllm.regions import Region, Segment
from tokenprune_vllm.scoring import Watched, picture_attention, plain_linear


class InternVL(Family):
    """InternVL: every tile of an image is a segment of its own, a video is one."""

    flat_fields: ClassVar[Mapping[str, str]] = {
        "pixel_values": "image_num_patches",
        "pixel_values_videos": "video_num_patches",
    }
    shared_fields: ClassVar[frozenset[str]] = frozenset({"image_token_id", "video_token_id"})

    def segments(self, modality: str, rows: int, fields: Fields) -> Sequence[Segment]:
        """Return one segment for each tile of an image, or one for a video."""
        tiles = int(fields[f"{modality}_num_patches"])
        each = rows // tiles
        ratio = float(self.config.downsample_ratio)
        height, width = (round(side * ratio) for side in self.patch_grid())
        grid = check_count(each, (height, width), "a tile")
        if modality == "video":
            return [Segment(torch.arange(rows), (tiles, *grid))]
        return [
            Segment(torch.arange(tile * each, (tile + 1) * each), (1, *grid), f"tile {tile}")
            for tile in range(tiles)
        ]

    def tiles(self, region: Region, fields: Fields) -> int:
        """Return the number of tiles or frames."""
        name = "video_num_patches" if "video_num_patches" in fields else "image_num_patches"
        return int(fields[name])

    def tokens(
        self, model: Any, watched: Watched, regions: Sequence[Region], fields: Sequence[Fields]
    ) -> list[list[tuple[Tensor, Tensor | None]]]:
        """Return the features and attention of each tile, or of all frames of a video."""
        attention = picture_attention(watched, self.heads, self.has_cls(model))
        if attention is not None:
            attention = self.merge(model, attention)
        found = []
        start = 0
        for region, own in zip(regions, fields, strict=True):
            mine = slice(start, start + self.tiles(region, own))
            start = mine.stop
            features = watched.features[mine].flatten(0, 1)
            # [tiles, H, P] -> [H, tiles * P]
            scores = None if attention is None else attention[mine].transpose(0, 1).flatten(1)
            found.append(
                [
                    (features[part.rows], None if scores is None else scores[:, part.rows])
                    for part in region.segments
                ]
            )
        return found

    def build_projector(self, model: Any) -> MLPProjector:
        """Return the projector on the pixel-shuffled features."""
        module: Any = model.multi_modal_projector
        return MLPProjector(
            first=plain_linear(module.linear_1),
            activation=module.act,
            second=plain_linear(module.linear_2),
            norm=module.layer_norm,
        )

    def merge(self, model: Any, attention: Tensor) -> Tensor:
        """Send the scores through the model's own pixel shuffle, and average what it lays aside."""
        heads = attention.shape[1]
        maps = attention.mT.unflatten(1, self.patch_grid()).contiguous()
        shuffled = model.pixel_shuffle(maps, scale_factor=model.downsample_ratio)
        merged: Tensor = shuffled.flatten(1, 2).unflatten(-1, (-1, heads)).mean(dim=2).mT
        return merged


class InternVLChat(InternVL):
    """InternVL in its own format."""

    flat_fields: ClassVar[Mapping[str, str]] = {
        "pixel_values_flat": "image_num_patches",
        "pixel_values_flat_video": "video_num_patches",
    }

    def patch_grid(self) -> tuple[int, int]:
        """Return the rows and columns of patches of a tile, which the config may force."""
        side = getattr(self.config, "force_image_size", None)
        if not side:
            return super().patch_grid()
        patch = int(self.config.vision_config.patch_size)
        return int(side) // patch, int(side) // patch

    def tower(self, model: Any) -> nn.Module:
        """Return the vision encoder."""
        module: nn.Module = model.vision_model
        return module

    def projector(self, model: Any) -> nn.Module:
        """Return the layers behind the pixel shuffle."""
        module: nn.Module = model.mlp1
        return module

    def build_projector(self, model: Any) -> MLPProjector:
        """Return those layers: norm, linear, GELU, linear."""
        norm, first, activation, second = model.mlp1
        return MLPProjector(
            first=plain_linear(first),
            activation=activation,
            second=plain_linear(second),
            norm=norm,
        )


class _InternVLInfo(UnprunedLimits, InternS1ProcessingInfo):
    pass


class _InternVLProcessor(PruningProcessor, InternS1MultiModalProcessor):
    family_class = InternVL


@register(_InternVLProcessor, _InternVLInfo, InternS1DummyInputsBuilder)
class TokenPruneInternVLForConditionalGeneration(PrunedModel, InternS1ForConditionalGeneration):
    """InternVL in transformers' format, pruned."""

    family_class = InternVL


class _InternVLChatInfo(UnprunedLimits, InternVLProcessingInfo):
    pass


class _InternVLChatProcessor(PruningProcessor, InternVLMultiModalProcessor):
    family_class = InternVLChat


@register(_InternVLChatProcessor, _InternVLChatInfo, InternVLDummyInputsBuilder)
class TokenPruneInternVLChatModel(PrunedModel, InternVLChatModel):
    """InternVL in its own format, pruned."""

    family_class = InternVLChat
