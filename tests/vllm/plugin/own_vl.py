"""A plugin of somebody else: types that nobody knows, by other names known ones."""

from __future__ import annotations

from typing import Any

import transformers

tf: Any = transformers  # its classes are not typed


class OwnLlavaConfig(tf.LlavaConfig):  # type: ignore[misc]  # not typed
    """Positions with one axis."""

    model_type = "own_llava"


class OwnNextConfig(tf.LlavaNextConfig):  # type: ignore[misc]
    """Rows that are newlines."""

    model_type = "own_llava_next"


class OwnVLConfig(tf.Qwen2VLConfig):  # type: ignore[misc]
    """Positions with three axes, videos."""

    model_type = "own_vl"


def register() -> None:
    """Make the types known, as vLLM's plugins do."""
    from vllm import ModelRegistry

    models = "vllm.model_executor.models"
    for config, name, home in (
        (OwnLlavaConfig, "OwnLlava", f"{models}.llava:LlavaForConditionalGeneration"),
        (OwnNextConfig, "OwnNext", f"{models}.llava_next:LlavaNextForConditionalGeneration"),
        (OwnVLConfig, "OwnVL", f"{models}.qwen2_vl:Qwen2VLForConditionalGeneration"),
    ):
        tf.AutoConfig.register(config.model_type, config, exist_ok=True)
        ModelRegistry.register_model(name, home)
