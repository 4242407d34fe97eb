"""Rows of an encoder that are no part of a picture: newlines, separators, marks of an end.

They are the same whatever the pixels are, so an encoder that is run again on noise returns them
again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_ALIKE = 1e-2
"""Two rows are one if no number differs by more than this share of the largest: half precision."""


def same(rows: Tensor, others: Tensor) -> Tensor:
    """Return BoolTensor [...], where rows [..., D] are those of `others`, within half precision."""
    difference = (rows - others).float().abs().amax(dim=-1)
    return difference <= _ALIKE * others.float().abs().amax(dim=-1)


def of_noise(arguments: Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
    """Return an encoder's arguments with other pixels of the same shapes.

    Pixels are what has two dimensions or more and is no whole number, or one of a byte; all else
    (sizes, grids, masks) stays. So do pictures [B, n, 3, H, W] that are zero and only pad a
    prompt's to `n`: models tell them by that, and return no rows for them.
    """
    generator = torch.Generator().manual_seed(seed)
    return {name: _noise(value, generator) for name, value in arguments.items()}


def _noise(value: Any, generator: torch.Generator) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_noise(one, generator) for one in value)
    if not isinstance(value, Tensor) or value.ndim < 2:
        return value
    if value.dtype == torch.uint8:
        return torch.randint(0, 256, value.shape, generator=generator).to(value)
    if not value.is_floating_point():
        return value
    noise = torch.randn(value.shape, generator=generator).to(value)
    if value.ndim == 5 and value.shape[2] == 3:
        noise = noise * (value != 0).flatten(2).any(dim=-1)[..., None, None, None]
    return noise
