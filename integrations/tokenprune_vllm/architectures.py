"""Which of vLLM's architectures can be pruned, under which names of our own.

Knows no engine: `tokenprune serve` and `tokenprune export` look here before vLLM is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenprune.errors import UnsupportedModelError
from tokenprune.registry import find
from tokenprune.tokens import FROM_PROMPT

PREFIX = "TokenPrune"
"""What our name of an architecture has in front of vLLM's."""


@dataclass(frozen=True)
class Architecture:
    """One of our architectures.

    Attributes
    ----------
    name
        What it is called in a config's ``architectures``.
    mrope
        Whether the model itself counts positions on three axes.
    """

    name: str
    mrope: bool = False

    @property
    def home(self) -> str:
        """``module:class``, where vLLM finds it."""
        return f"tokenprune_vllm.models:{self.name}"


_ONE_AXIS = (
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "InternVLChatModel",
)
_THREE_AXES = (
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
)

ARCHITECTURES: dict[str, Architecture] = {
    name: Architecture(PREFIX + name, name in _THREE_AXES) for name in (*_ONE_AXIS, *_THREE_AXES)
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
