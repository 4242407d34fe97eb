"""Watching q and k of a vision tower's scoring layer while its fused kernel runs.

Hooks on the layer's projections see q and k as they pass; the rows that a method needs are
computed from them by `tokenprune.tower.attention`.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.errors import UnsupportedModelError
from tokenprune.tower.tracing import APART, OUTPUTS
from tokenprune_hf.watching import watch_input, watch_output

_CHOOSE_ANOTHER = (
    "so methods that need attention cannot serve it. Use one that needs features or embeddings "
    "only (see `tokenprune methods`)."
)


def scoring_layer(tower: Any, chosen: int | Sequence[int], model: str) -> nn.Module:
    """Return the attention module of the layer whose output is the feature.

    Parameters
    ----------
    tower
        A vision encoder.
    chosen
        The config's ``vision_feature_layer``: an index into the hidden states, or several.
    model
        What to call the model in an error.

    Raises
    ------
    UnsupportedModelError
        If the tower's layers, or their q and k, are not where they are known to be.
    """
    tower = getattr(tower, "timm_model", tower)
    if hasattr(tower, "blocks"):  # Qwen's towers and timm's end in the layer that scores
        attention: nn.Module = tower.blocks[-1].attn
        return attention
    layers = _layers(tower)
    if not isinstance(chosen, int):
        chosen = max(chosen, key=lambda index: index % (len(layers) + 1))
    # hidden_states has one entry more than there are layers: entry 0 is the embedding.
    return _attention_of(layers[chosen % (len(layers) + 1) - 1], tower, model)


def _attention_of(layer: Any, tower: Any, model: str) -> nn.Module:
    """Return a layer's attention module, or raise UnsupportedModelError."""
    names = ("self_attn", "attention", "attn")
    found = next((getattr(layer, name) for name in names if hasattr(layer, name)), None)
    if found is None or not hasattr(found, "q_proj"):
        raise UnsupportedModelError(
            f"the vision tower {type(tower).__name__} of {model} has no q_proj and k_proj to "
            f"watch, {_CHOOSE_ANOTHER}"
        )
    module: nn.Module = found
    return module


def layer_count(tower: Any) -> int:
    """Return how many layers a vision encoder has."""
    tower = getattr(tower, "timm_model", tower)
    return len(tower.blocks if hasattr(tower, "blocks") else _layers(tower))


def layer_number(tower: Any, number: int, model: str) -> nn.Module:
    """Return the attention module of one of a tower's layers.

    Parameters
    ----------
    tower
        A vision encoder.
    number
        From 0.
    model
        What to call the model in an error.

    Raises
    ------
    UnsupportedModelError
        If the tower's layers, or their q and k, are not where they are known to be.
    """
    tower = getattr(tower, "timm_model", tower)
    if hasattr(tower, "blocks"):
        attention: nn.Module = tower.blocks[number].attn
        return attention
    return _attention_of(_layers(tower)[number], tower, model)


def _layers(tower: object) -> Sequence[Any]:
    encoder = (
        getattr(tower, "encoder", None)
        or getattr(getattr(tower, "vision_model", None), "encoder", None)
        or getattr(tower, "transformer", None)
        or getattr(tower, "model", None)  # Llama 4
        or tower
    )
    encoder = getattr(encoder, "encoder", encoder)  # Ovis2's stands in its transformer
    for name in ("layers", "layer"):
        layers = getattr(encoder, name, None)
        if layers is not None:
            return list(layers)
    raise UnsupportedModelError(
        f"the vision tower {type(tower).__name__} keeps its layers where tokenprune does not look, "
        f"{_CHOOSE_ANOTHER}"
    )


