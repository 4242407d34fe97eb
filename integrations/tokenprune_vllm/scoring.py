"""What selectors look at, taken from vLLM's vision tower while it runs.

In vLLM every tower's attention goes through one module, `MMEncoderAttention`, which is called with
q and k. A hook on the last one that the tower has (vLLM builds no layer behind the one whose output
is the feature) sees them; the fused kernel stays. Under tensor parallelism a rank has some of the
heads and a part of the projector: both are gathered, so that every rank sees what one would.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.model_executor.layers.attention import MMEncoderAttention
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    RowParallelLinear,
    UnquantizedLinearMethod,
)

from tokenprune.errors import UnreadableProjectorError, UnsupportedModelError
from tokenprune.plain_weights import why_altered
from tokenprune.tower.attention import cls_row, received


@dataclass
class Watched:
    """What hooks saw while the encoder ran once.

    Attributes
    ----------
    seen_features
        The projector's input, once for each of its runs, each [..., C].
    query, key
        [B, P, H, d] of the scoring layer, this rank's heads; None where no method asked.
    scale
        The factor on q kᵀ.
    """

    seen_features: list[Tensor] = field(default_factory=list)
    query: Tensor | None = None
    key: Tensor | None = None
    scale: float = 1.0

    @property
    def features(self) -> Tensor:
        """The projector's input of all items."""
        if len(self.seen_features) == 1:
            return self.seen_features[0]
        return torch.cat(self.seen_features)


def scoring_layer(tower: nn.Module) -> tuple[str, nn.Module]:
    """Return name and module of the last attention of a tower.

    Raises
    ------
    UnsupportedModelError
        If its attention does not go through `MMEncoderAttention`.
    """
    found = [(n, m) for n, m in tower.named_modules() if isinstance(m, MMEncoderAttention)]
    if not found:
        raise UnsupportedModelError(
            f"the vision tower {type(tower).__name__} computes its attention where tokenprune does "
            "not look, so methods that need attention cannot serve it. Choose a method that needs "
            "features or embeddings only (see `tokenprune methods`)."
        )
    return found[-1]


@contextmanager
def watch(entrance: nn.Module, attention: nn.Module | None) -> Iterator[Watched]:
    """Collect the projector's input and the scoring layer's q and k while the block runs."""
    watched = Watched()

    def keep_features(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        watched.seen_features.append(args[0])

    def keep_query_and_key(module: Any, args: Any, kwargs: Any) -> None:
        query = args[0] if args else kwargs["query"]
        key = args[1] if len(args) > 1 else kwargs["key"]
        heads = (module.num_heads, module.head_size)
        watched.query = query if query.ndim == 4 else query.unflatten(-1, heads)
        watched.key = key if key.ndim == 4 else key.unflatten(-1, heads)
        watched.scale = float(module.scale)

    with ExitStack() as hooks:
        hooks.callback(entrance.register_forward_pre_hook(keep_features).remove)
        if attention is not None:
            handle = attention.register_forward_pre_hook(keep_query_and_key, with_kwargs=True)
            hooks.callback(handle.remove)
        yield watched


def picture_attention(watched: Watched, heads: int, has_cls: bool) -> Tensor | None:
    """Return the scores of a tower that encodes whole pictures: CLS row, or attention received.

    Parameters
    ----------
    watched
        With q and k [B, P, H, d].
    heads
        How many the tower has, on all ranks together.
    has_cls
        Whether token 0 is a CLS token.

    Returns
    -------
    Tensor or None
        float32 [B, H, P] with the heads of all ranks and without the CLS token; None where the
        scoring layer was not watched.
    """
    if watched.query is None or watched.key is None:
        return None
    query, key = watched.query.transpose(1, 2), watched.key.transpose(1, 2)
    if has_cls:
        return _all_heads(cls_row(query, key, watched.scale)[..., 1:], heads)
    return _all_heads(received(query, key, watched.scale), heads)


def packed_attention(watched: Watched, heads: int, lengths: list[int]) -> Tensor | None:
    """Return the attention received in a tower that packs pictures into one sequence (Qwen-VL).

    Parameters
    ----------
    watched
        With q and k [1, P, H, d].
    heads
        How many the tower has, on all ranks together.
    lengths
        Patches of each picture or frame; attention stays inside them. They add up to P.

    Returns
    -------
    Tensor or None
        float32 [H, P] with the heads of all ranks.
    """
    if watched.query is None or watched.key is None:
        return None
    query, key = watched.query.transpose(1, 2), watched.key.transpose(1, 2)
    parts = [
        received(q, k, watched.scale)[0]
        for q, k in zip(query.split(lengths, dim=2), key.split(lengths, dim=2), strict=True)
    ]
    return _all_heads(torch.cat(parts, dim=-1)[None], heads)[0]


def _all_heads(attention: Tensor, heads: int) -> Tensor:
    """Put the heads of all ranks together: [B, H / ranks, P] -> [B, H, P].

    vLLM pads some towers with empty heads, and leaves others whole on every rank, where the
    number of heads does not divide by the ranks; the real ones come first.
    """
    if get_tensor_model_parallel_world_size() > 1:
        attention = tensor_model_parallel_all_gather(attention.contiguous(), dim=1)
    return attention[:, :heads]


def plain_linear(layer: Any) -> Any:
    """Return something with the whole `weight` and `bias` of one of vLLM's linear layers.

    Under tensor parallelism they are gathered anew each time: a copy would outlive the weights,
    which a trainer may update while the server runs.

    Raises
    ------
    UnreadableProjectorError
        If the layer computes something else, or the weights are not laid out as a plain matrix
        (quantised, or repacked).
    """
    if not isinstance(layer, LinearBase):
        return layer
    reason = why_altered(layer)
    if reason is not None:
        raise UnreadableProjectorError(f"of its {type(layer).__name__}, {reason}")
    if not isinstance(layer.quant_method, UnquantizedLinearMethod):
        raise UnreadableProjectorError(
            f"its {type(layer).__name__} is quantised ({type(layer.quant_method).__name__})"
        )
    # vLLM's own class of parameters says how they are loaded, and no more.
    weight = layer.weight.data.as_subclass(Tensor)
    if weight.ndim != 2 or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise UnreadableProjectorError(
            f"a weight of it is {weight.dtype} of shape {list(weight.shape)}, which is no plain "
            "matrix (quantised, or repacked)"
        )
    bias = None if layer.bias is None else layer.bias.data.as_subclass(Tensor)
    if layer.tp_size > 1:
        if isinstance(layer, ColumnParallelLinear):
            weight = tensor_model_parallel_all_gather(weight, dim=0)
            bias = None if bias is None else tensor_model_parallel_all_gather(bias, dim=0)
        elif isinstance(layer, RowParallelLinear):
            weight = tensor_model_parallel_all_gather(weight, dim=1)
    return SimpleNamespace(weight=weight, bias=bias)


def keep_weights_plain(projector: nn.Module) -> None:
    """Ask vLLM's CPU backend not to repack the projector's matrices, which selectors read."""
    for layer in projector.modules():
        if isinstance(layer, LinearBase):
            layer._cpu_skip_gemm_dispatch = True
