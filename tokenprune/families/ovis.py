"""Ovis2: a token is a probability of each visual word, and its embedding the mean of the words'."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenprune.errors import UnsupportedModelError
from tokenprune.families.tiles import Tiles


class Ovis2(Tiles):
    """Ovis2: blocks of patches, linear, layer norm, softmax, then a table of visual words."""

    model_types: ClassVar[tuple[str, ...]] = ("ovis2",)

    @property
    def merged(self) -> int:
        """Patches on a side of each token."""
        return int(self.config.vision_config.hidden_stride)

    def projector(self, model: Any) -> nn.Module:
        """Return what stands between the tower's features and the language model."""
        return _VisualWords(model.vision_tower, model.visual_embeddings_table)


class _VisualWords(nn.Module):
    """The parts of an Ovis2 that project, which its tower and the model call one by one."""

    def __init__(self, tower: Any, table: nn.Module) -> None:
        super().__init__()
        self.head_linear: nn.Module = tower.head_linear
        self.head_norm: nn.Module = tower.head_norm
        self.table = table
        self._how = str(tower.config.tokenize_function)

    def forward(self, features: Tensor) -> Tensor:
        """Project features [..., C] to [..., D].

        Raises
        ------
        UnsupportedModelError
            If one word is taken in place of the mean of all.
        """
        if self._how != "softmax":
            raise UnsupportedModelError(
                f"this Ovis2 takes one visual word for each token (tokenize_function="
                f"{self._how!r}), which has no derivative. Use a method that does not look at the "
                "projector (see `tokenprune methods`)."
            )
        words = self.head_norm(self.head_linear(features)).softmax(dim=-1)
        weights: Any = self.table.weight
        result: Tensor = torch.matmul(words, weights[: words.shape[-1]])
        return result
