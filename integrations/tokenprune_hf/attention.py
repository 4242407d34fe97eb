"""Watching q and k of a vision tower's scoring layer while its fused kernel runs.

Hooks on the layer's projections see q and k as they pass; the rows that a method needs are
computed from them by `tokenprune.attention`.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenprune.attention import cls_row, received
from tokenprune_hf.watching import watch_input, watch_output


@dataclass
class AttentionProbe:
    """What the hooks on one attention module saw during one run of the tower.

    Attributes
    ----------
    query, key
        [B, P, H * d] as the projections put them out, or, for a fused projection, both inside
        `fused` [P, 3 * H * d].
    arguments
        What the attention module was called with, by parameter name.
    """

    query: Tensor | None = None
    key: Tensor | None = None
    fused: Tensor | None = None
    arguments: dict[str, Any] = field(default_factory=dict)


@contextmanager
def probe(attention: Any) -> Iterator[AttentionProbe]:
    """Watch one attention module while the block runs; its hooks are gone afterwards.

    Parameters
    ----------
    attention
        An attention module of transformers with `q_proj` and `k_proj` (and perhaps `q_norm`,
        `k_norm` after them), or with a fused `qkv`.
    """
    seen = AttentionProbe()
    signature = inspect.signature(attention.forward)

    def arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.arguments = dict(signature.bind(*args, **kwargs).arguments)
        seen.arguments.update(seen.arguments.pop("kwargs", {}))

    with ExitStack() as hooks:
        hooks.enter_context(watch_input(attention, arguments))
        if hasattr(attention, "qkv"):
            watched = {"fused": attention.qkv}
        else:
            watched = {
                "query": getattr(attention, "q_norm", attention.q_proj),
                "key": getattr(attention, "k_norm", attention.k_proj),
            }
        for name, module in watched.items():
            hooks.enter_context(watch_output(module, functools.partial(setattr, seen, name)))
        yield seen


def _heads(projected: Tensor, heads: int) -> Tensor:
    """[B, P, H * d] -> float32 [B, H, P, d]."""
    split: Tensor = projected.unflatten(-1, (heads, -1)).transpose(1, 2)
    return split.float()


def grid_attention(attention: Any, seen: AttentionProbe, has_cls: bool) -> Tensor:
    """Return the scores of a tower that encodes whole images: CLS row, or attention received.

    Parameters
    ----------
    attention
        The module that was watched (CLIP, SigLIP, InternVL, Idefics3 and their likes).
    seen
        What `probe` saw.
    has_cls
        Whether token 0 is a CLS token.

    Returns
    -------
    Tensor
        float32 [B, H, P], P without the CLS token.
    """
    heads = int(attention.num_heads)
    if seen.query is None or seen.key is None:
        raise RuntimeError("the scoring layer did not run while it was watched")
    query, key = _heads(seen.query, heads), _heads(seen.key, heads)
    scale = float(getattr(attention, "scale", query.shape[-1] ** -0.5))
    mask = seen.arguments.get("attention_mask")
    if has_cls:
        return cls_row(query, key, scale, mask)[..., 1:]
    return received(query, key, scale, mask)


def packed_rows_attention(attention: Any, seen: AttentionProbe, lengths: list[int]) -> Tensor:
    """Return the attention received in a tower that packs images into one row (Pixtral).

    Parameters
    ----------
    attention
        The module that was watched, with `q_proj`, `k_proj` and 2-D rotary positions.
    seen
        What `probe` saw, of one row [1, P, ...].
    lengths
        Patches of each image; attention stays inside them. They add up to P.

    Returns
    -------
    Tensor
        float32 [H, P].
    """
    if seen.query is None or seen.key is None:
        raise RuntimeError("the scoring layer did not run while it was watched")
    heads = int(attention.num_heads)
    query, key = _heads(seen.query, heads), _heads(seen.key, heads)
    cos, sin = seen.arguments["position_embeddings"]
    # The family's own rotary function: its convention is not ours to repeat.
    rotary = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    query, key = rotary(query, key, cos.float(), sin.float(), unsqueeze_dim=0)
    scale = float(attention.scaling)
    parts = zip(query.split(lengths, dim=2), key.split(lengths, dim=2), strict=True)
    return torch.cat([received(one, other, scale)[0] for one, other in parts], dim=-1)


def packed_attention(attention: Any, seen: AttentionProbe) -> Tensor:
    """Return the attention received in a tower that packs images into one sequence (Qwen-VL).

    Attention runs inside the segments that `cu_seqlens` marks: one per frame or image.

    Parameters
    ----------
    attention
        The module that was watched, with a fused `qkv` and 2-D rotary positions.
    seen
        What `probe` saw.

    Returns
    -------
    Tensor
        float32 [H, P] over all packed patches P.
    """
    if seen.fused is None:
        raise RuntimeError("the scoring layer did not run while it was watched")
    heads = int(attention.num_heads)
    query, key, _ = seen.fused.unflatten(-1, (3, heads, -1)).unbind(-3)
    cos, sin = seen.arguments["position_embeddings"]
    # The family's own rotary function: its convention is not ours to repeat.
    rotary = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision
    query, key = rotary(query, key, cos, sin)
    query, key = query.transpose(0, 1)[None], key.transpose(0, 1)[None]
    edges = seen.arguments["cu_seqlens"].tolist()
    scale = float(attention.scaling)
    return torch.cat(
        [
            received(query[:, :, start:end], key[:, :, start:end], scale)[0]
            for start, end in itertools.pairwise(edges)
        ],
        dim=-1,
    )
