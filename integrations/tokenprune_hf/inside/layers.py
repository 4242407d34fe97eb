"""InsideLayers: stands in front of a decoder's layers, where tokens leave as a method says."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from tokenprune.budget import Budget
from tokenprune.errors import PromptError, UnsupportedModelError
from tokenprune.families.registry import attending_layers
from tokenprune.inside.base import InsideMethod
from tokenprune_hf.attached import ThreadState, named_arguments
from tokenprune_hf.inside.continuing import Continuing
from tokenprune_hf.inside.items import Placed
from tokenprune_hf.inside.left import Left
from tokenprune_hf.inside.masks import form_of
from tokenprune_hf.inside.reading import Reading
from tokenprune_hf.interface import check_logits, check_no_checkpointing
from tokenprune_hf.vision import VisionModel

_WHAT = "methods that leave tokens out inside the language model"
"""As refusals name them."""

_KINDS = ("full_attention", "sliding_attention")
"""Kinds of layers that are known, as configs name them."""


class _Thread(ThreadState):
    """The call of the decoder that is running in a thread."""

    run: Reading | Continuing | None = None


class InsideLayers:
    """Lets tokens leave between the layers of one model, while a call says so.

    Parameters
    ----------
    vision
        The model.
    method
        What says which.
    budget
        Of each item: what is left of it behind the last stage.

    Raises
    ------
    UnsupportedModelError
        If the decoder's layers are not of a kind from which tokens can leave.
    OptionError
        If it has too few of them.
    """

    def __init__(self, vision: VisionModel, method: InsideMethod, budget: Budget) -> None:
        self._method = method
        self._budget = budget
        self._decoder = vision.decoder()
        _check_decoder(vision, self._decoder)
        self._layers = list(self._decoder.layers)
        self._stages = method.stages(len(self._layers))
        check_logits([self._layers[one.ranked_at].self_attn for one in self._stages], _WHAT)
        for layer in self._layers:
            form_of(layer.self_attn)
        self._thread = _Thread()

    def attach(self) -> list[RemovableHandle]:
        """Put hooks on the layers; they do nothing unless a call runs inside of `run`."""
        handles = [
            # No lambda: a partial of a bound method is bound anew in a copy of the model.
            layer.register_forward_pre_hook(
                functools.partial(self._before, number), with_kwargs=True
            )
            for number, layer in enumerate(self._layers)
        ]
        return [*handles, self._layers[-1].register_forward_hook(self._after)]

    def drops(self, items: Placed) -> bool:
        """Say whether any item of a call loses a token."""
        return any(
            self._budget.count(item.tokens.total) < item.tokens.total for item in items.items
        )

    def check_call(self, items: Placed, cache: Any) -> None:
        """Raise for a call that reads a prompt and cannot be pruned.

        Parameters
        ----------
        items
            Of the call.
        cache
            What it fills, or None.

        Raises
        ------
        UnsupportedModelError, PromptError
            Saying why.
        """
        check_no_checkpointing(self._decoder, _WHAT)
        last = max(items.added_in, default=-1)
        if self._stages[0].layer <= last:
            raise UnsupportedModelError(
                f"this model adds features of its encoder to the tokens behind layer {last} "
                f"(deepstack), and method {self._method.name!r} has tokens leave in front of layer "
                f"{self._stages[0].layer} already. Have its option {self._method.where} begin so "
                f"that they leave in front of layer {last + 1} or later."
            )
        if cache is not None:
            self._check_cache(cache)

    def _check_cache(self, cache: Any) -> None:
        """Raise for a cache whose layers all have one length."""
        from transformers.cache_utils import DynamicLayer

        layers = getattr(cache, "layers", None)
        kinds = set() if layers is None else {type(layer) for layer in layers}
        # A cache made without a config makes its layers as they are filled, all of this kind.
        if (later := getattr(cache, "layer_class_to_replicate", None)) is not None:
            kinds.add(later)
        if layers is None or any(not issubclass(kind, DynamicLayer) for kind in kinds):
            raise PromptError(
                f"the layers of a {type(cache).__name__} are all of one length, and behind a stage "
                "they hold fewer tokens. Leave out cache_implementation and the cache, or pass a "
                "DynamicCache."
            )

    def reading(self, items: Placed, repeats: int, known: Left | None) -> Reading:
        """Return what reads a batch of prompts; see `Reading`."""
        return Reading(
            self._method, self._budget, self._stages, self._layers, items, repeats, known
        )

    @contextmanager
    def run(self, run: Reading | Continuing | None) -> Iterator[None]:
        """Have the layers do in this thread what a call needs; None for the plain layers."""
        before = self._thread.run
        self._thread.run = run
        try:
            yield
        finally:
            self._thread.run = before

    def _plain(self, function: Callable[[], Any]) -> Any:
        """Run a function with plain layers: a copy of a layer has the layer's own hooks."""
        with self.run(None):
            return function()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before(
        self, number: int, layer: Any, args: tuple[object, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor], dict[str, Any]] | None:
        """Run before a layer."""
        run = self._thread.run
        if run is None:
            return None
        named = named_arguments(layer, args, kwargs)
        states: Tensor | None = named.pop("hidden_states", None)
        if states is None:
            raise UnsupportedModelError(
                f"{type(layer).__name__} is given no hidden_states, of which tokens could be left "
                "out. Use a method that prunes before the language model (see `tokenprune "
                "methods`)."
            )
        if isinstance(run, Continuing):
            return (states,), run.before(number, layer, states, named)
        states, arguments = run.before(number, layer, states, named, self._plain)
        # As decoders call their layers: the hidden states by position, all else by name.
        return (states,), arguments

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after(self, _layer: object, _args: object, output: Any) -> Any:
        """Run behind the last layer."""
        run = self._thread.run
        return run.after(output) if isinstance(run, Reading) else None


def _check_decoder(vision: VisionModel, decoder: Any) -> None:
    """Raise unless tokens can leave between a decoder's layers.

    Raises
    ------
    UnsupportedModelError
        Saying why not.
    """
    name = type(vision.model).__name__
    text = vision.model.config.get_text_config()
    layers = getattr(decoder, "layers", None)
    before = "Use a method that prunes before it (see `tokenprune methods`)."
    depth = int(text.num_hidden_layers)
    if (others := depth - len(attending_layers(text))) > 0:
        raise UnsupportedModelError(
            f"{others} of the {depth} layers of {name}'s language model do not attend to "
            f"tokens, but keep a state of all that they were given. {before}"
        )
    if not layers or any(getattr(layer, "self_attn", None) is None for layer in layers):
        raise UnsupportedModelError(
            f"the language model of {name} has no layers with self_attn, between which tokens "
            f"could leave. {before}"
        )
    kinds = set(getattr(text, "layer_types", None) or ()) - set(_KINDS)
    if kinds:
        raise UnsupportedModelError(
            f"the language model of {name} has layers of the kinds {', '.join(sorted(kinds))}, "
            f"whose masks are not known for fewer tokens. {before}"
        )
    if getattr(text, "num_kv_shared_layers", 0):
        raise UnsupportedModelError(
            f"layers of {name}'s language model attend with the keys of earlier ones, which hold "
            f"tokens that have left. {before}"
        )
