"""Keys that count several times, or not at all: what is added to their logits rides in q and k.

log n is added to the logits of a key that counts n times. It goes in as two more numbers of each
query and key, so that any fused attention computes it, under any mask: no matrix of all pairs is
made, and a cache holds what it always does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

HIDDEN = -1e4
"""What stands for log 0: far below all logits, and a number that float16 holds."""

_QUERY = 8.0
"""What stands in the queries beside log n in the keys: a power of two, so exact in any dtype."""

_WIDER = 8
"""Numbers added to each head, of which two are used: fused kernels want multiples of eight."""

_LEAST = -3e4
"""The smallest number that goes into a key: float16 ends at -65504."""


def log_counts(counts: Tensor) -> Tensor:
    """Return float32 log n of whole numbers n, and `HIDDEN` for 0."""
    return counts.float().log().clamp_(min=HIDDEN)


def weighted(
    query: Tensor, key: Tensor, value: Tensor, logs: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v under which the logits of each key have its number added.

    Parameters
    ----------
    query
        [..., Q, d].
    key, value
        [..., K, d].
    logs
        float32, what is added to the logits of each key: of a shape that broadcasts to [..., K].
    scale
        Factor on q kᵀ; it stays the same.

    Returns
    -------
    tuple
        q, k and v, wider than they were: of what attention returns, the first numbers of each token
        count, as many as `value` has.
    """
    # q gets c and k gets log n / (c * scale), so that scale * q kᵀ grows by log n.
    wanted = (logs / (scale * _QUERY)).clamp(min=_LEAST)
    # In bfloat16 one number holds log n to a hundredth; what it misses goes into a second.
    first = wanted.to(key.dtype)
    extra = key.new_zeros(*wanted.shape, _WIDER)
    extra[..., 0], extra[..., 1] = first, (wanted - first.float()).to(key.dtype)
    asks = query.new_zeros(_WIDER)
    asks[:2] = _QUERY
    return (
        torch.cat([query, asks.expand(*query.shape[:-1], -1)], dim=-1),
        torch.cat([key, extra.expand(*key.shape[:-1], -1)], dim=-1),
        # Fused kernels want values as wide as keys.
        F.pad(value, (0, key.shape[-1] + _WIDER - value.shape[-1])),
    )
