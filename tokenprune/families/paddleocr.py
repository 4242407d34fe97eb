"""PaddleOCR-VL: a packed tower with patches in raster order, which its projector merges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenprune.families.base import frames_of
from tokenprune.families.qwen import Qwen2VL
from tokenprune.tower.layouts import Medium, order_of_windows
from tokenprune.transfer import to_device


class PaddleOCRVL(Qwen2VL):
    """PaddleOCR-VL: each token is a 2x2 group of patches, images only."""

    model_types: ClassVar[tuple[str, ...]] = ("paddleocr_vl",)

    def rows_of(
        self, media: Sequence[Medium], features: Tensor, attention: Tensor | None
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Return features and attention, the patches of a token laid one after another first."""
        parts = [order_of_windows(frames_of(medium), self.merged) for medium in media]
        starts = torch.tensor([0, *map(len, parts[:-1])]).cumsum(0)
        order = torch.cat([part + start for part, start in zip(parts, starts, strict=True)])
        order = to_device(order, features.device)
        by_token = features.reshape(len(order), -1)[order]
        return super().rows_of(
            media, by_token, None if attention is None else attention[..., order]
        )

    def around_projector(self, projector: Any, run: Any, features: Tensor) -> Tensor:
        """Give the projector each token as a picture of its own, of 2x2 patches."""
        side = self.merged
        patches = features.reshape(-1, features.shape[-1] // side**2)
        sides = torch.tensor([[len(patches) // side**2, side, side]], device="cpu")
        grid = to_device(sides, features.device)
        # vLLM's takes a list of pictures and returns one; transformers' takes and returns a tensor.
        several = hasattr(projector, "text_config")
        projected = run([patches], grid)[0] if several else run(patches, grid)
        result: Tensor = projected.unflatten(0, features.shape[:-1])
        return result
