"""`select` and `select_many`: visual tokens and a method in, selections out."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenprune.budget import Budget, Keep
from tokenprune.checking import BatchCheck, check_kind
from tokenprune.errors import OptionError, TokensError, WeightsChangedError
from tokenprune.late import looking_later
from tokenprune.registry import build
from tokenprune.selection import Selection
from tokenprune.selectors.base import Picks, Selector
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

    On a GPU a batch may also hold items of different sizes (`Selector.takes_sizes`), and the host
    waits for the device once, when all is selected. An object that comes several times among the
    items is processed once.

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
    try:
        return select_unchecked(items, selector, keep, known=known).checked()
    except WeightsChangedError:  # what they were is forgotten now
        return select_unchecked(items, selector, keep, known=known).checked()


@dataclass(frozen=True, eq=False)
class Unchecked:
    """Selections whose numbers the host has not looked at: the device may still be computing them.

    Attributes
    ----------
    selections
        One per item. They may be used in what the device is given to do: their indices are inside
        the items. What comes of it must not be handed on before `checked` was called.
    """

    selections: list[Selection]
    _batches: list[_Selected]

    def checked(self) -> list[Selection]:
        """Return the selections, once it is known that nothing is wrong with them.

        Raises
        ------
        TokensError, SelectorError
            As `select_many`.
        WeightsChangedError
            If weights were changed behind torch's back since the last call, and were not read anew.
        """
        self.on_host()
        return self.selections

    def on_host(self) -> list[Tensor]:
        """Return the kept tokens of each selection on the CPU, LongTensor [K]; see `checked`."""
        kept: dict[int, Tensor] = {}
        for batch in self._batches:
            for selection, of_item in zip(batch.selections, batch.check.kept(), strict=True):
                kept[id(selection)] = of_item
        return [
            kept[id(selection)] if id(selection) in kept else selection.kept.cpu()
            for selection in self.selections
        ]


@dataclass(frozen=True, eq=False)
class _Selected:
    """The selections of one batch, and what there is to check of them."""

    check: BatchCheck
    selections: list[Selection]


def select_unchecked(
    items: Sequence[VisualTokens],
    selector: Selector,
    keep: Keep | Budget,
    *,
    known: Sequence[Selection | None] | None = None,
    counts: Sequence[int] | None = None,
) -> Unchecked:
    """Choose which tokens of each item stay, without a wait for a GPU; see `select_many`.

    On a GPU whatever has to do with numbers is checked by `Unchecked.checked` alone.

    Parameters
    ----------
    items, selector, keep, known
        As for `select_many`.
    counts
        How many tokens of each item stay, where that is not what the budget is of its tokens; see
        `tokenprune.scope`. Between 1 and as many as it has.

    Raises
    ------
    BudgetError, TokensError, SelectorError
        As for `select_many`, for all that is known without the device.
    """
    budget = Budget.of(keep)
    if selector.needs_picture:
        _check_pictures(items, selector)
    totals = [item.total for item in items]
    keeps = list(map(budget.count, totals)) if counts is None else list(counts)
    earlier = [None] * len(items) if known is None else list(known)
    check_known(earlier, totals)
    first = _first_places(items, selector)
    selections: dict[int, Selection] = {}
    scores: dict[int, Tensor | None] = {}
    groups: dict[tuple[object, ...], list[int]] = {}
    for index in dict.fromkeys(first):
        before = earlier[index]
        if before is not None and len(before) == keeps[index]:
            selections[index] = before
            continue
        scores[index] = _reusable_scores(selector, before)
        # Items without scores need them computed, so the two never share a batch.
        fresh = scores[index] is None
        any_size = fresh and selector.takes_sizes and _on_gpu(items[index])
        inputs = selector.inputs_of(items[index])
        key = (fresh, *batch_key(items[index], inputs, any_size))
        if not any_size:
            key = (keeps[index], *key)  # what one call of `select` is told
        groups.setdefault(key, []).append(index)
    batches = []
    with torch.no_grad():
        for indices in groups.values():
            batch = _select_batch(
                [items[index] for index in indices],
                selector,
                [keeps[index] for index in indices],
                [scores[index] for index in indices],
            )
            batches.append(batch)
            selections.update(zip(indices, batch.selections, strict=True))
    _say_if_nothing_was_pruned(budget, selections.values())
    return Unchecked([selections[index] for index in first], batches)


def _on_gpu(item: VisualTokens) -> bool:
    """Say whether an item is where launches cost more than padding."""
    tensors = (item.features, item.embeddings, item.cls_attention)
    return any(tensor.is_cuda for tensor in tensors if tensor is not None)


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


def _select_batch(
    items: Sequence[VisualTokens],
    selector: Selector,
    keeps: Sequence[int],
    scores: Sequence[Tensor | None],
) -> _Selected:
    """Select from items of one batch, from each one's scores float32 [N] where they are known."""
    inputs = selector.inputs_of(items[0])
    batch = stack(items, inputs)
    check = BatchCheck(batch, selector, inputs)
    on_gpu = batch.device.type == "cuda"
    if not on_gpu:
        check.check_inputs()  # nothing to wait for, and no selector is shown what is wrong
    try:
        with looking_later() as looks:
            picks = _pick(selector, batch, keeps, scores)
    except Exception:
        check.check_inputs()  # the likely reason
        raise
    picks = check_kind(selector, batch, picks, max(keeps))
    kept, found, merges = picks.kept, picks.scores, picks.merges
    if on_gpu:
        # Each copy is a launch there, so there is one of a batch; and none of what was made for it.
        kept, found = _of_batch(selector, batch, picks)
    check.take(picks, keeps, looks)
    if not on_gpu:
        check.kept()
    selections = [
        Selection(
            kept=_own(kept[row, :keep], on_gpu),
            total=item.total,
            grid=item.grid,
            scores=None if found is None else _own(found[row, : item.total], on_gpu),
            is_picture=item.is_picture,
            # Whatever a method says of an item of which everything stays, its rows stay.
            merge=None if merges is None or keep == item.total else merges[row],
        )
        for row, (item, keep) in enumerate(zip(items, keeps, strict=True))
    ]
    return _Selected(check, selections)


def _of_batch(selector: Selector, batch: TokenBatch, picks: Picks) -> tuple[Tensor, Tensor | None]:
    """Return kept tokens and scores that are nobody else's, with indices inside the items."""
    kept, scores = picks.kept, picks.scores
    if type(selector).__module__.startswith("tokenprune."):
        # They return what they made; rows that are the same memory become rows of their own.
        return kept.contiguous(), None if scores is None else scores.contiguous()
    # They are checked only after they were used as indices.
    return kept.clamp(0, batch.total - 1), None if scores is None else scores.clone()


def _own(row: Tensor, on_gpu: bool) -> Tensor:
    """Return a row as a copy, so that an item's selection does not keep the whole batch alive."""
    return row if on_gpu else row.clone()


def _pick(
    selector: Selector, batch: TokenBatch, keeps: Sequence[int], scores: Sequence[Tensor | None]
) -> Picks:
    """Return what stays of a batch, from each item's scores float32 [N] where they are known."""
    if batch.grids is not None or len(set(keeps)) > 1:
        return selector.select_sizes(batch, keeps)
    known = [score for score in scores if score is not None]
    if known:
        stacked = torch.stack(known).to(batch.device)
        return Picks(selector.pick(batch, stacked, keeps[0]), stacked)
    return selector.select(batch, keeps[0])


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
            stacklevel=4,
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
