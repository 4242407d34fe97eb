"""`calibrate_heads`: which of BlindSight's masks each head of a model can do with.

The plain model reads prompts with several images, one at a time. Twice: first to find the sinks,
which two of the masks are made of, then to measure how much of each head's attention every mask
holds. Nothing but these shares is kept, so that thresholds can be tried at no cost afterwards.
Source: BlindSight (arXiv 2507.09071); see `tokenprune.masks.coverage` for what is reconstructed.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tokenprune.errors import (
    ConfigError,
    LayoutError,
    UnsupportedModelError,
)
from tokenprune.masks.coverage import (
    PromptCoverage,
    categories_of,
    coverage,
    densities,
    expected_density,
    received,
    thresholds,
)
from tokenprune.masks.heads import HeadCategories, ModelIdentity, Thresholds, layout_with_sinks
from tokenprune.masks.layout import PromptLayout
from tokenprune.masks.mask import BLOCK
from tokenprune.masks.sinks import Sinks, SinkSearch, massive_activations
from tokenprune.media.images import load_image
from tokenprune_eval.calibrate_heads.prompts import Prompt
from tokenprune_eval.shared.left_out import LeftOut, around
from tokenprune_hf.interface import Interception, Plain
from tokenprune_hf.layout import decoder_of, identity_of, image_spans_of, own_mask
from tokenprune_hf.prefix import sliding_window

_FIRST_STATE = 2
"""Massive activations are looked for from this layer's input on, as published: before, words'
embeddings stick out by themselves."""


@dataclass(frozen=True, eq=False)
class HeadCoverage:
    """What was measured on a model.

    Attributes
    ----------
    model
        Whose heads they are.
    sinks
        What was found first.
    prompts
        One for each prompt that was measured until then.
    planned
        How many prompts there are in all, with those that were left out.
    block
        Queries, and keys, of a block, for the densities.
    """

    model: ModelIdentity
    sinks: Sinks
    prompts: tuple[PromptCoverage, ...]
    planned: int
    block: int

    def choose(self, limits: Thresholds) -> HeadCategories:
        """Return the heads' categories under these thresholds; nothing is run."""
        categories = categories_of(self.prompts, limits)
        return HeadCategories(
            model=self.model,
            categories=categories,
            sinks=self.sinks.places,
            thresholds=limits,
            density=expected_density(self.prompts, categories),
            block=self.block,
            prompts=len(self.prompts),
        )


def calibrate_heads(
    model: Any,
    processor: Any,
    prompts: Sequence[Prompt],
    limits: Thresholds | None = None,
    *,
    block: int = BLOCK,
) -> HeadCategories:
    """Find the sinks, measure the heads and choose their categories.

    Parameters
    ----------
    model
        A vision-language model of transformers that can be given several images.
    processor
        Its processor.
    prompts
        Of two or more images each.
    limits
        What `tokenprune.masks.coverage.thresholds` returned; None for its defaults.
    block
        Queries, and keys, of a block, for the densities.

    Returns
    -------
    HeadCategories
        ``.save("heads.json")`` writes them, ``tokenprune_hf.sparse(model, "heads.json")`` uses
        them.

    Raises
    ------
    ConfigError
        If there is no prompt, or the block is not 1 or more.
    LayoutError
        If a prompt has fewer than two images.
    UnsupportedModelError
        If the model's attention cannot be watched.
    InputFileError
        If a picture cannot be read.
    TokensError
        If the model's attention is not finite.
    """
    sinks = find_sinks(model, processor, prompts)
    measured = measure_heads(model, processor, prompts, sinks, block=block)
    return measured.choose(thresholds(measured.model.layers) if limits is None else limits)


def find_sinks(
    model: Any,
    processor: Any,
    prompts: Sequence[Prompt],
    *,
    on_prompt: Callable[[], None] | None = None,
    left_out: LeftOut | None = None,
) -> Sinks:
    """Find the places of an image whose tokens are sinks; see `tokenprune.masks.sinks`.

    Parameters
    ----------
    model, processor, prompts
        As for `calibrate_heads`.
    on_prompt
        Called after each prompt.
    left_out
        Notes prompts that fail, by `Prompt.name`; None: the first one is an error.
    """
    _check(prompts)
    modules = [layer.self_attn for layer in decoder_of(model).layers]
    # Through a window later images see no more than an image's end: that is no sink.
    whole = [number for number, module in enumerate(modules) if sliding_window(module) is None]
    voting = frozenset(whole or range(len(modules)))
    search = SinkSearch(identity_of(model).hidden_size)
    for prompt in prompts:
        with around(left_out, prompt.name):
            inputs, layout = _prepare(model, processor, prompt)
            seen = _SinkObserver(model, modules, voting, layout, _reads_both_ways(inputs))
            _run(model, inputs, seen)
            search.add(layout, seen.attention, seen.massive)
        if on_prompt is not None:
            on_prompt()
    return search.result()


