"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: packed towers, 2x2 mergers, positions with three axes."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenprune.model_projector import ModelProjector
from tokenprune.projectors import MLPProjector
from tokenprune.tokens import Projector
from tokenprune_hf.attention import packed_attention
from tokenprune_hf.families.base import Captured, Family, Item, Media


class Qwen2VL(Family):
    """Qwen2-VL: each token is a 2x2 group of patches; the merger normalises each patch alone."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl",)
    mrope: ClassVar[bool] = True

    def tower(self, modality: str) -> Any:
        """Return the encoder, one for images and videos."""
        return self.inner.visual

    def projector_module(self, modality: str) -> nn.Module:
        """Return the merger, whose input is the patches [P, C]."""
        module: nn.Module = self.inner.visual.merger
        return module

    def around_projector(self, run: Projector, features: Tensor) -> Tensor:
        """Lay the patches of each token one after another, as the merger takes them."""
        patches = features.reshape(-1, features.shape[-1] // self._merged())
        projected: Tensor = run(patches).unflatten(0, features.shape[:-1])
        return projected

    def build_projector(self, modality: str) -> MLPProjector:
        """Return the merger on four patches side by side."""
        merger: Any = self.inner.visual.merger
        return MLPProjector(
            first=merger.mlp[0],
            activation=merger.mlp[1],
            second=merger.mlp[2],
            norm=merger.ln_q,
            norm_groups=self._merged(),
        )

    def projector(self, modality: str) -> ModelProjector:
        """Return one projector for images and videos."""
        return super().projector("image")

    def scoring_layer(self, media: Media) -> nn.Module:
        """Return the attention of the last block, which sees whole frames in all three models.

        Source: HoloV's Qwen path (methods of the field score there): last layer, mean over heads
        and queries, averaged over the patches of a token.
        """
        module: nn.Module = self.inner.visual.blocks[-1].attn
        return module

    def items(self, media: Media, rows: Tensor, sizes: list[int], captured: Captured) -> list[Item]:
        """Return one item per image or video."""
        grids: Tensor = media.arguments[f"{media.modality}_grid_thw"]
        merged = self._merged()
        order = self._raster_order(grids)
        features = captured.features.reshape(len(rows), -1)[order]
        attention = None
        if captured.attention_module is not None and captured.attention is not None:
            patches = packed_attention(captured.attention_module, captured.attention)
            attention = patches.unflatten(-1, (-1, merged)).mean(dim=-1)[:, order]
        side = int(self.inner.visual.spatial_merge_size)
        items = []
        start = 0
        for index, (size, (frames, height, width)) in enumerate(
            zip(sizes, grids.tolist(), strict=True)
        ):
            mine = torch.arange(start, start + size, device=rows.device)
            items.append(
                self.item(
                    media,
                    f"{media.modality} {index}",
                    (frames, height // side, width // side),
                    mine,
                    rows,
                    features[mine],
                    None if attention is None else attention[:, mine],
                )
            )
            start += size
        return items

    def _merged(self) -> int:
        """Return how many patches one token holds."""
        return int(self.inner.visual.spatial_merge_size) ** 2

    def _raster_order(self, grids: Tensor) -> Tensor | slice:
        """Return the index that puts the encoder's inner order of tokens into raster order."""
        return slice(None)


class Qwen25VL(Qwen2VL):
    """Qwen2.5-VL: as Qwen2-VL, but the encoder works on windows and undoes it after the merger."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_vl",)

    def frame_interval(self, modality: str) -> int:
        """Return the positions per second for a video, as if its frames were a second apart."""
        if modality == "image":
            return 1
        return int(self.model.config.vision_config.tokens_per_second)

    def _raster_order(self, grids: Tensor) -> Tensor | slice:
        """Undo the order of windows as the encoder itself does."""
        visual = self.inner.visual
        # The engine's own window index: its layout is not ours to repeat.
        windows = sys.modules[type(visual).__module__].get_vision_window_index
        index, _ = windows(
            grids,
            spatial_merge_size=visual.spatial_merge_size,
            window_size=visual.window_size,
            patch_size=visual.patch_size,
            kwargs={},
        )
        return torch.argsort(index)


class Qwen3VL(Qwen2VL):
    """Qwen3-VL: as Qwen2-VL, with features for deeper layers that are pruned alike."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen3_vl", "qwen3_vl_moe")

    def build_projector(self, modality: str) -> MLPProjector:
        """Return the merger on four patches side by side."""
        merger: Any = self.inner.visual.merger
        return MLPProjector(
            first=merger.linear_fc1,
            activation=merger.act_fn,
            second=merger.linear_fc2,
            norm=merger.norm,
            norm_groups=1 if merger.use_postshuffle_norm else self._merged(),
        )
