"""Vision attention from q and k of one layer, without eager attention and without full maps.

Just the rows that a method needs are computed, in float32; the engine keeps its fused kernel.
"""

from __future__ import annotations

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
