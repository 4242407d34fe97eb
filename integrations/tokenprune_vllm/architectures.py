"""Which of vLLM's architectures can be pruned, under which names of our own.

Knows no engine: `tokenprune serve` and `tokenprune export` look here before vLLM is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenprune.errors import UnsupportedModelError
from tokenprune.registry import find
from tokenprune.tokens import FROM_PROMPT

PROVIDED = ("features", "embeddings", "cls_attention", "projector", *sorted(FROM_PROMPT))
"""What the plugin can hand to a selector."""


@dataclass(frozen=True)
class Architecture:
    """One of our architectures.

    Attributes
    ----------
    name
        What it is called in a config's ``architectures``.
    home
        ``module:class``.
    mrope
        Whether the model itself counts positions on three axes.
    """

    name: str
    home: str
    mrope: bool = False


def _of(module: str, name: str, mrope: bool = False) -> Architecture:
    own = f"TokenPrune{name}"
    return Architecture(own, f"tokenprune_vllm.families.{module}:{own}", mrope)


ARCHITECTURES: dict[str, Architecture] = {
    "LlavaForConditionalGeneration": _of("llava", "LlavaForConditionalGeneration"),
    "LlavaNextForConditionalGeneration": _of("llava", "LlavaNextForConditionalGeneration"),
    "LlavaOnevisionForConditionalGeneration": _of(
        "llava", "LlavaOnevisionForConditionalGeneration"
    ),
    "InternVLForConditionalGeneration": _of("internvl", "InternVLForConditionalGeneration"),
    "InternVLChatModel": _of("internvl", "InternVLChatModel"),
    "Qwen2VLForConditionalGeneration": _of("qwen", "Qwen2VLForConditionalGeneration", True),
    "Qwen2_5_VLForConditionalGeneration": _of("qwen", "Qwen2_5_VLForConditionalGeneration", True),
    "Qwen3VLForConditionalGeneration": _of("qwen", "Qwen3VLForConditionalGeneration", True),
}
"""vLLM's name -> ours."""


def architecture_of(config: dict[str, Any], model: str) -> Architecture:
    """Return our architecture for a model's config.json.

    Parameters
    ----------
    config
        The config as plain JSON types.
    model
        What to call the model in an error.

    Raises
    ------
    UnsupportedModelError
        If there is none.
    """
    names = config.get("architectures") or []
    ours = {one.name: one for one in ARCHITECTURES.values()}
    for name in names:
        found = ARCHITECTURES.get(name) or ours.get(name)
        if found is not None:
            return found
    raise UnsupportedModelError(
        f"{model} has the architecture {', '.join(names) or '(none in its config.json)'}, which "
        f"tokenprune cannot prune in vLLM. Supported: {', '.join(sorted(ARCHITECTURES))}."
    )


def reads_prompt(method: str) -> bool:
    """Say whether a method chooses by the text around an image or video."""
    return bool(FROM_PROMPT & set(find(method).needs))


def check_method(method: str) -> None:
    """Raise unless the plugin can give the method what it needs.

    Raises
    ------
    UnsupportedModelError
        Naming what is missing.
    """
    missing = [name for name in find(method).needs if name not in PROVIDED]
    if missing:
        raise UnsupportedModelError(
            f"method {method!r} needs {', '.join(missing)}, which tokenprune_vllm does not gather. "
            f"It gathers: {', '.join(PROVIDED)}."
        )
