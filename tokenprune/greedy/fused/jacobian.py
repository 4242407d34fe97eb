"""A projector's Jacobian norm: what stands between its matrix products, as Triton kernels.

They compute what `tokenprune.tower.projectors` says in torch's operations, in as many numbers, and
spare a GPU a launch for each operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenprune.greedy.fused import kernels

_DEPTH = 1024  # columns that a program looks at together


@triton.jit
def _normalise(
    parts, gain, scaled, inverse, shrinkage, width,
    EPSILON: tl.constexpr, CENTRED: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Normalise a part of a token; one program for a part."""
    part = tl.program_id(0).to(tl.int64)
    parts += part * width
    place = tl.arange(0, DEPTH)
    total = tl.zeros((DEPTH,), parts.dtype.element_ty)
    if CENTRED:
        for start in range(0, width, DEPTH):
            total += tl.load(parts + start + place, start + place < width, 0.0)
    mean = tl.sum(total, axis=0) / width
    square = tl.zeros((DEPTH,), parts.dtype.element_ty)
    for start in range(0, width, DEPTH):
        inside = start + place < width
        value = tl.where(inside, tl.load(parts + start + place, inside, 0.0) - mean, 0.0)
        square += value * value
    variance = tl.sum(square, axis=0) / width
    squared_scale = variance + EPSILON
    scale = tl.sqrt(squared_scale)
    for start in range(0, width, DEPTH):
        inside = start + place < width
        value = (tl.load(parts + start + place, inside, 0.0) - mean) / scale
        value *= tl.load(gain + start + place, inside, 0.0)
        tl.store(scaled + part * width + start + place, value, inside)
    tl.store(inverse + part, 1.0 / squared_scale)
    tl.store(shrinkage + part, (2.0 - variance / squared_scale) / width)


