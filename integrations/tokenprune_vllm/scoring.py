"""What selectors look at, taken from vLLM's vision tower while it runs.

In vLLM every tower's attention goes through one module, `MMEncoderAttention`, which is called with
q and k; that of Idefics2 leaves it out where pictures are padded to one length, and is seen by its
projection. A hook on the last one that the tower has (vLLM builds no layer behind the one whose
output is the feature) sees them; the fused kernel stays. Under tensor parallelism a rank has some
of the heads and a part of the projector: both are gathered, so that every rank sees what one would.
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
from vllm.model_executor.models.idefics2_vision_model import Idefics2VisionAttention

from tokenprune.errors import UnreadableProjectorError, UnsupportedModelError
from tokenprune.families import modules
from tokenprune.families.base import Family
from tokenprune.tower.plain_weights import why_altered


@dataclass
class Watched:
    """What hooks saw while the encoder ran once.

    Attributes
    ----------
    seen_features
        The projector's input, once for each of its runs, each [..., C].
    seen_queries, seen_keys
        [B, H, P, d] of the scoring layer, this rank's heads, once for each of its runs; none where
        no method asked.
    scale
        The factor on q kᵀ.
    mask
        None: pictures that vLLM encodes together do not see each other.
    middle
        q and k of a layer in the middle, where a method asked for it.
    """

    seen_features: list[Tensor] = field(default_factory=list)
    seen_queries: list[Tensor] = field(default_factory=list)
    seen_keys: list[Tensor] = field(default_factory=list)
    scale: float = 1.0
    mask: Tensor | None = None
    middle: Watched | None = None

    @property
    def query(self) -> Tensor:
        """[B, H, P, d] of all items; those that a packed tower ran one by one lie end to end."""
        return torch.cat(self.seen_queries, dim=2)

    @property
    def key(self) -> Tensor:
        """[B, H, P, d], likewise."""
        return torch.cat(self.seen_keys, dim=2)

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
    found = _attentions(tower)
    if not found:
        raise UnsupportedModelError(
            f"the vision tower {type(tower).__name__} computes its attention where tokenprune does "
            "not look, so methods that need attention cannot serve it. Choose a method that needs "
            "features or embeddings only (see `tokenprune methods`)."
        )
    name, last = found[-1]
    around = dict(found).get(name.rpartition(".")[0], last)
    return name, around


def middle_layer(tower: nn.Module, family: Family) -> nn.Module:
    """Return the attention module in the middle of a tower that `scoring_layer` was found in."""
    # Idefics2's holds another that is left out for some pictures.
    found = [(n, m) for n, m in _attentions(tower) if not isinstance(m, MMEncoderAttention)]
    found = found or _attentions(tower)
    return found[family.middle_layer(family.has_cls(tower), len(found))][1]


def _attentions(tower: nn.Module) -> list[tuple[str, nn.Module]]:
    kinds = (MMEncoderAttention, Idefics2VisionAttention)
    return [(n, m) for n, m in tower.named_modules() if isinstance(m, kinds)]


@contextmanager
def watch(
    entrance: nn.Module | None, attention: nn.Module | None, middle: nn.Module | None = None
) -> Iterator[Watched]:
    """Collect the projector's input and the q and k of layers while the block runs.

    Parameters
    ----------
    entrance
        Where the projector's input is seen, or None.
    attention, middle
        Of the scoring layer and of one in the middle, or None.
    """
    with ExitStack() as stack:
        watched = stack.enter_context(_watch(entrance, attention))
        if middle is not None:
            watched.middle = stack.enter_context(_watch(None, middle))
        yield watched


@contextmanager
def _watch(entrance: nn.Module | None, attention: nn.Module | None) -> Iterator[Watched]:
    watched = Watched()

    def keep_features(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        watched.seen_features.append(args[0])

    def keep_query_and_key(module: Any, args: Any, kwargs: Any) -> None:
        # Towers call it by position or by name, with heads apart or in one dimension.
        query = args[0] if args else kwargs["query"]
        key = args[1] if len(args) > 1 else kwargs["key"]
        keep(query, key, module.num_heads, module.head_size)
        watched.scale = float(module.scale)

    def keep_projected(_module: nn.Module, _args: Any, output: tuple[Tensor, ...]) -> None:
        idefics: Any = attention
        query, key, _ = output[0].chunk(3, dim=-1)
        keep(query, key, idefics.num_heads_per_partition, idefics.head_dim)
        watched.scale = float(idefics.scale)

    def keep(query: Tensor, key: Tensor, heads: int, width: int) -> None:
        for seen, kept in ((query, watched.seen_queries), (key, watched.seen_keys)):
            apart = seen if seen.ndim == 4 else seen.unflatten(-1, (heads, width))
            kept.append(apart.transpose(1, 2))

    with ExitStack() as hooks:
        if entrance is not None:
            hooks.callback(entrance.register_forward_pre_hook(keep_features).remove)
        if isinstance(attention, Idefics2VisionAttention):
            hooks.callback(attention.qkv_proj.register_forward_hook(keep_projected).remove)
        elif attention is not None:
            handle = attention.register_forward_pre_hook(keep_query_and_key, with_kwargs=True)
            hooks.callback(handle.remove)
        yield watched


def entrance_of(projector: Any) -> nn.Module:
    """Return the module whose input is the tokens' features: the projector, or the norm in it.

    vLLM's mergers are marked for torch.compile, and such modules do not run their hooks.
    """
    for name in ("ln_q", "norm", "pre_norm"):
        if hasattr(projector, name):
            inside: nn.Module = getattr(projector, name)
            return inside
    module: nn.Module = modules.entrance_of(projector)
    return module


def all_heads(attention: Tensor, vision_config: Any) -> Tensor:
    """Put the heads of all ranks together: [B, H / ranks, P] -> [B, H, P].

    vLLM leaves some towers whole on every rank, where the number of heads does not divide by the
    ranks; the real ones come first.
    """
    if get_tensor_model_parallel_world_size() > 1:
        attention = tensor_model_parallel_all_gather(attention.contiguous(), dim=1)
    return real_heads(attention, vision_config)


@dataclass(frozen=True)
class AllHeads:
    """q and k of a layer, of all heads: `tokenprune.families.base.Seen`.

    Attributes
    ----------
    watched
        What this rank saw.
    vision_config
        The tower's config.
    apart
        Whether ranks have different heads.
    """

    watched: Watched
    vision_config: Any
    apart: bool

    @property
    def query(self) -> Tensor:
        """[B, H, P, d]."""
        return self._whole(self.watched.query)

    @property
    def key(self) -> Tensor:
        """[B, H, P, d]."""
        return self._whole(self.watched.key)

    @property
    def scale(self) -> float:
        """The factor on q kᵀ."""
        return self.watched.scale

    @property
    def mask(self) -> Tensor | None:
        """The layer's."""
        return self.watched.mask

    def _whole(self, of_rank: Tensor) -> Tensor:
        if self.apart:
            return all_heads(of_rank, self.vision_config)
        return real_heads(of_rank, self.vision_config)


