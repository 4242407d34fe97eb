"""Where the items of a call's prompts stand, and the text behind each; `finding` finds it out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenprune.tokens import VisualTokens


@dataclass(frozen=True, eq=False)
class PlacedItem:
    """An image, video or crop in a prompt of which nothing was left out yet.

    Attributes
    ----------
    prompt
        The number of its prompt.
    columns
        LongTensor [N] on the CPU, where its tokens stand.
    text
        LongTensor [Q] on the CPU, where text stands behind it.
    tokens
        Its own.
    """

    prompt: int
    columns: Tensor
    text: Tensor
    tokens: VisualTokens


@dataclass(frozen=True)
class Placed:
    """All items of a call.

    Attributes
    ----------
    items
        In prompt order.
    lengths
        How many tokens each prompt has, without padding.
    padded_right
        Whether padding stands behind the prompts.
    added_in
        The layers behind which features of the encoder are added to the tokens (deepstack).
    """

    items: tuple[PlacedItem, ...]
    lengths: tuple[int, ...]
    padded_right: bool
    added_in: tuple[int, ...] = ()
