"""Shapes of what `bench_gpu.py` measures: those of public models, and tiny ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import bench_flexselect
import bench_generate
from bench_flexselect import Shape


@dataclass(frozen=True)
class Tower:
    """A vision tower's shape.

    Attributes
    ----------
    kind
        ``"clip"``, ``"siglip"`` or ``"qwen3-vl"``.
    settings
        Of its config.
    """

    kind: str
    settings: Mapping[str, Any]

    @property
    def heads(self) -> int:
        """Attention heads of a layer."""
        return int(self.settings.get("num_heads") or self.settings["num_attention_heads"])

    @property
    def merged(self) -> int:
        """Patches on a side of the block that becomes one token."""
        return int(self.settings.get("spatial_merge_size", 1))


@dataclass(frozen=True)
class Size:
    """The tokens of one image: `crops` items with a budget each, of `rows` x `columns` tokens."""

    rows: int
    columns: int
    crops: int = 1

    @property
    def name(self) -> str:
        """As it stands in tables."""
        total = f"N = {self.crops * self.rows * self.columns:,}"
        return f"{total} in {self.crops} crops" if self.crops > 1 else total


@dataclass(frozen=True)
class Plan:
    """Everything that differs between a GPU's run and a small one.

    Attributes
    ----------
    towers, sizes, images
        Of the section ``selection``. Every size meets every tower.
    compared
        Sizes of the section ``agreement``.
    features, width
        C of the tokens' features, and D of the language model that reads them.
    vision, text, lite
        Shapes of the LLaVA's tower, of the 7B language model, and of the trained selector.
    prompts
        Images of a prompt in the section ``prefill``, one number for each case.
    answer
        Tokens that `generate` adds.
    video_tower, frames, frames_per_set
        Of the section ``video``.
    lengths, heads, key_heads, dim, mask_images
        Of the section ``masks``.
    turns
        Timed turns of what takes milliseconds; what takes longer has fewer.
    """

    towers: Mapping[str, Tower]
    sizes: Sequence[Size]
    images: Sequence[int]
    compared: Sequence[Size]
    features: int
    width: int
    vision: Mapping[str, Any]
    text: Shape
    lite: Shape
    prompts: Sequence[int]
    answer: int
    video_tower: Mapping[str, int]
    frames: Sequence[int]
    frames_per_set: int
    lengths: Sequence[int]
    heads: int
    key_heads: int
    dim: int
    mask_images: int
    turns: int


SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
_SIZES = Size(24, 24), Size(30, 40), Size(24, 24, crops=5)
FULL = Plan(
    towers={
        "CLIP-L/14-336": Tower("clip", bench_generate.CLIP_L),
        # At 336 pixels, for 576 tokens. At 384 the tower takes longer, so its share is less.
        "SigLIP-so400m/14-336": Tower("siglip", {**SO400M, "image_size": 336}),
        "Qwen3-VL-8B": Tower(
            "qwen3-vl",
            {
                "depth": 27,
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_heads": 16,
                "patch_size": 16,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "out_hidden_size": 4096,
                "num_position_embeddings": 2304,
                "deepstack_visual_indexes": [8, 16, 24],
            },
        ),
    },
    sizes=_SIZES,
    images=(1, 4, 16),
    compared=(*_SIZES, Size(48, 60)),
    features=1024,
    width=4096,
    vision=bench_generate.CLIP_L,
    text=bench_flexselect.REAL,
    lite=bench_flexselect.REAL_LITE,
    prompts=(1, 5),
    answer=32,
    video_tower=SO400M,
    frames=(64, 512),
    frames_per_set=64,
    lengths=(16_384, 32_768),
    heads=28,
    key_heads=4,
    dim=128,
    mask_images=16,
    turns=7,
)
_TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
_SMALL_SIZES = Size(6, 6), Size(5, 8), Size(6, 6, crops=5)
SMALL = Plan(
    towers={
        "CLIP-L/14-336": Tower(
            "clip", {**_TINY, "num_attention_heads": 2, "image_size": 84, "patch_size": 14}
        ),
        "SigLIP-so400m/14-336": Tower(
            "siglip", {**_TINY, "num_attention_heads": 2, "image_size": 84, "patch_size": 14}
        ),
        "Qwen3-VL-8B": Tower(
            "qwen3-vl",
            {
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 2,
                "patch_size": 4,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "out_hidden_size": 64,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0],
            },
        ),
    },
    sizes=_SMALL_SIZES,
    images=(1, 2),
    compared=_SMALL_SIZES,
    features=32,
    width=64,
    vision={**_TINY, "num_attention_heads": 2, "image_size": 84, "patch_size": 14},
    text=bench_flexselect.QUICK,
    lite=bench_flexselect.QUICK_LITE,
    prompts=(1, 2),
    answer=3,
    video_tower={**_TINY, "num_attention_heads": 2, "image_size": 40, "patch_size": 4},
    frames=(2, 8),
    frames_per_set=4,
    lengths=(512, 1024),
    heads=4,
    key_heads=2,
    dim=16,
    mask_images=4,
    turns=2,
)
