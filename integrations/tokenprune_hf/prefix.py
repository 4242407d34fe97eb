"""Running a decoder's first layers, and taking q and k out of those that are asked for.

The decoder's modules run as they are and none is touched: the run goes through a copy of its
outermost module that holds fewer of the same layers.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tokenprune.errors import UnsupportedModelError
from tokenprune.question.attention import QueryKeys
from tokenprune_hf.interface import AttentionModule


def read_layers(
    language_model: Any,
    embeddings: Tensor,
    positions: Tensor,
    layers: Sequence[int],
    *,
    asked: Sequence[Tensor],
    questions: int,
    values: bool = False,
    hidden: bool = False,
    **arguments: Any,
) -> list[dict[int, QueryKeys]]:
    """Run the layers up to the last one asked for; of that one, q and k only.

    Parameters
    ----------
    language_model
        A decoder of transformers without its head: embeddings, layers, norm.
    embeddings
        [S, L, D], S prompts of one length.
    positions
        LongTensor [S, L], or [4, S, L] for models with M-RoPE.
    layers
        Which layers, from 0.
    asked
        For each prompt LongTensor [n], the columns of the visual tokens asked about.
    questions
        Q; the last Q tokens of each prompt are the question.
    values, hidden
        Whether `QueryKeys.value_norm` and `QueryKeys.hidden` are wanted.
    **arguments
        Whatever else the decoder's forward takes.

    Returns
    -------
    list of dict
        Layer -> q and k, for each prompt.

    Raises
    ------
    UnsupportedModelError
        If the layers are not of a kind that can be read.
    """
    probes = [_Probe(columns, questions, values, hidden) for columns in asked]
    prefix = _first_layers(language_model, layers, probes)
    prefix(inputs_embeds=embeddings, position_ids=positions, use_cache=False, **arguments)
    return [probe.seen for probe in probes]


def sliding_window(attention: AttentionModule) -> int | None:
    """Return how many tokens an attention module of a decoder sees; None where it sees all."""
    # Some (Mistral's) have no window of their own and take their config's with every call.
    source = attention if hasattr(attention, "sliding_window") else attention.config
    window: int | None = getattr(source, "sliding_window", None)
    return window


def rotary_of(attention: Any, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors by which an attention module turns q and k; some turn nothing."""
    if attention.config.model_type == "cohere2":  # in sliding layers alone
        rotates = sliding_window(attention) is not None
    else:  # Llama 4 and SmolLM3 say of each layer whether it does
        rotates = bool(getattr(attention, "use_rope", True))
    return (cos, sin) if rotates else (torch.ones_like(cos), torch.zeros_like(sin))


class _Projections(Protocol):
    """An attention module that is read: with q_proj, k_proj and v_proj, and norms where it has."""

    head_dim: int
    scaling: float

    @property
    def config(self) -> Any:
        """The language model's config."""


class _Probe:
    """Takes q and k of one prompt out of each watched layer.

    Attributes
    ----------
    seen
        Layer -> what was seen there.
    """

    def __init__(self, asked: Tensor, questions: int, values: bool, hidden: bool) -> None:
        self._asked = asked
        self._questions = questions
        self._values = values
        self._hidden = hidden
        self.seen: dict[int, QueryKeys] = {}

    def take(
        self,
        number: int,
        attention: _Projections,
        states: Tensor,
        normed: Tensor,
        rotary: tuple[Tensor, Tensor],
    ) -> None:
        """Compute q of the question and k of everything from one prompt's states [L, D]."""
        cos, sin = rotary_of(attention, *rotary)
        # The model's own function, as families pair the numbers of a head in different ways.
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        query = heads_of(attention, "q", normed[-self._questions :])
        key = heads_of(attention, "k", normed)
        value_norm = None
        if self._values:
            value = heads_of(attention, "v", normed[self._asked])
            value_norm = value[0].float().abs().sum(dim=-1)
        last = slice(-self._questions, None)
        self.seen[number] = QueryKeys(
            # The function takes q and k of one length, and here they have two: one at a time.
            query=rotate(query, query, cos[:, last], sin[:, last])[0][0],
            key=rotate(key, key, cos, sin)[0][0],
            visual=self._asked,
            scale=float(attention.scaling),
            value_norm=value_norm,
            hidden=states[self._asked] if self._hidden else None,
        )


