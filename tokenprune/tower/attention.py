"""Vision attention from q and k of one layer, without eager attention and without full maps.

Just the rows that a method needs are computed, in float32; the engine keeps its fused kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_QUERIES_AT_ONCE = 512  # rows of the attention map that exist at one time


def cls_row(
    query: Tensor, key: Tensor, scale: float, mask: Tensor | None = None, cls_index: int = 0
) -> Tensor:
    """Return the softmax attention of one query, the CLS token, to every key.

    Parameters
    ----------
    query, key
        [B, H, P, d] of the scoring layer, any float dtype; the CLS token is token `cls_index`.
    scale
        Factor on q kᵀ, usually d ** -0.5.
    mask
        Bool (True may be seen) or additive, broadcastable to [B, H, P, P], or None.
    cls_index
        Where the CLS token stands.

    Returns
    -------
    Tensor
        float32 [B, H, P], the CLS key included in the softmax and in the result.
    """
    row = query[:, :, cls_index : cls_index + 1].float()
    logits = row @ key.float().transpose(-1, -2) * scale
    if mask is not None:
        mask = mask if mask.shape[-2] == 1 else mask[..., cls_index : cls_index + 1, :]
    return _softmax(logits, mask)[:, :, 0]


def received(query: Tensor, key: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Return the attention each token receives: the mean over all queries, in blocks of queries.

    Source: the SigLIP path of VisPruner's released code (arXiv 2412.01818 v2), mean over queries
    of the softmax; heads are kept apart here and averaged by the selector.

    Parameters
    ----------
    query, key
        [B, H, P, d] of the scoring layer, any float dtype.
    scale
        Factor on q kᵀ, usually d ** -0.5.
    mask
        Bool (True may be seen) or additive, broadcastable to [B, H, P, P], or None.

    Returns
    -------
    Tensor
        float32 [B, H, P].
    """
    key = key.float()
    total = key.new_zeros(key.shape[:-1])
    for start in range(0, query.shape[2], _QUERIES_AT_ONCE):
        rows = query[:, :, start : start + _QUERIES_AT_ONCE].float()
        logits = rows @ key.transpose(-1, -2) * scale
        part = mask
        if mask is not None and mask.shape[-2] > 1:
            part = mask[..., start : start + _QUERIES_AT_ONCE, :]
        total += _softmax(logits, part).sum(dim=2)
    return total / query.shape[2]


def _softmax(logits: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None:
        if mask.dtype == torch.bool:
            logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
        else:
            logits = logits + mask.float()
    return logits.softmax(dim=-1)


def whole_pictures(
    query: Tensor, key: Tensor, scale: float, has_cls: bool, mask: Tensor | None = None
) -> Tensor:
    """Return the scores of a tower that encodes whole pictures: CLS row, or attention received.

    Parameters
    ----------
    query, key, scale, mask
        See `received`; one picture for each entry of the batch.
    has_cls
        Whether token 0 is a CLS token.

    Returns
    -------
    Tensor
        float32 [B, H, P], P without the CLS token.
    """
    if has_cls:
        return cls_row(query, key, scale, mask)[..., 1:]
    return received(query, key, scale, mask)


def packed_pictures(query: Tensor, key: Tensor, scale: float, lengths: Sequence[int]) -> Tensor:
    """Return the attention received in a tower that packs pictures into one sequence.

    Parameters
    ----------
    query, key, scale
        See `received`; a batch of one.
    lengths
        Patches of each picture or frame; attention stays inside them. They add up to P.

    Returns
    -------
    Tensor
        float32 [H, P].
    """
    pictures = zip(query.split(list(lengths), dim=2), key.split(list(lengths), dim=2), strict=True)
    return torch.cat([received(q, k, scale)[0] for q, k in pictures], dim=-1)


def mean_of_blocks(scores: Tensor, sides: tuple[int, int], merged: int) -> Tensor:
    """Return [..., N] of scores [..., P], where blocks of patches become one token each.

    Parameters
    ----------
    scores
        One for each patch, in raster order.
    sides
        Rows and columns of patches, P in all.
    merged
        Patches on a side of a block.
    """
    rows, columns = sides
    blocks: Tensor = scores.unflatten(-1, (rows // merged, merged, columns // merged, merged))
    return blocks.transpose(-3, -2).flatten(-2).mean(dim=-1).flatten(-2)
