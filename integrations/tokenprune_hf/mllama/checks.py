"""What a call of a Llama-3.2-Vision brings, and which calls cannot be trimmed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from tokenprune.errors import PromptError, UnsupportedModelError
from tokenprune_hf.caches import Held
from tokenprune_hf.mllama.choice import Choice

_CROPPED = "what is rejected of a draft is cut off every layer of the cache, vision tokens included"
_REFUSED = {
    "assistant_model": _CROPPED,
    "assistant_early_exit": _CROPPED,
    "prompt_lookup_num_tokens": _CROPPED,
    "prefill_chunk_size": "transformers passes no images along with chunks",
}


def brings_images(arguments: Mapping[str, Any]) -> bool:
    """Say whether a call brings images, encoded or not."""
    return any(
        arguments.get(name) is not None for name in ("pixel_values", "cross_attention_states")
    )


def text_of(arguments: Mapping[str, Any]) -> Tensor | None:
    """Return the ids [B, S] or embeddings [B, S, C] that a call reads, or None."""
    names = ("inputs", "input_ids", "inputs_embeds")
    return next((arguments[name] for name in names if arguments.get(name) is not None), None)


def vision_keys(cache: Any, numbers: Iterable[int]) -> list[Tensor | None]:
    """Return the keys that a cache holds for each cross-attention layer, None where none."""
    layers = getattr(cache, "layers", [])
    of_layers = [layers[number].keys if number < len(layers) else None for number in numbers]
    # transformers makes a layer before it is filled: no keys, or a tensor without entries.
    return [keys if isinstance(keys, Tensor) and keys.numel() else None for keys in of_layers]


def vision_lengths(cache: Any, numbers: Iterable[int]) -> tuple[int, ...]:
    """Return how many vision tokens a cache holds for each cross-attention layer."""
    return tuple(0 if keys is None else keys.shape[-2] for keys in vision_keys(cache, numbers))


def refuse(arguments: Mapping[str, Any], config: object) -> None:
    """Raise for arguments of `generate` that cannot work with images, or with trimmed ones.

    Parameters
    ----------
    arguments
        The call's, by name.
    config
        The model's own, for a call that brings none.

    Raises
    ------
    PromptError
        Saying why.
    """
    if arguments.get("generation_config") is not None:
        config = arguments["generation_config"]
    for name, reason in _REFUSED.items():
        if arguments.get(name, getattr(config, name, None)) is not None:
            raise PromptError(
                f"generate({name}=...) is not supported with trimmed attention: {reason}. Leave it "
                "out, or call it outside the block."
            )


def check_prompt(
    arguments: Mapping[str, Any], cache: Any, text: Tensor, layers: Mapping[int, Any]
) -> None:
    """Raise unless a call that brings images can be trimmed.

    Parameters
    ----------
    arguments
        The call's, by name.
    cache
        The one among them.
    text
        See `text_of`.
    layers
        The model's cross-attention layers by number.

    Raises
    ------
    UnsupportedModelError, PromptError
        Saying why.
    """
    if any(layer.training and layer.gradient_checkpointing for layer in layers.values()):
        raise UnsupportedModelError(
            "trimmed attention does not work with gradient checkpointing, which runs layers a "
            "second time after the call. Call model.eval(), or turn gradient checkpointing off."
        )
    from transformers.cache_utils import DynamicLayer

    of_cache = getattr(cache, "layers", [])
    kinds = {type(of_cache[number]) for number in layers if number < len(of_cache)}
    # A cache made without a config makes its layers as they are filled, all of this kind.
    if (later := getattr(cache, "layer_class_to_replicate", None)) is not None:
        kinds.add(later)
    if kinds - {DynamicLayer}:
        raise PromptError(
            f"a {type(cache).__name__} does not shrink with its vision tokens, so it cannot be "
            "used with trimmed attention. Leave out cache_implementation and the cache, or "
            "pass a DynamicCache."
        )
    if any(vision_lengths(cache, layers)):
        raise PromptError(
            "images cannot be added to a cache that already holds some. Leave out pixel_values "
            "and cross_attention_states if the cache holds them, or call without "
            "a cache. `generate` takes pixel_values alone: it would pass "
            "cross_attention_states again at every step."
        )
    pixels = arguments.get("pixel_values")
    if pixels is not None and len(pixels) != len(text):
        raise PromptError(
            f"pixel_values are those of {len(pixels)} prompts, and the text has {len(text)}. "
            "Pass both as the processor returned them."
        )


def known_choice(
    cache: Any, held: Held[Choice] | None, text: Tensor, numbers: Iterable[int]
) -> Choice:
    """Return what was chosen for the rows of a filled cache.

    Parameters
    ----------
    cache
        A call's.
    held
        What it was found to hold.
    text
        See `text_of`.
    numbers
        Of the cross-attention layers.

    Raises
    ------
    PromptError
        If that is not known, or the cache does not hold it any more.
    """
    if held is None:
        raise PromptError(
            "this cache was filled outside the block in which attention is trimmed, so it is "
            "not known which vision tokens it holds. Let the block begin before the prompt is "
            "read."
        )
    choice = held.holding.prompt
    if held.rows is not None:
        choice = choice.of_rows(held.rows)
    keys = vision_keys(cache, numbers)
    lengths = tuple(0 if of_layer is None else of_layer.shape[-2] for of_layer in keys)
    # `tokenprune_hf.caches` looks at a layer of text alone. A crop of the cache cuts every layer,
    # vision tokens included, and shows here.
    rows = {len(text), *(len(of_layer) for of_layer in keys if of_layer is not None)}
    if rows != {choice.rows} or lengths != choice.lengths:
        raise PromptError(
            f"{choice.rows} prompts left {list(choice.lengths)} vision tokens in this cache's "
            f"cross-attention layers; now {len(text)} go on from it and it holds "
            f"{list(lengths)}. Go on with the same rows, from a cache that was "
            "not cropped or otherwise changed."
        )
    return choice
