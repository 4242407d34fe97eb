"""Llama-3.2-Vision models: how they are recognised, and where their cross-attention layers are."""

from __future__ import annotations

from typing import Any

from tokenprune.errors import UnsupportedModelError
from tokenprune_hf.mllama.method import METHOD


def _model_type(model: object) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)


def cross_attention_of(model: Any) -> tuple[Any, dict[int, Any]]:
    """Return the inner model, and its cross-attention layers by number, in order.

    Raises
    ------
    UnsupportedModelError
        If it is no Llama-3.2-Vision.
    """
    model_type, name = _model_type(model), type(model).__name__
    if model_type not in (None, "mllama"):
        raise UnsupportedModelError(
            f"{name} (model_type {model_type!r}) has no cross-attention to vision tokens that "
            f"{METHOD.name} could trim: it is for Llama-3.2-Vision (model_type 'mllama'). For "
            "models whose vision tokens stand in the prompt take one of tokenprune.methods()."
        )
    from transformers.models.mllama.modeling_mllama import MllamaModel

    modules = () if model_type is None else model.modules()
    inner: Any = next((module for module in modules if isinstance(module, MllamaModel)), None)
    if inner is None or not hasattr(model, "generate"):
        raise UnsupportedModelError(
            f"{name} is no vision-language model of transformers with `generate`. Pass the whole "
            "model, for example what AutoModelForImageTextToText.from_pretrained returned."
        )
    decoder = inner.language_model
    numbers = sorted(set(decoder.cross_attention_layers))
    if not numbers:
        raise UnsupportedModelError(
            f"the text_config of this {name} names no cross_attention_layers, so there is nothing "
            "to trim. Use it as it is."
        )
    return inner, {number: decoder.layers[number] for number in numbers}


def check_prompt_has_images(model: object, method: object) -> None:
    """Raise for a Llama-3.2-Vision, whose images stand beside the prompt that `prune` shortens.

    Parameters
    ----------
    model
        Any model.
    method
        What was to prune it: a name, a `Selector` or a `PruningConfig`.

    Raises
    ------
    UnsupportedModelError
        If it is a Llama-3.2-Vision.
    """
    if _model_type(model) == "mllama":
        name = method if isinstance(method, str) else type(method).__name__
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be pruned by {name!r}: its vision tokens stand in no "
            f"prompt, the text attends to them beside it. Call {METHOD.call} instead."
        )
