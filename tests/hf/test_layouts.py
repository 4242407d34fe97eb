"""Layouts that are worked out without an engine, against the engine's own on many sizes."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaNextConfig, LlavaOnevisionConfig
from transformers.models.llava_next.modeling_llava_next import (
    LlavaNextModel,
    image_size_to_num_patches,
)
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

from tokenprune.errors import UnsupportedModelError
from tokenprune.families.llava import LlavaNext, LlavaOnevision
from tokenprune.families.qwen import Qwen25VL
from tokenprune.tower.attention import mean_of_blocks
from tokenprune.tower.layouts import Medium, order_of_windows

PIXELS, PATCH = 28, 7
SIDE = PIXELS // PATCH
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84], [112, 112], [112, 56]]
VISION = {"image_size": PIXELS, "patch_size": PATCH, "model_type": "clip_vision_model"}


def sizes(seed: int, count: int) -> list[tuple[int, int]]:
    """Return heights and widths, the extreme ones among them."""
    draw = random.Random(seed)
    drawn = [(draw.randint(1, 200), draw.randint(1, 200)) for _ in range(count)]
    return [(1, 200), (200, 1), (28, 28), (56, 56), (112, 112), *drawn]


def config(kind: Any, **more: Any) -> Any:
    return kind(image_grid_pinpoints=PINPOINTS, vision_config=dict(VISION), **more)


def packed_by_engine(model: Any, kind: Any, size: tuple[int, int], values: Tensor) -> Tensor:
    """Return what the engine's packing makes of values [crops, P, X], -1 for newlines."""
    model.config = kind
    options: dict[str, Any] = {"vision_feature_select_strategy": "default"}
    if isinstance(kind, LlavaOnevisionConfig):
        options = {"vision_aspect_ratio": kind.vision_aspect_ratio}
    owner = LlavaOnevisionModel if isinstance(kind, LlavaOnevisionConfig) else LlavaNextModel
    (packed,), _ = owner.pack_image_features(
        model,
        [values],
        torch.tensor([size]),
        image_newline=values.new_full((values.shape[-1],), -1.0),
        **options,
    )
    result: Tensor = packed
    return result


def of_image(family: LlavaNext, size: tuple[int, int]) -> tuple[Medium, Tensor]:
    """Return an image as it is encoded, and values of its crops that tell every patch apart."""
    pictures = int(image_size_to_num_patches(size, PINPOINTS, PIXELS))
    assert family.crops(size).pictures == pictures
    rows = family.row_count(Medium("image", 0, pictures, size=size))
    assert rows is not None
    values = torch.arange(pictures * SIDE**2 * 2, dtype=torch.float32).view(pictures, SIDE**2, 2)
    return Medium("image", rows, pictures, (PIXELS, PIXELS), size), values


@pytest.mark.parametrize("size", sizes(0, 40))
def test_crops_are_packed_as_the_engine_packs_them(size: tuple[int, int]) -> None:
    kind = config(LlavaNextConfig)
    family = LlavaNext(kind)
    medium, values = of_image(family, size)
    expected = packed_by_engine(SimpleNamespace(), kind, size, values)
    assert len(expected) == medium.rows
    got = family.lay_out(medium, values)
    is_patch = expected[:, 0] >= 0
    assert torch.equal(got[is_patch], expected[is_patch])
    segments = family.segments(medium)
    in_segments = torch.cat([segment.rows for segment in segments])
    assert torch.equal(in_segments.sort().values, is_patch.nonzero()[:, 0])
    for segment in segments:
        assert segment.grid is not None
        assert math.prod(segment.grid) == len(segment.rows)
        # The rows of a segment are the patches of one crop, in raster order.
        crops = (expected[segment.rows, 0] // (SIDE**2 * 2)).unique()
        assert len(crops) == 1
        places = (expected[segment.rows, 0] / 2 % SIDE**2).view(segment.grid[1:])
        assert torch.equal(places[:, :1] + torch.arange(places.shape[1]), places)
        assert bool((places[1:] - places[:-1] == SIDE).all())


@pytest.mark.parametrize("limit", ["anyres_max_9", "anyres_max_2"])
@pytest.mark.parametrize("size", sizes(1, 20))
def test_a_map_is_resampled_as_the_engine_resamples_it(size: tuple[int, int], limit: str) -> None:
    kind = config(LlavaOnevisionConfig, vision_aspect_ratio=limit)
    family = LlavaOnevision(kind)
    medium, values = of_image(family, size)
    expected = packed_by_engine(SimpleNamespace(), kind, size, values)
    assert len(expected) == medium.rows
    whole, high = family.segments(medium)
    got = family.lay_out(medium, values)
    assert torch.equal(got[whole.rows], values[0])
    assert torch.equal(got[high.rows], expected[high.rows])
    newlines = torch.ones(medium.rows, dtype=torch.bool)
    newlines[whole.rows] = newlines[high.rows] = False
    assert bool((expected[newlines] == -1).all())
    assert not bool((expected[high.rows] == -1).any())


def test_frames_are_pooled_as_the_engine_pools_them() -> None:
    kind = config(LlavaOnevisionConfig)
    family = LlavaOnevision(kind)
    values = torch.randn(3, SIDE**2, 5, generator=torch.Generator().manual_seed(0))
    stand_in: Any = SimpleNamespace(config=kind)
    pool: Any = LlavaOnevisionModel.apply_pooling
    expected = pool(stand_in, values).flatten(0, 1)
    medium = Medium("video", len(expected) + 1, 3, (PIXELS, PIXELS))
    (segment,) = family.segments(medium)
    assert segment.grid == (3, 2, 2)
    assert torch.equal(family.lay_out(medium, values)[segment.rows], expected)


@pytest.mark.parametrize("grid", [(1, 4, 6), (2, 8, 8), (3, 10, 14), (1, 16, 2)])
def test_windows_stand_as_the_engine_has_them(grid: tuple[int, int, int]) -> None:
    window, patch, merged = 56, 7, 2
    engine: Any = modeling_qwen2_5_vl
    index, _ = engine.get_vision_window_index(
        torch.tensor([grid]),
        spatial_merge_size=merged,
        window_size=window,
        patch_size=patch,
        kwargs={},
    )
    tokens = (grid[0], grid[1] // merged, grid[2] // merged)
    assert torch.equal(order_of_windows(tokens, window // merged // patch), index)
    vision = {"window_size": window, "patch_size": patch, "spatial_merge_size": merged}
    family = Qwen25VL(
        SimpleNamespace(model_type="qwen2_5_vl", vision_config=SimpleNamespace(**vision))
    )
    raster = torch.arange(math.prod(tokens)).float()
    laid = family.lay_out(Medium("video", len(raster), grid=grid), raster[index][None, :, None])
    assert torch.equal(laid[:, 0], raster)


def test_rows_that_do_not_fit_the_config_are_refused() -> None:
    family = LlavaNext(config(LlavaNextConfig))
    medium, _ = of_image(family, (50, 90))
    wrong = Medium("image", medium.rows + 1, medium.pictures, size=medium.size)
    with pytest.raises(UnsupportedModelError, match="does not know how they lie"):
        family.segments(wrong)
    with pytest.raises(UnsupportedModelError, match="image_sizes"):
        family.segments(Medium("image", medium.rows, medium.pictures))


def test_the_mean_of_blocks() -> None:
    scores = torch.arange(24.0).view(1, 24)  # 4 x 6 patches, 2 x 3 tokens
    expected = torch.tensor([[3.5, 5.5, 7.5, 15.5, 17.5, 19.5]])
    assert torch.equal(mean_of_blocks(scores, (4, 6), 2), expected)
