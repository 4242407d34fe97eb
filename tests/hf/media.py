"""What encoders are given of images: an image is its number, whatever the batch.

And which of the rows that they return of it are structure: the same whatever its pixels.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

Media = Callable[[Any, list[list[int]]], dict[str, Any]]
"""(config, numbers of the images of each prompt) -> what the encoder is given."""


def noise(number: int, *shape: int) -> Tensor:
    """Return the pixels of an image, by its number."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7 + number))


def flat(prompts: list[list[int]]) -> list[int]:
    """Return the images of all prompts, in order."""
    return [number for prompt in prompts for number in prompt]


# What encoders are given ------------------------------------------------------------------------

GRIDS = [(4, 6), (8, 4)]
"""Rows and columns of patches of even and odd images."""
SIZES = [(16, 24), (32, 16)]
"""Height and width of even and odd images, where patches do not matter."""


def square(side: int = 32, *lead: int, name: str = "pixel_values") -> Media:
    """Return images of one size, [n, *lead, 3, side, side]."""

    def make(config: Any, prompts: list[list[int]]) -> dict[str, Any]:
        return {name: torch.stack([noise(n, *lead, 3, side, side) for n in flat(prompts)])}

    return make


def grids(*channels: int, name: str = "image_grid_thw", merged: bool = False) -> Media:
    """Return packed patches [P, *channels] of images of two sizes, and their grids.

    Without channels there are as many as the config's patches have pixels.
    """

    def make(config: Any, prompts: list[list[int]]) -> dict[str, Any]:
        vision = config.vision_config
        own = channels or (3 * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2,)
        sides = [GRIDS[n % 2] for n in flat(prompts)]
        if merged:
            sides = [(rows // 2, columns // 2) for rows, columns in sides]
        pixels = [noise(n, math.prod(s), *own) for n, s in zip(flat(prompts), sides, strict=True)]
        grid = torch.tensor([[1, *s] if name.endswith("thw") else s for s in sides])
        return {"pixel_values": torch.cat(pixels), name: grid}

    return make


def merge_sizes(config: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """Return packed patches, their grids, and how many patches on a side make each token."""
    sizes = torch.full((len(flat(prompts)),), 2)
    return grids()(config, prompts) | {"image_merge_sizes": sizes}


def patches(*each: int, flat_too: bool = False, name: str = "pixel_values") -> Media:
    """Return as many patches of each image, [n, 6, *each], or one after another, [6 n, *each]."""

    def make(config: Any, prompts: list[list[int]]) -> dict[str, Any]:
        join = torch.cat if flat_too else torch.stack
        return {name: join([noise(n, 6, *each) for n in flat(prompts)])}

    return make


def sized(config: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """Return images padded to one size, and their own sizes."""
    sizes = torch.tensor([SIZES[n % 2] for n in flat(prompts)])
    pixels = torch.stack([noise(n, 3, 32, 24) for n in flat(prompts)])
    return {"pixel_values": pixels, "image_sizes": sizes}


def crops(config: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """Return crops of images that are wider or higher than a square, and their sizes."""
    sizes = torch.tensor([[(60, 64), (30, 60)][n % 2] for n in flat(prompts)])
    pixels = torch.stack([noise(n, 5, 3, 32, 32) for n in flat(prompts)])
    return {"pixel_values": pixels, "image_sizes": sizes}


def per_prompt(config: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """Return pixels [B, most images of a prompt, 3, 32, 32], padded with black images."""
    most = max(map(len, prompts))
    pixels = torch.zeros(len(prompts), most, 3, 32, 32)
    for row, prompt in enumerate(prompts):
        for column, number in enumerate(prompt):
            pixels[row, column] = noise(number, 3, 32, 32)
    return {"pixel_values": pixels}


def per_prompt_masked(config: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """Return the same, and which of the images are no padding."""
    most = max(map(len, prompts))
    real = torch.tensor([[column < len(prompt) for column in range(most)] for prompt in prompts])
    return per_prompt(config, prompts) | {"pixel_attention_mask": real}


def shaped(config: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """Return patches padded to one number, their rows and columns, and where the padding is."""
    shapes = torch.tensor([GRIDS[n % 2] for n in flat(prompts)])
    mask = (torch.arange(32) < shapes.prod(-1)[:, None]).long()
    pixels = torch.stack([noise(n, 32, 48) for n in flat(prompts)])
    return {"pixel_values": pixels, "spatial_shapes": shapes, "pixel_attention_mask": mask}


def placed(merged: int) -> Media:
    """Return patches padded to one number, and the column and row of each, -1 for padding."""

    def make(config: Any, prompts: list[list[int]]) -> dict[str, Any]:
        width = 32 // merged**2
        places = torch.full((len(flat(prompts)), width, 2), -1)
        for index, number in enumerate(flat(prompts)):
            rows, columns = (side // merged for side in GRIDS[number % 2])
            y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
            places[index, : rows * columns] = torch.stack([x.flatten(), y.flatten()], -1)
        pixels = [noise(n, width, 48 * merged**2).sigmoid() for n in flat(prompts)]
        return {"pixel_values": torch.stack(pixels), "image_position_ids": places}

    return make


def targets(config: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """Return all patches in a row, [1, 3, 4, 4 P], and rows and columns of each image."""
    sizes = [[(8, 12), (12, 4)][n % 2] for n in flat(prompts)]
    pixels = [
        noise(n, 1, 3, 4, 4 * math.prod(s)) for n, s in zip(flat(prompts), sizes, strict=True)
    ]
    return {"pixel_values": torch.cat(pixels, dim=-1), "target_sizes": torch.tensor(sizes)}


def local_crops(side: int, grid: bool = False, size: int = 64) -> Media:
    """Return whole images, and one or two smaller crops of each."""

    def make(config: Any, prompts: list[list[int]]) -> dict[str, Any]:
        numbers = flat(prompts)
        counts = [2 - n % 2 for n in numbers]
        local = [
            noise(10 * n + c, 3, side, side)
            for n, k in zip(numbers, counts, strict=True)
            for c in range(k)
        ]
        given = {
            "pixel_values": torch.stack([noise(n, 3, size, size) for n in numbers]),
            "pixel_values_local": torch.stack(local),
            "num_local_patches": counts,
        }
        return given | ({"patches_grid": [[k, 1] for k in counts]} if grid else {})

    return make


def pooled(config: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """Return two crops of 16 patches of each image, and which four patches make each token."""
    numbers = flat(prompts)
    sides = torch.tensor([[(2, 2, 2, 3), (2, 2, 4, 2)][n % 2] for n in numbers])
    counts = (sides[:, 0] * sides[:, 1] + sides[:, 2] * sides[:, 3]).tolist()
    pooling = [
        torch.arange(4 * count).view(count, 4) * 7 % 32 + 32 * index
        for index, count in enumerate(counts)
    ]
    return {
        "pixel_values": torch.cat([noise(n, 2, 16, 192) for n in numbers]),
        "image_token_pooling": torch.cat(pooling),
        "image_grids": sides,
        "image_num_crops": torch.full((len(numbers),), 2),
    }


def high_resolution(config: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """Return images of one size twice, small and large."""
    large = square(64, name="high_res_pixel_values")(config, prompts)
    return square(32)(config, prompts) | large


# Rows that are structure ------------------------------------------------------------------------


def line_ends(lines: int, length: int, start: int = 0) -> list[int]:
    """Return the last row of each of so many lines of so many rows, the first one at `start`."""
    return [start + length * line + length - 1 for line in range(lines)]


def of_crops(number: int) -> list[int]:
    """Return the newlines behind a square image and a map of 8 x 8 or 4 x 8."""
    return line_ends((8, 4)[number % 2], 9, 16)


def of_pooled_crops(number: int) -> list[int]:
    """Return the newlines behind a square image and a map of 4 x 4 or 2 x 4."""
    return line_ends((4, 2)[number % 2], 5, 4)


def of_local_crops(number: int) -> list[int]:
    """Return the newlines of two crops or one, and of the whole image, and the separator."""
    width = (9, 5)[number % 2]
    return [*line_ends(4, width), *line_ends(4, 5, 4 * width), 4 * width + 20]


def separator(number: int) -> list[int]:
    """Return the row behind two crops or one, and the whole image, of 144 rows each."""
    return [144 * (3, 2)[number % 2]]


def with_marks(number: int) -> list[int]:
    """Return the begin, the newlines and the end of a grid that is merged by two."""
    rows, columns = (side // 2 for side in GRIDS[number % 2])
    return [0, *line_ends(rows, columns + 1, 1), rows * (columns + 1) + 1]


def of_grid(number: int) -> list[int]:
    """Return the newlines of a grid that is merged by two."""
    rows, columns = (side // 2 for side in GRIDS[number % 2])
    return line_ends(rows, columns + 1)


def of_codes(number: int) -> list[int]:
    """Return the ends of the lines of codes, each of 2 x 2 pixels."""
    height, width = SIZES[number % 2]
    return line_ends(height // 2, width // 2 + 1)


FUYU_PATCHES = "pixel_values"
if "pixel_values" not in inspect.signature(transformers.FuyuForCausalLM.forward).parameters:
    FUYU_PATCHES = "image_patches"  # its name until transformers 5.23
