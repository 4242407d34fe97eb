"""What vLLM's processor made of one image or video, as far as its rows' layout follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenprune.families.any import AnyFamily, has_mrope
from tokenprune.families.base import Family
from tokenprune.families.molmo import Molmo2
from tokenprune.families.registry import FAMILIES, family_of_config
from tokenprune.tower.layouts import Grid, Medium, grids_by_position
from tokenprune_vllm.architectures import is_of_family
from tokenprune_vllm.settings import RequestError

Fields = Mapping[str, Any]
"""What vLLM's processor made of one image or video, by name: pixel_values, image_grid_thw, ..."""


SOUND = ("audio",)
"""vLLM's modalities that are left as they are. All others are pruned, whatever a plugin calls them:
Kimi-K2.5 calls images and parts of videos chunks."""

_GRIDS = {"grid_thws": 3, "image_grid_hws": 2, "grids": 3, "video_grids": 3}
"""What Kimi-K2.5 calls frames, rows and columns of patches; Kimi-VL, which has no frames; Ovis 2.5,
of an image and of a video. Each is so many numbers: Ovis2 calls rows and columns of tiles grids."""

_SHAPES = {
    "image": ("spatial_shapes", "tgt_sizes"),
    "video": ("video_tgt_sizes",),
}
"""What LFM2-VL and MiniCPM-V call the rows and columns of patches of each picture."""

_POSITIONS = {"image": "pixel_position_ids", "video": "pixel_position_ids_videos"}
"""Where Gemma 4's processor says which patch stands where."""


def family_of(config: Any, causal: bool = False) -> Family:
    """Return the family of a model's config, as vLLM loads it, or that of any model.

    Parameters
    ----------
    config
        The model's.
    causal
        Of a model of no family: see `AnyFamily`.
    """
    # A type of a known family may run by another class, whose modules have other places.
    if config.model_type in FAMILIES and is_of_family(config.architectures or []):
        return family_of_config(config)
    return AnyFamily(config, has_mrope(config), causal)


def medium_of(family: Family, modality: str, rows: int, fields: Fields) -> Medium:
    """Return one image or video.

    Parameters
    ----------
    family
        The model's.
    modality
        ``"image"`` or ``"video"``.
    rows
        How many rows the encoder will return for it.
    fields
        What vLLM's processor made of it.

    Raises
    ------
    RequestError
        If it is a video in no grid.
    """
    if "video_is_codec" in fields and bool(fields["video_is_codec"]):
        raise RequestError(
            "this video was packed by its codec: its tokens are parts of frames, in no grid, and "
            "tokenprune does not know how they lie. Leave video_backend out, so that the model is "
            "given frames."
        )
    grid = _grid_of(modality, fields)
    if grid is not None:
        return Medium(modality, rows, grid=grid)
    if not family.known:
        return Medium(modality, rows)
    if isinstance(family, Molmo2):
        names = "tokens", "token_pooling", "num_crops"
        ids, pooling, crops = (fields[f"{modality}_{name}"] for name in names)
        return family.medium_of_ids(modality, ids, pooling, int(crops))
    shapes = next((fields[name] for name in _SHAPES.get(modality, ()) if name in fields), None)
    if shapes is not None:
        return Medium(modality, rows, len(shapes), shapes=tuple(map(tuple, shapes.tolist())))
    positions = fields.get(_POSITIONS.get(modality, ""))
    if positions is not None:
        pictures = positions if positions.ndim == 3 else positions[None]
        (grid,) = grids_by_position(pictures, [len(pictures)])
        return Medium(modality, rows, grid=grid)
    pixels = next(
        (
            value
            for name, value in fields.items()
            if name.startswith("pixel_values") and isinstance(value, Tensor) and value.ndim >= 3
        ),
        None,
    )
    pictures = fields.get(f"{modality}_num_patches")  # InternVL counts tiles
    if pictures is None:
        pictures = len(pixels) if pixels is not None and pixels.ndim > 3 else 1
    size = fields.get("image_sizes")
    return Medium(
        modality,
        rows,
        int(pictures),
        None if pixels is None else (pixels.shape[-2], pixels.shape[-1]),
        None if size is None else (_numbers(size)[0], _numbers(size)[1]),
    )


def _grid_of(modality: str, fields: Fields) -> Grid | None:
    """Return frames, rows and columns of patches, where they are said."""
    for name, numbers in {f"{modality}_grid_thw": 3, **_GRIDS}.items():
        grid = fields.get(name)
        if isinstance(grid, Tensor) and grid.ndim == 2 and bool((grid == grid[0]).all()):
            # LLaVA-OneVision 2 says the grid of each frame of a video.
            grid = torch.cat([grid[:, :-2].sum(dim=0), grid[0, -2:]])
        if isinstance(grid, Tensor) and grid.numel() == numbers:
            *frames, height, width = _numbers(grid.flatten())
            return frames[0] if frames else 1, height, width
    return None


def _numbers(value: Any) -> list[int]:
    return [int(number) for number in torch.as_tensor(value).tolist()]
