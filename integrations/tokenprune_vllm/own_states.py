"""Layers of vLLM that keep a state (gated delta net), run on one prompt apart from the engine's.

Such a layer reads its state from the slot that the batch's metadata names. Here it gets slots and
metadata of its own, so that the engine's own kernels run and the states of its requests stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

_SLOT = 1
"""The slot of the one prompt: the engine's kernels leave out sequences whose slot is 0."""


@contextmanager
def own_states(
    layers: Sequence[Any], tokens: int, vllm_config: Any, device: torch.device
) -> Iterator[None]:
    """Let layers read a prompt of so many tokens from its beginning while the block runs.

    Parameters
    ----------
    layers
        vLLM's modules that keep a state, all of one kind; none is fine.
    tokens
        L, of the prompt that the block runs through them.
    vllm_config
        vLLM's.
    device
        Where the model is.
    """
    if not layers:
        yield
        return
    # Before vLLM has measured its memory there is none.
    before = [getattr(layer, "kv_cache", ()) for layer in layers]
    metadata = _metadata(layers[0], tokens, vllm_config, device)
    try:
        for layer in layers:
            layer.kv_cache = tuple(
                torch.zeros(_SLOT + 1, *shape, dtype=dtype, device=device)
                for shape, dtype in zip(
                    layer.get_state_shape(), layer.get_state_dtype(), strict=True
                )
            )
        with set_forward_context({layer.prefix: metadata for layer in layers}, vllm_config):
            yield
    finally:
        for layer, states in zip(layers, before, strict=True):
            layer.kv_cache = states


def _metadata(layer: Any, tokens: int, vllm_config: Any, device: torch.device) -> Any:
    """Return what the layer's own backend makes of a batch of one prompt without a state."""
    spec = layer.get_kv_cache_spec(vllm_config)
    builder = layer.get_attn_backend().get_builder_cls()(spec, [layer.prefix], vllm_config, device)
    ends = torch.tensor([0, tokens], dtype=torch.int32)
    lengths = ends[1:]
    # The state may have a slot for every so many tokens: all of them are the same one here.
    blocks = -(-tokens // int(spec.block_size)) + 1 + int(spec.num_speculative_blocks)
    return builder.build(
        0,
        CommonAttentionMetadata(
            query_start_loc=ends.to(device),
            query_start_loc_cpu=ends,
            seq_lens=lengths.to(device),
            num_reqs=1,
            num_actual_tokens=tokens,
            max_query_len=tokens,
            max_seq_len=tokens,
            block_table_tensor=torch.full((1, blocks), _SLOT, dtype=torch.int32, device=device),
            slot_mapping=torch.zeros(tokens, dtype=torch.int64, device=device),
            is_prefilling=torch.ones(1, dtype=torch.bool),
            seq_lens_cpu_upper_bound=lengths,
        ),
    )
