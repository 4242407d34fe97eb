"""What sparse masks must know of a model and a prompt: its decoder, who it is, where images stand.

Placeholders are found by token id, as everywhere in this adapter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import PromptError, UnsupportedModelError
from tokenprune.masks import Causal, Classes, ImageSpan, Mask, ModelIdentity, PromptLayout, Window
from tokenprune.masks.layout import image_spans
from tokenprune_hf.families.base import Family
from tokenprune_hf.families.registry import family_of
from tokenprune_hf.prefix import sliding_window

_SAMPLE = 64  # weights that tell one model from another

_BIDIRECTIONAL = ("gemma3",)
"""Models in which the tokens of an image see the whole of it, also what comes behind them."""


def decoder_of(model: Any) -> Any:
    """Return the decoder of a vision-language model, with ``.layers[i].self_attn``.

    Raises
    ------
    UnsupportedModelError
        If it is of no known family, or its layers have no such attention.
    """
    decoder = family_of(model).inner.language_model
    layers = getattr(decoder, "layers", [])
    if not len(layers) or not all(hasattr(layer, "self_attn") for layer in layers):
        raise UnsupportedModelError(
            f"the decoder {type(decoder).__name__} of {type(model).__name__} has no layers with "
            "self_attn, so its attention cannot be reached. Use a model with a decoder of the "
            "Llama or Qwen kind."
        )
    return decoder


def identity_of(model: Any) -> ModelIdentity:
    """Return what a heads file knows about a model."""
    decoder, text = decoder_of(model), model.config.get_text_config()
    heads = int(text.num_attention_heads)
    weights = decoder.get_input_embeddings().weight.detach().flatten()
    step = max(1, len(weights) // _SAMPLE)
    return ModelIdentity(
        model_type=str(model.config.model_type),
        layers=len(decoder.layers),
        heads=heads,
        key_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        hidden_size=int(text.hidden_size),
        sample=tuple(weights[step // 2 :: step][:_SAMPLE].float().tolist()),
    )


def own_mask(model: Any, attention: Any, layout: PromptLayout, *, both_ways: bool = True) -> Mask:
    """Return what a layer's own mask lets through in a prompt without padding.

    Parameters
    ----------
    model
        The whole model.
    attention
        The attention module of one of its decoder layers.
    layout
        Of the prompt.
    both_ways
        Whether the prompt came with token types, from which some models (Gemma 3) know that the
        tokens of an image see all of it.
    """
    own: Mask = Causal(layout.length)
    if both_ways and layout.images and model.config.model_type in _BIDIRECTIONAL:
        table = torch.eye(len(layout.images) + 1, dtype=torch.bool)
        table[0, 0] = False
        own = own | Classes(layout.image_of + 1, table[None])
    window = sliding_window(attention)
    return own if window is None else own & Window(layout.length, window)


def image_spans_of(
    model: Any, input_ids: Tensor, arguments: Mapping[str, Any]
) -> list[list[ImageSpan]]:
    """Return where the images and videos of each prompt stand.

    A run of placeholders is an image, or a frame where a video's frames have text between them.
    Images that touch are told apart where the arguments say how large each one is.

    Parameters
    ----------
    model
        A vision-language model of transformers.
    input_ids
        LongTensor [B, L]; places count padding as it does.
    arguments
        The other arguments of the call, as the processor returned them.

    Raises
    ------
    PromptError
        If images touch whose sizes are not known, or sizes and placeholders do not fit.
    """
    family = family_of(model)
    result: list[list[ImageSpan]] = [[] for _ in input_ids]
    for modality in ("image", "video"):
        places = input_ids == family.token_id(modality)
        runs = [(row, span) for row, flags in enumerate(places) for span in image_spans(flags)]
        total = sum(len(span) for _, span in runs)
        sizes = _sizes(family, modality, arguments, total)
        if sizes is not None and sum(sizes) != total:
            raise PromptError(
                f"the prompt holds {total} {modality} placeholders, and its {modality}s make "
                f"{sum(sizes)} tokens. Pass input_ids and pixel values of one and the same "
                "processor call, neither truncated."
            )
        if sizes is not None and len(sizes) > len(runs):
            runs = _split(runs, sizes, modality)
        elif sizes is None:
            _check_apart(arguments, modality, len(runs))
        for row, span in runs:
            result[row].append(span)
    return [sorted(spans, key=lambda span: span.start) for spans in result]


def _sizes(
    family: Family, modality: str, arguments: Mapping[str, Any], total: int
) -> list[int] | None:
    """Return how many placeholders each image has, where that is known without running anything."""
    grids = arguments.get(f"{modality}_grid_thw")
    if grids is not None:
        merged = int(family.tower(modality).spatial_merge_size) ** 2
        return [math.prod(grid) // merged for grid in grids.tolist()]
    pixels = arguments.get("pixel_values")
    fixed = family.model.config.model_type == "llava" and modality == "image"
    if fixed and isinstance(pixels, Tensor) and pixels.ndim == 4 and total % len(pixels) == 0:
        return [total // len(pixels)] * len(pixels)
    return None


def _split(
    runs: Sequence[tuple[int, ImageSpan]], sizes: Sequence[int], modality: str
) -> list[tuple[int, ImageSpan]]:
    """Cut runs of placeholders where one image ends and the next begins."""
    left = list(sizes)
    result = []
    for row, run in runs:
        start = run.start
        while start < run.stop and left and start + left[0] <= run.stop:
            result.append((row, ImageSpan(start, start + left[0])))
            start += left.pop(0)
        if start != run.stop:
            raise PromptError(
                f"prompt {row + 1} has {len(run)} {modality} placeholders in a row, which are no "
                f"whole number of its {modality}s (of {list(sizes)} tokens). Pass input_ids as the "
                "processor returned them."
            )
    return result


def _check_apart(arguments: Mapping[str, Any], modality: str, runs: int) -> None:
    """Raise if there are more images than runs of placeholders."""
    shapes = arguments.get(f"{modality}_sizes")
    if shapes is not None and len(shapes) > runs > 0:
        raise PromptError(
            f"{len(shapes)} {modality}s stand in {runs} runs of placeholders: some touch, and where"
            " one ends is not known. Put text between them, a line break for example."
        )
