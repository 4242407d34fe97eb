"""One set over all crops of an image: several items become one, and its selection becomes theirs.

A crop is an item, with a budget of its own. With ``scope="image"`` the crops of an image have one
budget, that of all together, and are chosen from as one item without a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tokenprune.budget import Budget, Keep
from tokenprune.errors import ConfigError, TokensError, did_you_mean
from tokenprune.inside.base import InsideMethod
from tokenprune.selecting import check_known, select_unchecked
from tokenprune.selection import Selection
from tokenprune.selectors.base import Selector
from tokenprune.tokens import VisualTokens, token_axis
from tokenprune.transfer import to_device

Scope = Literal["item", "image"]
"""What has a budget and a set of its own: each item, or all crops of an image together."""


def check_scope(scope: Scope, method: Selector | InsideMethod) -> Scope:
    """Return `scope` if there is one of that name and a method can choose so.

    Parameters
    ----------
    scope
        What a caller gave.
    method
        What chooses.

    Raises
    ------
    ConfigError
        If there is none, or the method cannot.
    """
    if scope not in get_args(Scope):
        raise ConfigError(
            f"scope={scope!r} is not what a set of kept tokens can be of. "
            f"{did_you_mean(str(scope), get_args(Scope))}"
        )
    if scope == "item":
        return scope
    why = ""
    if isinstance(method, InsideMethod):
        why = "has the tokens of each item leave inside the language model"
    elif method.needs_picture:
        why = "looks at neighbours in a picture, and crops that are laid end to end are none"
    elif method.merges:
        why = "adds tokens to others, and those of one crop could be added to those of another"
    if why:
        raise ConfigError(
            f"scope='image' does not go with method {method.name!r}, which {why}. Use "
            "scope='item', which chooses in each crop, or another method."
        )
    return scope


@dataclass(frozen=True, eq=False)
class Joined:
    """Crops of one image, joined to one item.

    Attributes
    ----------
    tokens
        All of them, of grid (1, 1, N) and no picture.
    crops
        Each, as it was.
    places
        For each crop a LongTensor [N_i] on the CPU, ascending: where its tokens are among all.
    """

    tokens: VisualTokens
    crops: tuple[VisualTokens, ...]
    places: tuple[Tensor, ...]

    @classmethod
    def of(
        cls, crops: Sequence[VisualTokens], places: Sequence[Tensor] | None = None, label: str = ""
    ) -> Joined:
        """Join crops.

        Inputs that are of no token (the question) are those of the last crop, behind which the
        text about the image stands.

        Parameters
        ----------
        crops
            At least one.
        places
            See `Joined`; None: one crop behind the other.
        label
            What to call the image in an error; by default as its first crop is called.

        Raises
        ------
        TokensError
            If a crop has what another one lacks, or is read with the question by a reader of its
            own.
        """
        totals = [crop.total for crop in crops]
        if places is None:
            places = torch.arange(sum(totals), device="cpu").split(totals)
        # Which of the tokens that are laid end to end stands at each place.
        order = torch.cat(list(places)).argsort()
        name = label or crops[0].label
        given: dict[str, Any] = {}
        for one in fields(VisualTokens):
            values = [getattr(crop, one.name) for crop in crops]
            axis = token_axis(one.name)
            if one.name in ("grid", "label", "is_picture", "frame_features"):
                continue
            if any((value is None) != (values[0] is None) for value in values):
                raise TokensError(
                    f"{name}: some of its {len(crops)} crops have {one.name} and some have not. "
                    "Give it for all of them, or for none."
                )
            if axis is None or values[0] is None:
                given[one.name] = values[-1]
                continue
            if not all(isinstance(value, Tensor) for value in values):
                raise TokensError(
                    f"{name}: {one.name} of its crops is read by a reader of each. Read the image "
                    "as a whole, or give tensors."
                )
            together = torch.cat(values, dim=axis)
            given[one.name] = together.index_select(axis, to_device(order, together.device))
        tokens = VisualTokens((1, 1, sum(totals)), is_picture=False, label=name, **given)
        return cls(tokens, tuple(crops), tuple(places))

    def count(self, keep: Keep | Budget) -> int:
        """Return how many tokens stay: a number of them in each crop, or a share of all."""
        return count_together(keep, [crop.total for crop in self.crops])

    def split(self, selection: Selection) -> list[Selection]:
        """Return the selection of each crop, of a number of tokens of its own, which may be 0.

        On a GPU the host waits for it: how many stay of each crop is not known before.
        """
        device = selection.kept.device
        found = []
        for crop, places in zip(self.crops, self.places, strict=True):
            own = to_device(places, device)
            # Where each token of the image is in the crop, -1 for those of the others.
            inside = torch.full((selection.total,), -1, dtype=torch.int64, device=device)
            inside[own] = torch.arange(len(places), device=device)
            of_kept = inside[selection.kept]
            stays = of_kept >= 0
            scores, represented = selection.scores, selection.represented
            found.append(
                Selection(
                    of_kept[stays],
                    crop.total,
                    crop.grid,
                    None if scores is None else scores[own.to(scores.device)],
                    None if represented is None else represented[stays],
                    crop.is_picture,
                )
            )
        return found

    def whole(self, selections: Sequence[Selection | None]) -> Selection | None:
        """Return the image's selection, of those of its crops; None where one is not known."""
        known = [one for one in selections if one is not None]
        check_known(selections, [crop.total for crop in self.crops])
        if len(known) < len(self.crops):
            return None
        device = known[0].kept.device
        own = [to_device(places, device) for places in self.places]
        kept = torch.cat([at[one.kept] for at, one in zip(own, known, strict=True)])
        order = kept.argsort()
        scores = represented = None
        if all(one.scores is not None for one in known):
            parts = [one.scores for one in known if one.scores is not None]
            scores = torch.empty(self.tokens.total, dtype=torch.float32, device=parts[0].device)
            scores[torch.cat(own).to(scores.device)] = torch.cat(parts)
        counts = [one.represented for one in known if one.represented is not None]
        if len(counts) == len(known):
            represented = torch.cat(counts)[order]
        grid = (1, 1, self.tokens.total)
        return Selection(kept[order], self.tokens.total, grid, scores, represented, False)


def count_together(keep: Keep | Budget, totals: Sequence[int]) -> int:
    """Return how many tokens stay of crops that have one budget together.

    Parameters
    ----------
    keep
        A number of tokens of each crop, which are added up; or a share, of all their tokens.
    totals
        How many tokens each crop has.

    Raises
    ------
    BudgetError
        If `keep` is no budget.
    """
    budget = Budget.of(keep)
    if budget.is_share:
        return budget.count(sum(totals))
    return sum(map(budget.count, totals))


def select_together(
    crops: Sequence[VisualTokens], selector: Selector, keep: Keep | Budget
) -> list[Selection]:
    """Choose one set over all crops of an image.

    Parameters
    ----------
    crops
        At least one.
    selector
        A method with its options, see `tokenprune.registry.build`.
    keep
        A number of tokens of each crop, or a share of all. They need not be evenly spread.

    Returns
    -------
    list of Selection
        One per crop, in the order given; together of `count_together` tokens.

    Raises
    ------
    ConfigError
        If the method cannot choose so.
    BudgetError, TokensError, SelectorError
        As for `tokenprune.select`.
    """
    check_scope("image", selector)
    joined = Joined.of(crops)
    counts = [joined.count(keep)]
    chosen = select_unchecked([joined.tokens], selector, keep, counts=counts).checked()
    return joined.split(chosen[0])
