"""What a language model's layer attends to: q of the question's tokens, k of the whole prompt.

An engine's adapter runs the first layers of a language model on a prompt and hands over q and k
of one layer (`QueryKeys`); the attention of the question to each visual token is worked out here,
in float32 and in blocks, so that every engine's numbers come from one formula and no attention of
all pairs is ever built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from tokenprune.numerics import full_precision

Reduction = Literal["max", "mean"]
"""How heads and question tokens become one number per visual token."""

_LOGITS_AT_ONCE = 2**24  # float32 numbers of q kᵀ that exist at one time (64 MiB)


@dataclass(frozen=True, eq=False)
class QueryKeys:
    """One layer's q of a question and k of the prompt it ends.

    Attributes
    ----------
    query
        [H, Q, d]: the prompt's last Q tokens, or those in `columns`, after the rotary embedding.
    key
        [G, L, d]: all L tokens of the prompt, after the rotary embedding; H is a multiple of G.
    visual
        LongTensor [n], which of the L tokens are the visual tokens that were asked about.
    scale
        Factor on q kᵀ, usually d ** -0.5.
    value_norm
        float32 [G, n], the L1 norm of each visual token's value, or None.
    hidden
        [n, D], each visual token's hidden state at the layer's input, or None.
    columns
        LongTensor [Q], where among the L tokens the queries stand; None for the last Q.
    weights
        float32 [Q], how much each query counts in a mean; None for all alike.
    """

    query: Tensor
    key: Tensor
    visual: Tensor
    scale: float
    value_norm: Tensor | None = None
    hidden: Tensor | None = None
    columns: Tensor | None = None
    weights: Tensor | None = None


class QueryReader(Protocol):
    """Reads visual tokens together with the question; an adapter's, one for each image or video."""

    def read(
        self,
        sets: Sequence[Tensor],
        layer: int | None,
        *,
        values: bool,
        hidden: bool,
        among: Sequence[Tensor] | None = None,
    ) -> Sequence[QueryKeys]:
        """Run the language model up to a layer on each set of the item's tokens.

        Parameters
        ----------
        sets
            LongTensors [n], ascending: which of the item's tokens each prompt holds. No other of
            its visual tokens is in that prompt; all of the text is.
        layer
            Whose q and k are wanted, counted from 0; None for `reference_layer`'s.
        values, hidden
            Whether `value_norm` and `hidden` are wanted.
        among
            LongTensors [r], ascending, for each set: which of its tokens are read, counted in the
            set. The others are in no prompt, and those that are read keep their positions. None
            for all tokens.

        Raises
        ------
        UnsupportedModelError
            If the model has no such layer, or cannot be read.
        PromptError
            If no text comes after the item.
        """
        ...


def question_scores(seen: QueryKeys, reduction: Reduction, weigh_values: bool = False) -> Tensor:
    """Return how much the question attends to each visual token.

    The softmax runs over all keys that a question token may see; then the visual keys are taken
    out, and heads and question tokens are reduced.

    Parameters
    ----------
    seen
        q and k of one layer.
    reduction
        ``"max"`` or ``"mean"`` over heads and question tokens.
    weigh_values
        Whether each head's attention is first multiplied by the token's `value_norm`.

    Returns
    -------
    Tensor
        float32 [n].
    """
    heads, questions, _ = seen.query.shape
    groups, length, _ = seen.key.shape
    key = seen.key.float()
    device = key.device
    result = key.new_full(seen.visual.shape, float("-inf") if reduction == "max" else 0.0)
    weight = None if seen.value_norm is None or not weigh_values else seen.value_norm[:, None, None]
    columns = torch.arange(length, device=device)
    asked = columns[length - questions :] if seen.columns is None else seen.columns
    block = max(1, _LOGITS_AT_ONCE // (heads * length))
    with full_precision(device):
        for start in range(0, questions, block):
            # Heads side by side for each key head, so that keys need not be repeated.
            query = seen.query[:, start : start + block].float().unflatten(0, (groups, -1))
            logits = torch.einsum("ghqd,gld->ghql", query, key) * seen.scale
            own = asked[start : start + query.shape[2]]
            attention = logits.masked_fill_(columns > own[:, None], float("-inf")).softmax(dim=-1)
            attention = attention[..., seen.visual]
            if weight is not None:
                attention = attention * weight
            if reduction == "max":
                result = torch.maximum(result, attention.amax(dim=(0, 1, 2)))
            elif seen.weights is not None:
                of_block = seen.weights[start : start + query.shape[2], None]
                result = result + (attention * of_block).sum(dim=(0, 1, 2)) / heads
            else:
                result = result + attention.sum(dim=(0, 1, 2)) / (heads * questions)
    if reduction == "mean" and seen.weights is not None:
        result = result / seen.weights.sum()
    return result
