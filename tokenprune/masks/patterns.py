"""BlindSight's four masks for prompts with several images.

Source: BlindSight (arXiv 2507.09071). The four categories are the paper's; what exactly each one
lets through was not published: the rules here are a reconstruction. In all of them text attends to
everything before it and is attended to by everything behind it; the categories differ in which
image tokens a token of an image attends to.

=============  ============================================================================
category       an image token attends to these image tokens before it
=============  ============================================================================
``sink``       attention sinks, and the last `LOCAL` tokens
``intra``      those of its own image
``intra+sink`` both
``dense``      all
=============  ============================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from tokenprune.masks.layout import PromptLayout
from tokenprune.masks.mask import Causal, Classes, Mask, PerHead, Window

Category = Literal["sink", "intra", "intra+sink", "dense"]
CATEGORIES: tuple[Category, ...] = get_args(Category)
"""From the sparsest to the densest."""

LOCAL = 64
"""How many tokens before it a token of a ``sink`` head sees (reconstruction)."""

INTRA, SINK, NEAR, DENSE = 1, 2, 4, 8
"""What a token of an image sees, as bits: its image, sinks, the last `LOCAL` tokens, all."""

SEES: dict[Category, int] = {
    "sink": SINK | NEAR,
    "intra": INTRA,
    "intra+sink": INTRA | SINK,
    "dense": DENSE,
}
"""The table above, for kernels that look at single pairs."""


def layer_mask(layout: PromptLayout, window: int | None = None, *, both_ways: bool = False) -> Mask:
    """Return what a layer's own mask lets through in a prompt without padding.

    Parameters
    ----------
    layout
        Of the prompt.
    window
        How many tokens up to itself a query sees, itself included; None for all.
    both_ways
        Whether the tokens of an image see all of it, as far as the window goes (Gemma 3).
    """
    mask: Mask = Causal(layout.length)
    if both_ways and layout.images:
        # Class 0 is text, which sees nothing that stands behind it; an image sees itself alone.
        table = torch.eye(len(layout.images) + 1, dtype=torch.bool)
        table[0, 0] = False
        mask = mask | Classes(layout.image_of + 1, table[None])
    return mask if window is None else mask & Window(layout.length, window)


def category_mask(layout: PromptLayout, category: Category, model: Mask | None = None) -> Mask:
    """Return one category's mask for a prompt, the same for all heads.

    Parameters
    ----------
    layout
        Where the prompt's images stand, and its sinks.
    category
        See the table above.
    model
        What the model's own mask lets through; None for `Causal`.
    """
    model_mask = Causal(layout.length) if model is None else model
    if category == "dense" or not layout.images:
        return model_mask
    labels, table = _classes(layout, category)
    classes: Mask = Classes(labels, table[None])
    if category == "sink":
        classes = classes | Window(layout.length, LOCAL)
    return model_mask & classes


def heads_mask(
    layout: PromptLayout, categories: Sequence[Category], model: Mask | None = None
) -> Mask:
    """Return the mask of a layer whose heads have these categories.

    Parameters
    ----------
    layout
        Of the prompt.
    categories
        One for each head.
    model
        What the model's own mask lets through; None for `Causal`.
    """
    return per_head(
        categories,
        {category: category_mask(layout, category, model) for category in set(categories)},
    )


def per_head(categories: Sequence[Category], masks: Mapping[Category, Mask]) -> Mask:
    """Return the mask in which each head has its category's.

    Parameters
    ----------
    categories
        One for each head.
    masks
        Of each of these categories, the same for all heads.
    """
    used = [category for category in CATEGORIES if category in categories]
    if len(used) == 1:
        return masks[used[0]]
    of_head = torch.tensor([used.index(category) for category in categories])
    return PerHead([masks[category] for category in used], of_head)


def _classes(layout: PromptLayout, category: Category) -> tuple[Tensor, Tensor]:
    """Return each token's class, LongTensor [L], and which class attends to which [C, C]."""
    labels = labels_of(layout)
    classes = torch.arange(1 + 2 * len(layout.images))
    is_text, is_sink = classes == 0, (classes > 0) & (classes % 2 == 0)
    owner = (classes - 1).div(2, rounding_mode="floor")
    table = is_text[:, None] | is_text[None, :]
    if category in ("intra", "intra+sink"):
        table = table | (owner[:, None] == owner[None, :])
    if category in ("sink", "intra+sink"):
        table = table | is_sink[None, :]
    return labels, table


def labels_of(layout: PromptLayout) -> Tensor:
    """Return each token's class, LongTensor [L].

    Class 0 is text; image m has class 1 + 2m, and 2 + 2m for its sinks.
    """
    image = layout.image_of
    return torch.where(image < 0, 0, 1 + 2 * image + layout.is_sink.long())
