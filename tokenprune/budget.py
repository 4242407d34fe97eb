"""How many tokens to keep: a pure function of `keep` and the number of tokens there are.

It must be known before any score is (vLLM sizes the prompt first), and every engine must come to
the same number, so this is the only place where `keep` is rounded.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

from tokenprune.errors import BudgetError, did_you_mean

Keep = int | float | str
"""A number of tokens (int, at least 1), a fraction of them (float, above 0 and at most 1), or the
name of a published budget (`PUBLISHED`)."""

PUBLISHED = {"llava-video-7b": 6720, "qwen2.5-vl-7b": 7040, "internvl2.5-8b": 8256}
"""Tokens of a video that FlexSelect (arXiv 2506.00993) keeps in its released scripts, by model.

InternVL's number counts ``<img>`` and ``</img>`` of 32 frames, which here are text and stay.
"""


class PublishedBudget(int):
    """A number of tokens that was given by a published name: an int in every other way.

    Attributes
    ----------
    name
        Out of `PUBLISHED`.
    """

    name: str

    def __new__(cls, name: str) -> PublishedBudget:
        """Return the budget of that name."""
        budget = super().__new__(cls, PUBLISHED[name])
        budget.name = name
        return budget

    def __reduce__(self) -> tuple[type[PublishedBudget], tuple[str]]:  # for pickle and copy
        return PublishedBudget, (self.name,)


@dataclass(frozen=True)
class Budget:
    """A `keep` that was checked.

    `Budget.of` makes one where `keep` comes in from a caller. Functions hand it to each other in
    place of the number, so that nothing is checked twice.

    Attributes
    ----------
    keep
        A number of tokens, at least 1, perhaps a `PublishedBudget`; or a share of them, above 0
        and at most 1.
    is_share
        Which of the two: 1 is one token and 1.0 all of them, though they are equal for Python.
    """

    keep: int | float
    is_share: bool

    @classmethod
    def of(cls, keep: Keep | Budget) -> Budget:
        """Return the budget that `keep` says.

        Parameters
        ----------
        keep
            As for `check_keep`; a budget comes back as it is.

        Raises
        ------
        BudgetError
            As `check_keep`.
        """
        if isinstance(keep, Budget):
            return keep
        if isinstance(keep, str):
            if keep not in PUBLISHED:
                raise BudgetError(
                    f"keep={keep!r} is no published budget. {did_you_mean(keep, PUBLISHED)} Or "
                    "give a number of tokens (keep=64) or a fraction of them (keep=0.1)."
                )
            return cls(PublishedBudget(keep), is_share=False)
        if isinstance(keep, PublishedBudget):
            return cls(keep, is_share=False)
        # bool is an int for Python, and keep=True is a mistake.
        if isinstance(keep, bool) or not isinstance(keep, numbers.Real):
            raise BudgetError(
                f"keep={keep!r} ({type(keep).__name__}) is not a budget. Give a whole number of "
                "tokens (keep=64) or a fraction of them (keep=0.1)."
            )
        # numbers.*, and not int and float: NumPy's scalars are budgets too.
        if isinstance(keep, numbers.Integral):
            if keep < 1:
                raise BudgetError(
                    f"keep={keep} keeps nothing. Give at least 1 token, or a fraction above 0."
                )
            return cls(int(keep), is_share=False)
        if not 0.0 < keep <= 1.0:  # also refuses NaN
            hint = (
                f" For {int(keep)} tokens write keep={int(keep)}, without the decimal point."
                if keep > 1.0 and math.isfinite(keep)
                else ""
            )
            raise BudgetError(f"keep={keep} is not a fraction: it must lie in (0, 1].{hint}")
        return cls(float(keep), is_share=True)

    @property
    def published(self) -> PublishedBudget | None:
        """The published budget, where it was given by its name."""
        return self.keep if isinstance(self.keep, PublishedBudget) else None

    def count(self, total: int) -> int:
        """Return how many of `total` tokens stay; see `tokens_kept`."""
        if total < 1:
            raise BudgetError(f"an item of {total} visual tokens has none to keep.")
        if not self.is_share:
            return min(int(self.keep), total)
        # floor(x + 0.5), and not `round`, which rounds half to even: 0.5 of 5 is 3 everywhere.
        return max(1, math.floor(self.keep * total + 0.5))


def check_keep(keep: Keep | Budget) -> int | float:
    """Return `keep` as a plain int or float if it is a budget, and raise if it is not.

    Parameters
    ----------
    keep
        An int of at least 1 (tokens), a float in (0, 1] (fraction), or a name out of `PUBLISHED`.
        ``1`` is one token and ``1.0`` is all of them.

    Returns
    -------
    int or float
        The same value as a built-in number; a `PublishedBudget` for a name.

    Raises
    ------
    BudgetError
        For zero, a negative number, NaN, a fraction above 1, an unknown name, a bool or anything
        else.
    """
    return Budget.of(keep).keep


def keeps_all(keep: Keep) -> bool:
    """Say whether `keep` drops nothing whatever there is: the fraction 1.0, not the number 1."""
    return isinstance(keep, float) and keep == 1.0


def tokens_kept(keep: Keep | Budget, total: int) -> int:
    """Return how many of `total` tokens stay.

    A fraction keeps ``max(1, floor(keep * total + 0.5))``, an int keeps ``min(keep, total)``.

    Parameters
    ----------
    keep
        The budget, see `check_keep`.
    total
        Number of visual tokens N of the item, at least 1.

    Returns
    -------
    int
        Between 1 and `total`.

    Raises
    ------
    BudgetError
        If `keep` is no budget or `total` is below 1.
    """
    return Budget.of(keep).count(total)


def left_by_rate(total: int, pruning_rate: float) -> int:
    """Return how many of a video's tokens vLLM's ``--video-pruning-rate`` leaves, rounded down.

    Parameters
    ----------
    total
        N.
    pruning_rate
        The share that is dropped, from 0 to below 1.

    Raises
    ------
    BudgetError
        If the rate is no such number.
    """
    if not 0.0 <= pruning_rate < 1.0:
        raise BudgetError(
            f"pruning_rate={pruning_rate!r} is the share that is dropped, from 0 to below 1. To "
            "keep a quarter give 0.75."
        )
    return int(total * (1.0 - pruning_rate))
