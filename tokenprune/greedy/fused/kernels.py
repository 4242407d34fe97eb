"""The objectives as Triton kernels: a few launches for any budget, and no wait for the device.

Each kernel computes what `tokenprune.greedy.objectives` and `tokenprune.greedy.rows` say, bit for
bit: products of whole numbers are exact in any order, every other sum has the order of the torch
version, and no multiplication is fused with an addition (``enable_fp_fusion=False``).

Items may differ in size; a table says how many rows each one has of its own (`Layout`), and what
lies behind them changes nothing. Up to `ALL_PAIRS` tokens, all products of an item's rows are
computed at once, and one program makes all of its choices, so that nothing is told to the host in
between. Larger items take one launch for each token taken, and still no wait: each launch finds out
what the one before left as the best.

What comes out are indices inside an item, also where rows hold NaN, in which nothing is the
largest: what is wrong is told by whoever looks at the numbers, and must not be an address before.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenprune.greedy.objectives import BLOCK, NOTHING_LEFT
from tokenprune.greedy.rows import MEAN_BITS, bits_of
from tokenprune.transfer import to_device

LIMB = 7
"""Bits of each part into which a whole number is cut for products in int8."""

CHUNK = 1024
"""Tokens of an item that a program looks at together."""

_WARPS = 16  # of a program that makes all choices of an item: it has a multiprocessor for itself

FOLDED = 8192
"""Numbers that `folded_sum` can add up: a program holds all of them."""

STEP_CHUNK = 64
"""The same where a launch takes one token: fewer, so that there are programs for all of a GPU."""

_PRODUCTS = 2**25  # float64 entries of products that are held at once
_SIDE = 64  # of the tiles in which products are computed
_ROUNDED = tl.constexpr(6755399441055744.0)  # 1.5 * 2**52: added, it leaves no bits below 1
_NOTHING_LEFT = tl.constexpr(NOTHING_LEFT)
_COLUMNS = tl.constexpr(6)
_START, _TOTAL, _KEEP = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_PAIRS, _KEPT, _FACTOR = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)


@dataclass(frozen=True, eq=False)
class Layout:
    """Where each of some items lies.

    Attributes
    ----------
    totals, keeps
        N and K of each item.
    table
        int64 [B, 6]: where an item's rows start, N, K, and where its products [N, N], its kept
        tokens [K] and its rows of a Cholesky factor [K, N] start.
    """

    totals: tuple[int, ...]
    keeps: tuple[int, ...]
    table: Tensor

    @property
    def longest(self) -> int:
        """Return the most rows of an item."""
        return max(self.totals)

    def new_kept(self) -> Tensor:
        """Return LongTensor [B, max K] to write kept tokens to; 0 behind an item's own K."""
        make = torch.empty if len(set(self.keeps)) == 1 else torch.zeros
        shape = len(self.keeps), max(self.keeps)
        return make(shape, dtype=torch.int64, device=self.table.device)

    @classmethod
    def of(
        cls, longest: int, totals: Sequence[int], keeps: Sequence[int], device: torch.device
    ) -> Layout:
        """Lay out items of `longest` rows, `totals` of them their own, of which `keeps` stay."""
        rows, pairs, factor = [], 0, 0
        for item, (total, keep) in enumerate(zip(totals, keeps, strict=True)):
            rows.append((item * longest, total, keep, pairs, item * max(keeps), factor))
            pairs, factor = pairs + total * total, factor + keep * total
        table = torch.tensor(rows, dtype=torch.int64, device="cpu")
        return cls(tuple(totals), tuple(keeps), to_device(table, device))


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a kernel: all launches of this module go through here.

    Parameters
    ----------
    kernel, grid
        The kernel, and how many programs run it.
    *arguments, **constants
        Of the kernel. A float is handed over as float32. No multiplication is fused with an
        addition, unless ``enable_fp_fusion`` says so.
    """
    device = next(each.device for each in arguments if isinstance(each, Tensor))
    # Triton launches on the current device, which need not be the tensors'.
    there = device.type == "cuda" and torch.cuda.is_initialized()
    on_it = torch.cuda.device(device) if there else nullcontext()
    with on_it:
        kernel[grid](*arguments, **{"enable_fp_fusion": False, **constants})


@triton.jit
def _one(values):
    tl.store(values, 1.0)


def try_out(device: torch.device) -> None:
    """Run a kernel, to find out whether Triton can."""
    launch(_one, (1,), torch.empty(1, dtype=torch.float32, device=device))


# Rows as whole numbers ----------------------------------------------------------------------------


@triton.jit
def _round_rows(given, rows, scales, squares, inverse, width, factor, DEPTH: tl.constexpr):
    """Write what `IntegerRows` has of a row; one program for a row."""
    row = tl.program_id(0).to(tl.int64)
    most = tl.full((), 0.0, tl.float64)
    for start in range(0, width, DEPTH):
        column = start + tl.arange(0, DEPTH)
        value = tl.load(given + row * width + column, column < width, 0.0).to(tl.float64)
        most = tl.maximum(most, tl.max(tl.abs(value), axis=0))
    tl.store(scales + row, most / factor)  # by a power of two
    most = tl.where(most == 0.0, 1.0, most)
    square = tl.full((), 0.0, tl.float64)
    for start in range(0, width, DEPTH):
        column = start + tl.arange(0, DEPTH)
        value = tl.load(given + row * width + column, column < width, 0.0).to(tl.float64)
        # To the nearest whole number, halves to the even one.
        whole = (value / most * factor + _ROUNDED) - _ROUNDED
        # Whole numbers below 2**53: exact in any order.
        square += tl.sum(whole * whole, axis=0)
        tl.store(rows + row * width + column, whole.to(tl.int32), column < width)
    tl.store(squares + row, square)
    tl.store(inverse + row, tl.where(square == 0.0, 0.0, 1.0 / tl.sqrt(square)))


def whole_rows(embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the attributes of `IntegerRows`, in its order but for the last two.

    Parameters
    ----------
    embeddings
        Floating point [R, D].

    Returns
    -------
    tuple of Tensor
        int32 [R, D], the rows; float64 [R]: scales, squares, inverse norms.
    """
    total, width = embeddings.shape
    given = embeddings.contiguous()
    rows = torch.empty(given.shape, dtype=torch.int32, device=given.device)
    scales = torch.empty(total, dtype=torch.float64, device=given.device)
    squares, inverse = torch.empty_like(scales), torch.empty_like(scales)
    factor = 2.0 ** bits_of(width)
    depth = min(1024, triton.next_power_of_2(width))
    launch(_round_rows, (total,), given, rows, scales, squares, inverse, width, factor, DEPTH=depth)
    return rows, scales, squares, inverse


# Products -----------------------------------------------------------------------------------------


@triton.jit
def _low(value):
    """Return the lowest limb of int32, from -64 to 63."""
    return ((value + 64) & 127) - 64


