"""How much each token of a video changed since the frame before: what EVS and FastVID look at."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune.greedy.engine import folded_sum
from tokenprune.numerics import square_root

_ENTRIES = 2**24  # float64 entries of rows held at once: 128 MiB


def distances_in_time(by_frame: Tensor) -> Tensor:
    """Return 1 - the cosine of each token to the one at the same place a frame before.

    Sums add in a fixed order, in float64, so the result is the same in any batch.

    Parameters
    ----------
    by_frame
        Floating point [B, T, n, D], of at least two frames.

    Returns
    -------
    Tensor
        float64 [B, T - 1, n], of all frames but the first, from 0 to 2; exactly 0 of equal tokens,
        and 1 of a token of zeros.
    """
    step = max(1, _ENTRIES // by_frame[:, 0].numel() - 1)
    found = [
        _distances(by_frame[:, start : start + step + 1])
        for start in range(0, by_frame.shape[1] - 1, step)
    ]
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def _distances(by_frame: Tensor) -> Tensor:
    rows = by_frame.double()
    before, after = rows[:, :-1], rows[:, 1:]
    squares = folded_sum(rows.square(), dim=3)
    # The root of a square is exact, as a product of two roots is not: equal tokens have cosine 1.
    lengths = square_root(squares[:, :-1] * squares[:, 1:])
    cosine = folded_sum(before * after, dim=3) / lengths.masked_fill(lengths == 0, 1.0)
    return (1.0 - cosine).clamp_(min=0.0)
