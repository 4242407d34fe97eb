"""A Triton kernel: attention under the categories of heads, over keys and values in a paged cache.

A program has some queries of a prompt and all query heads of a key-value head, so that each key is
read once for all of them. It goes through the lists of `tokenprune.masks.paged`: first the blocks
of keys all of whose pairs are allowed, then those in which it looks at pairs. The softmax is
online, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenprune.greedy.fused import kernels
from tokenprune.masks.patterns import DENSE, INTRA, LOCAL, NEAR, SINK

_COLUMNS = tl.constexpr(6)  # numbers of a tile; see `tokenprune.masks.paged.PagedPlan.tiles`
_INTRA, _SINK = tl.constexpr(INTRA), tl.constexpr(SINK)
_NEAR, _DENSE = tl.constexpr(NEAR), tl.constexpr(DENSE)
_LOCAL = tl.constexpr(LOCAL)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _allowed(
    query_at, query_label, kind, key_at, key_label, length, window,
    HIDES: tl.constexpr, WINDOWED: tl.constexpr, BOTH_WAYS: tl.constexpr,
):  # fmt: skip
    """Return whether each query of a program may attend to each key of a block."""
    away = query_at[:, None] - key_at[None, :]
    itself = away == 0
    hidden = key_label < 0
    if HIDES:
        key_label = tl.where(hidden, -1 - key_label, key_label)
        query_label = tl.where(query_label < 0, -1 - query_label, query_label)
    # Label 0 is text, 1 + 2m a token of image m, 2 + 2m one of its sinks.
    text = (query_label == 0)[:, None] | (key_label == 0)[None, :]
    same = ((query_label + 1) // 2)[:, None] == ((key_label + 1) // 2)[None, :]
    sink = (key_label > 0) & (key_label % 2 == 0)
    seen = text | ((kind & _DENSE) != 0)[:, None]
    seen = seen | (((kind & _INTRA) != 0)[:, None] & same)
    seen = seen | (((kind & _SINK) != 0)[:, None] & sink[None, :])
    seen = seen | (((kind & _NEAR) != 0)[:, None] & (away < _LOCAL))
    own = away >= 0
    if WINDOWED:
        own = own & (away < window)
    if BOTH_WAYS:
        own = own | (same & (query_label > 0)[:, None])
    seen = seen & own & (key_at < length)[None, :]
    if HIDES:
        seen = seen & (~hidden[None, :] | itself)
    return seen


@triton.jit
def _add_block(
    most, total, sums, query, keys, values, pages, bias, start, length, head, scale, allowed,
    key_strides_page, key_strides_token, key_strides_head,
    value_strides_page, value_strides_token, value_strides_head,
    WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr,
    BIASED: tl.constexpr, LOOKS: tl.constexpr,
):  # fmt: skip
    """Take a block of keys into the softmax: the maximum, the sum, and the weighted values."""
    key_at = start + tl.arange(0, KEYS)
    there = key_at < length
    page = tl.load(pages + key_at // PAGE, there, 0).to(tl.int64)
    slot = key_at % PAGE
    width = tl.arange(0, WIDTH_PADDED)
    inside = width < WIDTH
    place = page * key_strides_page + slot * key_strides_token + head * key_strides_head
    key = tl.load(keys + place[None, :] + width[:, None], there[None, :] & inside[:, None], 0.0)
    logits = tl.dot(query, key, input_precision="ieee") * scale
    if BIASED:
        logits += tl.load(bias + key_at, there, 0.0)[None, :] * _LOG2_E
    if LOOKS:
        logits = tl.where(allowed, logits, float("-inf"))
    new = tl.maximum(most, tl.max(logits, axis=1))
    # A query that has seen no key yet has no maximum, and nothing minus nothing is no number.
    base = tl.where(new == float("-inf"), 0.0, new)
    weights = tl.exp2(logits - base[:, None])
    shrunk = tl.exp2(most - base)
    total = total * shrunk + tl.sum(weights, axis=1)
    place = page * value_strides_page + slot * value_strides_token + head * value_strides_head
    value = tl.load(values + place[:, None] + width[None, :], there[:, None] & inside[None, :], 0.0)
    added = tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    return new, total, sums * shrunk[:, None] + added


@triton.jit
def _attend(
    output, query, keys, values, table, labels, bias, tiles, order, counts, list_of, kinds,
    scale, window, columns,
    output_strides_row, output_strides_head, query_strides_row, query_strides_head,
    key_strides_page, key_strides_token, key_strides_head,
    value_strides_page, value_strides_token, value_strides_head, table_strides_row,
    GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_PADDED: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    BIASED: tl.constexpr, HIDES: tl.constexpr, WINDOWED: tl.constexpr, BOTH_WAYS: tl.constexpr,
):  # fmt: skip
    """Write the attention of a tile of queries, for the heads of a key-value head."""
    # The last queries of a prompt see most: what takes longest begins first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    entry = tiles + tile * _COLUMNS
    first_row, first_at = tl.load(entry), tl.load(entry + 1)
    count, length = tl.load(entry + 2), tl.load(entry + 3)
    pages = table + tl.load(entry + 4).to(tl.int64) * table_strides_row
    offset = tl.load(entry + 5)
    labels += offset
    bias += offset
    row = tl.arange(0, ROWS)
    number, of_group = row // GROUP_PADDED, row % GROUP_PADDED
    live = (number < count) & (of_group < GROUP)
    of_head = head * GROUP + of_group
    query_at = first_at + number
    width = tl.arange(0, WIDTH_PADDED)
    inside = live[:, None] & (width < WIDTH)[None, :]
    rows = (first_row + number).to(tl.int64)
    place = rows * query_strides_row + of_head * query_strides_head
    given = tl.load(query + place[:, None] + width[None, :], inside, 0.0)
    query_label = tl.load(labels + query_at, live, 0)
    kind = tl.load(kinds + of_head, live, 0)
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, WIDTH_PADDED), tl.float32)
    listed = tl.load(list_of + head) * tl.num_programs(0) + tile
    whole = tl.load(counts + 2 * listed)
    end = whole + tl.load(counts + 2 * listed + 1)
    order += listed.to(tl.int64) * columns
    for place_of in range(0, whole):
        start = tl.load(order + place_of) * KEYS
        most, total, sums = _add_block(
            most, total, sums, given, keys, values, pages, bias, start, length, head, scale, live,
            key_strides_page, key_strides_token, key_strides_head,
            value_strides_page, value_strides_token, value_strides_head,
            WIDTH, WIDTH_PADDED, PAGE, KEYS, BIASED, False,
        )  # fmt: skip
    for place_of in range(whole, end):
        start = tl.load(order + place_of) * KEYS
        key_at = start + tl.arange(0, KEYS)
        key_label = tl.load(labels + key_at, key_at < length, 0)
        allowed = _allowed(
            query_at, query_label, kind, key_at, key_label, length, window,
            HIDES, WINDOWED, BOTH_WAYS,
        )  # fmt: skip
        most, total, sums = _add_block(
            most, total, sums, given, keys, values, pages, bias, start, length, head, scale,
            allowed,
            key_strides_page, key_strides_token, key_strides_head,
            value_strides_page, value_strides_token, value_strides_head,
            WIDTH, WIDTH_PADDED, PAGE, KEYS, BIASED, True,
        )  # fmt: skip
    sums = sums / tl.where(total == 0.0, 1.0, total)[:, None]  # rows of no query have seen nothing
    place = rows * output_strides_row + of_head * output_strides_head
    tl.store(output + place[:, None] + width[None, :], sums.to(output.dtype.element_ty), inside)


def padded(number: int, least: int = 1) -> int:
    """Return the next power of two, at least `least`: what tensors in a kernel are as large as."""
    found: int = triton.next_power_of_2(number)
    return max(found, least)


def attend(
    output: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    tokens: tuple[Tensor, Tensor | None, bool],
    lists: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    rows: int,
    width_of_block: int,
    scale: float,
    window: int | None,
    both_ways: bool,
) -> None:
    """Launch the kernel; see `tokenprune.masks.paged.PagedPlan.__call__`.

    Parameters
    ----------
    output, query
        [n, H, d].
    keys, values
        [pages, page, G, d], with any strides but of d.
    table
        Integers [requests, pages of a request].
    tokens
        Labels int32 and biases float32 (or None) of all prompts' tokens, and whether any is hidden.
    lists
        int32: tiles [T, COLUMNS], order [S, T, columns], counts [S, T, 2], the list of each
        key-value head [G], and what each head sees [H].
    rows, width_of_block
        Rows of a tile, of queries and heads; keys of a block.
    scale, window, both_ways
        Of the layer.
    """
    tiles, order, counts, list_of, kinds = lists
    labels, bias, hides = tokens
    group = query.shape[1] // keys.shape[2]
    width = query.shape[2]
    strides: Sequence[int] = (
        *output.stride()[:2],
        *query.stride()[:2],
        *keys.stride()[:3],
        *values.stride()[:3],
        table.stride(0),
    )
    kernels.launch(
        _attend,
        (len(tiles), keys.shape[2]),
        output, query, keys, values, table, labels,
        labels if bias is None else bias,
        tiles, order, counts, list_of, kinds,
        torch.tensor(scale * _LOG2_E.value).item(),
        0 if window is None else window,
        order.shape[2],
        *strides,
        GROUP=group, GROUP_PADDED=padded(group), WIDTH=width, WIDTH_PADDED=padded(width, 16),
        PAGE=keys.shape[1], ROWS=rows, KEYS=width_of_block,
        BIASED=bias is not None, HIDES=hides, WINDOWED=window is not None, BOTH_WAYS=both_ways,
        num_warps=8 if width > 64 else 4, enable_fp_fusion=True,
    )  # fmt: skip
