"""GLM-4.1V to GLM-5 and GLM-OCR: as Qwen2-VL, with a convolution in front of the projector."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from tokenprune.families.qwen import Qwen2VL
from tokenprune.tokens import Projector


class Glm4V(Qwen2VL):
    """GLM-4.1V, GLM-4.5V, GLM-4.6V and GLM-OCR.

    Each token is a 2x2 group of patches, which a convolution merges. Its output is the features.
    """

    model_types: ClassVar[tuple[str, ...]] = ("glm4v", "glm4v_moe", "glm46v", "glm_ocr")
    videos_as_images: ClassVar[bool] = True

    def around_projector(self, projector: Any, run: Projector, features: Tensor) -> Tensor:
        """Call the projector on tokens, which is what it takes."""
        return run(features)


class Glm5(Glm4V):
    """GLM-5.3-Flash: images and videos as in GLM-4V; positions have one axis, which nothing reads.

    Most layers of its language model keep a state, and the others attend to blocks of tokens that
    they look up among the columns of the prompt: of the short one, where tokens are dropped.
    """

    model_types: ClassVar[tuple[str, ...]] = ("glm5_next",)
    mrope: ClassVar[bool] = False
    videos_marked: ClassVar[bool] = True
