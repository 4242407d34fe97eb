"""FlexSelect (arXiv 2506.00993), training-free: the question's attention inside the model itself.

The first layers of the language model read a set of frames and the question; at a reference layer
the tokens that the question attends to most are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.activations import largest_number
from tokenprune.errors import OptionError, TokensError
from tokenprune.greedy.engine import folded_sum
from tokenprune.question.attention import QueryKeys, Reduction, question_scores
from tokenprune.selectors.layer_reading import LayerReading
from tokenprune.tokens import TokenBatch
from tokenprune.transfer import to_device

_ALL = "all"


@dataclass(frozen=True)
class FlexSelect(LayerReading):
    """Keep what the question attends to at a reference layer of the language model.

    ``A = softmax(q kᵀ / sqrt(d))`` with q of the text after the video and k of everything;
    ``r_i = max A[h, t, i]`` over heads h and text tokens t; the highest r of each set of frames
    are kept. Source: FlexSelect (arXiv 2506.00993) and its released code, whose `token_selection`
    takes the maximum (its README says the average).

    Parameters
    ----------
    layer
        The reference layer, from 0. None: the published one for the published models, else the
        layer at seven tenths of the depth (see `tokenprune.families.registry.reference_layer`).
        ``tokenprune find-layer`` measures which layer of a model finds needles.
    reduction
        ``"max"`` (the released code) or ``"mean"`` (its README) over heads and text tokens.
    drop_sinks
        Leave out attention sinks before ranking: tokens whose hidden state at the layer, after an
        RMS norm without weight, exceeds `sink_threshold` in one of `sink_dimensions`. They are
        kept only where nothing else is left. Source of the test: Visual Attention Sink (ICLR 2025).
    sink_dimensions
        Numbers of dimensions, comma-separated (``"1415,2533"`` for LLaMA-2-7B), or ``"all"``.
    sink_threshold
        tau of that paper. A state of D dimensions cannot exceed ``sqrt(D)``.
    weigh_values
        Multiply each head's attention by the L1 norm of the token's value before reducing. Source:
        VATP (arXiv 2406.12335), with grouped heads each on their own value head: reconstruction.
    """

    name: ClassVar[str] = "flexselect"
    summary: ClassVar[str] = "the question's attention at a reference layer of the language model"
    paper: ClassVar[str] = "FlexSelect, arXiv 2506.00993"
    needs: ClassVar[tuple[str, ...]] = ("query_attention",)

    reduction: Reduction = "max"
    drop_sinks: bool = False
    sink_dimensions: str = _ALL
    sink_threshold: float = 20.0
    weigh_values: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        numbers = self.sink_dimensions.split(",")
        if self.sink_dimensions != _ALL and not all(text.strip().isdecimal() for text in numbers):
            raise OptionError(
                f"option sink_dimensions={self.sink_dimensions!r} of method {self.name!r} must be "
                "'all' or numbers with commas between them, such as '1415,2533'."
            )

    def score_sets(self, tokens: TokenBatch, sets: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return each set's `question_scores`; see the class."""
        given = tokens.require_query_attention()
        if isinstance(given, Tensor):
            attention = given.float()
            return [
                self._reduce(attention[..., to_device(members, given.device)]) for members in sets
            ]
        keys_of_sets = given.read(
            sets, self.layer, values=self.weigh_values, hidden=self.drop_sinks
        )
        return [self.score_keys(keys)[None] for keys in keys_of_sets]

    def _reduce(self, attention: Tensor) -> Tensor:
        """[B, H, Q, n] -> [B, n]."""
        if self.weigh_values or self.drop_sinks:
            raise TokensError(
                "weigh_values and drop_sinks need values and hidden states, and query_attention "
                "was given as a tensor. Leave these options out, or pass a reader (see "
                "tokenprune.question.attention.QueryReader), as the adapters do."
            )
        rows = attention.flatten(1, 2)
        if self.reduction == "max":
            return rows.amax(dim=1)
        # Folded: `Tensor.mean` would round equal tokens differently at different places.
        return folded_sum(rows, dim=1) / rows.shape[1]

    def score_keys(self, keys: QueryKeys) -> Tensor:
        """Return what the tokens of one prompt are ranked by.

        Parameters
        ----------
        keys
            The reference layer's; `QueryKeys.hidden` is needed to drop sinks, and
            `QueryKeys.value_norm` to weigh values.

        Returns
        -------
        Tensor
            float32 [n].
        """
        scores = question_scores(keys, self.reduction, self.weigh_values)
        if self.drop_sinks and keys.hidden is not None:
            # Below every other token's score, which is never negative, and in their own order.
            largest = largest_number(keys.hidden, self._dimensions(keys.hidden.shape[-1]))
            below = scores - scores.max() - 1
            scores = torch.where(largest > self.sink_threshold, below, scores)
        return scores

    def _dimensions(self, count: int) -> list[int] | None:
        """Return which of a state's dimensions tell a sink; None for all."""
        if self.sink_dimensions == _ALL:
            return None
        wanted = [int(number) for number in self.sink_dimensions.split(",")]
        if max(wanted) >= count:
            raise OptionError(
                f"option sink_dimensions={self.sink_dimensions!r} of method {self.name!r} "
                f"names a dimension that this model's {count} do not have."
            )
        return wanted
