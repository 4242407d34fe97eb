"""AnyFamily: models whose type has no family; an engine says of them what it says of all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from tokenprune.errors import UnsupportedModelError
from tokenprune.families.base import Family, ModelConfig
from tokenprune.tower.layouts import Medium, Segment


class AnyFamily(Family):
    """A model whose rows are known, and neither how they lie nor what they were made of.

    Parameters
    ----------
    config
        The model's.
    mrope
        Whether the model itself counts positions on three axes.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    known: ClassVar[bool] = False
    given: ClassVar[frozenset[str]] = frozenset({"embeddings"})

    def __init__(self, config: ModelConfig, mrope: bool = False) -> None:
        super().__init__(config)
        # Of a family, all models count alike; here each is asked.
        self.mrope = mrope  # type: ignore[misc]

    def segments(self, medium: Medium) -> Sequence[Segment]:
        """Return all rows of an image or video together; how they lie is not known."""
        return [Segment(torch.arange(medium.rows), None)]

    def check_needs(self, method: str, needs: Sequence[str]) -> None:
        """Raise if a method looks at what is not known of the model; see `Family.check_needs`."""
        unknown = [need for need in needs if need not in self.given]
        if unknown:
            raise UnsupportedModelError(
                f"method {method!r} looks at {', '.join(unknown)}, and tokenprune does not know "
                f"where a model of the type {self.config.model_type!r} has that. Use a method that "
                "needs embeddings or nothing, such as information, divprune or uniform (see "
                "`tokenprune methods`)."
            )
