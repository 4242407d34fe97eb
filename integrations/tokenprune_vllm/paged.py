"""Reading keys and values out of vLLM's paged cache on a CPU, and its attention for some requests.

vLLM's kernels for CPUs keep the tokens of a block in an order of their own, another one for each
instruction set: keys transposed, or pairs of values side by side. It is not written down, so it is
found: numbers are written into a block by vLLM's own function, and where they lie is the order.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import UnsupportedModelError, reason_of

_DIGITS, _BASE = 3, 128
"""Numbers are written as digits, which every dtype holds: below 128 ** 3."""


@dataclass(frozen=True)
class Axis:
    """Tokens, or values of a token, as nested loops.

    Attributes
    ----------
    sizes, strides
        Of each loop, the outermost first.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, places: Sequence[int]) -> Axis:
        """Return the loops that visit these places, of which the first is 0, in this order.

        Raises
        ------
        ValueError
            If there are none.
        """
        sizes: list[int] = []
        strides: list[int] = []
        step = 1  # how many places the loops found so far visit
        while step < len(places):
            stride, size = places[step], 1
            while size * step < len(places) and places[size * step] == size * stride:
                size += 1
            sizes.insert(0, size)
            strides.insert(0, stride)
            step *= size
        axis = cls(tuple(sizes), tuple(strides))
        if axis.places() != list(places):
            raise ValueError("no loops visit these places")
        return axis

    def places(self) -> list[int]:
        """Return the places that the loops visit, in their order."""
        places = [0]
        for size, stride in zip(self.sizes, self.strides, strict=True):
            places = [place + index * stride for place in places for index in range(size)]
        return places


@dataclass(frozen=True)
class Order:
    """How a block of one head lies in memory: where its tokens are, and each one's values."""

    tokens: Axis
    values: Axis

    @classmethod
    def of(cls, place: Tensor) -> Order:
        """Return the order of a block.

        Parameters
        ----------
        place
            LongTensor [block, d], where each value lies.

        Raises
        ------
        ValueError
            If tokens and values are not in loops of their own.
        """
        tokens, values = place[:, 0] - place[0, 0], place[0] - place[0, 0]
        if int(place[0, 0]) or not torch.equal(place, tokens[:, None] + values):
            raise ValueError("tokens do not all lie alike")
        return cls(Axis.of(tokens.tolist()), Axis.of(values.tolist()))

    def read(self, blocks: Tensor) -> Tensor:
        """Return [G, n * block, d] of blocks [n, G, block * d], whose last dimension is memory's.

        Parameters
        ----------
        blocks
            Keys, or values, of some blocks.
        """
        count, heads = blocks.shape[:2]
        seen = blocks.as_strided(
            (heads, count, *self.tokens.sizes, *self.values.sizes),
            (blocks.stride(1), blocks.stride(0), *self.tokens.strides, *self.values.strides),
            blocks.storage_offset(),
        )
        sizes = [torch.Size(axis.sizes).numel() for axis in (self.tokens, self.values)]
        return seen.reshape(heads, count * sizes[0], sizes[1])


@functools.cache
def orders(isa: str, block: int, width: int, dtype: torch.dtype) -> tuple[Order, Order]:
    """Return the orders in which vLLM's kernels keep the keys and the values of a block.

    Parameters
    ----------
    isa
        vLLM's name of the instruction set that a layer uses.
    block
        Tokens of a block.
    width
        d, of a head.
    dtype
        Of the cache.

    Raises
    ------
    UnsupportedModelError
        If they cannot be read.
    """
    number = torch.arange(block * width, device="cpu").view(block, 1, width)
    found = torch.zeros(2, block * width, dtype=torch.int64, device="cpu")
    for digit in range(_DIGITS):
        cache = torch.zeros(1, 1, 2 * block, width, dtype=dtype, device="cpu")
        written = (number // _BASE**digit % _BASE).to(dtype)
        _write(written, cache, torch.arange(block, device="cpu"), isa)
        found += cache.view(2, block * width).long() * _BASE**digit
    try:
        place = found.argsort(dim=1).view(2, block, width)
        if not torch.equal(found.sort().values, number.flatten().expand(2, -1)):
            raise ValueError("some values are not there")
        return Order.of(place[0]), Order.of(place[1])
    except ValueError as error:
        from vllm import __version__

        raise UnsupportedModelError(
            f"vLLM {__version__} keeps keys and values on this CPU ({isa}) in a way that "
            f"tokenprune cannot read: {reason_of(error)}. Serve without --masks, or with a version "
            "of vLLM that `tokenprune docs serving` names."
        ) from error


def _write(states: Tensor, cache: Tensor, slots: Tensor, isa: str) -> None:
    """Have vLLM write keys, and as values the same, into a cache [blocks, heads, 2 * block, d]."""
    from vllm import _custom_ops as ops

    keys, values = cache.chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(
        states, states, keys, values, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
    )


def keys_and_values(cache: Tensor, table: Tensor, length: int, isa: str) -> tuple[Tensor, Tensor]:
    """Return what the cache holds of a request's first tokens.

    Parameters
    ----------
    cache
        A layer's [blocks, G, block, 2 * d].
    table
        IntTensor, the numbers of the request's blocks; more of them than are used may follow.
    length
        L, how many tokens.
    isa
        vLLM's name of the instruction set that the layer uses.

    Returns
    -------
    tuple
        Keys and values, [G, L, d] each.
    """
    block, width = cache.shape[2], cache.shape[3] // 2
    used = table[: -(-length // block)].long()
    blocks = cache[used].flatten(2)
    parts = zip(orders(isa, block, width, cache.dtype), blocks.chunk(2, dim=2), strict=True)
    keys, values = (order.read(part)[:, :length] for order, part in parts)
    return keys, values


def of_requests(metadata: Any, requests: Sequence[int], impl: Any, layer: Any) -> Any:
    """Return vLLM's metadata of some requests of a batch.

    Parameters
    ----------
    metadata
        vLLM's, of the whole batch.
    requests
        Which ones, ascending.
    impl, layer
        What computes the attention of a layer, and the layer.
    """
    from vllm import _custom_ops as ops
    from vllm import envs

    starts = metadata.query_start_loc
    chosen = torch.tensor(requests, device=starts.device)
    counts = starts.diff()[chosen]
    edges = torch.cat([starts[:1], counts.cumsum(0)]).to(starts.dtype)
    lengths = metadata.seq_lens[chosen]
    # Made for no window: vLLM says so too where layers with and without one share it.
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(requests),
        num_heads=impl.num_heads,
        num_kv_heads=impl.num_kv_heads,
        head_dim=impl.head_size,
        seq_lens=lengths,
        dtype=layer.dtype,
        query_start_loc=edges,
        causal=metadata.causal,
        sliding_window_size=-1,
        isa=layer.isa,
        enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        dynamic_causal=None,
        kv_cache_dtype=impl.kv_cache_dtype,
    )
    rows = [torch.arange(int(starts[one]), int(starts[one + 1])) for one in requests]
    return replace(
        metadata,
        num_actual_tokens=int(edges[-1]),
        max_query_len=int(counts.max()),
        query_start_loc=edges,
        max_seq_len=int(lengths.max()),
        seq_lens=lengths,
        block_table=metadata.block_table[chosen],
        slot_mapping=metadata.slot_mapping[torch.cat(rows)],
        scheduler_metadata=plan,
    )
