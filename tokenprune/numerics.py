"""Arithmetic whose result does not depend on a row's position or on the rest of the batch.

The same item must be pruned the same way in any batch, and exactly equal tokens must tie exactly.
A library's reductions and matrix products guarantee neither: the order in which they add depends on
shape, alignment, position and device. The functions of this file add in a fixed order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import cast

import numpy as np
import torch
from torch import Tensor

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_HASH_ROWS = 4096  # rows hashed at once: bounds the int64 copy


def folded_sum(values: Tensor, dim: int) -> Tensor:
    """Sum over `dim` by folding it in halves.

    Only elementwise additions are done, in an order that `values.shape[dim]` alone decides, so
    equal slices have bit-equal sums wherever they stand, whatever stands beside them.

    Parameters
    ----------
    values
        Floating point, any shape.
    dim
        The dimension to sum over, of at least 1 element.

    Returns
    -------
    Tensor
        `values` without `dim`, of the same dtype.
    """
    while (length := values.shape[dim]) > 1:
        # What lies past the largest power of two is added to the front, then one half to the other:
        # as if zeros were behind it up to the next power of two, and as kernels can do, too.
        half = 1 << ((length - 1).bit_length() - 1)
        folded = values.narrow(dim, 0, length - half) + values.narrow(dim, half, length - half)
        if length < 2 * half:
            rest = values.narrow(dim, length - half, 2 * half - length)
            folded = torch.cat([folded, rest], dim)
        values = folded
    return values.squeeze(dim)


def square_root(values: Tensor) -> Tensor:
    """Return the square root, rounded correctly, so that it is the same on every device.

    torch's own is, on CUDA. On a CPU it may come from a library that is off by a last bit in one of
    two hundred cases; numpy takes the processor's instruction.

    Parameters
    ----------
    values
        Floating point, any shape, at least 0.
    """
    if values.device.type != "cpu":
        return values.sqrt()
    return torch.from_numpy(np.sqrt(values.numpy()))


def exponential(values: Tensor) -> Tensor:
    """Return e to the power of each number; equal numbers give equal ones wherever they stand.

    torch's own is so on CUDA. On a CPU it comes from a library that takes several numbers at once,
    and the last of them in another way; numpy takes all of them in one way.

    Parameters
    ----------
    values
        Floating point, any shape.
    """
    if values.device.type != "cpu":
        return values.exp()
    return torch.from_numpy(np.exp(values.numpy()))


def power(values: Tensor, exponent: float) -> Tensor:
    """Return each number to a power; equal ones alike wherever they stand, as `exponential`.

    Parameters
    ----------
    values
        Floating point, any shape, at least 0.
    exponent
        What power.
    """
    if values.device.type != "cpu":
        return values.pow(exponent)
    return torch.from_numpy(np.power(values.numpy(), exponent))


def blocks_of(rows: Tensor, size: int) -> list[Tensor]:
    """Return views of `rows` [N, ...], `size` rows each, the last one with what is left."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def first_equal_row(rows: Tensor) -> Tensor:
    """Return for each row the index of the first row that equals it exactly, itself at the latest.

    Rows are compared by a hash in integer arithmetic, which has no rounding, and then in full.

    Parameters
    ----------
    rows
        Floating point [N, C] without NaN.

    Returns
    -------
    Tensor
        LongTensor [N].
    """
    total, width = rows.shape
    # Integers wrap around and do not round, so a sum of them is the same in any order. As the
    # factors are random, rows that differ rarely have the same sum.
    # A generator of its own: the global one belongs to the caller.
    generator = torch.Generator(device="cpu").manual_seed(0)
    factors = torch.randint(
        -(2**62), 2**62, (width,), generator=generator, dtype=torch.int64, device="cpu"
    ).to(rows.device)
    hashes = torch.cat(
        [
            # Adding zero turns -0.0, which equals 0.0, into the same bits.
            (block.add(0.0).contiguous().view(_BITS[block.element_size()]) * factors).sum(-1)
            for block in blocks_of(rows, _HASH_ROWS)
        ]
    )
    # Equal rows have equal hashes, so the first row of a group is the first that can be equal.
    values, group = torch.unique(hashes, return_inverse=True)
    index = torch.arange(total, dtype=torch.int64, device=rows.device)
    if values.numel() == total:
        return index
    first = index.new_full((values.numel(),), total).scatter_reduce_(0, group, index, "amin")[group]
    # A row whose hash is that of another row by chance is its own first, as if it were alone.
    return torch.where((rows == rows[first]).all(-1), first, index)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Make float32 products really float32: without autocast, TF32 or bfloat16 shortcuts.

    What the caller had set is set again afterwards.

    Parameters
    ----------
    device
        Where the products are computed.
    """
    with ExitStack() as restore:
        # Autocast shortens the operands; the settings below shorten what the product makes of them.
        restore.enter_context(torch.autocast(device.type, enabled=False))
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
            for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):  # type: ignore[attr-defined]
                if (before := backend.fp32_precision) not in ("none", "ieee"):
                    restore.callback(setattr, backend, "fp32_precision", before)
                    backend.fp32_precision = "ieee"
        elif (precision := torch.get_float32_matmul_precision()) != "highest":  # torch below 2.9
            restore.callback(torch.set_float32_matmul_precision, precision)
            torch.set_float32_matmul_precision("highest")
        yield


# Reentrant, as a projector that is differentiated may be one that differentiates.
_FORWARD_MODE = threading.RLock()


def directional_derivative(
    function: Callable[[Tensor], Tensor], points: Tensor, along: Tensor
) -> Tensor:
    """Return the exact derivative of a function along directions, by forward-mode differentiation.

    It needs no graph, so it works in inference mode too. torch counts its levels once for a whole
    process, and threads that differentiate at once end each other's; so they take turns here.

    Parameters
    ----------
    function
        [..., C] -> [..., D].
    points, along
        [..., C].

    Returns
    -------
    Tensor
        [..., D].
    """
    with _FORWARD_MODE:
        return cast(Tensor, torch.func.jvp(function, (points,), (along,))[1])
