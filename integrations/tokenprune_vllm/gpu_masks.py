"""Masks on a GPU: vLLM's FlashAttention and Triton backends, and our kernel beside them.

Both keep keys and values in one tensor, a token's value behind its key, and write a batch's keys
before they attend to them. So the kernel finds all keys of a prompt in the cache, whatever chunk of
it is read. What the masks leave whole is vLLM's: it gets metadata of the other requests alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from tokenprune.errors import UnsupportedModelError
from tokenprune.masks.paged import PagedChunk, PagedPlan
from tokenprune.masks.patterns import Category
from tokenprune.transfer import to_device

logger = init_logger("vllm.tokenprune")  # vLLM shows loggers below its own name

CPU = "CPU_ATTN"
BACKENDS = ("FLASH_ATTN", "TRITON_ATTN")
"""vLLM's names of the backends for GPUs whose caches and metadata are known here."""

ONE_RUNNER = "VLLM_USE_V2_MODEL_RUNNER=0"


def on_gpu(attention: Any) -> bool:
    """Say whether the kernel for GPUs computes a layer's masks, or those for CPUs do.

    Parameters
    ----------
    attention
        vLLM's layer.

    Raises
    ------
    UnsupportedModelError
        If the layer has another backend, or its cache holds other numbers than were written.
    """
    name = attention.attn_backend.get_name()
    if name == CPU:
        return False
    if name not in BACKENDS or attention.attn_backend.__module__.split(".")[0] != "vllm":
        raise UnsupportedModelError(
            f"sparse masks are computed beside vLLM's attention backends {', '.join(BACKENDS)}, "
            f"and this server chose {name}, which keeps keys or describes batches in another way. "
            f"Serve with --attention-backend {BACKENDS[0]}, or without --masks."
        )
    if is_quantized_kv_cache(attention.kv_cache_dtype):
        raise UnsupportedModelError(
            f"the keys of a layer are kept as {attention.kv_cache_dtype}, which this checkpoint "
            "asks for, and masks read keys as they were written. Serve with --kv-cache-dtype "
            "bfloat16, or without --masks."
        )
    if getattr(attention.impl, "chunk_lookback", -1) not in (-1, None):
        raise UnsupportedModelError(
            "a layer of this model sees some chunks of the prompt, which does not go together with "
            "sparse masks. Serve it without --masks."
        )
    if getattr(attention, "mm_prefix_clamp_sliding_window", False):
        raise UnsupportedModelError(
            "images of this model see themselves both ways inside of a window, which the kernel "
            "for sparse masks does not know. Serve it without --masks."
        )
    return True


def refused(vllm_config: Any) -> list[tuple[bool, str]]:
    """Return settings under which a GPU's masks would not happen, and whether each is there.

    Parameters
    ----------
    vllm_config
        vLLM's. Graphs of whole batches are turned off in it where graphs of pieces are left: a
        batch that is replayed as a whole runs none of our code, and would leave the cache without
        tags. Attention runs between the pieces.
    """
    compilation = vllm_config.compilation_config
    mode = compilation.cudagraph_mode
    if mode == CUDAGraphMode.FULL_AND_PIECEWISE:
        compilation.cudagraph_mode = mode = CUDAGraphMode.PIECEWISE
        logger.info("tokenprune: masks are on, so CUDA graphs are piecewise")
    return [
        (
            mode is not None and mode.has_full_cudagraphs(),
            f"CUDA graphs of whole batches, cudagraph_mode {mode and mode.name} (give "
            '--compilation-config \'{"cudagraph_mode": "PIECEWISE"}\')',
        ),
        (
            bool(compilation.pass_config.fuse_attn_quant),
            "fuse_attn_quant (vLLM's attention would write numbers of another type)",
        ),
        (
            vllm_config.model_config.rswa_window is not None,
            "a model whose answers see a window of their own",
        ),
    ]


