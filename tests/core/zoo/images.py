"""Images to compare methods on: clustered tokens, and what an encoder with a CLS token has of them.

Straight-line versions compute on `array`, in float64, and have no ties to break but those that a
test makes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenprune import Selection, VisualTokens

Array = NDArray[np.float64]

GRIDS = ((1, 7, 7), (1, 8, 9), (1, 9, 11), (1, 12, 12))
KEEPS = (1, 2, 5, 16, 30, 48)


@dataclass(frozen=True)
class Case:
    """An image and a number of tokens to keep."""

    seed: int
    keep: int

    @property
    def tokens(self) -> VisualTokens:
        """The image."""
        return image(GRIDS[self.seed % len(GRIDS)], self.seed)


CASES = [Case(seed, keep) for seed in range(20) for keep in KEEPS[seed % 2 :: 2]]
"""20 images, three numbers of tokens each."""

on_all_cases = pytest.mark.parametrize(
    "case", [pytest.param(case, id=f"image {case.seed}, keep {case.keep}") for case in CASES]
)


def image(grid: tuple[int, int, int], seed: int) -> VisualTokens:
    """Return an image whose tokens are of 12 clusters of rank 8, with a common offset."""
    generator = torch.Generator().manual_seed(seed)
    total, heads = grid[0] * grid[1] * grid[2], 3 + seed % 2

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    cluster = torch.randint(0, 12, (total,), generator=generator)

    def clustered(width: int) -> Tensor:
        rows = (drawn(12, 8)[cluster] + 0.3 * drawn(total, 8)) @ drawn(8, width) + drawn(width)
        lengths = 0.5 + torch.rand(total, 1, generator=generator)
        scaled: Tensor = lengths * rows / rows.norm(dim=-1, keepdim=True)
        return scaled

    def attention() -> Tensor:
        logits = drawn(heads, 12)[:, cluster] + drawn(heads, total)
        return torch.cat([drawn(heads, 1), logits], dim=1).softmax(-1)[:, 1:]

    return VisualTokens(
        grid,
        features=clustered(20),
        embeddings=clustered(28),
        cls_attention=attention(),
        received_attention=attention(),
        middle_attention=attention(),
        wide_attention=attention()[0],
        keys=torch.stack([clustered(6) for _ in range(heads)]),
    )


def array(tensor: object) -> Array:
    """Return a tensor in float64."""
    assert isinstance(tensor, Tensor)
    return np.asarray(tensor.double().numpy(), dtype=np.float64)


def cosines(rows: Array) -> Array:
    """Return the cosines of all pairs of rows."""
    unit = rows / np.sqrt((rows**2).sum(1, keepdims=True))
    return np.asarray(unit @ unit.T)


def by_score(scores: Sequence[float] | Array) -> list[int]:
    """Return all tokens, highest score first, and of equal ones the first."""
    return sorted(range(len(scores)), key=lambda token: (-float(scores[token]), token))


def twice(features: Tensor) -> Tensor:
    """Stand for a projector."""
    return 2.0 * features


def rows_of(
    tokens: VisualTokens, selection: Selection, projector: Callable[[Tensor], Tensor] = twice
) -> Array:
    """Return what the language model reads, with a projector that straight-line versions know."""
    assert tokens.features is not None
    return array(selection.rows(projector(tokens.features), tokens.features, projector))
