"""`select` and `select_many`: visual tokens and a method in, selections out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tokenprune.budget import Keep, check_keep, tokens_kept
from tokenprune.errors import TokensError
from tokenprune.registry import build
from tokenprune.selection import Selection
from tokenprune.selectors.base import Selector
from tokenprune.tokens import VisualTokens, batch_key, stack


def select(tokens: VisualTokens, method: str, keep: Keep, **options: Any) -> Selection:
    """Choose which visual tokens of one image or video stay.

    Parameters
    ----------
    tokens
        What the method may look at.
    method
        A name out of `tokenprune.methods()`.
    keep
        A number of tokens (int) or a fraction of them (float); ``1.0`` keeps all.
    **options
        The method's own options.

    Returns
    -------
    Selection
        Exactly ``tokens_kept(keep, tokens.total)`` tokens.

    Raises
    ------
    UnknownMethodError, OptionError, BudgetError, TokensError
        For an unknown method, a wrong option, a wrong budget, or tokens that lack what the method
        needs or hold NaN.
    """
    return select_many([tokens], build(method, options), keep)[0]


def select_many(items: Sequence[VisualTokens], selector: Selector, keep: Keep) -> list[Selection]:
    """Choose which tokens of each item stay; items of one shape are done in one batch.

    Parameters
    ----------
    items
        Any number of images and videos.
    selector
        A method with its options, see `tokenprune.registry.build`.
    keep
        The budget of each item.

    Returns
    -------
    list of Selection
        One per item, in the order given.

    Raises
    ------
    BudgetError, TokensError
        As for `select`; an error about tokens names the item.
    """
    keep = check_keep(keep)
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(batch_key(item, selector.needs), []).append(index)
    selections: dict[int, Selection] = {}
    with torch.no_grad():
        for indices in groups.values():
            batch = stack([items[index] for index in indices], selector.needs)
            count = tokens_kept(keep, batch.total)
            picks = selector.select(batch, count)
            if picks.kept.shape != (batch.size, count):
                raise TokensError(
                    f"{batch.labels[0]}: the selector {selector.name!r} returned kept tokens of "
                    f"shape {list(picks.kept.shape)}; it must be [B, K] = "
                    f"{[batch.size, count]}, ascending. Correct its `select`."
                )
            for row, index in enumerate(indices):
                selections[index] = Selection(
                    kept=picks.kept[row].clone(),
                    total=batch.total,
                    grid=batch.grid,
                    scores=None if picks.scores is None else picks.scores[row].clone(),
                )
    return [selections[index] for index in range(len(items))]
