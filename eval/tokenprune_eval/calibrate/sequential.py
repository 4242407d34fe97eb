"""A test of a mean that may be looked at after every observation, by betting.

Observations x_1, x_2, … lie in [-1, 1], and the mean of each, given those before it, is mu. To
show mu < b a player bets on it: with a stake t in (0, 1) the wealth, 1 at first, is multiplied by

    1 + t * (b - x) / (1 - b)

which is positive, and is 1 or less on average where mu >= b. By Ville's inequality the wealth then
ever reaches c with probability 1/c at most, however often one looks. This is the capital process of
Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting" (2024), with
their lambda = t / (1 - b). Which stake is best depends on what is not known beforehand, so the
wealth starts divided among `STAKES`; what they hold together is a bet whose stake follows from the
observations before.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tokenprune.errors import ConfigError

Array = NDArray[np.float64]

_COUNT = 32

STAKES: Array = (1 - np.cos((np.arange(_COUNT) + 0.5) * np.pi / _COUNT)) / 2
"""Chebyshev nodes in (0, 1), of one weight: the arcsine prior of Cover's universal portfolio."""

_LOG_COUNT = math.log(_COUNT)


def _together(log_wealths: Array) -> float:
    """Return the log of the mean wealth over stakes."""
    top = float(log_wealths.max())
    return top + math.log(float(np.exp(log_wealths - top).sum())) - _LOG_COUNT


def _below(values: Array | float, bound: float) -> Array:
    """Return each stake's log factor in bets that the mean is below `bound`: [..., stakes]."""
    shares = (bound - np.asarray(values, np.float64)[..., None]) / (1 - bound)
    factors: Array = np.log1p(STAKES * shares)
    return factors


class MeanTest:
    """Whether the mean of bounded observations is below a bound, observed one at a time.

    Parameters
    ----------
    bound
        Strictly between -1 and 1.
    accept_at
        Wealth at which "below" is accepted, at least 1: its inverse is the probability of ever
        accepting where the mean is `bound` or more.
    reject_at
        Wealth at which "above" is accepted, at least 1, the same way.

    Attributes
    ----------
    count
        Observations so far.

    Raises
    ------
    ConfigError
        For values that cannot be used.
    """

    def __init__(self, bound: float, accept_at: float, reject_at: float) -> None:
        if not -1 < bound < 1:
            raise ConfigError(f"bound={bound} must lie between -1 and 1, both left out.")
        for name, value in (("accept_at", accept_at), ("reject_at", reject_at)):
            if not value >= 1:
                raise ConfigError(f"{name}={value} must be at least 1, such as 20 for 95 %.")
        self.bound, self.accept_at, self.reject_at = bound, accept_at, reject_at
        self.count = 0
        self._below: Array = np.zeros(_COUNT)
        self._above: Array = np.zeros(_COUNT)
        self._values: Counter[float] = Counter()

    def add(self, value: float) -> None:
        """Observe a value in [-1, 1].

        Raises
        ------
        ConfigError
            If it lies elsewhere.
        """
        if not -1 <= value <= 1:
            raise ConfigError(f"an observation must lie in [-1, 1], got {value}.")
        self.count += 1
        self._values[value] += 1
        self._below += _below(value, self.bound)
        self._above += _below(-value, -self.bound)

    @property
    def wealth(self) -> float:
        """Wealth of the bets that the mean is below the bound."""
        return math.exp(_together(self._below))

    @property
    def accepted(self) -> bool:
        """Whether the mean is shown to be below the bound."""
        return _together(self._below) >= math.log(self.accept_at)

    @property
    def rejected(self) -> bool:
        """Whether the mean is shown to be above the bound."""
        return _together(self._above) >= math.log(self.reject_at)

    def can_accept_within(self, left: int) -> bool:
        """Say whether as many more observations of 0 would make it accept."""
        return _together(self._below + left * _below(0.0, self.bound)) >= math.log(self.accept_at)

    def least(self) -> int:
        """Return after how many observations in all it accepts if all those to come are 0."""
        return self.count + _first(self.can_accept_within, -1)

    def expected(self) -> int | None:
        """Return after how many observations in all it accepts if those to come are like these.

        A guess and no bound: what it is based on are the observations themselves.

        Returns
        -------
        int or None
            At least `count`; None where it would never accept, or nothing was observed.
        """
        if not self.count or self._below.max() <= 0:
            return None
        wanted = math.log(self.accept_at)

        def accepts(count: int) -> bool:
            return _together(self._below * (count / self.count)) >= wanted

        return self.count if accepts(self.count) else _first(accepts, self.count)

    @property
    def mean(self) -> float:
        """Mean of the observations; nan where there are none."""
        total = sum(value * times for value, times in self._values.items())
        return total / self.count if self.count else math.nan

    @property
    def at_most(self) -> float:
        """The least bound below which the observations show the mean to be, at `accept_at`.

        The mean is above it, at whatever moment it is read, with probability ``1 / accept_at`` at
        most; it is `bound` or less exactly where the test accepts.
        """
        return self._least_bound(1, self.accept_at)

    @property
    def at_least(self) -> float:
        """The other end, at `reject_at`."""
        return -self._least_bound(-1, self.reject_at)

    def _least_bound(self, sign: int, wanted: float) -> float:
        if not self.count:
            return 1.0
        from scipy.optimize import brentq

        values = sign * np.array(list(self._values), np.float64)
        times = np.array(list(self._values.values()), np.float64)

        def missing(bound: float) -> float:
            return _together(times @ _below(values, bound)) - math.log(wanted)

        # No stake gains against the mean itself, and every stake's wealth rises with the bound.
        low, high = sign * self.mean, 1 - 1e-9
        if low >= high or missing(high) < 0:
            return 1.0
        return low if missing(low) >= 0 else float(brentq(missing, low, high))


def needed(bound: float, accept_at: float) -> int:
    """Return after how many observations of 0, and nothing else, a `MeanTest` accepts.

    Parameters
    ----------
    bound
        Above 0 and below 1.
    accept_at
        See `MeanTest`.

    Raises
    ------
    ConfigError
        For values that cannot be used.
    """
    if not 0 < bound < 1:
        raise ConfigError(f"bound={bound} must lie between 0 and 1, both left out.")
    return _first(MeanTest(bound, accept_at, 1.0).can_accept_within, 0)


def least_bound(count: int, accept_at: float) -> float:
    """Return the least bound that `count` observations of 0, and nothing else, can show.

    Parameters
    ----------
    count
        Observations that there are.
    accept_at
        See `MeanTest`.

    Returns
    -------
    float
        1.0 where none below it can be shown.
    """
    test = MeanTest(0.5, accept_at, 1.0)
    for _ in range(count):
        test.add(0.0)
    return test.at_most


def _first(accepts: Callable[[int], bool], low: int) -> int:
    """Return the first number above `low` that is accepted, as all after it are."""
    high = max(low + 1, 2 * low)
    while not accepts(high):
        low, high = high, max(1, 2 * high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if accepts(middle) else (middle, high)
    return high
