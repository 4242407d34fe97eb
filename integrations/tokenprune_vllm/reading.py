"""Reading a video together with its question, by the first layers of vLLM's own language model.

The engine's layers run as they are, with the weights they have, on one prompt at a time. Only what
looks into the paged KV cache is left aside meanwhile: plain causal attention stands in its place.
Layers that keep a state in place of keys get one of their own (`own_states`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase

from tokenprune.errors import UnsupportedModelError
from tokenprune.families.base import Family
from tokenprune.families.registry import attending_layers, reference_layer
from tokenprune.question.attention import QueryKeys
from tokenprune.question.reader import SetPrompts
from tokenprune.transfer import to_device
from tokenprune_vllm.own_states import own_states

_TOLD_BY_MODALITY = frozenset({"visual_token_mask"})
"""Arguments of layers that are True [L, 1] where a row stands: experts are chosen by them."""


class LanguageModel:
    """vLLM's language model: a `tokenprune.question.reader.FirstLayers`.

    Parameters
    ----------
    model
        The vision-language model.
    family
        Of that model.
    vllm_config
        vLLM's.

    Raises
    ------
    UnsupportedModelError
        If its layers are not of a kind that can be read.
    """

    def __init__(self, model: Any, family: Family, vllm_config: Any) -> None:
        self._vllm_config = vllm_config
        whole = model.get_language_model()
        self._embed = whole.embed_input_ids
        self._layers: list[Any] = list(getattr(getattr(whole, "model", whole), "layers", ()))
        self._config = family.config
        self._text_config = family.config.get_text_config()
        self.width = int(self._text_config.hidden_size)
        why = family.why_unread()
        if why is not None:
            raise UnsupportedModelError(
                f"{type(model).__name__} {why}, and such layers are not read with the question in "
                "vLLM. Use flexselect-lite, or a method that needs no language model."
            )
        self._stateful: dict[int, Any] = {
            number: layer.linear_attn
            for number, layer in enumerate(self._layers)
            if isinstance(getattr(layer, "linear_attn", None), MambaBase)
        }
        attending = [one for n, one in enumerate(self._layers) if n not in self._stateful]
        for layer in attending or [None]:
            attention: Any = getattr(layer, "self_attn", None)
            parts = ("qkv_proj", "o_proj", "rotary_emb", "attn", "scaling", "head_dim")
            if not all(hasattr(attention, part) for part in parts):
                raise UnsupportedModelError(
                    f"the language model {type(whole).__name__} has layers of a kind that cannot "
                    "be read with the question in vLLM; those of Llama, Qwen2, Qwen3 and Qwen3.5 "
                    "can. Use flexselect-lite, or a method that needs no language model."
                )
            if getattr(attention.attn, "sliding_window", None) is not None:
                raise UnsupportedModelError(
                    f"the language model {type(whole).__name__} slides its attention window, and "
                    "such layers are not read with the question in vLLM. Use flexselect-lite, or a "
                    "method that needs no language model."
                )
        told = {
            name
            for layer in self._layers
            for name, taken in inspect.signature(layer.forward).parameters.items()
            if taken.default is taken.empty and taken.kind is not taken.VAR_KEYWORD
        }
        self._told_by_modality = told & _TOLD_BY_MODALITY
        unknown = told - {"positions", "hidden_states", "residual"} - _TOLD_BY_MODALITY
        if unknown:
            raise UnsupportedModelError(
                f"the layers of the language model {type(whole).__name__} are told "
                f"{', '.join(sorted(unknown))} as well, and tokenprune does not know what that is "
                "of a part of a prompt. Use flexselect-lite, or a method that needs no language "
                "model."
            )

    def reference_layer(self, asked: int | None) -> int:
        """Return the layer to read, from 0."""
        return reference_layer(
            self._config.model_type,
            len(self._layers),
            self.width,
            asked,
            attending_layers(self._text_config),
        )

    def embed(self, ids: Tensor) -> Tensor:
        """Return [S, L, D]."""
        embedded: Tensor = self._embed(to_device(ids, self.device))
        return embedded

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        device: torch.device = next(self._layers[0].parameters()).device
        return device

    def run(
        self, prompts: SetPrompts, layers: Sequence[int], values: bool, hidden: bool
    ) -> list[dict[int, QueryKeys]]:
        """Run the layers on one prompt after the other."""
        # Layers of experts look up where they run.
        with set_forward_context(None, self._vllm_config):
            return self._run(prompts, layers, values, hidden)

    def _run(
        self, prompts: SetPrompts, layers: Sequence[int], values: bool, hidden: bool
    ) -> list[dict[int, QueryKeys]]:
        found = []
        for index, states in enumerate(prompts.states):
            visual, asked = prompts.visual[index], prompts.asked[index]
            # Rows for deeper layers lie end to end, all prompts' visual tokens one after the other.
            first = sum(map(len, prompts.visual[:index]))
            of_prompt = slice(first, first + len(visual))
            deeper = []
            for rows in prompts.deeper:
                deeper.append(torch.zeros_like(states))
                deeper[-1][visual] = rows[of_prompt]
            seen: dict[int, QueryKeys] = {}
            is_visual = prompts.is_visual[index, :, None]
            beside = dict.fromkeys(self._told_by_modality, is_visual)
            for number in layers:
                positions = prompts.positions[..., index, :].contiguous()
                query, key, value, inputs, scale = self._read(
                    number, states, positions, deeper, beside
                )
                seen[number] = QueryKeys(
                    query=query[:, -prompts.questions :],
                    key=key,
                    visual=asked,
                    scale=scale,
                    value_norm=value[:, asked].float().abs().sum(dim=-1) if values else None,
                    hidden=inputs[asked] if hidden else None,
                )
            found.append(seen)
        return found

    def _read(
        self,
        number: int,
        states: Tensor,
        positions: Tensor,
        deeper: Sequence[Tensor],
        beside: Mapping[str, Tensor],
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
        beside
            What else the layers are told.

        Returns
        -------
        query, key, value
            [heads, L, d].
        hidden
            [L, D], the layer's input.
        scale
            Factor on q kᵀ.
        """
        # vLLM's layers pass the residual on apart, for a norm that adds it in one kernel.
        residual = None
        stateful = [layer for index, layer in self._stateful.items() if index < number]
        with own_states(stateful, len(states), self._vllm_config, states.device):
            for index, layer in enumerate(self._layers[:number]):
                with self._attending_plainly(index):
                    states, residual = layer(
                        positions=positions, hidden_states=states, residual=residual, **beside
                    )
                if index < len(deeper):
                    states = states + deeper[index]
        layer = self._layers[number]
        hidden = states if residual is None else states + residual
        taking = _Taking(layer.self_attn)
        # The layer's own modules make q and k, all norms and the rotary embedding included.
        with _in_place_of(layer.self_attn, taking), suppress(_TakenError):
            layer(positions=positions, hidden_states=states, residual=residual, **beside)
        query, key, value = taking.taken
        return query, key, value, hidden, float(layer.self_attn.scaling)

    def _attending_plainly(self, number: int) -> AbstractContextManager[None]:
        """Let a layer attend without the paged cache; one that keeps a state does not attend."""
        if number in self._stateful:
            return nullcontext()
        attention = self._layers[number].self_attn
        return _in_place_of(attention, _Causal(attention))


class _TakenError(Exception):
    """Ends a layer of which nothing more than q, k and v is wanted."""


class _Taking(nn.Module):
    """Stands where attention stands, keeps what comes in, and ends the layer."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self._width = int(attention.head_dim)
        self.taken: list[Tensor] = []

    def heads(self, flat: Tensor) -> Tensor:
        """[L, H * d] -> [H, L, d]."""
        return flat.reshape(len(flat), -1, self._width).transpose(0, 1)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Keep q, k and v.

        Raises
        ------
        _TakenError
            Always.
        """
        self.taken = [self.heads(one) for one in (query, key, value)]
        raise _TakenError


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
