"""A tiny model of every type of `tests.hf.type_table`, and prompts for it."""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)

from tests.hf.media import FUYU_PATCHES, noise
from tests.hf.models import BOS, END, IMAGE, PAD, START, VIDEO, Tiny, enliven
from tests.hf.small_configs import NOT_TO_SAY, small_config
from tests.hf.type_table import OWN_FAULTS, TIMM, TYPES, VIDEOS

_SEEING: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
_OF_ANYTHING: Any = MODEL_FOR_MULTIMODAL_LM_MAPPING
ARCHITECTURES: dict[Any, Any] = dict(_SEEING.items()) | {
    config: architecture
    for config, architecture in _OF_ANYTHING.items()
    if {"image", "video"} & set(architecture.input_modalities)
}
"""Class of a config -> class of its models, for all that read images or videos and text."""


def architecture_of(kind: str) -> Any:
    """Return the class of a type's models."""
    return ARCHITECTURES[CONFIG_MAPPING[kind]]


def takes_rows(kind: str) -> bool:
    """Say whether the models of a type can be handed rows in this release."""
    return "mm_encoder_outputs" in inspect.signature(architecture_of(kind).forward).parameters


def video_media(kind: str, model: Any) -> dict[str, Any]:
    """Return what the encoder is given of a video: two steps of the image's patches, or frames."""
    image = TYPES[kind].media(model.config, [[0]])
    if "image_grid_thw" not in image:
        return {"pixel_values_videos": noise(50, 1, 4, *image["pixel_values"].shape[-3:])}
    shape = image["pixel_values"].shape
    media = {
        "pixel_values_videos": torch.cat([noise(50, *shape), noise(51, *shape)]),
        "video_grid_thw": image["image_grid_thw"] * torch.tensor([2, 1, 1]),
    }
    if "image_merge_sizes" in image:
        media["video_merge_sizes"] = image["image_merge_sizes"]
    if kind.endswith("_thinker"):
        media["video_second_per_grid"] = torch.tensor([1.0])
    return media


def video_prompt(kind: str, model: Any) -> dict[str, Any]:
    """Return a prompt of text, a video, text, the image number 1 and text."""
    own, video = TYPES[kind], VIDEOS[kind]
    media = video_media(kind, model)
    around = own.around if own.around[0] else ([START], [END])
    length = sum(map(len, encoded(model, media, "video")[1]))
    frames = 2 if video.by_frame else 1
    ids = [BOS, 11, 12]
    for frame in range(frames):
        ids += [30 + frame, *around[0], *[VIDEO] * (length // frames), *around[1]]
    image = own.media(model.config, [[1]])
    rows = sum(map(len, encoded(model, image)[1]))
    ids += [21, 22, *around[0], *[IMAGE] * rows, *around[1], 40, 41, 42]
    input_ids = torch.tensor([ids])
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    kinds = (input_ids == IMAGE).long() + 2 * (input_ids == VIDEO).long()
    return inputs | dict.fromkeys(own.types, kinds) | media | image


def present() -> list[str]:
    """Return the types that can be run here."""
    return [
        kind
        for kind in TYPES
        if kind in CONFIG_MAPPING
        and takes_rows(kind)
        and (kind, transformers.__version__) not in OWN_FAULTS
        and (kind not in TIMM or importlib.util.find_spec("timm") is not None)
    ]


def tiny(kind: str) -> Tiny:
    """Return how the tiny model of a type is made."""
    own = TYPES[kind]
    config = small_config(kind, own.over)
    return Tiny(lambda: config, architecture_of(kind))


CONVOLUTIONAL = {"fast_vlm", "gemma3n"}
"""Types with towers of timm that convolve."""


def model_of(kind: str) -> Any:
    """Return the tiny model of a type."""
    model = tiny(kind).model()
    if kind in CONVOLUTIONAL:
        enliven(model)
    model.generation_config.suppress_tokens = NOT_TO_SAY
    return model


# Prompts ------------------------------------------------------------------------------------------


def prompts_of(kind: str, model: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """Return what a processor would: prompts of text, images and text, padded on the left.

    Parameters
    ----------
    kind
        The type.
    model
        Its tiny model, whose encoder says how many rows an image has.
    prompts
        The numbers of the images of each prompt.
    """
    own = TYPES[kind]
    rows = []
    for prompt in prompts:
        ids = [BOS, *range(11, 14 + len(prompt))]
        for number in prompt:
            length = sum(map(len, encoded(model, own.media(model.config, [[number]]))[1]))
            ids += [*own.around[0], *[IMAGE] * length, *own.around[1], 20 + number, 21, 22]
        rows.append([*ids, 40, 41, 42])
    longest = max(map(len, rows))
    input_ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    kinds = torch.zeros_like(input_ids) if own.prefix else (input_ids == IMAGE).long()
    inputs |= dict.fromkeys(own.types, kinds)
    return inputs | own.media(model.config, prompts)


def encoded(model: Any, media: dict[str, Any], modality: str = "image") -> tuple[Any, list[Tensor]]:
    """Return what the model's own encoder returns, and its rows [n, D] entry by entry."""
    name = f"get_{modality}_features"
    encoder = getattr(model.base_model if hasattr(model.base_model, name) else model, name)
    with torch.no_grad():
        output = encoder(**given_to(encoder, media))
    return output, entries(rows_in(output))


def given_to(function: Any, media: dict[str, Any]) -> dict[str, Any]:
    """Return those arguments that an encoder reads, some of which are the forward's alone."""
    names = inspect.signature(function).parameters
    if FUYU_PATCHES in media:
        media = {"pixel_values": media[FUYU_PATCHES], **media}
    return {name: value for name, value in media.items() if name in names} | {"return_dict": True}


def rows_in(output: Any) -> Any:
    """Return the field of an encoder's output that the forward reads."""
    if getattr(output, "pooler_output", None) is not None:
        return output.pooler_output
    layers = getattr(output, "deepstack_features", None)
    return layers[0][1] if layers else output.last_hidden_state


def entries(value: Any) -> list[Tensor]:
    """Return rows [n, D] of whatever container holds them."""
    if isinstance(value, Tensor) and value.ndim == 2:
        value = value[None]
    return [entry.reshape(-1, entry.shape[-1]) for entry in value]