@triton.jit
def _products(
    table, rows, products, width, begin, count,
    LIMBS: tl.constexpr, SIDE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Write a tile of the exact products of `count` rows of an item from `begin` on with all."""
    entry = table + tl.program_id(0).to(tl.int64) * _COLUMNS
    total = tl.load(entry + _TOTAL).to(tl.int32)
    end = tl.minimum(begin + count, total)
    upper = begin + tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    across = tl.program_id(2) * SIDE + tl.arange(0, SIDE)
    first = rows + tl.load(entry + _START) * width
    if (begin + tl.program_id(1) * SIDE < end) & (tl.program_id(2) * SIDE < total):
        # By the sum of the two limbs' places.
        sum0 = tl.zeros((SIDE, SIDE), tl.int32)
        sum1 = tl.zeros((SIDE, SIDE), tl.int32)
        sum2 = tl.zeros((SIDE, SIDE), tl.int32)
        sum3 = tl.zeros((SIDE, SIDE), tl.int32)
        sum4 = tl.zeros((SIDE, SIDE), tl.int32)
        sum5 = tl.zeros((SIDE, SIDE), tl.int32)
        sum6 = tl.zeros((SIDE, SIDE), tl.int32)
        for start in range(0, width, DEPTH):
            column = start + tl.arange(0, DEPTH)
            inside = column < width
            place = upper[:, None].to(tl.int64) * width + column[None, :]
            left = tl.load(first + place, (upper < end)[:, None] & inside[None, :], 0)
            place = across[None, :].to(tl.int64) * width + column[:, None]
            right = tl.load(first + place, (across < total)[None, :] & inside[:, None], 0)
            left0, right0 = _low(left), _low(right)
            left, right = (left - left0) >> 7, (right - right0) >> 7
            left1, right1 = _low(left), _low(right)
            left, right = (left - left1) >> 7, (right - right1) >> 7
            a0, a1 = left0.to(tl.int8), left1.to(tl.int8)
            b0, b1 = right0.to(tl.int8), right1.to(tl.int8)
            sum0 += tl.dot(a0, b0, out_dtype=tl.int32)
            sum1 += tl.dot(a0, b1, out_dtype=tl.int32) + tl.dot(a1, b0, out_dtype=tl.int32)
            sum2 += tl.dot(a1, b1, out_dtype=tl.int32)
            if LIMBS == 3:
                a2, b2 = left.to(tl.int8), right.to(tl.int8)
            else:
                left2, right2 = _low(left), _low(right)
                a2, b2 = left2.to(tl.int8), right2.to(tl.int8)
                a3 = ((left - left2) >> 7).to(tl.int8)
                b3 = ((right - right2) >> 7).to(tl.int8)
                sum3 += tl.dot(a0, b3, out_dtype=tl.int32) + tl.dot(a3, b0, out_dtype=tl.int32)
                sum4 += tl.dot(a1, b3, out_dtype=tl.int32) + tl.dot(a3, b1, out_dtype=tl.int32)
                sum5 += tl.dot(a2, b3, out_dtype=tl.int32) + tl.dot(a3, b2, out_dtype=tl.int32)
                sum6 += tl.dot(a3, b3, out_dtype=tl.int32)
            sum2 += tl.dot(a0, b2, out_dtype=tl.int32) + tl.dot(a2, b0, out_dtype=tl.int32)
            sum3 += tl.dot(a1, b2, out_dtype=tl.int32) + tl.dot(a2, b1, out_dtype=tl.int32)
            sum4 += tl.dot(a2, b2, out_dtype=tl.int32)
        # Whole numbers below 2**53 all the way, so nothing is rounded.
        whole = sum6.to(tl.float64) * 128.0 + sum5.to(tl.float64)
        whole = whole * 128.0 + sum4.to(tl.float64)
        whole = whole * 128.0 + sum3.to(tl.float64)
        whole = whole * 128.0 + sum2.to(tl.float64)
        whole = whole * 128.0 + sum1.to(tl.float64)
        whole = whole * 128.0 + sum0.to(tl.float64)
        place = (upper - begin)[:, None].to(tl.int64) * total + across[None, :]
        inside_tile = (upper < end)[:, None] & (across < total)[None, :]
        tl.store(products + tl.load(entry + _PAIRS) + place, whole, inside_tile)


def all_products(layout: Layout, rows: Tensor) -> Tensor:
    """Return the exact products of all rows of each item, float64 [sum of N * N].

    Parameters
    ----------
    layout, rows
        int32 [R, D], of `whole_rows`.
    """
    pairs = sum(total * total for total in layout.totals)
    products = torch.empty(pairs, dtype=torch.float64, device=rows.device)
    _launch_products(layout, rows, products, 0, layout.longest)
    return products


def _launch_products(
    layout: Layout, rows: Tensor, products: Tensor, begin: int, count: int
) -> None:
    width = rows.shape[1]
    # The highest limb is not cut, so it may be 64.
    limbs = 3 if bits_of(width) <= 3 * LIMB - 1 else 4
    grid = (len(layout.totals), triton.cdiv(count, _SIDE), triton.cdiv(layout.longest, _SIDE))
    launch(
        _products, grid, layout.table, rows, products, width, begin, count,
        LIMBS=limbs, SIDE=_SIDE, DEPTH=32, num_warps=8,
    )  # fmt: skip


@triton.jit
def _nearest(table, products, inverse, distances, begin, CHUNK: tl.constexpr):
    """Write the second smallest of a row's distances; the smallest is that to itself."""
    row = tl.program_id(0)
    entry = table + tl.program_id(1).to(tl.int64) * _COLUMNS
    total = tl.load(entry + _TOTAL).to(tl.int32)
    inverse += tl.load(entry + _START)
    if begin + row < total:
        own = tl.load(inverse + begin + row)
        line = products + tl.load(entry + _PAIRS) + row.to(tl.int64) * total
        first = tl.full((), float("inf"), tl.float32)
        second = tl.full((), float("inf"), tl.float32)
        for start in range(0, total, CHUNK):
            place = start + tl.arange(0, CHUNK)
            inside = place < total
            norms = own * tl.load(inverse + place, inside, 0.0)
            cosine = (tl.load(line + place, inside, 0.0) * norms).to(tl.float32)
            known = inside & (cosine == cosine)  # no NaN
            distance = tl.where(known, tl.maximum(1.0 - cosine, 0.0), float("inf"))
            least = tl.min(distance, axis=0)
            where = tl.argmin(distance, axis=0, tie_break_left=True)
            others = tl.where(tl.arange(0, CHUNK) == where, float("inf"), distance)
            second = tl.minimum(
                tl.maximum(first, least), tl.minimum(second, tl.min(others, axis=0))
            )
            first = tl.minimum(first, least)
        nearest = tl.where(total == 1, first, second)
        tl.store(distances + tl.load(entry + _START) + begin + row, nearest)


def nearest_distances(layout: Layout, products: Tensor, inverse: Tensor, chunk: int) -> Tensor:
    """Return float32 [R], as `IntegerRows.nearest_distances`, with all products known."""
    distances = torch.empty(inverse.shape, dtype=torch.float32, device=inverse.device)
    grid = (layout.longest, len(layout.totals))
    launch(_nearest, grid, layout.table, products, inverse, distances, 0, CHUNK=chunk)
    return distances


def nearest_distances_in_blocks(
    layout: Layout, rows: Tensor, inverse: Tensor, entries: int, chunk: int
) -> Tensor:
    """Return the same of items of one size, with `entries` products at a time."""
    total, size = layout.longest, len(layout.totals)
    step = max(_SIDE, entries // (total * size) // _SIDE * _SIDE)
    pairs = [(total * number, total, 0, step * total * number, 0, 0) for number in range(size)]
    table = to_device(torch.tensor(pairs, dtype=torch.int64, device="cpu"), rows.device)
    blocks = Layout(layout.totals, layout.keeps, table)
    products = torch.empty(size * step * total, dtype=torch.float64, device=rows.device)
    distances = torch.empty(inverse.shape, dtype=torch.float32, device=inverse.device)
    for begin in range(0, total, step):
        count = min(step, total - begin)
        _launch_products(blocks, rows, products, begin, count)
        grid = (count, size)
        launch(_nearest, grid, table, products, inverse, distances, begin, CHUNK=chunk)
    return distances


# Means and weights --------------------------------------------------------------------------------


@triton.jit
def _folded(values, SIZE: tl.constexpr):
    """Return the sum of float64 [SIZE], a power of two; the order is that of `folded_sum`."""
    # No early return: what stands behind it is compiled nevertheless, without an end.
    if SIZE == 1:
        result = tl.sum(values, axis=0)
    else:
        half: tl.constexpr = SIZE // 2
        result = _folded(tl.sum(tl.reshape(values, (2, half)), axis=0), half)
    return result


@triton.jit
def _fold(values, sums, length, inner, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """Sum over the middle axis of values [outer, length, inner]."""
    outer = tl.program_id(0).to(tl.int64)
    across = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    place = tl.arange(0, SIZE)
    inside = (place < length)[:, None] & (across < inner)[None, :]
    from_place = (outer * length + place)[:, None] * inner + across[None, :]
    found = _folded_columns(tl.load(values + from_place, inside, 0.0), SIZE, WIDE)
    tl.store(sums + outer * inner + across, found, across < inner)


@triton.jit
def _folded_columns(values, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """Return the sum of each column of values [SIZE, WIDE], in the order of `folded_sum`."""
    if SIZE == 1:
        result = tl.sum(values, axis=0)
    else:
        half: tl.constexpr = SIZE // 2
        halves = tl.sum(tl.reshape(values, (2, half, WIDE)), axis=0)
        result = _folded_columns(halves, half, WIDE)
    return result


def folded_sum(values: Tensor, dim: int) -> Tensor:
    """Do as `tokenprune.numerics.folded_sum`, over at most `FOLDED` numbers."""
    dim = dim % values.ndim
    length, before, behind = values.shape[dim], values.shape[:dim], values.shape[dim + 1 :]
    sums = values.new_empty((*before, *behind))
    size, inner = triton.next_power_of_2(length), math.prod(behind)
    wide = max(1, min(64, FOLDED // size, triton.next_power_of_2(inner)))
    grid = (math.prod(before), triton.cdiv(inner, wide))
    launch(_fold, grid, values.contiguous(), sums, length, inner, SIZE=size, WIDE=wide)
    return sums


@triton.jit
def _mean_rows(
    table, rows, scales, mean, width, power, WIDE: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Write a part of an item's mean row; as `IntegerRows.mean`."""
    item = tl.program_id(0).to(tl.int64)
    entry = table + item * _COLUMNS
    total = tl.load(entry + _TOTAL).to(tl.int32)
    rows += tl.load(entry + _START) * width
    scales += tl.load(entry + _START)
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    inside = column < width
    largest = tl.full((), 0.0, tl.float64)
    for start in range(0, total, CHUNK):
        place = start + tl.arange(0, CHUNK)
        largest = tl.maximum(largest, tl.max(tl.load(scales + place, place < total, 0.0), axis=0))
    # The largest power of two up to it: without the bits behind the point.
    whole_bits = largest.to(tl.int64, bitcast=True) & -4503599627370496
    unit = whole_bits.to(tl.float64, bitcast=True)
    unit = tl.where(unit == 0.0, 1.0, unit) * power
    found = tl.zeros((WIDE,), tl.float64)
    for start in range(0, total, CHUNK):
        place = start + tl.arange(0, CHUNK)
        known = (place < total)[:, None] & inside[None, :]
        value = tl.load(rows + place[:, None].to(tl.int64) * width + column[None, :], known, 0)
        scale = tl.load(scales + place, place < total, 0.0)
        scaled = value.to(tl.float64) * (scale / unit)[:, None]
        # Whole numbers below 2**53: exact in any order.
        found += tl.sum((scaled + _ROUNDED) - _ROUNDED, axis=0)
    tl.store(mean + item * width + column, found * unit / total.to(tl.float64), inside)


def mean_rows(layout: Layout, rows: Tensor, scales: Tensor) -> Tensor:
    """Return float64 [B, D], as `IntegerRows.mean`.

    Parameters
    ----------
    layout, rows, scales
        int32 [R, D] and float64 [R], of `whole_rows`.
    """
    width = rows.shape[1]
    mean = torch.empty(len(layout.totals), width, dtype=torch.float64, device=rows.device)
    grid = (len(layout.totals), triton.cdiv(width, 64))
    power = 2.0 ** (bits_of(width) - MEAN_BITS)
    launch(_mean_rows, grid, layout.table, rows, scales, mean, width, power, WIDE=64, CHUNK=64)
    return mean


@triton.jit
def _dot(one, other, width, DEPTH: tl.constexpr):
    """Return the exact product of two rows of int32, float64."""
    found = tl.full((), 0.0, tl.float64)
    for start in range(0, width, DEPTH):
        column = start + tl.arange(0, DEPTH)
        value = tl.load(one + column, column < width, 0).to(tl.float64)
        # Whole numbers below 2**53: exact in any order.
        found += tl.sum(value * tl.load(other + column, column < width, 0).to(tl.float64), axis=0)
    return found


@triton.jit
def _deviations(
    table, rows, scales, squares, centre, centre_scale, centre_square, found, width,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """Write 1 and how far a token is from the mean one; as `IntegerRows.deviations`."""
    item = tl.program_id(1).to(tl.int64)
    entry = table + item * _COLUMNS
    if tl.program_id(0) < tl.load(entry + _TOTAL):
        row = tl.load(entry + _START) + tl.program_id(0)
        dot = _dot(rows + row * width, centre + item * width, width, DEPTH)
        scale, of_mean = tl.load(scales + row), tl.load(centre_scale + item)
        product = dot * (scale * of_mean)
        squared = tl.load(squares + row) * (scale * scale)
        square = tl.load(centre_square + item) * (of_mean * of_mean)
        distance = tl.sqrt(tl.maximum(squared - 2.0 * product + square, 0.0))
        length = tl.sqrt(squared)
        tl.store(found + row, 1.0 + tl.where(length == 0.0, 0.0, distance * (1.0 / length)))


def deviations(layout: Layout, rows: Tensor, scales: Tensor, squares: Tensor) -> Tensor:
    """Return float64 [R], 1 plus `IntegerRows.deviations`.

    Parameters
    ----------
    layout, rows, scales, squares
        int32 [R, D] and float64 [R], of `whole_rows`.
    """
    centre, centre_scale, centre_square, _ = whole_rows(mean_rows(layout, rows, scales))
    found, width = torch.empty_like(scales), rows.shape[1]
    launch(
        _deviations, (layout.longest, len(layout.totals)), layout.table, rows, scales, squares,
        centre, centre_scale, centre_square, found, width,
        DEPTH=min(1024, triton.next_power_of_2(width)),
    )  # fmt: skip
    return found


@triton.jit
def _changes(table, rows, inverse, found, width, per_frame, DEPTH: tl.constexpr):
    """Write how much a token changed since the frame before; 0 in the first frame."""
    entry = table + tl.program_id(1).to(tl.int64) * _COLUMNS
    if tl.program_id(0) < tl.load(entry + _TOTAL):
        row = tl.load(entry + _START) + tl.program_id(0)
        change = tl.full((), 0.0, tl.float64)
        if tl.program_id(0) >= per_frame:
            before = row - per_frame
            dot = _dot(rows + before * width, rows + row * width, width, DEPTH)
            cosine = dot * (tl.load(inverse + before) * tl.load(inverse + row))
            change = tl.maximum(1.0 - cosine, 0.0)
        tl.store(found + row, change)


def changes(layout: Layout, rows: Tensor, inverse: Tensor, per_frame: int) -> Tensor:
    """Return how much tokens changed since the frame before, float64 [R]; 0 in the first frame.

    Parameters
    ----------
    layout, rows, inverse
        int32 [R, D] and float64 [R], of `whole_rows`.
    per_frame
        Tokens of a frame.
    """
    found, width = torch.empty_like(inverse), rows.shape[1]
    launch(
        _changes, (layout.longest, len(layout.totals)), layout.table, rows, inverse, found, width,
        per_frame, DEPTH=min(1024, triton.next_power_of_2(width)),
    )  # fmt: skip
    return found


@triton.jit
def _over_mean(table, values, per_frame, SIZE: tl.constexpr):
    """Divide an item's changes by their mean, and let the first frame have 1."""
    entry = table + tl.program_id(0).to(tl.int64) * _COLUMNS
    values += tl.load(entry + _START)
    count = tl.load(entry + _TOTAL).to(tl.int32) - per_frame
    place = tl.arange(0, SIZE)
    # The first frame has no change, and the sum is over the others alone.
    change = tl.load(values + per_frame + place, place < count, 0.0)
    mean = _folded(change, SIZE) / count.to(tl.float64)
    shares = tl.where(mean == 0.0, 1.0, change / tl.where(mean == 0.0, 1.0, mean))
    tl.store(values + per_frame + place, shares, place < count)
    tl.store(values + place, tl.full((SIZE,), 1.0, tl.float64), place < per_frame)


def over_mean(layout: Layout, values: Tensor, per_frame: int) -> None:
    """Make of the `changes` of items of up to `ALL_PAIRS` rows those of `IntegerRows`, in place."""
    size = triton.next_power_of_2(layout.longest)
    grid = (len(layout.totals),)
    launch(_over_mean, grid, layout.table, values, per_frame, SIZE=size, num_warps=8)


@triton.jit(do_not_specialize=["noise"])
def _weigh(
    table, squares, scales, multiple, factors, variance, level, noise,
    NOISY: tl.constexpr, GIVEN: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Write the factors, variances and noise of an item; as `objectives.factors_of`.

    Where variances are given, `multiple` is what they are; as `objectives.factors_to`.
    """
    item = tl.program_id(0).to(tl.int64)
    entry = table + item * _COLUMNS
    start, total = tl.load(entry + _START), tl.load(entry + _TOTAL)
    place = tl.arange(0, SIZE)
    inside = place < total
    scale = tl.load(scales + start + place, inside, 0.0)
    squared = tl.load(squares + start + place, inside, 0.0) * (scale * scale)
    root = tl.sqrt(squared)
    given = tl.load(multiple + start + place, inside, 0.0)
    if GIVEN:
        factor = tl.where(root == 0.0, 0.0, 1.0 / root) * tl.sqrt(given)
        own = tl.where(squared == 0.0, 0.0, given)
    else:
        root = tl.sqrt(root)
        factor = tl.where(root == 0.0, 0.0, 1.0 / root) * tl.sqrt(given)
        own = squared * (factor * factor)
    tl.store(factors + start + place, factor, inside)
    tl.store(variance + start + place, own, inside)
    of_item = tl.full((), 0.0, tl.float64)
    if NOISY:
        share = noise.to(tl.float64, bitcast=True) / total.to(tl.float64)
        of_item = _folded(tl.where(inside, own, 0.0), SIZE) * share
        # All rows are zero: nothing is divided by 0.
        of_item = tl.where(of_item == 0.0, 1.0, of_item)
    tl.store(level + item, of_item)


def weigh(
    layout: Layout, squares: Tensor, scales: Tensor, multiple: Tensor, noise: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `objectives.factors_of` items of up to `ALL_PAIRS` rows: float64 [R], [R] and [B].

    Parameters
    ----------
    layout, squares, scales, multiple
        float64 [R].
    noise
        As a multiple of the mean variance. None: `multiple` has variances that are given, as for
        `objectives.factors_to`.
    """
    given = noise is None
    noise = noise or 0.0
    factors, variance = torch.empty_like(scales), torch.empty_like(scales)
    level = torch.empty(len(layout.totals), dtype=torch.float64, device=scales.device)
    # A float would be handed over as float32; so its bits are.
    [bits] = struct.unpack("q", struct.pack("d", noise))
    launch(
        _weigh, (len(layout.totals),), layout.table, squares, scales, multiple, factors, variance,
        level, bits, NOISY=noise > 0, GIVEN=given, SIZE=triton.next_power_of_2(layout.longest),
        num_warps=8,
    )  # fmt: skip
    return factors, variance, level


@triton.jit
def _better(best, pick, values, start):
    """Return the larger of `best` and all values, and its index; of equal ones the first."""
    values = tl.where(values == values, values, float("-inf"))  # no NaN
    most = tl.max(values, axis=0)
    index = start + tl.argmax(values, axis=0, tie_break_left=True).to(tl.int32)
    return tl.maximum(best, most), tl.where(most > best, index, pick)


@triton.jit
def _scaled(scores, weights, first, total, CHUNK: tl.constexpr):
    """Write an item's scores, scaled, and where the largest is; as `engine.scaled`."""
    item = tl.program_id(0).to(tl.int64)
    scores += item * total
    weights += item * total
    low = tl.full((), float("inf"), tl.float32)
    high = tl.full((), float("-inf"), tl.float32)
    for start in range(0, total, CHUNK):
        place = start + tl.arange(0, CHUNK)
        low = tl.minimum(low, tl.min(tl.load(scores + place, place < total, float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.load(scores + place, place < total, float("-inf")), 0))
    spread = high - low + 1e-8
    best = tl.full((), float("-inf"), tl.float32)
    pick = tl.full((), 0, tl.int32)
    for start in range(0, total, CHUNK):
        place = start + tl.arange(0, CHUNK)
        score = tl.load(scores + place, place < total, low)
        # The plain operator is not rounded correctly for float32.
        weight = tl.div_rn(score - low, tl.broadcast_to(spread, (CHUNK,)))
        weight = tl.where(low == high, 1.0, weight)
        tl.store(weights + place, weight, place < total)
        best, pick = _better(best, pick, tl.where(place < total, weight, float("-inf")), start)
    tl.store(first + item, tl.minimum(pick, total - 1).to(tl.int64))


def scaled(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Do as `engine.scaled`."""
    given = scores.contiguous()
    weights = torch.empty_like(given)
    first = torch.empty(len(given), dtype=torch.int64, device=given.device)
    launch(_scaled, (len(given),), given, weights, first, given.shape[1], CHUNK=CHUNK)
    return weights, first


# Equal rows ---------------------------------------------------------------------------------------


@triton.jit
def _hashes(given, hashes, width, DEPTH: tl.constexpr):
    """Write a sum of a row's bits times factors of the columns, which wraps around."""
    row = tl.program_id(0).to(tl.int64)
    found = tl.full((), 0, tl.int64)
    for start in range(0, width, DEPTH):
        column = start + tl.arange(0, DEPTH)
        value = tl.load(given + row * width + column, column < width, 0.0).to(tl.float64)
        # Adding zero turns -0.0, which equals 0.0, into the same bits.
        bits = (value + 0.0).to(tl.int64, bitcast=True)
        # Of a short number the upper bits alone are set, and products keep what is 0 below.
        bits = bits ^ (bits >> 32)
        # Well-mixed factors, as SplitMix64 makes them.
        factor = (column + 1).to(tl.int64) * -7046029254386353131
        factor = (factor ^ (factor >> 30)) * -4658895280553007687
        factor = (factor ^ (factor >> 27)) * -7723592293110705685
        found += tl.sum(bits * (factor ^ (factor >> 31)), axis=0)
    tl.store(hashes + row, found)


@triton.jit
def _first_equal(given, hashes, first, total, width, CHUNK: tl.constexpr, DEPTH: tl.constexpr):
    """Write the first row of an item that equals a row."""
    own = tl.program_id(0)
    start = tl.program_id(1).to(tl.int64) * total
    mine = tl.load(hashes + start + own)
    found = own
    for begin in range(0, own, CHUNK):
        place = begin + tl.arange(0, CHUNK)
        equal = tl.load(hashes + start + place, place < own, 0) == mine
        found = tl.minimum(found, tl.min(tl.where(equal & (place < own), place, own), axis=0))
    # A row whose hash is that of another row by chance is its own first, as if it were alone.
    apart = tl.full((), 0, tl.int32)
    for begin in range(0, width, DEPTH):
        column = begin + tl.arange(0, DEPTH)
        one = tl.load(given + (start + own) * width + column, column < width, 0.0)
        other = tl.load(given + (start + found) * width + column, column < width, 0.0)
        differ = one.to(tl.float64) != other.to(tl.float64)
        apart += tl.sum(differ.to(tl.int32), axis=0)
    tl.store(first + start + own, tl.where(apart > 0, own, found).to(tl.int64))


def first_equal_rows(rows: Tensor) -> Tensor:
    """Do as `engine.first_equal_rows`."""
    size, total, width = rows.shape
    given = rows.contiguous()
    hashes = torch.empty(size, total, dtype=torch.int64, device=rows.device)
    first = torch.empty_like(hashes)
    depth = min(1024, triton.next_power_of_2(width))
    launch(_hashes, (size * total,), given, hashes, width, DEPTH=depth)
    grid = (total, size)
    launch(_first_equal, grid, given, hashes, first, total, width, CHUNK=CHUNK, DEPTH=depth)
    return first


@triton.jit
def _standing(table, products, inverse, kept, standing, longest, CHUNK: tl.constexpr):
    """Write which kept token a token is most similar to; a kept one is so to itself."""
    own = tl.program_id(0)
    item = tl.program_id(1).to(tl.int64)
    entry = table + item * _COLUMNS
    total = tl.load(entry + _TOTAL).to(tl.int32)
    keep = tl.load(entry + _KEEP).to(tl.int32)
    kept += tl.load(entry + _KEPT)
    inverse += tl.load(entry + _START)
    line = products + tl.load(entry + _PAIRS) + own.to(tl.int64) * total
    mine = tl.load(inverse + own)
    best = tl.full((), float("-inf"), tl.float32)
    pick = tl.full((), 0, tl.int32)
    itself = tl.full((), -1, tl.int32)
    for start in range(0, keep, CHUNK):
        place = start + tl.arange(0, CHUNK)
        inside = place < keep
        there = tl.load(kept + place, inside, 0)
        norms = mine * tl.load(inverse + there, inside, 0.0)
        cosine = (tl.load(line + there, inside, 0.0) * norms).to(tl.float32)
        best, pick = _better(best, pick, tl.where(inside, cosine, float("-inf")), start)
        itself = tl.maximum(itself, tl.max(tl.where(inside & (there == own), place, -1), axis=0))
    found = tl.where(itself >= 0, itself, pick)
    tl.store(standing + item * longest + own, found.to(tl.int64))


def representatives(embeddings: Tensor, kept: Tensor) -> Tensor:
    """Do as `tokenprune.representation.representatives`, for up to `ALL_PAIRS` tokens."""
    size, total, _ = embeddings.shape
    standing = torch.empty(size, total, dtype=torch.int64, device=embeddings.device)
    kept = kept.contiguous()
    at_once = max(1, _PRODUCTS // total**2)
    for start in range(0, size, at_once):
        some = slice(start, min(start + at_once, size))
        count = some.stop - some.start
        layout = Layout.of(total, [total] * count, [kept.shape[1]] * count, embeddings.device)
        rows, _, _, inverse = whole_rows(embeddings[some].flatten(0, 1))
        products = all_products(layout, rows)
        launch(
            _standing, (total, count), layout.table, products, inverse, kept[some],
            standing[some], total, CHUNK=CHUNK,
        )  # fmt: skip
    return standing


# Choices ------------------------------------------------------------------------------------------


@triton.jit
def _largest(values, total, CHUNK: tl.constexpr):
    """Return the largest of an item's values and the first index that has it."""
    best = tl.full((), float("-inf"), values.dtype.element_ty)
    pick = tl.full((), 0, tl.int32)
    for start in range(0, total, CHUNK):
        place = start + tl.arange(0, CHUNK)
        value = tl.load(values + place, place < total, float("-inf"))
        best, pick = _better(best, pick, value, start)
    return best, tl.minimum(pick, total - 1)


@triton.jit
def _write_ascending(values, mark, kept, total, keep, CHUNK: tl.constexpr):
    """Write the places of the `keep` values that equal `mark`; the last place for any missing."""
    count = tl.full((), 0, tl.int32)
    for start in range(0, total, CHUNK):
        place = start + tl.arange(0, CHUNK)
        inside = place < total
        taken = ((tl.load(values + place, inside, 0.0) == mark) & inside).to(tl.int32)
        index = count + tl.cumsum(taken, 0) - 1
        tl.store(kept + index, place.to(tl.int64), (taken > 0) & (index < keep))
        count += tl.sum(taken, axis=0)
    for start in range(0, keep, CHUNK):
        place = start + tl.arange(0, CHUNK)
        last = tl.zeros((CHUNK,), tl.int64) + (total - 1)
        tl.store(kept + place, last, (place >= count) & (place < keep))


@triton.jit
def _block_sum(
    factor, place, inside, pick, first, step, total,
    OFFSET: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the covariance that a block of tokens explains, as `folded_sum` adds it up.

    Of the rows `OFFSET`, `OFFSET` + `STRIDE`, ... of the block. Folding in halves adds every second
    row to the others at the end; this does the same from the end, and needs no rows in order.
    """
    if STRIDE == BLOCK:
        row = first + OFFSET
        line = factor + tl.cast(row, tl.int64) * total
        of_pick = tl.load(line + pick, row < step, 0.0)
        result = tl.load(line + place, inside & (row < step), 0.0) * of_pick
    else:
        even = _block_sum(
            factor, place, inside, pick, first, step, total, OFFSET, 2 * STRIDE, BLOCK
        )
        odd = _block_sum(
            factor, place, inside, pick, first, step, total, OFFSET + STRIDE, 2 * STRIDE, BLOCK
        )
        result = even + odd
    return result


@triton.jit
def _variance_left(
    dot, place, inside, pick, most, step, scales, weights, variance, noise, factor, total,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Return what `pick`, taken as number `step`, leaves of some tokens' variances; -inf if taken.

    `dot` has the products of those tokens' rows with that of `pick`, which had variance `most`.
    """
    scale = tl.load(scales + place, inside, 0.0) * tl.load(scales + pick)
    covariance = dot * scale * tl.load(weights + place, inside, 0.0) * tl.load(weights + pick)
    for first in range(0, step, BLOCK):
        covariance -= _block_sum(factor, place, inside, pick, first, step, total, 0, 1, BLOCK)
    spread = most + noise
    nothing = (noise == 0.0) & (spread <= _NOTHING_LEFT)
    column = covariance / tl.sqrt(tl.where(nothing, float("inf"), spread))
    tl.store(factor + tl.cast(step, tl.int64) * total + place, column, inside)
    left = tl.load(variance + place, inside, float("-inf"))
    less = tl.maximum(left - column * column, 0.0)
    left = tl.where((left == float("-inf")) | (place == pick), float("-inf"), less)
    tl.store(variance + place, left, inside)
    return left


@triton.jit
def _log_determinant(
    table, products, scales, weights, variance, level, factor, kept,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Take tokens of an item, always the one with most variance left."""
    item = tl.program_id(0).to(tl.int64)
    entry = table + item * _COLUMNS
    start, total = tl.load(entry + _START), tl.load(entry + _TOTAL).to(tl.int32)
    keep = tl.load(entry + _KEEP).to(tl.int32)
    products += tl.load(entry + _PAIRS)
    factor += tl.load(entry + _FACTOR)
    scales, weights, variance = scales + start, weights + start, variance + start
    noise = tl.load(level + item)
    most, pick = _largest(variance, total, CHUNK)
    for step in range(0, keep - 1):
        best = tl.full((), float("-inf"), tl.float64)
        following = tl.full((), 0, tl.int32)
        for begin in range(0, total, CHUNK):
            place = begin + tl.arange(0, CHUNK)
            inside = place < total
            dot = tl.load(products + pick.to(tl.int64) * total + place, inside, 0.0)
            left = _variance_left(
                dot, place, inside, pick, most, step, scales, weights, variance, noise, factor,
                total, BLOCK,
            )  # fmt: skip
            best, following = _better(best, following, left, begin)
        most, pick = best, tl.minimum(following, total - 1)
        tl.debug_barrier()  # what was written is read by all next
    tl.store(variance + pick, float("-inf"))
    tl.debug_barrier()
    _write_ascending(variance, float("-inf"), kept + tl.load(entry + _KEPT), total, keep, CHUNK)


def log_determinant(
    layout: Layout,
    products: Tensor,
    scales: Tensor,
    weighed: tuple[Tensor, Tensor, Tensor],
    chunk: int,
) -> Tensor:
    """Do as `objectives.most_variance`, with all products known.

    Parameters
    ----------
    layout, products, scales
        float64 [sum of N * N] and [R].
    weighed
        Of `weigh`; the variances are changed.
    chunk
        Tokens looked at together.

    Returns
    -------
    Tensor
        LongTensor [B, K], ascending; 0 behind an item's own K.
    """
    factors, variance, level = weighed
    entries = sum(n * k for n, k in zip(layout.totals, layout.keeps, strict=True))
    factor = torch.empty(entries, dtype=torch.float64, device=scales.device)
    kept = layout.new_kept()
    launch(
        _log_determinant, (len(layout.totals),), layout.table, products, scales, factors, variance,
        level, factor, kept, BLOCK=BLOCK, CHUNK=chunk, num_warps=_WARPS,
    )  # fmt: skip
    return kept


@triton.jit
def _weighted_distance(
    dot, place, inside, pick, fresh, inverse, weights, closest, WEIGHTED: tl.constexpr
):
    """Return weight times distance to what is taken, of some tokens; -inf if taken.

    `dot` has the products of those tokens' rows with that of `pick`, the last one that was taken;
    with `fresh` it is the first.
    """
    norms = tl.load(inverse + place, inside, 0.0) * tl.load(inverse + pick)
    cosine = (dot * norms).to(tl.float32)
    near = tl.load(closest + place, inside, 0.0)
    near = tl.where(fresh, cosine, tl.maximum(near, cosine))
    # A token taken is as close as can be, and stays it.
    near = tl.where(place == pick, float("inf"), near)
    tl.store(closest + place, near, inside)
    score = tl.maximum(1.0 - near, 0.0)
    if WEIGHTED:
        weight = tl.load(weights + place, inside, 0.0)
        score = tl.where(weight == 0.0, -1.0, score * weight)
    return tl.where((near == float("inf")) | (inside == 0), float("-inf"), score)


@triton.jit
def _max_min(
    table, products, inverse, weights, begin, closest, kept,
    WEIGHTED: tl.constexpr, GIVEN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Take tokens of an item, always the one of highest weight times distance."""
    item = tl.program_id(0).to(tl.int64)
    entry = table + item * _COLUMNS
    start, total = tl.load(entry + _START), tl.load(entry + _TOTAL).to(tl.int32)
    keep = tl.load(entry + _KEEP).to(tl.int32)
    products += tl.load(entry + _PAIRS)
    inverse, weights, closest = inverse + start, weights + start, closest + start
    if GIVEN:
        pick = tl.minimum(tl.load(begin + item).to(tl.int32), total - 1)
    else:
        _, pick = _largest(begin + start, total, CHUNK)
    for step in range(0, keep - 1):
        best = tl.full((), float("-inf"), tl.float32)
        following = tl.full((), 0, tl.int32)
        for first in range(0, total, CHUNK):
            place = first + tl.arange(0, CHUNK)
            inside = place < total
            dot = tl.load(products + pick.to(tl.int64) * total + place, inside, 0.0)
            score = _weighted_distance(
                dot, place, inside, pick, step == 0, inverse, weights, closest, WEIGHTED
            )
            best, following = _better(best, following, score, first)
        pick = tl.minimum(following, total - 1)
        tl.debug_barrier()  # what was written is read by all next
    if keep == 1:
        # Nothing was compared with the only one.
        tl.store(kept + tl.load(entry + _KEPT), pick.to(tl.int64))
    else:
        tl.store(closest + pick, float("inf"))
        tl.debug_barrier()
        _write_ascending(closest, float("inf"), kept + tl.load(entry + _KEPT), total, keep, CHUNK)


def max_min(
    layout: Layout,
    products: Tensor,
    inverse: Tensor,
    weights: Tensor | None,
    begin: Tensor,
    chunk: int,
) -> Tensor:
    """Do as `objectives.farthest`, with all products known.

    Parameters
    ----------
    layout, products, inverse
        float64 [sum of N * N] and [R].
    weights
        float32 [R], at least 0; or None.
    begin
        LongTensor [B], the token each item starts with; or float32 [R], of which each item's
        largest one says so.
    chunk
        Tokens looked at together.

    Returns
    -------
    Tensor
        LongTensor [B, K], ascending; 0 behind an item's own K.
    """
    closest = torch.empty(inverse.shape, dtype=torch.float32, device=inverse.device)
    kept = layout.new_kept()
    launch(
        _max_min, (len(layout.totals),), layout.table, products, inverse,
        closest if weights is None else weights, begin, closest, kept,
        WEIGHTED=weights is not None, GIVEN=not begin.dtype.is_floating_point, CHUNK=chunk,
        num_warps=_WARPS,
    )  # fmt: skip
    return kept


@triton.jit
def _suppress(
    table, products, inverse, scores, threshold, groups, state, kept, survivors,
    GROUPED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Take tokens of an item by score.

    `state` is 0 of a free token, 1 of a too similar one, 2 of one taken; at first there is none.
    """
    item = tl.program_id(0).to(tl.int64)
    entry = table + item * _COLUMNS
    start, total = tl.load(entry + _START), tl.load(entry + _TOTAL).to(tl.int32)
    keep = tl.load(entry + _KEEP).to(tl.int32)
    products += tl.load(entry + _PAIRS)
    kept += tl.load(entry + _KEPT)
    inverse, scores, state, groups = inverse + start, scores + start, state + start, groups + start
    most_alike = tl.load(threshold + item)
    count = tl.full((), 1, tl.int64)
    _, pick = _largest(scores, total, CHUNK)
    tl.store(kept, pick.to(tl.int64))
    for step in range(1, keep):
        best = tl.full((), float("-inf"), tl.float32)
        following = tl.full((), 0, tl.int32)
        best_alike = tl.full((), float("-inf"), tl.float32)
        following_alike = tl.full((), 0, tl.int32)
        for first in range(0, total, CHUNK):
            place = first + tl.arange(0, CHUNK)
            inside = place < total
            dot = tl.load(products + pick.to(tl.int64) * total + place, inside, 0.0)
            norms = tl.load(inverse + place, inside, 0.0) * tl.load(inverse + pick)
            alike = (dot * norms).to(tl.float32) > most_alike
            if GROUPED:
                alike = alike & (tl.load(groups + place, inside, 0) == tl.load(groups + pick))
            was = tl.load(state + place, inside & (step > 1), 0)
            now = tl.where(place == pick, 2, tl.maximum(was, alike.to(tl.int32)))
            tl.store(state + place, now, inside)
            score = tl.load(scores + place, inside, float("-inf"))
            free = tl.where(now == 0, score, float("-inf"))
            best, following = _better(best, following, free, first)
            rest = tl.where(now < 2, score, float("-inf"))
            best_alike, following_alike = _better(best_alike, following_alike, rest, first)
        some = best > float("-inf")
        count += some.to(tl.int64)
        pick = tl.minimum(tl.where(some, following, following_alike), total - 1)
        tl.store(kept + step, pick.to(tl.int64))
        tl.debug_barrier()  # what was written is read by all next
    tl.store(survivors + item, count)


def suppress(
    layout: Layout,
    products: Tensor,
    inverse: Tensor,
    scores: Tensor,
    threshold: Tensor,
    groups: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Do as `objectives.suppress`, with all products known.

    Parameters
    ----------
    layout, products, inverse
        float64 [sum of N * N] and [R].
    scores, threshold, groups
        float32 [R] and [B]; LongTensor [R] or None.
    chunk
        Tokens looked at together.

    Returns
    -------
    tuple of Tensor
        LongTensor [B, K] in the order taken, 0 behind an item's own K; and LongTensor [B].
    """
    state = torch.empty(scores.shape, dtype=torch.int32, device=scores.device)
    kept = layout.new_kept()
    survivors = torch.empty(len(layout.totals), dtype=torch.int64, device=scores.device)
    launch(
        _suppress, (len(layout.totals),), layout.table, products, inverse, scores, threshold,
        state if groups is None else groups, state, kept, survivors,
        GROUPED=groups is not None, CHUNK=chunk, num_warps=_WARPS,
    )  # fmt: skip
    return kept, survivors


@triton.jit(do_not_specialize=["sharpness"])
def _soft_suppress(table, products, inverse, left, kept, sharpness, CHUNK: tl.constexpr):
    """Take tokens of an item by score, which those like it lose of theirs; -inf if taken."""
    item = tl.program_id(0).to(tl.int64)
    entry = table + item * _COLUMNS
    start, total = tl.load(entry + _START), tl.load(entry + _TOTAL).to(tl.int32)
    keep = tl.load(entry + _KEEP).to(tl.int32)
    products += tl.load(entry + _PAIRS)
    inverse, left = inverse + start, left + start
    slope = -sharpness.to(tl.float64, bitcast=True)
    own, pick = _largest(left, total, CHUNK)
    for _ in range(0, keep - 1):
        best = tl.full((), float("-inf"), tl.float64)
        following = tl.full((), 0, tl.int32)
        for first in range(0, total, CHUNK):
            place = first + tl.arange(0, CHUNK)
            inside = place < total
            dot = tl.load(products + pick.to(tl.int64) * total + place, inside, 0.0)
            norms = tl.load(inverse + place, inside, 0.0) * tl.load(inverse + pick)
            apart = 1.0 - (dot * norms).to(tl.float32).to(tl.float64)
            share = tl.exp(slope * (apart * apart)).to(tl.float32).to(tl.float64)
            had = tl.load(left + place, inside, float("-inf"))
            now = tl.maximum(had - share * own, 0.0)
            now = tl.where((place == pick) | (had == float("-inf")), float("-inf"), now)
            tl.store(left + place, now, inside)
            best, following = _better(best, following, now, first)
        own, pick = best, tl.minimum(following, total - 1)
        tl.debug_barrier()  # what was written is read by all next
    tl.store(left + pick, float("-inf"))
    tl.debug_barrier()
    _write_ascending(left, float("-inf"), kept + tl.load(entry + _KEPT), total, keep, CHUNK)


def soft_suppress(
    layout: Layout,
    products: Tensor,
    inverse: Tensor,
    scores: Tensor,
    sharpness: float,
    chunk: int,
) -> Tensor:
    """Do as `objectives.soft_suppress`, with all products known.

    Parameters
    ----------
    layout, products, inverse
        float64 [sum of N * N] and [R].
    scores
        float32 [R], at least 0.
    sharpness
        See there.
    chunk
        Tokens looked at together.

    Returns
    -------
    Tensor
        LongTensor [B, K], ascending; 0 behind an item's own K.
    """
    kept = layout.new_kept()
    # A float would be handed over as float32; so its bits are.
    [bits] = struct.unpack("q", struct.pack("d", sharpness))
    launch(
        _soft_suppress, (len(layout.totals),), layout.table, products, inverse, scores.double(),
        kept, bits, CHUNK=chunk, num_warps=_WARPS,
    )  # fmt: skip
    return kept


@triton.jit
def _most_cover(
    similar, weights, bonus, covered, taken, kept, targets, total, keep,
    WEIGHTED: tl.constexpr, MORE: tl.constexpr, DEPTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Take tokens of an item, always the one that adds most to what is covered."""
    item = tl.program_id(0).to(tl.int64)
    similar += item * targets * total
    weights, taken, covered = weights + item * total, taken + item * total, covered + item * targets
    bonus += item * total
    for _ in range(0, keep):
        best = tl.full((), float("-inf"), tl.float64)
        pick = tl.full((), 0, tl.int32)
        for begin in range(0, total, CHUNK):
            place = begin + tl.arange(0, CHUNK)
            inside = place < total
            gain = tl.zeros((CHUNK,), tl.float64)
            for first in range(0, targets, DEPTH):
                target = first + tl.arange(0, DEPTH)
                known = target < targets
                line = target[:, None].to(tl.int64) * total + place[None, :]
                values = tl.load(similar + line, known[:, None] & inside[None, :], 0.0)
                have = tl.load(covered + target, known, 0.0)
                # Whole numbers below 2**53: exact in any order.
                gain += tl.sum(tl.maximum(values - have[:, None], 0.0), axis=0)
            if WEIGHTED:
                weight = tl.load(weights + place, inside, 0.0)
                gain = gain * weight
            if MORE:
                gain = gain + tl.load(bonus + place, inside, 0.0)
            if WEIGHTED:
                gain = tl.where(weight < 0.0, -1.0, gain)
            gone = tl.load(taken + place, inside, 1.0) > 0.0
            best, pick = _better(best, pick, tl.where(gone, float("-inf"), gain), begin)
        pick = tl.minimum(pick, total - 1)
        tl.debug_barrier()  # all have read what is covered before it is written
        tl.store(taken + pick, 1.0)
        for first in range(0, targets, DEPTH):
            target = first + tl.arange(0, DEPTH)
            known = target < targets
            own = tl.load(similar + target.to(tl.int64) * total + pick, known, 0.0)
            tl.store(
                covered + target, tl.maximum(tl.load(covered + target, known, 0.0), own), known
            )
        tl.debug_barrier()
    _write_ascending(taken, 1.0, kept + item * keep, total, keep, CHUNK)


def most_cover(whole: Tensor, keep: int, weights: Tensor | None, bonus: Tensor | None) -> Tensor:
    """Do as `objectives.most_cover`.

    Parameters
    ----------
    whole
        float64 [B, M, N], of `objectives.whole_similarity`.
    keep
        K.
    weights
        float64 [B, N]; or None.
    bonus
        float64 [B, N], at least 0, in the unit of `whole`; or None.

    Returns
    -------
    Tensor
        LongTensor [B, K], ascending.
    """
    size, targets, total = whole.shape
    covered = torch.zeros(size, targets, dtype=torch.float64, device=whole.device)
    taken = torch.zeros(size, total, dtype=torch.float32, device=whole.device)
    kept = torch.empty(size, keep, dtype=torch.int64, device=whole.device)
    launch(
        _most_cover, (size,), whole, covered if weights is None else weights,
        covered if bonus is None else bonus, covered, taken, kept, targets, total, keep,
        WEIGHTED=weights is not None, MORE=bonus is not None, DEPTH=32, CHUNK=128,
        num_warps=_WARPS,
    )  # fmt: skip
    return kept


# Choices, one launch each: for items of more than `ALL_PAIRS` tokens -----------------------------


@triton.jit
def _first_best(values, best, where, total, programs, GIVEN: tl.constexpr, CHUNK: tl.constexpr):
    """Write a chunk's largest value and its index; of a token that is given, its chunk's is it."""
    item = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    if GIVEN:
        given = tl.load(values + item)
        value = tl.where(place == given, float("inf"), float("-inf")).to(tl.float64)
    else:
        value = tl.load(values + item * total + place, place < total, float("-inf")).to(tl.float64)
    _write_best(value, best + item * programs, where + item * programs, CHUNK)


@triton.jit
def _write_best(value, best, where, CHUNK: tl.constexpr):
    chunk = tl.program_id(0)
    value = tl.where(value == value, value, float("-inf"))  # no NaN
    index = chunk * CHUNK + tl.argmax(value, axis=0, tie_break_left=True).to(tl.int32)
    tl.store(best + chunk, tl.max(value, axis=0))
    tl.store(where + chunk, index)


@triton.jit
def _read_best(best, where, programs, total, PROGRAMS: tl.constexpr):
    """Return the largest of all chunks' values and the first index that has it."""
    place = tl.arange(0, PROGRAMS)
    value = tl.load(best + place, place < programs, float("-inf"))
    most = tl.max(value, axis=0)
    index = tl.load(where + place, place < programs, 2147483647)
    pick = tl.min(tl.where(value == most, index, 2147483647), axis=0)
    return most, tl.minimum(pick, total - 1)


@triton.jit
def _dots(rows, place, inside, pick, width, CHUNK: tl.constexpr, DEPTH: tl.constexpr):
    """Return the exact products of some rows with one of them, float64."""
    found = tl.zeros((CHUNK,), tl.float64)
    for start in range(0, width, DEPTH):
        column = start + tl.arange(0, DEPTH)
        known = column < width
        line = place[:, None].to(tl.int64) * width + column[None, :]
        values = tl.load(rows + line, inside[:, None] & known[None, :], 0).to(tl.float64)
        own = tl.load(rows + pick.to(tl.int64) * width + column, known, 0).to(tl.float64)
        # Whole numbers below 2**53: exact in any order.
        found += tl.sum(values * own[None, :], axis=1)
    return found


@triton.jit(do_not_specialize=["step"])
def _log_determinant_step(
    rows, scales, weights, variance, level, factor, best, where, total, width, keep, step, programs,
    PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Take token number `step` and write the best of a chunk then."""
    item = tl.program_id(1).to(tl.int64)
    # Two tables take turns: one is read by all programs while the other is written.
    read = ((step % 2) * tl.num_programs(1) + item) * programs
    write = (((step + 1) % 2) * tl.num_programs(1) + item) * programs
    most, pick = _read_best(best + read, where + read, programs, total, PROGRAMS)
    place = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    inside = place < total
    dot = _dots(rows + item * total * width, place, inside, pick, width, CHUNK, DEPTH)
    start = item * total
    left = _variance_left(
        dot, place, inside, pick, most, step, scales + start, weights + start, variance + start,
        tl.load(level + item), factor + item * keep * total, total, BLOCK,
    )  # fmt: skip
    _write_best(left, best + write, where + write, CHUNK)


@triton.jit(do_not_specialize=["step"])
def _max_min_step(
    rows, inverse, weights, closest, best, where, total, width, step, programs,
    WEIGHTED: tl.constexpr, PROGRAMS: tl.constexpr, CHUNK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Take token number `step` and write the best of a chunk then."""
    item = tl.program_id(1).to(tl.int64)
    # Two tables take turns: one is read by all programs while the other is written.
    read = ((step % 2) * tl.num_programs(1) + item) * programs
    write = (((step + 1) % 2) * tl.num_programs(1) + item) * programs
    _, pick = _read_best(best + read, where + read, programs, total, PROGRAMS)
    place = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    inside = place < total
    dot = _dots(rows + item * total * width, place, inside, pick, width, CHUNK, DEPTH)
    start = item * total
    score = _weighted_distance(
        dot, place, inside, pick, step == 0, inverse + start, weights + start, closest + start,
        WEIGHTED,
    )  # fmt: skip
    _write_best(score.to(tl.float64), best + write, where + write, CHUNK)


@triton.jit(do_not_specialize=["step"])
def _last_step(
    values, mark, best, where, kept, total, keep, step, programs,
    PROGRAMS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Take the last token, and write all that were taken, ascending."""
    item = tl.program_id(0).to(tl.int64)
    read = ((step % 2) * tl.num_programs(0) + item) * programs
    _, pick = _read_best(best + read, where + read, programs, total, PROGRAMS)
    if keep == 1:
        tl.store(kept + item, pick.to(tl.int64))
    else:
        tl.store(values + item * total + pick, mark)
        tl.debug_barrier()
        _write_ascending(values + item * total, mark, kept + item * keep, total, keep, CHUNK)


class _Steps:
    """What the launches of one choice hand on to each other.

    Parameters
    ----------
    size, total, keep
        B, N and K.
    device
        Where the items are.
    """

    def __init__(self, size: int, total: int, keep: int, device: torch.device) -> None:
        self.size, self.total, self.keep = size, total, keep
        self.programs = triton.cdiv(total, STEP_CHUNK)
        self.shape = {
            "PROGRAMS": triton.next_power_of_2(self.programs), "CHUNK": STEP_CHUNK,
        }  # fmt: skip
        bests = (2, size, self.programs)
        self.best = torch.empty(bests, dtype=torch.float64, device=device)
        self.where = torch.empty(bests, dtype=torch.int32, device=device)

    @property
    def grid(self) -> tuple[int, int]:
        """Return a program for each chunk of each item."""
        return self.programs, self.size

    def begin(self, values: Tensor) -> None:
        """Find the first token: that of largest value, [B, N], or a given one, LongTensor [B]."""
        launch(
            _first_best, self.grid, values, self.best, self.where, self.total, self.programs,
            GIVEN=not values.dtype.is_floating_point, CHUNK=STEP_CHUNK,
        )  # fmt: skip

    def end(self, values: Tensor, mark: float) -> Tensor:
        """Return LongTensor [B, K], ascending: the tokens whose values are `mark`, and the last."""
        kept = torch.empty(self.size, self.keep, dtype=torch.int64, device=values.device)
        launch(
            _last_step, (self.size,), values, mark, self.best, self.where, kept, self.total,
            self.keep, self.keep - 1, self.programs, PROGRAMS=self.shape["PROGRAMS"], CHUNK=CHUNK,
        )  # fmt: skip
        return kept


def log_determinant_by_steps(
    rows: Tensor, scales: Tensor, weighed: tuple[Tensor, Tensor, Tensor], keep: int
) -> Tensor:
    """Do as `objectives.most_variance` of long items, one launch for each token taken.

    Parameters
    ----------
    rows, scales
        int32 [B, N, D] and float64 [B, N].
    weighed
        Of `objectives.factors_of`; the variances are changed.
    keep
        K.

    Returns
    -------
    Tensor
        LongTensor [B, K], ascending.
    """
    factors, variance, level = weighed
    size, total, width = rows.shape
    steps = _Steps(size, total, keep, rows.device)
    factor = torch.empty(size, keep, total, dtype=torch.float64, device=rows.device)
    steps.begin(variance)
    for step in range(keep - 1):
        launch(
            _log_determinant_step, steps.grid, rows, scales, factors, variance, level, factor,
            steps.best, steps.where, total, width, keep, step, steps.programs, **steps.shape,
            BLOCK=BLOCK, DEPTH=_depth(width),
        )  # fmt: skip
    return steps.end(variance, -torch.inf)


def max_min_by_steps(
    rows: Tensor, inverse: Tensor, weights: Tensor | None, begin: Tensor, keep: int
) -> Tensor:
    """Do as `objectives.farthest` of long items, one launch for each token taken.

    Parameters
    ----------
    rows, inverse
        int32 [B, N, D] and float64 [B, N].
    weights
        float32 [B, N], at least 0; or None.
    begin
        LongTensor [B], the token each item starts with; or float32 [B, N], of which each item's
        largest one says so.
    keep
        K.

    Returns
    -------
    Tensor
        LongTensor [B, K], ascending.
    """
    size, total, width = rows.shape
    steps = _Steps(size, total, keep, rows.device)
    closest = torch.empty(size, total, dtype=torch.float32, device=rows.device)
    steps.begin(begin)
    for step in range(keep - 1):
        launch(
            _max_min_step, steps.grid, rows, inverse, closest if weights is None else weights,
            closest, steps.best, steps.where, total, width, step, steps.programs, **steps.shape,
            WEIGHTED=weights is not None, DEPTH=_depth(width),
        )  # fmt: skip
    return steps.end(closest, torch.inf)


def _depth(width: int) -> int:
    return min(128, int(triton.next_power_of_2(width)))
