"""How many tokens each kept token stands for, so that attention can count it as often.

Attention spreads a query over all keys, so what a token adds depends on how many others are like
it. Where a hundred tokens of sky become one, that one weighs a hundredth of what the sky did, and
everything else more. Counting a key n times, by adding log n to its logits, undoes this; the field
calls it proportional attention (Token Merging, arXiv 2210.09461, section 3).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenprune.greedy.engine import fuses, rows_in_parts
from tokenprune.greedy.rows import ALL_PAIRS, IntegerRows

_BLOCK_ENTRIES = 2**24  # float64 entries of a block of cosines: 128 MiB


def tokens_represented(embeddings: Tensor, kept: Tensor) -> Tensor:
    """Count the tokens that each kept token stands for; see `representatives`.

    Parameters
    ----------
    embeddings
        Floating point [B, N, D], what the language model would read.
    kept
        LongTensor [B, K], ascending in each row.

    Returns
    -------
    Tensor
        LongTensor [B, K]; each row adds up to N.
    """
    stands_for = representatives(embeddings, kept)
    return torch.zeros_like(kept).scatter_add_(1, stands_for, torch.ones_like(stands_for))


def representatives(embeddings: Tensor, kept: Tensor) -> Tensor:
    """Return which kept token stands for each token.

    A kept token stands for itself, and a dropped one is stood for by the kept token whose cosine
    to it is highest; of equal ones by the first. Cosines come out of exact products, so the result
    is the same in any batch and on any device. O(N * K * D) time.

    Parameters
    ----------
    embeddings
        Floating point [B, N, D], what the language model would read.
    kept
        LongTensor [B, K], ascending in each row.

    Returns
    -------
    Tensor
        LongTensor [B, N], counted among the K.
    """
    if fuses(embeddings) and embeddings.shape[1] <= ALL_PAIRS:
        from tokenprune.greedy.fused import kernels  # imports Triton, which is not everywhere

        return kernels.representatives(embeddings, kept)
    found = []
    step = max(1, _BLOCK_ENTRIES // max(1, kept.shape[1]))
    # One item, and of it one block of tokens at a time: that is what bounds memory.
    for tokens, stay in zip(embeddings, kept, strict=True):
        rows = IntegerRows.from_embeddings(tokens[None])
        whole, inverse = rows.rows[0], rows.inverse_norms[0]
        nearest = []
        for block in torch.arange(len(tokens), device=tokens.device).split(step):
            cosines = whole[block] @ whole[stay].T * (inverse[block, None] * inverse[stay])
            # float32, as selectors compare cosines; argmax gives the first of equal ones.
            nearest.append(cosines.float().argmax(-1))
        stands_for = torch.cat(nearest)
        # A kept token may have an exact copy among those before it, and still stands for itself.
        stands_for[stay] = torch.arange(len(stay), device=stay.device)
        found.append(stands_for)
    return torch.stack(found)


def nearest_tokens(embeddings: Tensor, tokens: Tensor, count: int) -> Tensor:
    """Return for some tokens which others are most similar to each.

    Cosines are those of `representatives`; of equal ones the first comes first. O(N * m * D) time.

    Parameters
    ----------
    embeddings
        Floating point [B, N, D].
    tokens
        LongTensor [B, m].
    count
        How many others of each, below N.

    Returns
    -------
    Tensor
        LongTensor [B, m, count], highest cosine first; never the token itself.
    """
    found, first = [], 0
    for rows in rows_in_parts(embeddings):
        size, total = rows.scales.shape
        some = tokens[first : first + size]
        first += size
        nearest = []
        for block in some.split(max(1, _BLOCK_ENTRIES // (size * total)), dim=1):
            cosines = rows.cosines_of(block).scatter_(2, block[:, :, None], -math.inf)
            # torch.topk leaves the order of equal ones open; a stable sort does not.
            order = cosines.sort(dim=2, descending=True, stable=True).indices
            nearest.append(order[:, :, :count])
        found.append(torch.cat(nearest, dim=1))
    return torch.cat(found)
