"""`select` and `select_many`: visual tokens and a method in, selections out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tokenprune.budget import Keep, check_keep, tokens_kept
from tokenprune.errors import TokensError
from tokenprune.registry import build
from tokenprune.selection import Selection
from tokenprune.selectors.base import Picks, Selector
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


def select_many(
    items: Sequence[VisualTokens],
    selector: Selector,
    keep: Keep,
    *,
    scored: Sequence[Selection] | None = None,
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
    scored
        What the same method returned for the same items at any budget. Its scores are taken from
        there and not computed again, where the method has scores that do not depend on the budget.

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
    if scored is not None:
        check_scored(scored, [item.total for item in items])
    groups: dict[tuple[object, ...], list[int]] = {}
    # Images that many questions are about come many times, as one object.
    first: dict[int, int] = {}
    for index, item in enumerate(items):
        first.setdefault(id(item), index)
    for index in first.values():
        groups.setdefault(batch_key(items[index], selector.needs), []).append(index)
    selections: dict[int, Selection] = {}
    with torch.no_grad():
        for indices in groups.values():
            batch = stack([items[index] for index in indices], selector.needs)
            count = tokens_kept(keep, batch.total)
            known = [scored[index].scores for index in indices] if scored is not None else []
            scores = [one for one in known if one is not None]
            # A `select` of its own may use its scores in another way than `pick` does.
            if len(scores) == len(indices) and type(selector).select is Selector.select:
                both = torch.stack(scores).to(batch.device)
                picks = Picks(selector.pick(batch, both, count), both)
            else:
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
    return [selections[first[id(item)]] for item in items]


def check_scored(scored: Sequence[Selection], totals: Sequence[int]) -> None:
    """Raise unless there is one selection for each item, of as many tokens.

    Raises
    ------
    TokensError
        Naming what was given and what is needed.
    """
    given = [one.total for one in scored]
    if given != list(totals):
        raise TokensError(
            f"scored holds selections of {given} tokens, and the items have {list(totals)}. Pass "
            "what the same method returned for the same items, in their order."
        )
