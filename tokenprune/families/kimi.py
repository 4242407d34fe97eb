"""Kimi-K2.5, K2.6 and Kimi-VL: packed towers that merge patches in front of the projector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenprune.families.base import frames_of
from tokenprune.families.qwen import Qwen2VL
from tokenprune.tower.layouts import Grid, Medium, order_of_windows
from tokenprune.transfer import to_device


class KimiK25(Qwen2VL):
    """Kimi-K2.5 and K2.6: each token is a 2x2 group of patches; positions have one axis.

    The tower hands the projector the patches of each token together. The frames of a chunk of
    video (up to four) see each other and become one picture, their mean.
    """

    model_types: ClassVar[tuple[str, ...]] = ("kimi_k25",)
    mrope: ClassVar[bool] = False

    @property
    def merged(self) -> int:
        """Patches on a side of each token."""
        return int(self.config.vision_config.merge_kernel_size[0])

    def packed_lengths(self, medium: Medium) -> list[int]:
        """Return the patches of all frames."""
        return [sum(super().packed_lengths(medium))]

    def rows_of(
        self, media: Sequence[Medium], features: Tensor, attention: Tensor | None
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Return features and attention, the mean of a patch's frames in the order of tokens."""
        if attention is not None:
            lengths = [length for medium in media for length in self.packed_lengths(medium)]
            parts = zip(media, attention.split(lengths, dim=-1), strict=True)
            attention = torch.cat([self._merged_frames(*part) for part in parts], dim=-1)
        return super().rows_of(media, features, attention)

    def around_projector(self, projector: Any, run: Any, features: Tensor) -> Tensor:
        """Give the projector the patches of each token apart."""
        patches = features.reshape(-1, self.merged**2, features.shape[-1] // self.merged**2)
        projected: Tensor = run(patches)
        return projected.reshape(*features.shape[:-1], projected.shape[-1])

    def _merged_frames(self, medium: Medium, attention: Tensor) -> Tensor:
        """Return [..., patches of a frame], each token's one after another."""
        grid = frames_of(medium)
        order = to_device(order_of_windows(grid, self.merged), attention.device)
        merged: Tensor = attention[..., order].unflatten(-1, (grid[0], -1)).mean(dim=-2)
        return merged

    def _token_grid(self, medium: Medium) -> Grid:
        return (1, *self.token_sides(medium))


class KimiVL(KimiK25):
    """Kimi-VL: as Kimi-K2.5, but that it takes no videos."""

    model_types: ClassVar[tuple[str, ...]] = ("kimi_vl",)
    in_transformers: ClassVar[bool] = False
