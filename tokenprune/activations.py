"""How far hidden states stand out in single dimensions: what tells massive activations.

Source: Visual Attention Sink (ICLR 2025), whose phi is the largest number after an RMS norm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def over_root_mean_square(states: Tensor) -> Tensor:
    """Return hidden states after an RMS norm without weight, ``x * rsqrt(mean(x²) + 1e-6)``.

    Parameters
    ----------
    states
        [n, D].

    Returns
    -------
    Tensor
        float32 [n, D], no number above ``sqrt(D)``.
    """
    values = states.float()
    return values * torch.rsqrt(values.square().mean(dim=-1, keepdim=True) + 1e-6)


def largest_number(hidden: Tensor, dimensions: Sequence[int] | None = None) -> Tensor:
    """Return the largest absolute number in each hidden state after an RMS norm without weight.

    A sink's is far above the others'.

    Parameters
    ----------
    hidden
        [n, D].
    dimensions
        Which of the D are looked at; None for all. The norm is over all of them.

    Returns
    -------
    Tensor
        float32 [n], at most ``sqrt(D)``.
    """
    states = over_root_mean_square(hidden)
    looked_at = states if dimensions is None else states[:, list(dimensions)]
    return looked_at.abs().amax(dim=-1)
