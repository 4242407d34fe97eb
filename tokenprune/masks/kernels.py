"""Attention under a mask, in kernels that skip the blocks in which nothing is allowed.

``"flex"`` is torch's FlexAttention, compiled; ``"gathered"`` collects, for each block of queries,
the keys of its blocks and gives them to torch's fused attention; ``"dense"`` is that same fused
attention over everything, with the mask as a matrix.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.errors import LayoutError
from tokenprune.masks.mask import BLOCK, Cover, Mask

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
    """

    def __init__(
        self,
        mask: Mask,
        device: torch.device,
        kernel: Kernel | None = None,
        block: int = BLOCK,
    ) -> None:
        self.mask = mask
        self.kernel: Kernel = default_kernel(device) if kernel is None else kernel
        self._block = block
        self._on_device = mask.to(device)
        self._blocks: Any = block_mask(mask, device, block) if self.kernel == "flex" else None
        self._cover = mask.cover(block) if self.kernel == "gathered" else None

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None
    ) -> Tensor:
        """Return what `attend` returns."""
        heads, length = query.shape[:2]
        if self.mask.length != length or self.mask.heads not in (1, heads):
            raise LayoutError(
                f"a mask of {self.mask.heads} heads and {self.mask.length} tokens was given with "
                f"queries of {heads} heads and {length} tokens. Make it for this prompt, for all "
                "heads or for 1."
            )
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if self._blocks is not None:
            return _flex(query, key, value, self._blocks, scale)
        if self._cover is not None:
            return self._gathered(query, key, value, self._cover, scale)
        pairs = self.mask.matrix()[None].to(query.device)
        return _fused(query, key, value, pairs, scale)

    def _gathered(
        self, query: Tensor, key: Tensor, value: Tensor, cover: Cover, scale: float
    ) -> Tensor:
        heads, length = query.shape[:2]
        some, every = cover.some, cover.every & cover.some
        device = query.device
        output = torch.empty_like(query)
        places = torch.arange(length, device=device).split(self._block)
        key_head = torch.arange(heads, device=device) // (heads // len(key))
        for row in range(some.shape[1]):
            queries = places[row]
            # Heads that compute the same blocks of a row go through the kernel together.
            patterns, group_of = torch.unique(some[:, row], dim=0, return_inverse=True)
            for number, pattern in enumerate(patterns):
                members = (group_of == number).nonzero()[:, 0]
                mine = members.to(device) if len(some) > 1 else torch.arange(heads, device=device)
                columns = pattern.nonzero()[:, 0]
                keys = torch.cat([places[column] for column in columns.tolist()])
                pairs = None
                if not bool(every[members][:, row, columns].all()):
                    head = mine[None, :, None, None]
                    pairs = self._on_device.allowed(head, queries[:, None], keys[None])
                whole = len(mine) == heads
                part = query[:, queries] if whole else query[mine[:, None], queries]
                wide = (key[:, keys], value[:, keys])
                if not whole:
                    source = key_head[mine][:, None]
                    wide = (key[source, keys], value[source, keys])
                found = _fused(part, *wide, pairs, scale)
                if whole:
                    output[:, queries] = found
                else:
                    output[mine[:, None], queries] = found
        return output


def _fused(query: Tensor, key: Tensor, value: Tensor, pairs: Tensor | None, scale: float) -> Tensor:
    """Torch's own attention of [H, Q, d] to [G, K, d], over `pairs` [1, H or 1, Q, K] or all."""
    return F.scaled_dot_product_attention(
        query[None], key[None], value[None], pairs, scale=scale, enable_gqa=len(query) != len(key)
    )[0]


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

    def allowed(_batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if length % block == 0:
            return on_device.allowed(head, query, key)
        inside = (query < length) & (key < length)
        last = length - 1
        return inside & on_device.allowed(head, query.clamp(max=last), key.clamp(max=last))

    return BlockMask.from_kv_blocks(
        *indices(partial),
        *indices(every),
        BLOCK_SIZE=(block, block),
        mask_mod=allowed,
        seq_lengths=(length, length),
    )


_compiled: Any = None


def _flex(query: Tensor, key: Tensor, value: Tensor, blocks: Any, scale: float) -> Tensor:
    global _compiled
    if _compiled is None:
        from torch.nn.attention.flex_attention import flex_attention

        _compiled = torch.compile(flex_attention)
    output: Tensor = _compiled(
        query[None],
        key[None],
        value[None],
        block_mask=blocks,
        scale=scale,
        enable_gqa=query.shape[0] != key.shape[0],
    )
    return output[0]
