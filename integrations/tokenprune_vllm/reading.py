"""Reading a video together with its question, by the first layers of vLLM's own language model.

The engine's layers run as they are, with the weights they have, on one prompt at a time. Only what
looks into the paged KV cache is left aside meanwhile: plain causal attention stands in its place.
Layers that keep a state in place of keys get one of their own (`own_states`).

Under tensor parallelism all ranks read the same prompts in the same order, since layers wait for
all of them; each has some of the heads, which are put together in the order of ranks. In a pipeline
the first stage reads, where images are encoded, as far as its layers go.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.models.utils import PPMissingLayer

from tokenprune.errors import UnsupportedModelError
from tokenprune.families.base import Family
from tokenprune.families.registry import attending_layers, reference_layer
from tokenprune.question.attention import QueryKeys
from tokenprune.question.reader import SetPrompts
from tokenprune.transfer import to_device
from tokenprune_vllm.adapters import Adapters
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
        self._ranks = int(vllm_config.parallel_config.tensor_parallel_size)
        whole = model.get_language_model()
        self._whole = whole
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
        held = [one for one in self._layers if not isinstance(one, PPMissingLayer)]
        self._held = len(held)
        attending = [one for n, one in enumerate(held) if n not in self._stateful]
        for layer in attending or [None]:
            attention: Any = getattr(layer, "self_attn", None)
            parts = ["qkv_proj", "o_proj", "rotary_emb", "attn", "scaling", "head_dim"]
            if self._ranks > 1:
                parts.append("total_num_kv_heads")
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
            for layer in held
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
        """Return the layer to read, from 0.

        Raises
        ------
        UnsupportedModelError
            If there is no such layer, it does not attend, or it is on a later stage.
        """
        count = len(self._layers)
        number = reference_layer(
            self._config.model_type, count, self.width, asked, attending_layers(self._text_config)
        )
        if number >= self._held:
            raise UnsupportedModelError(
                f"layer {number} is to be read with the question, and the pipeline's first stage, "
                f"where images are encoded, has {self._held} of {count} layers. Give it more of "
                "them (VLLM_PP_LAYER_PARTITION, which says how many each stage has), choose an "
                "earlier layer (--option layer=...), or use flexselect-lite."
            )
        return number

    def embed(self, ids: Tensor) -> Tensor:
        """Return [S, L, D]."""
        # All tokens in one row, as the engine embeds a batch: so do embeddings with adapters.
        flat: Tensor = self._whole.embed_input_ids(to_device(ids, self.device).flatten())
        return flat.view(*ids.shape, -1)

    def modules(self) -> Iterator[nn.Module]:
        """Return what reads: vLLM may have put others in the place of the first ones."""
        return self._whole.modules()  # type: ignore[no-any-return]

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
                norm = value[:, asked].float().abs().sum(dim=-1) if values else None
                groups = getattr(self._layers[number].self_attn, "total_num_kv_heads", None)
                seen[number] = QueryKeys(
                    query=self._of_all_ranks(query[:, -prompts.questions :]),
                    key=self._of_all_ranks(key, groups),
                    visual=asked,
                    scale=scale,
                    value_norm=None if norm is None else self._of_all_ranks(norm, groups),
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
            [heads, L, d], this rank's.
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

    def _of_all_ranks(self, heads: Tensor, total: int | None = None) -> Tensor:
        """Put the heads of all ranks together, in the order of ranks.

        Parameters
        ----------
        heads
            [heads of this rank, ...].
        total
            How many there are; where that is less than ranks, neighbours have the same one. None:
            as many as all ranks have.
        """
        if self._ranks == 1:
            return heads
        together: Tensor = tensor_model_parallel_all_gather(heads.contiguous(), dim=0)
        return together if total is None else together[:: len(together) // total]

    def _attending_plainly(self, number: int) -> AbstractContextManager[None]:
        """Let a layer attend without the paged cache; one that keeps a state does not attend."""
        if number in self._stateful:
            return nullcontext()
        attention = self._layers[number].self_attn
        return _in_place_of(attention, _Causal(attention))


@dataclass(frozen=True, eq=False)
class Adapted:
    """A language model that reads with a LoRA adapter: a `question.reader.FirstLayers`, too.

    Attributes
    ----------
    language_model
        Whose layers read.
    adapters
        The adapters of the model.
    adapter
        Which of them, by vLLM's number.
    """

    language_model: LanguageModel
    adapters: Adapters
    adapter: int

    def reference_layer(self, asked: int | None) -> int:
        """Return the layer to read, from 0."""
        return self.language_model.reference_layer(asked)

    def embed(self, ids: Tensor) -> Tensor:
        """Return [S, L, D]."""
        with self.adapters.active(self.adapter, ids.numel(), self.language_model.modules()):
            return self.language_model.embed(ids)

    def run(
        self, prompts: SetPrompts, layers: Sequence[int], values: bool, hidden: bool
    ) -> list[dict[int, QueryKeys]]:
        """Run the layers on one prompt after the other; all of them are of one length."""
        tokens = prompts.states.shape[1]
        with self.adapters.active(self.adapter, tokens, self.language_model.modules()):
            return self.language_model.run(prompts, layers, values, hidden)


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
