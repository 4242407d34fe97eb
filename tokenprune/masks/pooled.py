"""PooledBlocks: a mask of whole blocks, chosen anew for every prompt and layer from its q and k.

Queries and keys are averaged block by block, and the softmax of their products says which blocks of
keys a block of queries needs. Source: Faster VGGT with block-sparse global attention (arXiv
2509.07120), where it replaces attention over all frames of a scene in both directions; here it is
what a language model reads a prompt with, so that only blocks before a query's own can be chosen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.errors import LayoutError, OptionError, TokensError
from tokenprune.masks.layout import PromptLayout
from tokenprune.masks.mask import BLOCK, Blocks, Causal, Classes, Mask
from tokenprune.numerics import full_precision


@dataclass(frozen=True)
class PooledBlocks:
    """How blocks are chosen.

    Each block of queries keeps its most probable blocks of keys: as many as `keep` says, or as
    `mass` does, whichever is more. Dense whatever is chosen: the block on the diagonal; all that
    text attends to; all text and all sinks, for every query.

    Parameters
    ----------
    keep
        Share of the blocks that a block of queries could see that it keeps, rounded to the nearest
        number and at least 1; None for no such rule. (The authors' code rounds down.)
    mass
        Share of the pooled softmax that the kept blocks hold together; None for no such rule. The
        block with which the share is reached is kept. (The authors' code leaves it out, so that
        theirs hold at most this share, and ours at least.)
    block
        Queries, and keys, that are pooled and chosen together. The paper has 128 and 64; here both
        are of one size, as the kernels' blocks are.
    together
        Whether heads that share a key head choose the same blocks, by the mean of their
        probabilities. Their keys then are collected once for all of them, which is most of the
        work. The paper's model has a key head for each head, where it makes no difference.

    Raises
    ------
    OptionError
        If neither rule is given, or a value cannot be.

    Notes
    -----
    Pooling is in the order of the prompt: a block may straddle two images, or an image and text,
    as the paper's blocks straddle frames. Its average counts all its tokens alike.
    """

    keep: float | None = 0.25
    mass: float | None = None
    block: int = BLOCK
    together: bool = True

    def __post_init__(self) -> None:
        for name, share in (("keep", self.keep), ("mass", self.mass)):
            number = isinstance(share, int | float) and not isinstance(share, bool)
            if share is not None and not (number and 0 < share <= 1):
                raise OptionError(
                    f"{name}={share!r} is no share. Give a number above 0 and at most 1, or None "
                    "for no such rule."
                )
        if self.keep is None and self.mass is None:
            raise OptionError(
                "keep and mass are both None, so nothing says how many blocks are kept. Give one "
                "of them, or both."
            )
        if type(self.block) is not int or self.block < 1:
            raise OptionError(f"block={self.block!r} is no number of tokens. Give 1 or more.")

    def mask(
        self,
        query: Tensor,
        key: Tensor,
        layout: PromptLayout,
        *,
        scale: float | None = None,
        model: Mask | None = None,
        first: int = 0,
    ) -> Mask:
        """Return the mask of one layer for one prompt, or for a part of its queries.

        Parameters
        ----------
        query
            [H, L, d], after the rotary embedding; [H, L - first, d] of a part.
        key
            [G, L, d], after the rotary embedding; H is a multiple of G.
        layout
            Of the prompt. Without an image nothing is left out.
        scale
            Factor on q kᵀ; d ** -0.5 where it is left out.
        model
            What the model's own mask lets through, for 1 head or H; None for `Causal`.
        first
            Position of the first query. A block of queries in which it stands is chosen for by the
            average of those that are there; the mask says nothing of queries before it.

        Returns
        -------
        Mask
            Of H heads, on the CPU, within the model's own.

        Raises
        ------
        LayoutError
            If q, k, the layout and the model's mask do not fit each other.
        TokensError
            If q or k are not finite.
        """
        model_mask = Causal(layout.length) if model is None else model
        _check(query, key, layout, model_mask, first)
        if not layout.images:
            return model_mask
        possible = model_mask.cover(self.block).some.expand(len(query), -1, -1)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        shares = _probabilities(query, key, scale, possible, self.block, first)
        if self.together:
            groups = shares.unflatten(0, (len(key), -1))
            shares = groups.mean(dim=1, keepdim=True).expand_as(groups).flatten(0, 1)
        chosen = self._choose(shares, possible)
        # A query always sees itself, so no row of the softmax is empty.
        chosen |= torch.eye(chosen.shape[-1], dtype=torch.bool)
        labels = torch.where(layout.image_of < 0, 1, 2 * layout.is_sink.long())
        # Tokens of images, text, sinks in images: text sees all, text and sinks are seen by all.
        table = torch.tensor([[False, True, True], [True, True, True], [False, True, True]])
        return model_mask & (
            Blocks(chosen, layout.length, self.block) | Classes(labels, table[None])
        )

    def _choose(self, shares: Tensor, possible: Tensor) -> Tensor:
        """Return BoolTensor [H, n, n], the kept blocks; of equal ones the first wins."""
        # Behind those that are possible with a probability that rounds to 0.
        last = shares.masked_fill(~possible, -1.0)
        ordered, order = last.sort(dim=-1, descending=True, stable=True)
        number = possible.sum(dim=-1, keepdim=True)  # [H, n, 1]
        count = torch.zeros_like(number)
        if self.keep is not None:
            count = (self.keep * number + 0.5).floor().long().clamp(min=1)
        if self.mass is not None:
            # A block is needed where those before it hold too little.
            held = F.pad(ordered.clamp(min=0.0).cumsum(dim=-1), (1, -1))
            needed = (held < self.mass).sum(dim=-1, keepdim=True)
            # What is too improbable for a float counts as well where everything is wanted.
            count = count.maximum(number if self.mass == 1 else needed)
        count = count.minimum(number)
        kept = torch.arange(shares.shape[-1]) < count
        return torch.zeros_like(possible).scatter(-1, order, kept)


def pool(states: Tensor, block: int = BLOCK, first: int = 0) -> Tensor:
    """Return the averages of blocks of tokens.

    Parameters
    ----------
    states
        [H, L - first, d].
    block
        Tokens of a block; the last one has what is left.
    first
        Position of the first of these tokens. The average of a block is that of the tokens that are
        there, and 0 where none is.

    Returns
    -------
    Tensor
        float32 [H, blocks, d].
    """
    if first:
        before, inside = divmod(first, block)
        head = min((block - inside) % block, states.shape[1])
        parts = [states.new_zeros(len(states), before, states.shape[2], dtype=torch.float32)]
        if head:
            parts.append(states[:, :head].mean(dim=1, keepdim=True, dtype=torch.float32))
        if head < states.shape[1]:
            parts.append(pool(states[:, head:], block))
        return torch.cat(parts, dim=1)
    whole = states.shape[1] // block * block
    averages = [states[:, :whole].unflatten(1, (-1, block)).mean(dim=2, dtype=torch.float32)]
    if whole < states.shape[1]:
        averages.append(states[:, whole:].mean(dim=1, keepdim=True, dtype=torch.float32))
    return torch.cat(averages, dim=1)


def _probabilities(
    query: Tensor, key: Tensor, scale: float, possible: Tensor, block: int, first: int
) -> Tensor:
    """Return the pooled softmax, float64 [H, n, n] on the CPU, 0 where nothing is possible."""
    with full_precision(query.device):
        # Heads side by side for each key head, so that keys need not be repeated.
        queries = pool(query, block, first).unflatten(0, (len(key), -1))
        logits = torch.einsum("ghqd,gkd->ghqk", queries, pool(key, block)).flatten(0, 1)
    # One row sums up to `mass` in float64: in float32 a long prompt's rounding would show.
    logits = logits.double().cpu() * scale
    if not bool(logits.isfinite().all()):
        raise TokensError(
            "q or k hold NaN or infinite values, or overflow. Check the model's dtype (float16 "
            "overflows; bfloat16 or float32 do not)."
        )
    return logits.masked_fill_(~possible, -math.inf).softmax(dim=-1)


def _check(query: Tensor, key: Tensor, layout: PromptLayout, model_mask: Mask, first: int) -> None:
    heads, queries, size = query.shape
    length = first + queries
    if first < 0 or key.shape[1:] != (length, size) or heads % len(key) or layout.length != length:
        raise LayoutError(
            f"queries {list(query.shape)} and keys {list(key.shape)} do not fit a prompt of "
            f"{layout.length} tokens. Give q and k of the whole prompt, with heads that are a "
            "multiple of the key heads."
        )
    if model_mask.length != length or model_mask.heads not in (1, heads):
        raise LayoutError(
            f"the model's mask of {model_mask.heads} heads and {model_mask.length} tokens was "
            f"given with queries of {heads} heads and {length} tokens. Make it for this prompt, "
            "for all heads or for 1."
        )
