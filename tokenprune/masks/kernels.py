"""Attention under a mask, in kernels that skip the pairs it hides.

``"flex"`` is torch's FlexAttention, compiled, and skips blocks. ``"gathered"`` collects the keys
that a block of queries sees, as single keys where a block has few of them, and passes them to
torch's fused attention. ``"dense"`` is the same fused attention over all keys, with the mask as a
matrix.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from tokenprune.errors import LayoutError
from tokenprune.masks.gathered import Plan, Work, fused, plan_of, queries_in, shared_masks
from tokenprune.masks.mask import BLOCK, Mask

Kernel = Literal["flex", "gathered", "dense"]


def default_kernel(device: torch.device) -> Kernel:
    """Return FlexAttention, or on the CPU, where it would need a compiler, gathered blocks."""
    return "gathered" if device.type == "cpu" else "flex"


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    *,
    scale: float | None = None,
    kernel: Kernel | None = None,
    block: int = BLOCK,
) -> Tensor:
    """Return softmax(q kᵀ * scale) v over the allowed pairs of one prompt.

    Parameters
    ----------
    query
        [H, L, d].
    key, value
        [G, L, d], H a multiple of G; heads next to each other share a key head.
    mask
        Of L tokens and H heads, or 1. Every query must be allowed at least one key.
    scale
        Factor on q kᵀ; d ** -0.5 where it is left out.
    kernel
        None for `default_kernel`.
    block
        Queries, and keys, of a block that is computed or skipped as a whole.

    Returns
    -------
    Tensor
        [H, L, d].

    Raises
    ------
    LayoutError
        If the mask is of another prompt or number of heads.
    """
    return Prepared(mask, query.device, kernel, block)(query, key, value, scale)


class Prepared:
    """A mask made ready for a kernel once, for all layers that use it.

    Parameters
    ----------
    mask
        Of one prompt.
    device
        Where attention is computed.
    kernel, block
        As for `attend`.
    queries
        Positions of the queries that are computed, where these are a part of the prompt: a chunk
        of it, whose keys begin with the first token all the same. ``"flex"`` takes whole prompts.

    Raises
    ------
    LayoutError
        If these are no queries of the prompt, or the kernel takes no part of them.
    """

    def __init__(
        self,
        mask: Mask,
        device: torch.device,
        kernel: Kernel | None = None,
        block: int = BLOCK,
        queries: range | None = None,
    ) -> None:
        self.mask = mask
        self.queries = queries_in(queries, mask.length)
        self.kernel: Kernel = default_kernel(device) if kernel is None else kernel
        part = self.queries if self.queries != range(mask.length) else None
        if part is not None and self.kernel == "flex":
            raise LayoutError(
                f"queries={part} are a part of a prompt of {mask.length} tokens, and kernel 'flex' "
                "computes whole prompts. Use kernel 'gathered'."
            )
        self._blocks: Any = block_mask(mask, device, block) if self.kernel == "flex" else None
        self._plans: list[tuple[Plan, list[int] | None]] = []
        if self.kernel == "gathered":
            for shared, heads in shared_masks(mask):
                self._plans.append((plan_of(shared, block, device, part), heads))

    @property
    def computed(self) -> float:
        """Pairs that the kernel computes, over those of causal attention; the mean over heads."""
        length, first, last = self.mask.length, self.queries[0], self.queries[-1]
        causal = (first + last + 2) * len(self.queries) / 2
        if self._plans:
            pairs = sum(plan.pairs * len(heads or [0]) for plan, heads in self._plans)
            return pairs / self.mask.heads / causal
        if self._blocks is not None:
            return float(1 - self._blocks.sparsity() / 100) * length**2 / causal
        return length * len(self.queries) / causal

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None
    ) -> Tensor:
        """Return what `attend` returns; of `queries` alone, where these are a part."""
        heads, count = query.shape[:2]
        sizes = (count, key.shape[1])
        if sizes != (len(self.queries), self.mask.length) or self.mask.heads not in (1, heads):
            raise LayoutError(
                f"a mask of {self.mask.heads} heads, {len(self.queries)} queries and "
                f"{self.mask.length} tokens was given with queries of {heads} heads and {count} "
                f"tokens, and {sizes[1]} keys. Make it for this prompt, for all heads or for 1."
            )
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if self._blocks is not None:
            return _flex(query, key, value, self._blocks, scale)
        if self._plans:
            # Values may have another width than keys, as where layers keep latent states.
            output = query.new_empty(*query.shape[:2], value.shape[-1])
            work = Work(query, key, value, scale, output)
            for plan, of_heads in self._plans:
                plan(work, list(range(heads)) if of_heads is None else of_heads)
            return output
        rows = slice(self.queries.start, self.queries.stop)
        pairs = self.mask.matrix()[None, :, rows].to(query.device)
        return fused(query, key, value, pairs, scale)


def block_mask(mask: Mask, device: torch.device | None = None, block: int = BLOCK) -> Any:
    """Return torch's `BlockMask` of a mask, without ever making the matrix.

    Parameters
    ----------
    mask
        Of one prompt.
    device
        Where it will be used; None for the CPU.
    block
        Queries, and keys, of a block.
    """
    from torch.nn.attention.flex_attention import BlockMask

    device = torch.device("cpu") if device is None else device
    length, cover = mask.length, mask.cover(block)
    every = cover.every & cover.some
    if length % block:
        # Pairs behind the prompt's end are hidden only where the kernel looks at pairs.
        every[:, -1], every[:, :, -1] = False, False
    partial = cover.some & ~every
    on_device = mask.to(device)

    def indices(blocks: Tensor) -> tuple[Tensor, Tensor]:
        order = blocks.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices
        counts = blocks.sum(dim=-1, dtype=torch.int32)
        return counts[None].to(device), order[None].to(device, torch.int32)

    # A tensor: a Python number would be compiled into the kernel, one kernel for each length.
    last = torch.tensor(length - 1, device=device)

    def allowed(_batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if length % block == 0:
            return on_device.allowed(head, query, key)
        inside = (query <= last) & (key <= last)
        return inside & on_device.allowed(head, query.minimum(last), key.minimum(last))

    return BlockMask.from_kv_blocks(
        *indices(partial),
        *indices(every),
        BLOCK_SIZE=(block, block),
        mask_mod=allowed,
        seq_lengths=(length, length),
    )


_compiled: dict[str, Any] = {}

_KINDS_OF_MASKS = 64
"""How many kernels are compiled, one for each composition of masks, before torch gives up."""


def _flex(query: Tensor, key: Tensor, value: Tensor, blocks: Any, scale: float) -> Tensor:
    device = query.device.type
    if device not in _compiled:
        from torch.nn.attention.flex_attention import flex_attention

        # On the CPU, kernels for any length do not compile (torch 2.14): one for each length. To
        # give up in silence would be to compute all pairs, hence fullgraph.
        dynamic = False if device == "cpu" else None
        _compiled[device] = torch.compile(flex_attention, dynamic=dynamic, fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=_KINDS_OF_MASKS):
        output: Tensor = _compiled[device](
            query[None],
            key[None],
            value[None],
            block_mask=blocks,
            scale=scale,
            enable_gqa=query.shape[0] != key.shape[0],
        )
    return output[0]