def real_heads(attention: Tensor, vision_config: Any) -> Tensor:
    """Leave out the empty heads with which vLLM pads some towers: they come last."""
    return attention[:, : heads_of(vision_config)]


def heads_of(vision_config: Any) -> int:
    """Return how many heads a tower's config says; Qwen's call them ``num_heads``."""
    return int(getattr(vision_config, "num_attention_heads", None) or vision_config.num_heads)


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


def only_dtype(projector: nn.Module, dtype: torch.dtype) -> torch.dtype | None:
    """Return the only dtype in which a projector can be called; None where it takes others, too.

    vLLM chooses the kernels of quantised layers by the model's dtype when it loads them.

    Parameters
    ----------
    projector
        One of vLLM's, or anything else.
    dtype
        The model's.
    """
    methods = [layer.quant_method for layer in projector.modules() if isinstance(layer, LinearBase)]
    plain = all(isinstance(method, UnquantizedLinearMethod) for method in methods)
    return None if plain else dtype


def keep_weights_plain(projector: nn.Module, besides: nn.Module | None = None) -> None:
    """Ask vLLM's CPU backend not to repack the projector's matrices, which selectors read.

    Quantised ones are not read, and some of them would run in another kernel.
    """
    apart = set() if besides is None else set(besides.modules())
    for layer in projector.modules():
        plain = isinstance(getattr(layer, "quant_method", None), UnquantizedLinearMethod)
        if plain and isinstance(layer, LinearBase) and layer not in apart:
            layer._cpu_skip_gemm_dispatch = True  # vLLM's own mark, read when weights are loaded
