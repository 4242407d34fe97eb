"""What a calibration says of a method for which no budget holds the bound: why, and what next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenprune.baselines import RESIZE, resizes
from tokenprune.config import ABSTAINED, FORMAT
from tokenprune.formats import KEY
from tokenprune_eval.calibrate.search import Bounds, Decision, Outcome
from tokenprune_eval.shared.tables import percent

_NEAR_ALL = 0.9
"""A grid that begins below this share leaves room for a larger budget."""


@dataclass(frozen=True)
class Abstention:
    """Why a method has no budget, and what may help.

    It is written where the method's configuration would stand, without `keep`, and
    `PruningConfig.from_json` refuses it with what it says.

    Attributes
    ----------
    method
        Its name.
    bounds
        What was to be shown.
    nearest
        The decision that came nearest to acceptance: of those with answers the one with the most
        evidence.
    tried
        Every decision, in order.
    message
        What came of the budgets, as sentences.
    next
        What to do, a sentence each.
    """

    method: str
    bounds: Bounds
    nearest: Decision
    tried: tuple[Decision, ...]
    message: str
    next: tuple[str, ...]

    @property
    def reason(self) -> Outcome:
        """What came of the nearest budget."""
        return self.nearest.outcome

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        near = self.nearest
        return {
            KEY: FORMAT,
            ABSTAINED: True,
            "method": self.method,
            "reason": self.reason,
            "max_drop": self.bounds.max_drop,
            "types": dict(self.bounds.types) or None,
            "confidence": self.bounds.confidence,
            "nearest": without_nan(
                {
                    "keep": near.keep,
                    "outcome": near.outcome,
                    "type": near.type,
                    "bound": near.bound,
                    "drop": near.drop,
                    "at_least": near.at_least,
                    "at_most": near.at_most,
                    "media": near.types[near.type].media if near.type else near.media,
                    "of_media": near.of_media,
                    "media_least": near.media_least,
                    "media_expected": near.media_expected,
                }
            ),
            "tried": [{"keep": one.keep, "outcome": one.outcome} for one in self.tried],
            "message": self.message,
            "next": list(self.next),
        }


def abstain(
    method: str, tried: Sequence[Decision], bounds: Bounds, methods: Sequence[str]
) -> Abstention:
    """Return why a method has no budget.

    Parameters
    ----------
    method
        Its name.
    tried
        Its decisions, at least one and none of them accepted.
    bounds
        What was to be shown.
    methods
        Those that were calibrated beside it.
    """
    nearest = max(tried, key=_nearness)
    reasons = ", ".join(f"{one.keep} {one.outcome}" for one in tried)
    there = "" if nearest.type is None else f" for {nearest.type}"
    message = f"{method}: abstained, no budget below 1.0 can be accepted ({reasons}). "
    if nearest.outcome == "unanswered":
        message += f"With keep {nearest.keep} it answered nothing."
    else:
        message += (
            f"Nearest came keep {nearest.keep}{there}: {drop_of(nearest)}, to be below "
            f"{percent_of(nearest.bound)} %."
        )
    return Abstention(
        method, bounds, nearest, tuple(tried), message, _next(nearest, bounds, methods)
    )


def _nearness(one: Decision) -> tuple[bool, float, float]:
    """Return what orders decisions by how near they came; of equal ones the first is taken."""
    over = one.drop - one.bound
    return (one.outcome != "unanswered", one.wealth, -math.inf if math.isnan(over) else -over)


def _next(nearest: Decision, bounds: Bounds, methods: Sequence[str]) -> tuple[str, ...]:
    """Return what to do, that first which helps most."""
    method = nearest.method
    larger = "--max-drop" if nearest.type is None else f"--type-drop {nearest.type!r}=SHARE"
    if nearest.outcome == "unanswered":
        error = next(iter(nearest.errors.values()), "")
        return (f"See to the errors first, for example: {error}",)
    advice = []
    if nearest.outcome == "undecided":
        of_type = "" if nearest.type is None else f" with questions of type {nearest.type}"
        guess = ""
        if nearest.media_expected is not None and nearest.media_expected > nearest.media_least:
            guess = f", and about {nearest.media_expected:,} if more go like these"
        advice.append(
            f"Give more than the {nearest.of_media:,} images or videos{of_type}: at least "
            f"{nearest.media_least:,}, if no other answer changes{guess}; or more questions of "
            "each with --per-media."
        )
        advice.append(f"Or allow a larger {larger}.")
    else:
        advice.append(
            f"Allow a larger {larger}, above the {percent_of(nearest.at_least)} % that are lost at "
            "least."
        )
    largest = bounds.grid[0]
    if isinstance(largest, int) or largest < _NEAR_ALL:
        advice.append(f"Or try a budget above {largest} with --keep-grid.")
    others = "Or another --method"
    if not any(map(resizes, methods)) and method != RESIZE:
        others += f", {RESIZE} among them, which makes the picture smaller"
    advice.append(f"{others}.")
    return tuple(advice)


# Numbers ----------------------------------------------------------------------------------------


def percent_of(share: float) -> str:
    """Return a share in per cent, without the sign; nothing where there is none."""
    return "" if math.isnan(share) else percent(share, digits=2)


def drop_of(one: Decision) -> str:
    """Return the drop of a decision and its bounds, as part of a sentence."""
    if math.isnan(one.drop):
        return "no drop measured"
    return (
        f"drop {percent_of(one.drop)} % ({percent_of(one.at_least)} to {percent_of(one.at_most)})"
    )


def without_nan(values: Any) -> Any:
    """Return JSON values with None for each number that is none."""
    if isinstance(values, dict):
        return {name: without_nan(one) for name, one in values.items()}
    if isinstance(values, float) and math.isnan(values):
        return None
    return values
