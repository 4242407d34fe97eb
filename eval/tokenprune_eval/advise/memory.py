"""Bytes of keys and values that a request holds in vLLM's cache, from a model's config alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BLOCK = 16
"""Tokens of a block of vLLM's cache, unless a server is told otherwise."""

_ALL = frozenset({"full_attention", "attention", "global_attention"})
_NEAR = frozenset({"sliding_attention", "chunked_attention", "local_attention"})
"""What configs call layers that attend to everything, and to the latest tokens alone. Layers of
other kinds keep a state, which is as large for every prompt."""


@dataclass(frozen=True)
class Layer:
    """What one layer keeps.

    Attributes
    ----------
    per_token
        Bytes for each token.
    window
        How many tokens at most; None for all.
    """

    per_token: int
    window: int | None = None


@dataclass(frozen=True)
class Held:
    """What all layers of a model keep of a request.

    Attributes
    ----------
    layers
        Those whose keys and values grow with the prompt.
    dtype
        Of keys and values, as people write it.
    """

    layers: Sequence[Layer]
    dtype: str

    @property
    def per_token(self) -> int:
        """Bytes for each token that no window has passed."""
        return sum(layer.per_token for layer in self.layers)

    def bytes_of(self, tokens: float, block: int = BLOCK) -> int:
        """Return the bytes of a request's tokens, in whole blocks.

        Parameters
        ----------
        tokens
            Of its prompt and its answer.
        block
            Tokens of a block.
        """
        total = 0
        for layer in self.layers:
            seen = tokens if layer.window is None else min(tokens, layer.window)
            total += math.ceil(seen / block) * block * layer.per_token
        return total


def held_by(config: Any, item_size: int, dtype: str) -> Held | None:
    """Return what a model's layers keep; None where its config does not tell.

    Keys and values of a layer are ``2 * heads * width`` numbers a token. With latent attention
    (MLA, DeepSeek-V2, arXiv 2405.04434) they are the latent and the rotated part of the key.

    Parameters
    ----------
    config
        Of a model of transformers.
    item_size
        Bytes of a number.
    dtype
        Its name.
    """
    text = config.get_text_config()
    depth = getattr(text, "num_hidden_layers", None)
    queries = getattr(text, "num_attention_heads", None)
    if not isinstance(depth, int) or not isinstance(queries, int):
        return None
    latent = getattr(text, "kv_lora_rank", None)
    if latent:
        numbers = latent + (getattr(text, "qk_rope_head_dim", 0) or 0)
    else:
        heads = getattr(text, "num_key_value_heads", None) or queries
        width = getattr(text, "head_dim", None) or text.hidden_size // queries
        if not isinstance(heads, int) or not isinstance(width, int):
            return None
        numbers = 2 * heads * width
    window = getattr(text, "sliding_window", None)
    if not isinstance(window, int) or getattr(text, "use_sliding_window", True) is False:
        window = None
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        kinds = ["full_attention" if window is None else "sliding_attention"] * depth
    # The last layers of some models read what earlier ones keep.
    own = depth - (getattr(text, "num_kv_shared_layers", 0) or 0)
    near = window or getattr(text, "attention_chunk_size", None)
    layers = [
        Layer(item_size * numbers, near if kind in _NEAR else None)
        for kind in kinds[:own]
        if kind in _ALL | _NEAR
    ]
    return Held(layers, dtype)
