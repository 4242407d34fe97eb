"""What sparse masks must know of a model and a prompt: its decoder, who it is, where images stand.

Placeholders are found by token id, as everywhere in this adapter.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tokenprune.errors import PromptError, UnsupportedModelError
from tokenprune.masks import ImageSpan, Mask, ModelIdentity, PromptLayout, layer_mask
from tokenprune.masks.heads import sampled
from tokenprune.masks.layout import image_spans
from tokenprune_hf.encoder_inputs import EncoderInputs, sizes_of
from tokenprune_hf.interface import AttentionModule
from tokenprune_hf.prefix import sliding_window
from tokenprune_hf.vision import VisionModel, vision_model


def decoder_of(model: object) -> Any:
    """Return the decoder of a vision-language model, with ``.layers[i].self_attn``.

    Raises
    ------
    UnsupportedModelError
        If it is of no known family, or its layers have no such attention.
    """
    decoder = vision_model(model).decoder()
    layers = getattr(decoder, "layers", [])
    if not len(layers) or not all(hasattr(layer, "self_attn") for layer in layers):
        raise UnsupportedModelError(
            f"the decoder {type(decoder).__name__} of {type(model).__name__} has layers without "
            "self_attn, such as those that keep a state in place of keys, which no mask reaches. "
            "Use a model whose layers all attend to tokens, as those of Llama and Qwen3 do."
        )
    if "chunked_attention" in (getattr(decoder.config, "layer_types", None) or ()):
        raise UnsupportedModelError(
            f"the decoder {type(decoder).__name__} of {type(model).__name__} has layers that see "
            "one chunk of the prompt, which is not known here. Use a model whose layers see all "
            "that stands before, as those of Llama 3 and Qwen3 do."
        )
    return decoder


def check_images_apart(model: object) -> None:
    """Raise for models whose images see each other, which no mask here knows.

    Raises
    ------
    UnsupportedModelError
        Naming the model.
    """
    if vision_model(model).family.images_see_each_other:
        raise UnsupportedModelError(
            f"{type(model).__name__} lets all images of a prompt see each other in both "
            "directions, and sparse masks do not know that. Use a model whose images see "
            "themselves alone."
        )


def identity_of(model: Any) -> ModelIdentity:
    """Return what a heads file knows about a model."""
    decoder, text = decoder_of(model), model.config.get_text_config()
    heads = int(text.num_attention_heads)
    weights = decoder.get_input_embeddings().weight.detach().flatten()
    return ModelIdentity(
        model_type=str(model.config.model_type),
        layers=len(decoder.layers),
        heads=heads,
        key_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        hidden_size=int(text.hidden_size),
        sample=tuple(weights[sampled(len(weights))].float().tolist()),
    )


def own_mask(
    model: object, attention: AttentionModule, layout: PromptLayout, *, both_ways: bool = True
) -> Mask:
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
        tokens of an image see all of it, as far as the layer's window goes.
    """
    window = sliding_window(attention)
    sees_all = vision_model(model).family.images_see_all(window is not None)
    return layer_mask(layout, window, both_ways=both_ways and sees_all)


def image_spans_of(
    model: object, input_ids: Tensor, arguments: Mapping[str, Any]
) -> list[list[ImageSpan]]:
    """Return where the images and videos of each prompt stand.

    A run of placeholders is an image or a video, or a frame where a video's frames have text
    between them. Images that touch are told apart by their sizes.

    Parameters
    ----------
    model
        A vision-language model of transformers.
    input_ids
        LongTensor [B, L]; places count padding as it does.
    arguments
        The other arguments of the call, as the processor returned them or as `generate` hands them
        to the model.

    Raises
    ------
    PromptError
        If images may touch and their sizes are not known, or do not fit the placeholders.
    """
    check_images_apart(model)
    vision = vision_model(model)
    ids = input_ids.cpu()
    result: list[list[ImageSpan]] = [[] for _ in ids]
    modalities = ["image", "video"]
    if vision.family.videos_as_images:  # a call has one kind of them, whose grid it brings
        modalities = ["video" if arguments.get("video_grid_thw") is not None else "image"]
    for modality in modalities:
        places = ids == vision.token_id(modality)
        runs = [(row, span) for row, flags in enumerate(places) for span in image_spans(flags)]
        total = sum(len(span) for _, span in runs)
        if total and (sizes := _sizes(vision, modality, arguments, total)) is not None:
            runs = _split(runs, sizes, modality)
        for row, span in runs:
            result[row].append(span)
    return [sorted(spans, key=lambda span: span.start) for spans in result]


def _sizes(
    vision: VisionModel, modality: str, arguments: Mapping[str, Any], total: int
) -> list[int] | None:
    """Return how many placeholders each image has, without running the encoder.

    None where a delimiter stands around every image, so that runs of placeholders are images: a run
    of InternVL's may be several tiles of one.

    Raises
    ------
    PromptError
        If images may touch, and the arguments do not tell their sizes.
    """
    family = vision.family
    if family.delimited:
        return None
    if modality == "video" and family.videos_by_frame:
        return None  # the encoder does not say which frames are one video's
    # `generate` runs the encoder itself, and passes on what came out in place of the pixels.
    encoded = (arguments.get("mm_encoder_outputs") or {}).get(modality)
    if encoded is not None:
        # Those of a video may come frame by frame.
        return [rows[..., 0].numel() for rows in encoded.pooler_output]
    if family.mrope:
        name = f"{modality}_grid_thw"
        if arguments.get(name) is None:
            return None
        return sizes_of(family, EncoderInputs(modality, {name: arguments[name]}), total)
    of_modalities = vision.encoder_inputs(dict(arguments))
    given = next((inputs for inputs in of_modalities if inputs.modality == modality), None)
    if given is None:
        raise PromptError(
            f"the prompts hold {total} {modality} placeholders and no {modality} was passed, so "
            "that it is not known where one ends. Pass the processor's pixel values along with its "
            "input_ids."
        )
    return sizes_of(family, given, total)


def _split(
    runs: Sequence[tuple[int, ImageSpan]], sizes: Sequence[int], modality: str
) -> list[tuple[int, ImageSpan]]:
    """Cut runs of placeholders where one image ends and the next begins."""
    total = sum(len(run) for _, run in runs)
    if sum(sizes) != total:
        raise PromptError(
            f"the prompts hold {total} {modality} placeholders, and {len(sizes)} {modality}(s) of "
            f"{sum(sizes)} tokens were passed. Pass input_ids and pixel values of one and the same "
            "processor call, neither truncated."
        )
    # Runs and sizes count the same placeholders in the same order, text left out. An image that
    # ends inside a run cuts it; a run that ends inside an image does so where text stands in it.
    result, ends = [], sorted(set(itertools.accumulate(sizes)))
    before = 0  # placeholders in front of the run
    for row, run in runs:
        inside = [end for end in ends if before < end < before + len(run)]
        edges = [run.start, *(end - before + run.start for end in inside), run.stop]
        result += [(row, ImageSpan(*edge)) for edge in itertools.pairwise(edges)]
        before += len(run)
    return result
