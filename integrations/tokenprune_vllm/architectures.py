"""Which of vLLM's architectures can be pruned, under which names of our own.

Those of a family are listed here, and found without vLLM; about any other one vLLM itself is asked
(`tokenprune_vllm.any_architecture`).
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
        Whether the model itself counts positions on three axes; None where its config says so.
    family
        Whether it is of a known family: all methods run on it.
    """

    name: str
    mrope: bool | None = False
    family: bool = True

    @property
    def engine_name(self) -> str:
        """What vLLM calls it."""
        return self.name.removeprefix(PREFIX)

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
"""vLLM's name -> ours, of models of a known family."""


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
    names = [str(name).removeprefix(PREFIX) for name in config.get("architectures") or []]
    if not names:
        raise UnsupportedModelError(
            f"the config.json of {model} names no architecture, so vLLM does not know its class. "
            "Add architectures to it."
        )
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    from tokenprune_vllm.any_architecture import any_architecture

    return any_architecture(names, config, model)


def reads_prompt(method: str) -> bool:
    """Say whether a method chooses by the text around an image or video."""
    return bool(FROM_PROMPT & set(find(method).needs))
