"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL in vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.qwen2_vl import (
    Qwen2VLDummyInputsBuilder,
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)

from tokenprune.projectors import MLPProjector
from tokenprune.tokens import Projector
from tokenprune_vllm.families.base import Family, Fields, sizes_of
from tokenprune_vllm.model import PrunedModel
from tokenprune_vllm.processor import PruningProcessor, UnprunedLimits, register
from tokenprune_vllm.regions import Region, Segment
from tokenprune_vllm.scoring import Watched, packed_attention, plain_linear


class Qwen2VL(Family):
    """Qwen2-VL: each token is a 2x2 group of patches; an image or a video is one segment."""

    mrope: ClassVar[bool] = True
    flat_fields: ClassVar[Mapping[str, str]] = {
        "pixel_values": "image_grid_thw",
        "pixel_values_videos": "video_grid_thw",
    }

    @property
    def heads(self) -> int:
        """How many attention heads the tower has."""
        return int(self.config.vision_config.num_heads)

    def segments(self, modality: str, rows: int, fields: Fields) -> Sequence[Segment]:
        """Return the whole image or video."""
        frames, height, width = sizes_of(fields, f"{modality}_grid_thw").tolist()
        side = int(self.config.vision_config.spatial_merge_size)
        return [Segment(torch.arange(rows), (frames, height // side, width // side))]

    def tower(self, model: Any) -> nn.Module:
        """Return the encoder, one for images and videos."""
        module: nn.Module = model.visual
        return module

    def projector(self, model: Any) -> nn.Module:
        """Return the merger."""
        module: nn.Module = model.visual.merger
        return module

    def entrance(self, model: Any) -> nn.Module:
        """Return the merger's norm, whose input is the patches [P, 1, C]."""
        module: nn.Module = model.visual.merger.ln_q
        return module

    def around_projector(self, run: Projector, features: Tensor) -> Tensor:
        """Lay the patches of each token one after another, as the merger takes them."""
        patches = features.reshape(-1, 1, features.shape[-1] // self._merged())
        projected: Tensor = run(patches).unflatten(0, features.shape[:-1])
        return projected

    def build_projector(self, model: Any) -> MLPProjector:
        """Return the merger on four patches side by side."""
        merger: Any = model.visual.merger
        first, activation, second = merger.mlp
        return MLPProjector(
            first=plain_linear(first),
            activation=activation,
            second=plain_linear(second),
            norm=merger.ln_q,
            norm_groups=self._merged(),
        )

    def entries(self, value: Any) -> int:
        """Return the number of patches of a grid."""
        return int(torch.as_tensor(value).prod())

    def tokens(
        self, model: Any, watched: Watched, regions: Sequence[Region], fields: Sequence[Fields]
    ) -> list[list[tuple[Tensor, Tensor | None]]]:
        """Return each image's or video's features (patches side by side) and attention."""
        grids = []
        for own in fields:
            name = "image_grid_thw" if "image_grid_thw" in own else "video_grid_thw"
            grids.append(sizes_of(own, name).tolist())
        order = self._raster_order(model, grids)
        sizes = [region.total for region in regions]
        features = watched.features.reshape(sum(sizes), -1)[order].split(sizes)
        frames = [height * width for count, height, width in grids for _ in range(count)]
        patches = packed_attention(watched, self.heads, frames)
        if patches is None:
            return [[(one, None)] for one in features]
        attention = patches.unflatten(-1, (-1, self._merged())).mean(dim=-1)[:, order]
        return [
            [(one, score)] for one, score in zip(features, attention.split(sizes, -1), strict=True)
        ]

    def _merged(self) -> int:
        """Return how many patches one token holds."""
        return int(self.config.vision_config.spatial_merge_size) ** 2

    def _raster_order(self, model: Any, grids: list[list[int]]) -> Tensor | slice:
        """Return the index that puts the encoder's inner order of tokens into raster order."""
        return slice(None)


class Qwen25VL(Qwen2VL):
    """Qwen2.5-VL: as Qwen2-VL, but the encoder works on windows and undoes it after the merger."""

    def frame_interval(self, modality: str) -> int:
        """Return the positions per second for a video, as if its frames were a second apart."""
        if modality == "image":
            return 1
        return int(self.config.vision_config.tokens_per_second)

    def _raster_order(self, model: Any, grids: list[list[int]]) -> Tensor | slice:
        """Undo the order of windows as the encoder itself does."""
        parts = []
        start = 0
        for frames, height, width in grids:
            # The engine's own window index: its layout is not ours to repeat.
            index, _ = model.visual.get_window_index_thw(frames, height, width)
            parts.append(torch.as_tensor(index) + start)
            start += len(index)
        return torch.argsort(torch.cat(parts))


class Qwen3VL(Qwen2VL):
    """Qwen3-VL: as Qwen2-VL, with features for deeper layers beside each row, pruned alike."""

    def entrance(self, model: Any) -> nn.Module:
        """Return the merger's norm, which for some models comes after four patches are one."""
        module: nn.Module = model.visual.merger.norm
        return module

    def build_projector(self, model: Any) -> MLPProjector:
        """Return the merger on four patches side by side."""
        merger: Any = model.visual.merger
        return MLPProjector(
            first=plain_linear(merger.linear_fc1),
            activation=merger.act_fn,
            second=plain_linear(merger.linear_fc2),
            norm=merger.norm,
            norm_groups=1 if merger.use_postshuffle_norm else self._merged(),
        )


class _Qwen2VLInfo(UnprunedLimits, Qwen2VLProcessingInfo):
    pass


class _Qwen2VLProcessor(PruningProcessor, Qwen2VLMultiModalProcessor):
    family_class = Qwen2VL


@register(_Qwen2VLProcessor, _Qwen2VLInfo, Qwen2VLDummyInputsBuilder)
class TokenPruneQwen2VLForConditionalGeneration(PrunedModel, Qwen2VLForConditionalGeneration):
    """Qwen2-VL, pruned."""

    family_class = Qwen2VL


class _Qwen25VLInfo(UnprunedLimits, Qwen2_5_VLProcessingInfo):
    pass


class _Qwen25VLProcessor(PruningProcessor, Qwen2_5_VLMultiModalProcessor):
    family_class = Qwen25VL


@register(_Qwen25VLProcessor, _Qwen25VLInfo, Qwen2_5_VLDummyInputsBuilder)
class TokenPruneQwen2_5_VLForConditionalGeneration(PrunedModel, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL, pruned."""

    family_class = Qwen25VL


class _Qwen3VLInfo(UnprunedLimits, Qwen3VLProcessingInfo):
    pass


class _Qwen3VLProcessor(PruningProcessor, Qwen3VLMultiModalProcessor):
    family_class = Qwen3VL


@register(_Qwen3VLProcessor, _Qwen3VLInfo, Qwen3VLDummyInputsBuilder)
class TokenPruneQwen3VLForConditionalGeneration(PrunedModel, Qwen3VLForConditionalGeneration):
    """Qwen3-VL, pruned."""

    family_class = Qwen3VL
