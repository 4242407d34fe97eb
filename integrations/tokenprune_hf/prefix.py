"""Taking q and k out of a decoder's layers, and running its first ones in order to.

`taken` shows what one layer would attend with. `read_layers` runs the first layers for it: the
decoder's modules run as they are and none is touched, as the run goes through a copy of its
outermost module that holds fewer of the same layers.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from torch import Tensor, nn

from tokenprune.errors import UnsupportedModelError
from tokenprune.question.attention import QueryKeys
from tokenprune_hf.engine import CACHE_NAMES
from tokenprune_hf.interface import AttentionModule, check_logits

READ_BY_MODALITY = frozenset({"moe_mm_token_type_ids"})
"""Arguments of decoders that are 1 where a visual token stands: experts are chosen by them."""

_READ = frozenset(
    {
        *CACHE_NAMES,
        "input_ids",
        "inputs_embeds",
        "attention_mask",
        "position_ids",
        "use_cache",
        "cache_position",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "kwargs",
        "visual_pos_masks",
        "deepstack_visual_embeds",
    }
)
"""Arguments of decoders that are known: they are given, or need not be."""


def can_be_read(decoder: Any) -> bool:
    """Say whether all that a decoder's first layers read of a prompt is known.

    Others read ids besides, or features in a form of their own.
    """
    taken = set(inspect.signature(decoder.forward).parameters)
    return not taken - _READ - READ_BY_MODALITY


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
        LongTensor [S, L], or [3 or 4, S, L] for models with M-RoPE.
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
        self, number: int, states: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> None:
        """Keep of one prompt's layer what is asked for.

        Parameters
        ----------
        number
            The layer, from 0.
        states
            [L, D], what goes into the layer.
        query, key, value
            [heads, L, d], what goes into its attention function.
        scale
            Factor on q kᵀ.
        """
        value_norm = None
        if self._values:
            value_norm = value[:, self._asked].float().abs().sum(dim=-1)
        self.seen[number] = QueryKeys(
            query=query[:, -self._questions :],
            key=key,
            visual=self._asked,
            scale=scale,
            value_norm=value_norm,
            hidden=states[self._asked] if self._hidden else None,
        )


class _TakenError(Exception):
    """Ends a layer of which nothing more than q, k and v is wanted."""


class Taken(NamedTuple):
    """What a layer's attention function is given.

    Attributes
    ----------
    query
        [B, H, L, d], rotated.
    key, value
        [B, G, L, d].
    scale
        Factor on q kᵀ.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float


class _Watched(nn.Module):
    """Stands where a decoder layer stands: shows the probes what its attention is given."""

    def __init__(self, number: int, layer: Any, probes: Sequence[_Probe], last: bool) -> None:
        super().__init__()
        self._number = number
        # In a list, so that it is not registered as a part of this module.
        self._layer = [layer]
        self._probes = probes
        self._last = last

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: Any) -> object:
        """Show the probes the layer's q and k, then run it or stop."""
        layer = self._layer[0]
        remedy = "Use flexselect-lite, or a method that needs no language model"
        query, key, value, scale = taken(layer, hidden_states, *args, remedy=remedy, **kwargs)
        for index, probe in enumerate(self._probes):
            states, parts = hidden_states[index], (query[index], key[index], value[index])
            probe.take(self._number, states, *parts, scale)
        # Behind the last layer asked for nothing is read, so that layer itself need not run.
        return hidden_states if self._last else layer(hidden_states, *args, **kwargs)


def taken(layer: Any, hidden_states: Tensor, *args: object, remedy: str, **kwargs: Any) -> Taken:
    """Return what a decoder layer's attention would be given, without running the attention.

    The layer's own modules make q and k, whatever norms, gates and rotary embeddings there are.
    They run in a copy of the layer that shares all weights and calls another attention function.

    Parameters
    ----------
    layer
        Of a decoder of transformers.
    hidden_states, *args, **kwargs
        As the decoder passes them to the layer. A cache among them is filled.
    remedy
        What to do about a layer that cannot be read, for the error.

    Raises
    ------
    UnsupportedModelError
        If the layer does not attend by transformers' attention interface.
    """
    taking = _taking(layer)
    seen: list[Taken] = []
    taking.self_attn.__dict__[_TAKEN] = seen
    with suppress(_TakenError):
        taking(hidden_states, *args, **kwargs)
    if not seen:
        raise UnsupportedModelError(
            f"{type(layer.self_attn).__name__} does not attend by transformers' attention "
            f"interface, so that its queries and keys are not seen. {remedy} (see `tokenprune "
            "methods`)."
        )
    return seen[0]


_TAKING = "tokenprune-taking"
"""The name of the attention function that shows what it is given."""

_TAKEN = "_tokenprune_taken"
"""The attribute of a copied attention module in which what was shown is kept."""


def _taking(layer: Any) -> Any:
    """Return a copy of a decoder layer that shares its weights and whose attention is `_take`."""
    from transformers import AttentionInterface

    AttentionInterface.register(_TAKING, _take)
    layer = getattr(layer, "_orig_mod", layer)  # what `torch.compile` returned runs the original
    attention = _own_copy(layer.self_attn)
    attention.config = copy.copy(attention.config)
    attention.config._attn_implementation_internal = _TAKING
    taking = _own_copy(layer)
    taking._modules = {**layer._modules, "self_attn": attention}
    return taking


def _own_copy(module: Any) -> Any:
    """Return a shallow copy of a module that runs the forward of its class."""
    copied = copy.copy(module)
    # What was put in front of the original's forward (accelerate, torch.compile) would run that.
    copied.__dict__.pop("forward", None)
    copied._compiled_call_impl = None
    return copied


def _take(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: Tensor | None,
    scaling: float | None = None,
    **_arguments: Any,
) -> tuple[Tensor, None]:
    """Stand where an attention function of transformers stands, and show what it is given."""
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    module.__dict__[_TAKEN].append(Taken(query, key, value, scale))
    raise _TakenError


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
        if attention is None:
            raise UnsupportedModelError(
                f"the decoder layers of {type(language_model).__name__} have no self_attn, where "
                "the question's attention is read. Use flexselect-lite, or a method that needs no "
                "language model (see `tokenprune methods`)."
            )
        check_logits([attention], "methods that read the question")
        if (sliding := sliding_window(attention)) is not None:
            raise UnsupportedModelError(
                f"layer {number} of {type(language_model).__name__} sees {sliding} tokens only, so "
                "its attention cannot rank a video. Pass layer=... with a layer of full attention."
            )
        kept[number] = _Watched(number, kept[number], probes, last=number == last)
    # A shallow copy shares all modules but those that are replaced here, so that other threads run
    # the original meanwhile. Its `norm` has nothing to do: nobody looks at the output.
    prefix = _own_copy(language_model)
    prefix._modules = {
        **language_model._modules,
        "layers": nn.ModuleList(kept),
        "norm": nn.Identity(),
    }
    return prefix
