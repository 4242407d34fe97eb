"""Which family a model belongs to, by its config's `model_type`."""

from __future__ import annotations

from typing import Any

from tokenprune.errors import UnsupportedModelError
from tokenprune.families.base import Family
from tokenprune.families.llava import Llava, LlavaNext, LlavaOnevision, VideoLlava
from tokenprune.families.qwen import Qwen2VL, Qwen25VL
from tokenprune.families.tiles import Gemma3, Idefics3, InternVL, InternVLChat

FAMILIES: dict[str, type[Family]] = {
    name: family
    for family in (
        Llava,
        LlavaNext,
        LlavaOnevision,
        VideoLlava,
        InternVL,
        InternVLChat,
        Qwen2VL,
        Qwen25VL,
        Idefics3,
        Gemma3,
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
