"""The method ``flexselect-lite``: a trained selector's scores, set by set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenprune.errors import OptionError, UnsupportedModelError
from tokenprune.numerics import full_precision
from tokenprune.providers import selector_path
from tokenprune.selectors.base import ByPlace
from tokenprune.selectors.frame_sets import FrameSets
from tokenprune.tokens import TokenBatch


@dataclass(frozen=True)
class FlexSelectLite(FrameSets):
    """Keep what a small decoder, trained on the large model's ranking, attends to.

    It reads the vision features and the question's text, and its last layer's attention is
    reduced as `FlexSelect` does it. Source: FlexSelect-Lite (arXiv 2506.00993) and its released
    code; the projector's shape is our own.

    Parameters
    ----------
    path
        The folder that ``tokenprune train-selector`` wrote, or ``"bundled"`` for the one that was
        trained for the bundled model.
    """

    name: ClassVar[str] = "flexselect-lite"
    summary: ClassVar[str] = "a small decoder trained to rank tokens as the model's own layer does"
    paper: ClassVar[str] = "FlexSelect, arXiv 2506.00993"
    needs: ClassVar[tuple[str, ...]] = ("features", "question")
    by_place: ClassVar[ByPlace] = "place"  # a decoder counts positions

    path: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.path:
            raise OptionError(
                "method 'flexselect-lite' needs the option path: the folder of a selector that "
                "`tokenprune train-selector` trained for the model."
            )
        from tokenprune_hf.lite.model import read_config

        read_config(selector_path(self.path))

    def check_model(self, config: Any) -> None:
        """Raise unless the selector was trained for a model with this config."""
        from tokenprune_hf.lite.model import read_config

        trained = read_config(selector_path(self.path))
        text = config.get_text_config()
        # vLLM also knows InternVL in its own format, whose features and vocabulary are the same.
        kinds = {kind.removesuffix("_chat") for kind in (config.model_type, trained.model_type)}
        if len(kinds) > 1 or text.vocab_size != trained.vocab_size:
            raise UnsupportedModelError(
                f"the selector {self.path} was trained for a {trained.model_type} with a "
                f"vocabulary of {trained.vocab_size}, and this is a {config.model_type} with "
                f"{text.vocab_size}. Train one for this model with `tokenprune train-selector`."
            )

    def score_sets(self, tokens: TokenBatch, sets: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the trained selector's scores; sets of one size go through it together."""
        from tokenprune_hf.lite.model import load_on

        features, questions = tokens.require("features"), tokens.require("question")
        model = load_on(selector_path(self.path), features.device)
        scores: dict[int, Tensor] = {}
        for size in sorted({len(frames) for frames in sets}):
            of_size = [index for index, frames in enumerate(sets) if len(frames) == size]
            rows = torch.stack([sets[index].to(features.device) for index in of_size])
            with full_precision(features.device):
                per_item = [
                    model(of_item[rows], question)
                    for of_item, question in zip(features, questions, strict=True)
                ]
            for number, index in enumerate(of_size):
                scores[index] = torch.stack([of_item[number] for of_item in per_item])
        return [scores[index] for index in range(len(sets))]
