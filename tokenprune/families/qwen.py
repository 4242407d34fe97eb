"""Qwen2-VL to Qwen3.5: packed towers, 2x2 mergers, positions with three axes; and one like them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from tokenprune.families.base import Family, frames_of
from tokenprune.tokens import Projector
from tokenprune.tower.layouts import (
    Grid,
    Medium,
    Segment,
    Sides,
    check_rows,
    one_segment,
    order_of_windows,
)
from tokenprune.transfer import to_device


class Qwen2VL(Family):
    """Qwen2-VL, Qwen3-VL and Qwen3.5 (Qwen3.6 too): each token is a 2x2 group of patches.

    Attention is scored in the last block, which sees whole frames in all of them. Source:
    HoloV's Qwen path (methods of the field score there): last layer, mean over heads and queries,
    averaged over the patches of a token.
    """

    model_types: ClassVar[tuple[str, ...]] = (
        "qwen2_vl",
        "qwen3_vl",
        "qwen3_vl_moe",
        "qwen3_5",
        "qwen3_5_moe",
    )
    mrope: ClassVar[bool] = True

    @property
    def packed(self) -> bool:
        """True: frames of any size come in one sequence."""
        return True

    @property
    def merged(self) -> int:
        """Patches on a side of each token."""
        return int(self.config.vision_config.spatial_merge_size)

    def patch_sides(self, medium: Medium) -> Sides | None:
        """Return the rows and columns of patches of a frame."""
        _, rows, columns = frames_of(medium)
        return rows, columns

    def packed_lengths(self, medium: Medium) -> list[int]:
        """Return the patches of each frame."""
        frames, rows, columns = frames_of(medium)
        return [rows * columns] * frames

    def segments(self, medium: Medium) -> Sequence[Segment]:
        """Return the whole image or video."""
        grid = self._token_grid(medium)
        segment = one_segment(grid)
        check_rows(medium, len(segment.rows), "{} x {} x {}".format(*grid))
        return [segment]

    def row_count(self, medium: Medium) -> int | None:
        """Return the tokens of all frames."""
        return math.prod(self._token_grid(medium))

    def around_projector(self, projector: Any, run: Projector, features: Tensor) -> Tensor:
        """Lay the patches of each token one after another, as the merger takes them."""
        patches = features.reshape(-1, 1, features.shape[-1] // self.merged**2)
        projected: Tensor = run(patches).unflatten(0, features.shape[:-1])
        return projected

    def _token_grid(self, medium: Medium) -> Grid:
        return (frames_of(medium)[0], *self.token_sides(medium))


class Qwen25VL(Qwen2VL):
    """Qwen2.5-VL: as Qwen2-VL, but the encoder works on windows and undoes it after the merger."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_vl",)
    reference_layers: ClassVar[Mapping[tuple[int, int], int]] = {
        (28, 3584): 20,  # Qwen2.5-VL-7B; FlexSelect's training script says 19
    }

    def frame_interval(self, modality: str) -> int:
        """Return the positions per second for a video, as if its frames were a second apart."""
        if modality == "image":
            return 1
        return int(self.config.vision_config.tokens_per_second)

    def middle_layer(self, has_cls: bool, built: int = 0) -> int:
        """Return the layer nearest to the middle that attends to whole pictures, not to windows."""
        middle = super().middle_layer(has_cls, built)
        whole = self.tower_config.fullatt_block_indexes
        return int(min(whole, key=lambda layer: (abs(layer - middle), layer)))

    def lay_out(self, medium: Medium, values: Tensor) -> Tensor:
        """Undo the order of windows as the encoder itself does."""
        vision = self.tower_config
        side = int(vision.window_size) // self.merged // int(vision.patch_size)
        order = order_of_windows(self._token_grid(medium), side)
        return values[0][to_device(order.argsort(), values.device)]


class LlavaOnevision2(Qwen2VL):
    """LLaVA-OneVision 2: as Qwen2-VL, but positions have one axis, and frames never see each other.

    Videos that were packed by their codec are no pictures; vLLM's adapter refuses them.
    """

    model_types: ClassVar[tuple[str, ...]] = ("llava_onevision2",)
    mrope: ClassVar[bool] = False
    in_transformers: ClassVar[bool] = False