def heads_of(attention: _Projections, which: str, states: Tensor) -> Tensor:
    """Project [L, D] to [1, heads, L, d], with the norm on q and k that some models have."""
    projected = getattr(attention, f"{which}_proj")(states[None])
    width = int(attention.head_dim)
    if which == "q":
        # Qwen3.5 projects to q and to a gate on the head's output, head by head, q first.
        split = projected.unflatten(-1, (int(attention.config.num_attention_heads), -1))
        split = split[..., :width]
    else:
        split = projected.unflatten(-1, (-1, width))
    # LFM2 calls them q_layernorm and k_layernorm.
    norm = getattr(attention, f"{which}_norm", getattr(attention, f"{which}_layernorm", None))
    if norm is not None:
        split = norm(split)
    heads: Tensor = split.transpose(1, 2)
    return heads


class _Watched(nn.Module):
    """Stands where a decoder layer stands: shows its input to the probes, then runs it or stops."""

    def __init__(self, number: int, layer: Any, probes: Sequence[_Probe], last: bool) -> None:
        super().__init__()
        self._number = number
        # In a list, so that the layer is not registered as a part of this module.
        self._layer = [layer]
        self._probes = probes
        self._last = last

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: Any) -> object:
        """Show the layer's input to the probes."""
        layer = self._layer[0]
        normed = layer.input_layernorm(hidden_states)
        cos, sin = kwargs["position_embeddings"]
        for index, probe in enumerate(self._probes):
            # One table may serve all prompts.
            of_prompt = slice(index, index + 1) if len(cos) > 1 else slice(None)
            rotary = cos[of_prompt], sin[of_prompt]
            probe.take(self._number, layer.self_attn, hidden_states[index], normed[index], rotary)
        # Behind the last layer asked for nothing is read, so that layer itself need not run.
        return hidden_states if self._last else layer(hidden_states, *args, **kwargs)


def _first_layers(language_model: Any, layers: Sequence[int], probes: Sequence[_Probe]) -> Any:
    """Return a copy of a language model's outermost module with its first layers, watched.

    Raises
    ------
    UnsupportedModelError
        If its layers are not of a kind that can be watched.
    """
    last = max(layers)
    kept: list[Any] = list(language_model.layers[: last + 1])
    for number in layers:
        attention: Any = getattr(kept[number], "self_attn", None)
        if not hasattr(attention, "k_proj") or not hasattr(kept[number], "input_layernorm"):
            raise UnsupportedModelError(
                f"the decoder layers of {type(language_model).__name__} have no q_proj and k_proj "
                "to read the question's attention from. Use flexselect-lite, or a method that "
                "needs no language model (see `tokenprune methods`)."
            )
        if (sliding := sliding_window(attention)) is not None:
            raise UnsupportedModelError(
                f"layer {number} of {type(language_model).__name__} sees {sliding} tokens only, so "
                "its attention cannot rank a video. Pass layer=... with a layer of full attention."
            )
        kept[number] = _Watched(number, kept[number], probes, last=number == last)
    # A shallow copy shares all modules but those that are replaced here, so that other threads run
    # the original meanwhile. Its `norm` has nothing to do: nobody looks at the output.
    prefix = copy.copy(language_model)
    prefix._modules = {
        **language_model._modules,
        "layers": nn.ModuleList(kept),
        "norm": nn.Identity(),
    }
    # What was put in front of the original's forward (accelerate, torch.compile) would run that.
    prefix.__dict__.pop("forward", None)
    prefix._compiled_call_impl = None
    return prefix
