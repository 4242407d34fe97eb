"""Which family a model belongs to, by its config's `model_type`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenprune.errors import UnsupportedModelError
from tokenprune.families.base import Family
from tokenprune.families.glm import Glm4V, Glm5
from tokenprune.families.kimi import KimiK25, KimiVL
from tokenprune.families.llava import (
    Llava,
    LlavaNext,
    LlavaNextVideo,
    LlavaOnevision,
    VideoLlava,
)
from tokenprune.families.minicpm import MiniCPMV46, MiniCPMV47, NemotronOmni
from tokenprune.families.molmo import Molmo2
from tokenprune.families.ovis import Ovis, Ovis2, Ovis25
from tokenprune.families.own_sides import Gemma4, Lfm2VL, Mistral3
from tokenprune.families.paddleocr import PaddleOCRVL
from tokenprune.families.qwen import LlavaOnevision2, Qwen2VL, Qwen25VL
from tokenprune.families.tiles import (
    CohereVision,
    Gemma3,
    Gemma3n,
    Idefics3,
    InternVL,
    InternVLChat,
    Llama4,
    PerceptionLM,
)

FAMILIES: dict[str, type[Family]] = {
    name: family
    for family in (
        Llava,
        LlavaNext,
        LlavaNextVideo,
        LlavaOnevision,
        VideoLlava,
        InternVL,
        InternVLChat,
        Qwen2VL,
        Qwen25VL,
        LlavaOnevision2,
        Glm4V,
        Glm5,
        PaddleOCRVL,
        KimiK25,
        KimiVL,
        MiniCPMV46,
        NemotronOmni,
        MiniCPMV47,
        Idefics3,
        CohereVision,
        PerceptionLM,
        Ovis2,
        Ovis,
        Ovis25,
        Llama4,
        Gemma3,
        Gemma3n,
        Gemma4,
        Lfm2VL,
        Mistral3,
        Molmo2,
    )
    for name in family.model_types
}
"""`config.model_type` -> family."""


def family_of_config(config: Any) -> Family:
    """Return the family of a model's config.

    Raises
    ------
    UnsupportedModelError
        If it is of no known family.
    """
    name = getattr(config, "model_type", None)
    if name not in FAMILIES:
        raise UnsupportedModelError(
            f"a model of the type {name!r} cannot be pruned. Supported: "
            f"{', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[name](config)


_ATTENDING = ("full_attention", "sliding_attention", "chunked_attention")
"""How configs of transformers name layers with softmax attention in `layer_types`."""


def attending_layers(text_config: Any) -> list[int]:
    """Return the layers of a language model that attend to tokens, from 0.

    The others (linear attention, convolutions) keep a state in place of keys: it has seen all
    tokens before, and how much it took from each cannot be read from it.

    Parameters
    ----------
    text_config
        The language model's config.
    """
    kinds = getattr(text_config, "layer_types", None)
    if not kinds:
        return list(range(int(text_config.num_hidden_layers)))
    return [number for number, kind in enumerate(kinds) if kind in _ATTENDING]


def reference_layer(
    model_type: str,
    layers: int,
    width: int,
    asked: int | None = None,
    attending: Sequence[int] | None = None,
) -> int:
    """Return the layer whose attention ranks visual tokens.

    Source: FlexSelect (arXiv 2506.00993), the released scripts' layers for the models named
    there (`Family.reference_layers`). Other models have no published one: the layer at seven
    tenths of the depth is taken, the middle of what is published, or the nearest one that
    attends, the later of two; ``tokenprune find-layer`` measures a better one.

    Parameters
    ----------
    model_type
        The vision-language model's `config.model_type`.
    layers, width
        Number of decoder layers and hidden size of its language model.
    asked
        The layer that the user asked for, counted from 0, or None.
    attending
        What `attending_layers` returns; None for all layers.

    Raises
    ------
    UnsupportedModelError
        If the model has no such layer, or it does not attend.
    """
    known = range(layers) if attending is None else attending
    if not known:
        raise UnsupportedModelError(
            f"none of the {layers} layers of this model's language model attends to tokens, so "
            "nothing can rank them. Use a method that needs no language model (see `tokenprune "
            "methods`)."
        )
    if asked is None:
        family = FAMILIES.get(model_type)
        published = {} if family is None else family.reference_layers
        wanted = published.get((layers, width), min(layers * 7 // 10, layers - 1))
        return min(known, key=lambda number: (abs(number - wanted), -number))
    if not 0 <= asked < layers:
        raise UnsupportedModelError(
            f"layer={asked} is no layer of this model's language model, which has {layers}: 0 to "
            f"{layers - 1}. `tokenprune find-layer` measures which one to take."
        )
    if asked not in known:
        raise UnsupportedModelError(
            f"layer={asked} of this model's language model does not attend to tokens: it keeps a "
            f"state of all before, which cannot rank them. Layers {', '.join(map(str, known))} "
            "attend; `tokenprune find-layer` measures which one to take."
        )
    return asked
