"""Which of vLLM's architectures can be pruned, under which names of our own.

Those of a family are listed here, and found without vLLM; about any other one vLLM itself is asked
(`tokenprune_vllm.lookup`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
        Whether it is of a known family: how its tokens lie is known.
    """

    name: str
    mrope: bool | None = False
    family: bool = True

    @property
    def engine_name(self) -> str:
        """What vLLM calls it."""
        return self.name.removeprefix(PREFIX)

    @property
    def level(self) -> str:
        """How well it is supported, in a sentence."""
        if self.family:
            return (
                f"{self.engine_name} is of a known family: how its tokens lie is known, and the "
                "few methods that cannot run on it are refused before the server starts."
            )
        if self.engine_name.startswith("TransformersMultiModal"):
            through = "vLLM runs this model by its class of transformers. "
        else:
            through = ""
        return (
            f"{through}{self.engine_name} is of no known family: methods that look at embeddings, "
            "at the question or at nothing run on it, and those that look at features, attention "
            "or the projector if these are found in its tower. An image or video is pruned as one "
            "row of tokens."
        )

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
    "Gemma3ForConditionalGeneration",
    "Gemma3nForConditionalGeneration",
    "Gemma4ForConditionalGeneration",
    "Idefics3ForConditionalGeneration",
    "SmolVLMForConditionalGeneration",
    "Lfm2VlForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
    "Cohere2VisionForConditionalGeneration",
    "LlavaNextVideoForConditionalGeneration",
    "Llama4ForConditionalGeneration",
    "Molmo2ForConditionalGeneration",
    "MiniCPMV4_6ForConditionalGeneration",
    "KimiK25ForConditionalGeneration",
    "KimiVLForConditionalGeneration",
    "LlavaOnevision2ForConditionalGeneration",
    "Ovis",
    "Ovis2_5",
    "Ovis2_6ForCausalLM",
    "Ovis2_6_MoeForCausalLM",
)
_THREE_AXES = (
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
    "Glm4vForConditionalGeneration",
    "Glm4vMoeForConditionalGeneration",
    "GlmOcrForConditionalGeneration",
    "PaddleOCRVLForConditionalGeneration",
    "MiniCPMV4_7ForConditionalGeneration",
)

ARCHITECTURES: dict[str, Architecture] = {
    name: Architecture(PREFIX + name, name in _THREE_AXES) for name in (*_ONE_AXIS, *_THREE_AXES)
}
"""vLLM's name -> ours, of models of a known family."""


def is_of_family(names: Sequence[str]) -> bool:
    """Say whether one of a config's ``architectures`` is of a known family."""
    return any(name.removeprefix(PREFIX) in ARCHITECTURES for name in names)


def reads_prompt(method: str) -> bool:
    """Say whether a method chooses by the text around an image or video."""
    return bool(FROM_PROMPT & set(find(method).needs))