@dataclass
class SeenAttention:
    """q and k of one attention module during one run of the tower: `tokenprune.families.base.Seen`.

    Attributes
    ----------
    module
        The attention module that was watched.
    projected
        What its projections put out: ``query`` and ``key`` [B, P, H * d], or ``fused``
        [P, 3 * H * d]; where it is checked, ``value`` likewise, and ``output``, what goes into the
        last projection.
    arguments
        What it was called with, by parameter name.
    """

    module: Any
    projected: dict[str, Tensor] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def query(self) -> Tensor:
        """[B, H, P, d]."""
        return self._query_and_key[0]

    @property
    def key(self) -> Tensor:
        """[B, H, P, d]."""
        return self._query_and_key[1]

    @property
    def scale(self) -> float:
        """The factor on q kᵀ."""
        known = getattr(self.module, "scale", getattr(self.module, "scaling", None))
        return float(self.query.shape[-1] ** -0.5 if known is None else known)

    @property
    def mask(self) -> Tensor | None:
        """The mask that the module was called with."""
        mask: Tensor | None = self.arguments.get("attention_mask")
        return mask

    @property
    def value(self) -> Tensor:
        """[B, H, P, d]."""
        batch, heads, tokens, _ = self.query.shape
        if "fused" in self.projected:
            fused = self.projected["fused"].reshape(batch, tokens, 3, heads, -1)
            return fused[:, :, 2].transpose(1, 2)
        return self.projected["value"].reshape(batch, tokens, heads, -1).transpose(1, 2)

    @cached_property
    def _query_and_key(self) -> tuple[Tensor, Tensor]:
        if not self.projected:
            raise RuntimeError("the scoring layer did not run while it was watched")
        known = getattr(self.module, "num_heads", None)
        heads = int(self.module.config.num_attention_heads if known is None else known)
        # The family's own rotary function: its convention is not ours to repeat.
        rotary = sys.modules[type(self.module).__module__]
        # Of a packed tower all pictures' patches come in one sequence: [P, 3 * H * d], or apart.
        packed = None
        if hasattr(self.module, "fused_attn"):  # timm
            fused = self.projected["fused"].unflatten(-1, (3, heads, -1))
            query, key = fused.permute(2, 0, 3, 1, 4)[:2]
            return self._turned_by_timm(self.module.q_norm(query)), self._turned_by_timm(
                self.module.k_norm(key)
            )
        if "fused" in self.projected:
            packed = self.projected["fused"].unflatten(-1, (3, heads, -1)).unbind(-3)
        elif self.projected["query"].ndim == 2:
            packed = [self.projected[name].unflatten(-1, (heads, -1)) for name in ("query", "key")]
        if packed is not None:
            query, key = packed[:2]
            if hasattr(self.module, "q_norm"):
                query, key = self.module.q_norm(query), self.module.k_norm(key)
            cos, sin = self.arguments["position_embeddings"]
            query, key = rotary.apply_rotary_pos_emb_vision(query, key, cos, sin)
            return query.transpose(0, 1)[None], key.transpose(0, 1)[None]
        if hasattr(rotary, "apply_multidimensional_rope"):  # Gemma 4, whose norms are given heads
            cos, sin = self.arguments["position_embeddings"]
            places = self.arguments["position_ids"]
            query, key = (
                rotary.apply_multidimensional_rope(self.projected[name], cos, sin, places)
                for name in ("query", "key")
            )
            return query.transpose(1, 2), key.transpose(1, 2)
        if "freqs_ci" in self.arguments:  # Llama 4
            query, key = rotary.vision_apply_rotary_emb(
                *(self.projected[name].unflatten(-1, (heads, -1)) for name in ("query", "key")),
                self.arguments["freqs_ci"],
            )
            return query.transpose(1, 2), key.transpose(1, 2)
        query, key = (
            self.projected[name].unflatten(-1, (heads, -1)).transpose(1, 2).float()
            for name in ("query", "key")
        )
        if self.arguments.get("position_embeddings") is not None:
            cos, sin = self.arguments["position_embeddings"]
            query, key = rotary.apply_rotary_pos_emb(
                query, key, cos.float(), sin.float(), unsqueeze_dim=0
            )
        return query, key

    def _turned_by_timm(self, states: Tensor) -> Tensor:
        """Turn [B, H, P, d] by timm's rotary embedding, which leaves a CLS token as it is."""
        rope = self.arguments.get("rope")
        if rope is None:
            return states
        ahead = int(self.module.num_prefix_tokens)
        turn = sys.modules[type(self.module).__module__].apply_rot_embed_cat
        half = getattr(self.module, "rotate_half", False)
        turned = turn(states[:, :, ahead:], rope, half=half)
        return torch.cat([states[:, :, :ahead], turned], dim=2)


@contextmanager
def watch_attention(attention: Any) -> Iterator[SeenAttention]:
    """Watch one attention module while the block runs; its hooks are gone afterwards.

    Parameters
    ----------
    attention
        An attention module of transformers with `q_proj` and `k_proj` (and perhaps `q_norm`,
        `k_norm` after them), or with a fused `qkv`.
    """
    seen = SeenAttention(attention)
    with ExitStack() as hooks:
        hooks.enter_context(watch_input(attention, _keep_arguments(attention, lambda: seen)))
        for name, module in _projections(attention).items():
            keep = functools.partial(seen.projected.__setitem__, name)
            hooks.enter_context(watch_output(module, keep))
        yield seen


@contextmanager
def watch_runs(attention: Any, checked: bool) -> Iterator[list[SeenAttention]]:
    """Watch each run of one attention module while the block runs.

    Parameters
    ----------
    attention
        See `watch_attention`.
    checked
        Whether to see what `tokenprune.tower.any_attention.check_attention` asks for, too.
    """
    runs: list[SeenAttention] = []

    def another() -> SeenAttention:
        runs.append(SeenAttention(attention))
        return runs[-1]

    def keep(name: str, output: Tensor) -> None:
        runs[-1].projected[name] = output

    watched = _projections(attention)
    if checked and "fused" not in watched:
        watched["value"] = _apart(attention)[2]
    last = next((getattr(attention, name, None) for name in OUTPUTS if hasattr(attention, name)), 0)
    with ExitStack() as hooks:
        hooks.enter_context(watch_input(attention, _keep_arguments(attention, another)))
        for name, module in watched.items():
            hooks.enter_context(watch_output(module, functools.partial(keep, name)))
        if checked and isinstance(last, nn.Module):
            hooks.enter_context(
                watch_input(last, lambda args, _: runs[-1].projected.setdefault("output", args[0]))
            )
        yield runs


def _projections(attention: Any) -> dict[str, nn.Module]:
    """Return the modules whose outputs are q and k, or all in one."""
    if getattr(attention, "qkv", None) is not None:
        return {"fused": attention.qkv}
    query, key, _ = _apart(attention)
    return {
        "query": getattr(attention, "q_norm", query),
        "key": getattr(attention, "k_norm", key),
    }


def _apart(attention: Any) -> list[nn.Module]:
    """Return the modules that make q, k and v."""
    names = next(names for names in APART if hasattr(attention, names[0]))
    return [getattr(attention, name) for name in names]


def _keep_arguments(
    attention: Any, seen: Callable[[], SeenAttention]
) -> Callable[[tuple[object, ...], dict[str, Any]], None]:
    """Return what keeps, by name, the arguments with which an attention is called."""
    signature = inspect.signature(attention.forward)

    def arguments(args: tuple[object, ...], kwargs: dict[str, Any]) -> None:
        own = seen()
        own.arguments = dict(signature.bind(*args, **kwargs).arguments)
        own.arguments.update(own.arguments.pop("kwargs", {}))

    return arguments
