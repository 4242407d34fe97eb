"""cls-attention: keep the tokens the encoder's CLS token attends to (FasterVLM)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.greedy.engine import folded_sum
from tokenprune.selectors.base import Selector
from tokenprune.tokens import TokenBatch


@dataclass(frozen=True)
class ClsAttention(Selector):
    """Score s_i = (1/H) sum_h A_h[CLS, i], the softmax including the CLS key itself.

    Source: Zhang et al., "[CLS] Attention is All You Need for Training-Free Visual Token Pruning"
    (FasterVLM), arXiv 2412.01818 v1, and its released code: the layer whose output is the
    feature, mean over heads, no renormalisation over patches. On LLaVA-NeXT that code prunes crops
    before their padding is taken off, and has no newline tokens; here a crop's padding is no
    candidate, and newlines stay, so that the same `keep` is more of what the image shows. On an
    encoder without CLS token the adapters hand in the attention each token receives, as the same
    authors do for SigLIP.
    """

    name: ClassVar[str] = "cls-attention"
    summary: ClassVar[str] = "attention of the encoder's CLS token, mean over heads"
    paper: ClassVar[str] = "FasterVLM, arXiv 2412.01818"
    needs: ClassVar[tuple[str, ...]] = ("cls_attention",)
    takes_sizes: ClassVar[bool] = True

    def score(self, tokens: TokenBatch) -> Tensor:
        """Return float32 [B, N]: `cls_attention` averaged over heads."""
        return mean_over_heads(tokens.require("cls_attention"))


def mean_over_heads(attention: Tensor) -> Tensor:
    """Return the mean of attention over heads, float32 [B, N], as a tensor of its own.

    Parameters
    ----------
    attention
        Floating point [B, H, N], or [B, N] where that is done.
    """
    if attention.ndim == 2:
        return attention.to(torch.float32, copy=True)  # the item's own stays its own
    # Tensor.mean adds the heads in another order for the last tokens of a row than for the
    # others, so tokens with equal attention would not tie.
    return folded_sum(attention.float(), dim=1) / attention.shape[1]
