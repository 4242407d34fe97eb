"""`select` and `select_many`: visual tokens and a method in, selections out."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from tokenprune.budget import Keep, PublishedBudget, check_keep, tokens_kept
from tokenprune.errors import OptionError, TokensError
from tokenprune.registry import build
from tokenprune.selection import Selection
from tokenprune.selectors.base import Picks, Selector, check_picks
from tokenprune.tokens import VisualTokens, batch_key, stack


def select(tokens: VisualTokens, method: str | Selector, keep: Keep, **options: Any) -> Selection:
    """Choose which visual tokens of one image or video stay.

    Parameters
    ----------
    tokens
        What the method may look at.
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
    keep: Keep,
    *,
    known: Sequence[Selection | None] | None = None,
) -> list[Selection]:
    """Choose which tokens of each item stay; items of one shape are done in one batch.

    The same object several times among the items is looked at once.

    Parameters
    ----------
    items
        Any number of images and videos.
    selector
        A method with its options, see `tokenprune.registry.build`.
    keep
        The budget of each item.
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
    keep = check_keep(keep)
    if selector.needs_picture:
        _check_pictures(items, selector)
    earlier = [None] * len(items) if known is None else list(known)
    check_known(earlier, [item.total for item in items])
    groups: dict[tuple[object, ...], list[int]] = {}
    selections: dict[int, Selection] = {}
    # Images that many questions are about come many times, as one object.
    seen: dict[int, int] = {}
    first = [
        index if selector.of_place else seen.setdefault(id(item), index)
        for index, item in enumerate(items)
    ]
    for index in dict.fromkeys(first):
        before = earlier[index]
        if before is not None and len(before) == tokens_kept(keep, before.total):
            selections[index] = before
            continue
        # A `select` of its own may use its scores in another way than `pick` does.
        picks_by_score = type(selector).select is Selector.select
        scored = picks_by_score and before is not None and before.scores is not None
        key = (scored, *batch_key(items[index], selector.needs))
        groups.setdefault(key, []).append(index)
    with torch.no_grad():
        for key, indices in groups.items():
            batch = stack([items[index] for index in indices], selector.needs)
            count = tokens_kept(keep, batch.total)
            given = [one.scores for index in indices if (one := earlier[index]) is not None]
            if key[0]:
                scores = torch.stack([one for one in given if one is not None]).to(batch.device)
                picks = Picks(selector.pick(batch, scores, count), scores)
            else:
                picks = selector.select(batch, count)
            check_picks(selector, batch, picks, count)
            for row, index in enumerate(indices):
                selections[index] = Selection(
                    kept=picks.kept[row].clone(),
                    total=batch.total,
                    grid=batch.grid,
                    scores=None if picks.scores is None else picks.scores[row].clone(),
                    is_picture=batch.is_picture,
                )
    _say_if_nothing_was_pruned(keep, selections.values())
    return [selections[index] for index in first]


def _check_pictures(items: Sequence[VisualTokens], selector: Selector) -> None:
    """Raise TokensError if an item is no picture."""
    for item in items:
        if not item.is_picture:
            raise TokensError(
                f"{item.label}: method {selector.name!r} looks at neighbours in a picture, and "
                f"how the {item.total} tokens lie in it is not known. Give VisualTokens their "
                "grid, or choose another method (see `tokenprune methods`)."
            )


def _say_if_nothing_was_pruned(keep: int | float, selections: Iterable[Selection]) -> None:
    """Warn where a budget that was given by a published name keeps all there is."""
    if isinstance(keep, PublishedBudget) and any(len(one) == one.total for one in selections):
        # The same words for all items, so that Python shows them once.
        warnings.warn(
            f"keep={keep.name!r} is {int(keep)} tokens, and there are items with no more than "
            "that: nothing of them was pruned. Give a smaller number, or a fraction such as "
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
    given = [None if one is None else one.total for one in known]
    fits = [one in (None, total) for one, total in zip(given, totals, strict=False)]
    if len(given) != len(totals) or not all(fits):
        raise TokensError(
            f"known holds selections of {given} tokens, and the items have {list(totals)}. Pass "
            "what the same method returned for the same items, in their order."
        )