def measure_heads(
    model: Any,
    processor: Any,
    prompts: Sequence[Prompt],
    sinks: Sinks,
    *,
    block: int = BLOCK,
    on_prompt: Callable[[HeadCoverage], None] | None = None,
    left_out: LeftOut | None = None,
) -> HeadCoverage:
    """Measure how much of every head's attention each mask holds.

    Parameters
    ----------
    model, processor, prompts, block
        As for `calibrate_heads`.
    sinks
        What `find_sinks` returned.
    on_prompt
        Called after each prompt with all that is measured until then.
    left_out
        As for `find_sinks`.

    Raises
    ------
    NothingLeftError
        If no prompt is left.
    """
    _check(prompts)
    if block < 1:
        raise ConfigError(f"block={block} must be at least 1.")
    identity = identity_of(model)
    measured: list[PromptCoverage] = []
    for prompt in prompts:
        before = len(measured)
        with around(left_out, prompt.name):
            measured.append(_measure(model, processor, prompt, sinks, block))
        if on_prompt is not None and len(measured) > before:
            on_prompt(HeadCoverage(identity, sinks, tuple(measured), len(prompts), block))
    if left_out is not None:
        left_out.check("prompt", len(measured))
    return HeadCoverage(identity, sinks, tuple(measured), len(prompts), block)


def _measure(
    model: Any, processor: Any, prompt: Prompt, sinks: Sinks, block: int
) -> PromptCoverage:
    """Return what each mask holds of the heads' attention in one prompt."""
    inputs, plain_layout = _prepare(model, processor, prompt)
    layout = layout_with_sinks(plain_layout.length, plain_layout.images, sinks.places)
    modules = [layer.self_attn for layer in decoder_of(model).layers]
    seen = _CoverageObserver(model, modules, layout, _reads_both_ways(inputs))
    _run(model, inputs, seen)
    return seen.result(block)


def _check(prompts: Sequence[Prompt]) -> None:
    if not prompts:
        raise ConfigError("there is nothing to measure: give at least one prompt.")
    for number, prompt in enumerate(prompts, start=1):
        if len(prompt.images) < 2:
            raise LayoutError(
                f"prompt {number} has {len(prompt.images)} image(s) and cannot calibrate heads: "
                "what they do between images does not show. Give two or more."
            )


# What is seen while the model reads ---------------------------------------------------------------


class _Observer(Protocol):
    """Is shown what each decoder layer does with one prompt of L tokens."""

    def see_states(self, number: int, states: Tensor) -> None:
        """Before a layer: its hidden states [L, D]."""

    def see_attention(self, number: int, query: Tensor, key: Tensor, scale: float) -> None:
        """In a layer: q [H, L, d], k [G, L, d] and the factor on q kᵀ."""


class _SinkObserver:
    """Adds up the attention that a prompt's tokens receive, and finds massive activations.

    Attributes
    ----------
    attention
        float32 [L], summed over the layers that vote.
    massive
        Of each layer that is looked at, what `massive_activations` found.
    """

    def __init__(
        self,
        model: Any,
        modules: Sequence[Any],
        voting: frozenset[int],
        layout: PromptLayout,
        both_ways: bool,
    ) -> None:
        self._model, self._modules, self._voting = model, modules, voting
        self._layout, self._both_ways = layout, both_ways
        self.attention = torch.zeros(layout.length)
        self.massive: list[Tensor] = []

    def see_states(self, number: int, states: Tensor) -> None:
        if number >= min(_FIRST_STATE, len(self._modules) - 1):
            self.massive.append(massive_activations(states))

    def see_attention(self, number: int, query: Tensor, key: Tensor, scale: float) -> None:
        if number not in self._voting:
            return
        module = self._modules[number]
        own = own_mask(self._model, module, self._layout, both_ways=self._both_ways)
        self.attention.add_(received(query, key, self._layout, scale=scale, model=own))