def caches(cache: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return keys and values [blocks, block, G, d], as views.

    Parameters
    ----------
    cache
        A layer's [blocks, G, block, 2 * d], of any strides but of the last.
    width
        d, of a head.
    """
    keys, values = cache.transpose(1, 2).split(width, dim=-1)
    return keys, values


def of_requests(metadata: Any, requests: Sequence[int], starts: Sequence[int]) -> Any:
    """Return vLLM's metadata of some requests of a batch.

    Parameters
    ----------
    metadata
        vLLM's, of the whole batch.
    requests
        Which ones, ascending.
    starts
        First token of each request of the batch, and one behind the last.
    """
    device = metadata.seq_lens.device
    counts = [starts[one + 1] - starts[one] for one in requests]
    ends = torch.tensor([0, *counts], dtype=torch.int32, device="cpu").cumsum(0).int()
    chosen = to_device(torch.tensor(requests, device="cpu"), device)
    rows = to_device(rows_of(requests, starts), device)
    changes: dict[str, Any] = {
        "num_actual_tokens": sum(counts),
        "max_query_len": max(counts),
        "query_start_loc": to_device(ends, device),
        "seq_lens": metadata.seq_lens[chosen],
        "block_table": metadata.block_table[chosen],
        "slot_mapping": metadata.slot_mapping[rows],
        # How FlashAttention 3 shares out the whole batch; without it, it finds out by itself.
        "scheduler_metadata": None,
    }
    ranges = getattr(metadata, "mm_prefix_range", None)
    if ranges is not None:
        changes["mm_prefix_range"] = {
            place: ranges[one] for place, one in enumerate(requests) if one in ranges
        }
    for name, chosen_of in (
        ("mm_prefix_range_tensor", chosen),
        ("mm_prefix_query_range_tensor", rows),
    ):
        given = getattr(metadata, name, None)
        if given is not None:
            changes[name] = given[chosen_of]
    known = {one.name for one in fields(metadata)}
    if unknown := changes.keys() - known:
        raise UnsupportedModelError(
            f"vLLM's {type(metadata).__name__} has no {min(unknown)}: this version describes "
            "batches in another way. Serve without --masks, or with a version of vLLM that "
            "`tokenprune docs serving` names."
        )
    return replace(metadata, **changes)


def rows_of(requests: Sequence[int], starts: Sequence[int]) -> Tensor:
    """Return LongTensor, the tokens of some requests of a batch."""
    rows = [torch.arange(starts[one], starts[one + 1], device="cpu") for one in requests]
    return torch.cat([torch.empty(0, dtype=torch.int64, device="cpu"), *rows])


def both_ways(metadata: Any) -> bool:
    """Say whether vLLM lets tokens of this batch's images see all of their image."""
    names = ("mm_prefix_range_tensor", "mm_prefix_query_range_tensor")
    return any(getattr(metadata, name, None) is not None for name in names)


class Plans:
    """Plans of one batch's requests that are ours, made when the first layer of a shape asks.

    Parameters
    ----------
    masked
        Those that are read under masks.
    whole
        Those whose keys are hidden or count several times, and whose heads see all others.
    """

    def __init__(self, masked: Sequence[PagedChunk], whole: Sequence[PagedChunk]) -> None:
        self._chunks = (masked, whole)
        self._plans: dict[tuple[int, int, bool], list[PagedPlan | None]] = {}

    def attend(
        self, layer: Any, query: Tensor, cache: Tensor, metadata: Any, output: Tensor
    ) -> None:
        """Write the attention of these requests.

        Parameters
        ----------
        layer
            Ours, of a model's layer: `attention`, `categories` and `window`.
        query, output
            [n, H, d], of the whole batch.
        cache, metadata
            vLLM's.
        """
        impl = layer.attention.impl
        width = int(impl.head_size)
        shape = (impl.num_heads // impl.num_kv_heads, width, both_ways(metadata))
        if shape not in self._plans:
            self._plans[shape] = [
                PagedPlan(chunks, query.device, shape[0], width, both_ways=shape[2])
                if chunks
                else None
                for chunks in self._chunks
            ]
        keys, values = caches(cache, width)
        dense: Category = "dense"
        for plan, categories in zip(
            self._plans[shape], (layer.categories, (dense,) * len(layer.categories)), strict=True
        ):
            if plan is not None:
                plan(
                    output, query, keys, values, metadata.block_table, categories, layer.window,
                    impl.scale,
                )  # fmt: skip
