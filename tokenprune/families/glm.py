"""GLM-4.1V to 4.6V and GLM-OCR: as Qwen2-VL, with a convolution in front of the projector."""

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
