"""`select` and `select_many`: visual tokens and a method in, selections out."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenprune.budget import Budget, Keep
from tokenprune.errors import OptionError, TokensError
from tokenprune.registry import build
from tokenprune.selection import Selection
from tokenprune.selectors.base import Picks, Selector, check_picks
from tokenprune.tokens import TokenBatch, VisualTokens, batch_key, stack


def select(tokens: VisualTokens, method: str | Selector, keep: Keep, **options: Any) -> Selection:
    """Choose which visual tokens of one image or video stay.

    Parameters
    ----------
    tokens
        The inputs of the method.
    method
        A name out of `tokenprune.methods()`, or a `tokenprune.Selector` of your own.
    keep
        A number of tokens (int) or a fraction of them (float); ``1.0`` keeps all.
    **options
        The options of a method given by name. A selector has its own already.

    Returns
    -------
    Selection
        Exactly ``tokens_kept(keep, tokens.total)`` tokens.

    Raises
    ------
    UnknownMethodError, OptionError, BudgetError, TokensError
        For an unknown method, a wrong option, a wrong budget, or tokens that lack what the method
        needs or hold NaN.
    SelectorError
        If a selector of your own returns something else than it must.
    """
    if not isinstance(method, Selector):
        return select_many([tokens], build(method, options), keep)[0]
    if options:
        raise OptionError(
            f"options {sorted(options)} came with a {type(method).__name__} object, which has its "
            "options already. Set them there, or give the method by its name."
        )
    return select_many([tokens], method, keep)[0]


def select_many(
    items: Sequence[VisualTokens],
    selector: Selector,
    keep: Keep | Budget,
    *,
    known: Sequence[Selection | None] | None = None,
) -> list[Selection]:
    """Choose which tokens of each item stay; items of one shape are done in one batch.

    An object that comes several times among the items is processed once.

    Parameters
    ----------
    items
        Any number of images and videos.
    selector
        A method with its options, see `tokenprune.registry.build`.
    keep
        The budget of each item, as a caller gives it or checked before (`Budget.of`).
    known
        What the same method returned for the same items at any budget, or None. A selection of this
        budget is taken as it is; of another one, the scores are not computed again.

    Returns
    -------
    list of Selection
        One per item, in the order given.

    Raises
    ------
    BudgetError, TokensError, SelectorError
        As for `select`; an error about tokens names the item.
    """
    budget = Budget.of(keep)
    if selector.needs_picture:
        _check_pictures(items, selector)
    earlier = [None] * len(items) if known is None else list(known)
    check_known(earlier, [item.total for item in items])
    first = _first_places(items, selector)
    selections: dict[int, Selection] = {}
    scores: dict[int, Tensor | None] = {}
    groups: dict[tuple[object, ...], list[int]] = {}
    for index in dict.fromkeys(first):
        before = earlier[index]
        if before is not None and len(before) == budget.count(before.total):
            selections[index] = before
            continue
        scores[index] = _reusable_scores(selector, before)
        # Items without scores need them computed, so the two never share a batch.
        key = (scores[index] is None, *batch_key(items[index], selector.needs))
        groups.setdefault(key, []).append(index)
    with torch.no_grad():
        for indices in groups.values():
            batch = stack([items[index] for index in indices], selector.needs)
            picks = _pick(selector, batch, budget, [scores[index] for index in indices])
            for row, index in enumerate(indices):
                selections[index] = Selection(
                    # A copy, so that one item's selection does not keep the whole batch alive.
                    kept=picks.kept[row].clone(),
                    total=batch.total,
                    grid=batch.grid,
                    scores=None if picks.scores is None else picks.scores[row].clone(),
                    is_picture=batch.is_picture,
                )
    _say_if_nothing_was_pruned(budget, selections.values())
    return [selections[index] for index in first]


def _first_places(items: Sequence[VisualTokens], selector: Selector) -> list[int]:
    """Return for each item where the same object stands first.

    An image with many questions comes many times, as one object, and is processed once.
    """
    if selector.of_place:
        return list(range(len(items)))
    # `VisualTokens` has no equality of its own, so a dict tells its objects apart by identity.
    first: dict[VisualTokens, int] = {}
    return [first.setdefault(item, index) for index, item in enumerate(items)]


def _reusable_scores(selector: Selector, before: Selection | None) -> Tensor | None:
    """Return an item's scores from an earlier selection if this budget's may be picked from them.

    `Selector.select` is `score`, then `pick`, and scores do not depend on the budget. A `select` of
    the selector's own may do something else with its scores, so it always runs.
    """
    if before is None or type(selector).select is not Selector.select:
        return None
    return before.scores


def _pick(
    selector: Selector, batch: TokenBatch, budget: Budget, scores: Sequence[Tensor | None]
) -> Picks:
    """Return what stays of a batch, from each item's scores float32 [N] where they are known."""
    count = budget.count(batch.total)
    known = [score for score in scores if score is not None]
    if known:
        stacked = torch.stack(known).to(batch.device)
        picks = Picks(selector.pick(batch, stacked, count), stacked)
    else:
        picks = selector.select(batch, count)
    check_picks(selector, batch, picks, count)
    return picks


def _check_pictures(items: Sequence[VisualTokens], selector: Selector) -> None:
    """Raise TokensError if an item is no picture."""
    for item in items:
        if not item.is_picture:
            raise TokensError(
                f"{item.label}: method {selector.name!r} uses neighbours in a picture, and "
                f"how the {item.total} tokens lie in it is not known. Give VisualTokens their "
                "grid, or choose another method (see `tokenprune methods`)."
            )


def _say_if_nothing_was_pruned(budget: Budget, selections: Iterable[Selection]) -> None:
    """Warn where a budget that was given by a published name keeps all there is."""
    published = budget.published
    if published is None:
        return
    if any(len(selection) == selection.total for selection in selections):
        # The same words for all items, so that Python shows them once.
        warnings.warn(
            f"keep={published.name!r} is {int(published)} tokens, and there are items with no more "
            "than that: nothing of them was pruned. Give a smaller number, or a fraction such as "
            "keep=0.1.",
            UserWarning,
            stacklevel=3,
        )


def check_known(known: Sequence[Selection | None], totals: Sequence[int]) -> None:
    """Raise unless there is one selection for each item, of as many tokens, or None.

    Raises
    ------
    TokensError
        Naming what was given and what is needed.
    """
    given = [None if selection is None else selection.total for selection in known]
    fits = [known_total in (None, total) for known_total, total in zip(given, totals, strict=False)]
    if len(given) != len(totals) or not all(fits):
        raise TokensError(
            f"known holds selections of {given} tokens, and the items have {list(totals)}. Pass "
            "what the same method returned for the same items, in their order."
        )
