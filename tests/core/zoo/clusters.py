"""Rows such as encoders give: clusters of low rank with a common offset, and of several lengths."""

from __future__ import annotations

import torch
from torch import Tensor


def drawn(*shape: int, seed: int) -> Tensor:
    """Return float64 numbers of a normal distribution, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clustered(total: int, seed: int, width: int = 24, clusters: int = 12, rank: int = 8) -> Tensor:
    """Return float64 [total, width]: rows of clusters of a rank, around a common offset.

    Their lengths are multiplied by 0.5 to 1.5.
    """
    basis = drawn(rank, width, seed=seed)
    centres = drawn(clusters, rank, seed=seed + 1)
    of_cluster = torch.randint(
        0, clusters, (total,), generator=torch.Generator().manual_seed(seed + 2)
    )
    rows = (centres[of_cluster] + 0.3 * drawn(total, rank, seed=seed + 3)) @ basis
    rows = rows + drawn(1, width, seed=seed + 4) + 0.05 * drawn(total, width, seed=seed + 5)
    lengths = torch.rand(total, 1, generator=torch.Generator().manual_seed(seed + 6)).double()
    return rows * (0.5 + lengths)
