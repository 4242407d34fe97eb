"""Reading a video together with its question, by the first layers of vLLM's own language model.

The engine's layers run as they are, with the weights they have, on one prompt at a time. Only what
looks into the paged KV cache is left aside meanwhile: plain causal attention stands in its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.errors import UnsupportedModelError
from tokenprune.families.base import Family
from tokenprune.reading import QueryKeys, reference_layer
from tokenprune.set_prompt import ItemPrompt, SetPrompt, positions_on_axes


class LanguageModel:
    """vLLM's language model, as far as it is read here.

    Parameters
    ----------
    model
        The vision-language model.
    family
        Of that model.

    Raises
    ------
    UnsupportedModelError
        If its layers are not of a kind that can be read.
    """

    def __init__(self, model: Any, family: Family) -> None:
        whole = model.get_language_model()
        self._embed = whole.embed_input_ids
        self._layers: list[Any] = list(getattr(getattr(whole, "model", None), "layers", ()))
        self._config = family.config
        self._text_config = family.config.get_text_config()
        self.width = int(self._text_config.hidden_size)
        for layer in self._layers or [None]:
            attention: Any = getattr(layer, "self_attn", None)
            parts = ("qkv_proj", "o_proj", "rotary_emb", "attn", "scaling", "head_dim")
            if not all(hasattr(attention, part) for part in parts):
                raise UnsupportedModelError(
                    f"the language model {type(whole).__name__} has layers of a kind that cannot "
                    "be read with the question in vLLM; those of Llama, Qwen2 and Qwen3 can. Use "
                    "flexselect-lite, or a method that needs no language model."
                )
            if getattr(attention.attn, "sliding_window", None) is not None:
                raise UnsupportedModelError(
                    f"the language model {type(whole).__name__} slides its attention window, and "
                    "such layers are not read with the question in vLLM. Use flexselect-lite, or a "
                    "method that needs no language model."
                )

    def layer(self, asked: int | None) -> int:
        """Return the reference layer."""
        return reference_layer(self._config.model_type, len(self._layers), self.width, asked)

    def embed(self, ids: Tensor) -> Tensor:
        """Return [L, D] of text."""
        embedded: Tensor = self._embed(ids.to(self.device))
        return embedded

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        device: torch.device = next(self._layers[0].parameters()).device
        return device

    def read(
        self, number: int, states: Tensor, positions: Tensor, deeper: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        """Run the layers before one, and of that one take what goes into its attention.

        Parameters
        ----------
        number
            The layer, from 0.
        states
            [L, D], a prompt.
        positions
            LongTensor [L] or [3, L].
        deeper
            [L, D] each, what is added behind the first layers (DeepStack).

        Returns
        -------
        query, key, value
            [heads, L, d].
        hidden
            [L, D], the layer's input.
        scale
            Factor on q kᵀ.
        """
        residual = None
        for index, layer in enumerate(self._layers[:number]):
            with _in_place_of(layer.self_attn, _Causal(layer.self_attn)):
                states, residual = layer(positions, states, residual)
            if index < len(deeper):
                states = states + deeper[index]
        layer = self._layers[number]
        hidden = states if residual is None else states + residual
        taking = _Taking(layer.self_attn)
        with _in_place_of(layer.self_attn, taking):
            layer.self_attn(positions=positions, hidden_states=layer.input_layernorm(hidden))
        query, key, value = taking.taken
        return query, key, value, hidden, float(layer.self_attn.scaling)


class _Taking(nn.Module):
    """Stands where attention stands, and keeps what comes in."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self._width = int(attention.head_dim)
        self.taken: list[Tensor] = []

    def heads(self, flat: Tensor) -> Tensor:
        """[L, H * d] -> [H, L, d]."""
        return flat.reshape(len(flat), -1, self._width).transpose(0, 1)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Keep q, k and v; return what o_proj takes and nobody reads."""
        self.taken = [self.heads(one) for one in (query, key, value)]
        return torch.zeros_like(query)


class _Causal(_Taking):
    """Plain causal attention over one prompt."""

    def __init__(self, attention: Any) -> None:
        super().__init__(attention)
        self._scale = float(attention.scaling)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return [L, H * d]."""
        q, k, v = (self.heads(one)[None] for one in (query, key, value))
        out = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1], scale=self._scale
        )
        return out[0].transpose(0, 1).reshape(len(query), -1)


@contextmanager
def _in_place_of(attention: Any, stand_in: nn.Module) -> Iterator[None]:
    """Let `stand_in` stand where the engine's paged attention stands."""
    paged = attention._modules["attn"]
    attention._modules["attn"] = stand_in
    try:
        yield
    finally:
        attention._modules["attn"] = paged


@dataclass(frozen=True, eq=False)
class EngineReader:
    """A `tokenprune.reading.QueryReader` of one item in one prompt.

    Attributes
    ----------
    language_model
        What reads.
    prompt
        The item's part in the prompt.
    rows
        [M, D + D * levels], what `SetPrompt.sources` stands for: the item's rows, then loose ones;
        behind the first D numbers what goes into deeper layers.
    grid
        Of the item.
    interval
        See `tokenprune.set_prompt.positions_on_axes`; None for models with ordinary RoPE.
    finite
        Whether numbers that are not finite count as 0.
    """

    language_model: LanguageModel
    prompt: ItemPrompt
    rows: Tensor
    grid: tuple[int, int, int]
    interval: int | None
    finite: bool = False

    def made_finite(self) -> EngineReader:
        """Return a reader in which nothing is NaN or infinite."""
        return replace(self, rows=self.rows.nan_to_num(0.0, 0.0, 0.0), finite=True)

    def read(
        self, sets: Sequence[Tensor], layer: int | None, *, values: bool, hidden: bool
    ) -> list[QueryKeys]:
        """Return q and k of the reference layer for each set; see the protocol."""
        number = self.language_model.layer(layer)
        return [self._read(self.prompt.of_set(own), number, values, hidden) for own in sets]

    def _read(self, prompt: SetPrompt, number: int, values: bool, hidden: bool) -> QueryKeys:
        model = self.language_model
        device = model.device
        is_visual = prompt.is_visual.to(device)
        states = model.embed(prompt.ids.where(~prompt.is_visual, 0)).clone()
        rows = self.rows[prompt.sources.to(self.rows.device)].to(states)
        states[is_visual] = rows[:, : model.width]
        deeper = []
        for start in range(model.width, rows.shape[1], model.width):
            deeper.append(torch.zeros_like(states))
            deeper[-1][is_visual] = rows[:, start : start + model.width]
        positions = torch.arange(len(states), device=device)
        if self.interval is not None:
            positions = positions_on_axes(is_visual, self.grid, self.interval)
        query, key, value, inputs, scale = model.read(number, states, positions, deeper)
        asked = prompt.asked.to(device)
        seen = QueryKeys(
            query=query[:, -prompt.questions :],
            key=key,
            visual=asked,
            scale=scale,
            value_norm=value[:, asked].float().abs().sum(dim=-1) if values else None,
            hidden=inputs[asked] if hidden else None,
        )
        return _finite(seen) if self.finite else seen


def _finite(seen: QueryKeys) -> QueryKeys:
    return replace(
        seen,
        **{
            name: value.nan_to_num(0.0, 0.0, 0.0)
            for name in ("query", "key", "value_norm", "hidden")
            if (value := getattr(seen, name)) is not None
        },
    )