def normalise(
    parts: Tensor, gain: Tensor, epsilon: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise the parts of tokens, and say what their squared norms are to be corrected by.

    Parameters
    ----------
    parts
        float32 or float64 [n, G, c].
    gain
        [c], of that dtype.
    epsilon, centred
        Of the norm; layer norm is centred, RMS norm is not.

    Returns
    -------
    tuple of Tensor
        [n, G, c], the normalised parts h times the gain; [n, G], ``1 / s^2``; and [n, G],
        ``(2 - ||h||^2 / c) / c``.
    """
    parts = parts.contiguous()
    scaled, inverse = torch.empty_like(parts), parts.new_empty(parts.shape[:-1])
    shrinkage = torch.empty_like(inverse)
    kernels.launch(
        _normalise, (inverse.numel(),), parts, gain, scaled, inverse, shrinkage, parts.shape[-1],
        EPSILON=epsilon, CENTRED=centred, DEPTH=_depth(parts.shape[-1]),
    )  # fmt: skip
    return scaled, inverse, shrinkage


@triton.jit
def _take(
    total, product, vectors, outer, pushed, inverse, shrinkage, width, groups,
    NORM: tl.constexpr, FIRST: tl.constexpr, DIVISOR: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Add a part's share of a token's squared norm; one program for a token."""
    token = tl.program_id(0).to(tl.int64)
    row = token * width
    place = tl.arange(0, DEPTH)
    sums = tl.zeros((DEPTH,), product.dtype.element_ty)
    off = tl.zeros((DEPTH,), product.dtype.element_ty)
    for start in range(0, width, DEPTH):
        inside = start + place < width
        column = row + start + place
        vector = tl.load(vectors + column, inside, 0.0)
        sums += tl.load(product + column, inside, 0.0) * vector
        if NORM:
            vector *= tl.load(pushed + column, inside, 0.0)
            off += tl.load(outer + column, inside, 0.0) * vector
    share = tl.sum(sums, axis=0)
    if NORM:
        share -= tl.load(shrinkage + token * groups) * tl.sum(off, axis=0)
        share *= tl.load(inverse + token * groups)
    if not FIRST:
        share += tl.load(total + token)
    if DIVISOR is not None:
        share = tl.sqrt(tl.where(share < 0.0, 0.0, share)) / DIVISOR  # NaN stays
    tl.store(total + token, share)


def norm_without(product: Tensor, vectors: Tensor, divisor: float) -> Tensor:
    """Return [n], the root of each row's sum of ``product * vectors`` [n, H], over `divisor`."""
    total = product.new_empty(len(product))
    _launch_take(total, product, vectors, None, True, divisor)
    return total


def add_part(
    total: Tensor,
    product: Tensor,
    vectors: Tensor,
    of_norm: tuple[Tensor, Tensor, Tensor, Tensor],
    first: bool,
    divisor: float | None,
) -> None:
    """Add what a part of a norm contributes to ||J||_F^2; take the root behind the last one.

    Parameters
    ----------
    total
        [n], written to; what it holds before the first part is not read.
    product, vectors
        [n, H]: ``g' M`` and g.
    of_norm
        [n, H] ``(g o A h)' (W2' W2)``, [n, H] ``A h``, and [n] with any stride, the part's columns
        of `normalise`: ``1 / s^2`` and the correction.
    first
        Whether it is the first part.
    divisor
        With the last part, what the root is divided by; None before.
    """
    _launch_take(total, product, vectors, of_norm, first, divisor)


def _launch_take(
    total: Tensor,
    product: Tensor,
    vectors: Tensor,
    of_norm: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    first: bool,
    divisor: float | None,
) -> None:
    width = product.shape[1]
    # A kernel without a norm reads none of these.
    outer, pushed, inverse, shrinkage = of_norm or (product, product, total, total)
    kernels.launch(
        _take, (len(total),), total, product, vectors.contiguous(), outer, pushed, inverse,
        shrinkage, width, inverse.stride(0),
        NORM=of_norm is not None, FIRST=first, DIVISOR=divisor, DEPTH=_depth(width),
    )  # fmt: skip


@triton.jit
def _sum_row(values, row, width, DEPTH: tl.constexpr):
    place = tl.arange(0, DEPTH)
    total = tl.zeros((DEPTH,), tl.int64)
    values += row * width
    for start in range(0, width, DEPTH):
        inside = start + place < width
        total += tl.load(values + start + place, inside, 0).to(tl.int64)
    return tl.sum(total, axis=0)


@triton.jit
def _sums(
    a, b, c, d, e, digest, end_a, end_b, end_c, end_d,
    width_a, width_b, width_c, width_d, width_e, DEPTH: tl.constexpr,
):  # fmt: skip
    """Sum a row of one of up to five matrices that lie behind each other."""
    row = tl.program_id(0).to(tl.int64)
    if row < end_a:
        total = _sum_row(a, row, width_a, DEPTH)
    elif row < end_b:
        total = _sum_row(b, row - end_a, width_b, DEPTH)
    elif row < end_c:
        total = _sum_row(c, row - end_b, width_c, DEPTH)
    elif row < end_d:
        total = _sum_row(d, row - end_c, width_d, DEPTH)
    else:
        total = _sum_row(e, row - end_d, width_e, DEPTH)
    tl.store(digest + row, total)


_MATRICES = 5  # that `_sums` takes


def sums(matrices: Sequence[Tensor]) -> Tensor:
    """Return the sum of each row of up to five matrices of integers, int64 [rows of all]."""
    ends = list(accumulate(map(len, matrices)))
    digest = torch.empty(ends[-1], dtype=torch.int64, device=matrices[0].device)
    missing = _MATRICES - len(matrices)
    given = [*matrices, *[matrices[-1]] * missing]  # none of whose rows are left
    ends += [ends[-1]] * missing
    widths = [matrix.shape[1] for matrix in given]
    kernels.launch(_sums, (ends[-1],), *given, digest, *ends[:-1], *widths, DEPTH=_DEPTH)
    return digest


def _depth(width: int) -> int:
    depth: int = min(_DEPTH, triton.next_power_of_2(width))
    return depth