class _CoverageObserver:
    """Measures how much of each head's attention every mask holds."""

    def __init__(
        self, model: Any, modules: Sequence[Any], layout: PromptLayout, both_ways: bool
    ) -> None:
        self._windows = [sliding_window(module) for module in modules]
        self._layout = layout
        # Layers of one window have one mask, and one density.
        self._own = {
            window: own_mask(model, module, layout, both_ways=both_ways)
            for window, module in zip(self._windows, modules, strict=True)
        }
        self._held: dict[int, Tensor] = {}

    def see_states(self, number: int, states: Tensor) -> None:
        """Nothing of the hidden states is wanted."""

    def see_attention(self, number: int, query: Tensor, key: Tensor, scale: float) -> None:
        own = self._own[self._windows[number]]
        self._held[number] = coverage(query, key, self._layout, scale=scale, model=own)

    def result(self, block: int) -> PromptCoverage:
        """Return the coverage of all layers, and their densities in blocks of `block`."""
        density = {window: densities(self._layout, own, block) for window, own in self._own.items()}
        return PromptCoverage(
            torch.stack([self._held[number] for number in range(len(self._windows))]),
            torch.stack([density[window] for window in self._windows]),
        )


# Running the model ------------------------------------------------------------------------------


def _prepare(model: Any, processor: Any, prompt: Prompt) -> tuple[dict[str, Any], PromptLayout]:
    """Return the model's arguments for a prompt, and the prompt's layout."""
    inputs = ask_about(processor, prompt.question, [load_image(one) for one in prompt.images])
    arguments = dict(inputs.to(model.device, model.dtype))
    input_ids = arguments["input_ids"]
    others = {name: value for name, value in arguments.items() if name != "input_ids"}
    (spans,) = image_spans_of(model, input_ids, others)
    if len(spans) != len(prompt.images):
        raise UnsupportedModelError(
            f"{type(model).__name__} reads {len(prompt.images)} pictures as {len(spans)} images, "
            "so its prompts' layout is not known. Name a model that keeps every picture's tokens "
            "together."
        )
    return arguments, PromptLayout(input_ids.shape[1], tuple(spans))


def ask_about(processor: Any, question: str, images: Sequence[Any]) -> Any:
    """Return what the processor makes of a question about several images: a batch of one prompt."""
    if getattr(processor, "chat_template", None):
        pictures = [{"type": "image"} for _ in images]
        content = [*pictures, {"type": "text", "text": question}]
        message = {"role": "user", "content": content}
        text = processor.apply_chat_template([message], add_generation_prompt=True)
    else:
        text = f"{processor.image_token}\n" * len(images) + question
    text = _apart(text, getattr(processor, "image_token", None))
    # A list per prompt: from it some processors see that the images share one.
    return processor(text=[text], images=[list(images)], return_tensors="pt")


def _apart(text: str, image: str | None) -> str:
    """Put line breaks between images that touch, as most chat templates do."""
    return re.sub(f"(?<={re.escape(image)})(?={re.escape(image)})", "\n", text) if image else text


def _reads_both_ways(arguments: Mapping[str, Any]) -> bool:
    """Return whether an image's tokens see those behind them: such processors mark the images."""
    return "token_type_ids" in arguments


def _run(model: Any, arguments: Mapping[str, Any], observer: _Observer) -> None:
    """Have the plain model read one prompt, and show an observer what its layers do."""
    layers = list(decoder_of(model).layers)
    number_of = {id(layer.self_attn): number for number, layer in enumerate(layers)}

    def handler(
        module: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, plain: Plain
    ) -> tuple[Tensor, Tensor | None]:
        observer.see_attention(number_of[id(module)], query[0], key[0], scale)
        return plain()

    with ExitStack() as stack:
        for number, layer in enumerate(layers):
            hook = functools.partial(_show_states, observer, number)
            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        interception = Interception([layer.self_attn for layer in layers], handler)
        stack.callback(interception.remove)
        stack.enter_context(torch.no_grad())
        model(**arguments, use_cache=False, logits_to_keep=1)


def _show_states(
    observer: _Observer,
    number: int,
    _layer: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> None:
    """Before layer `number` of the decoder runs; a hook."""
    observer.see_states(number, (args[0] if args else kwargs["hidden_states"])[0])
