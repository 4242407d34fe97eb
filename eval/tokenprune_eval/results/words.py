"""How numbers and names are written in the tables and the report."""

from __future__ import annotations

from tokenprune_eval.results.records import UNPRUNED
from tokenprune_eval.results.statistics import Accuracy, Paired
from tokenprune_eval.shared import tables

NOTHING = "\N{EN DASH}"
"""Stands where nothing was measured."""

BUNDLED = (
    "The model is the one bundled with tokenprune, a test object and no public VLM: its accuracies "
    "say nothing about public models."
)

CUT = (
    "They are neither right nor wrong, and left out of the accuracies; with more --max-new-tokens "
    "they would come to an end."
)


def failed(count: int) -> str:
    """Return what becomes of questions that failed under some condition."""
    which = "1 question" if count == 1 else f"{count:,} questions"
    return (
        f"{which} failed under at least one condition and {'is' if count == 1 else 'are'} left out "
        "of the paired figures of all."
    )


def plain(text: str) -> str:
    """Return a text on one line, without anything that a terminal would act on."""
    return "".join(sign if sign.isprintable() else " " for sign in text)


def percent(share: float | None) -> str:
    """Return a share in per cent with one digit: ``"95.2"``."""
    return NOTHING if share is None else tables.percent(share)


def points(share: float | None) -> str:
    """Return a difference of shares in percentage points with its sign: ``"-4.6"``."""
    if share is None:
        return NOTHING
    text = f"{100 * share:+.1f}"
    return "0.0" if float(text) == 0 else text


def number(value: float | None) -> str:
    """Return a count or a mean of counts: ``"16"``, ``"12.5"``, ``"1,024"``."""
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.1f}"


def milliseconds(seconds: float | None) -> str:
    """Return seconds as milliseconds, three digits at least where there are any."""
    if seconds is None:
        return NOTHING
    value = 1000 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def mebibytes(count: float | None) -> str:
    """Return bytes as MiB."""
    if count is None:
        return NOTHING
    value = count / 2**20
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def p_value(pair: Paired | None) -> str:
    """Return the p-value with three digits, or that it is below 0.001."""
    if pair is None:
        return NOTHING
    return "<0.001" if pair.p_value < 0.001 else f"{pair.p_value:.3f}"


def agreement(pair: Paired | None) -> str:
    """Return the share of equal answers in per cent."""
    return NOTHING if pair is None else percent(pair.agreement)


def share_with_interval(accuracy: Accuracy | None) -> str:
    """Return ``"95.2 (93.0-96.7)"``, in per cent."""
    if accuracy is None:
        return NOTHING
    return f"{percent(accuracy.share)} ({percent(accuracy.low)}-{percent(accuracy.high)})"


def difference_with_interval(pair: Paired | None) -> str:
    """Return ``"-4.6 [-6.8, -2.4]"``, in percentage points."""
    if pair is None:
        return NOTHING
    return f"{points(pair.difference)} [{points(pair.low)}, {points(pair.high)}]"


def keep_text(method: str, keep: float) -> str:
    """Return what a condition keeps, as it was given; ``"all"`` for the unpruned one."""
    return "all" if method == UNPRUNED else str(keep)


def questions(asked: int, whole: int | None) -> str:
    """Return how many questions were asked, of how many: ``"30 of 400 questions"``."""
    noun = "question" if (whole or asked) == 1 else "questions"
    return f"{asked:,} {noun}" if whole is None else f"{asked:,} of {whole:,} {noun}"


def label(method: str, variant: str) -> str:
    """Return what a condition's curve or row is called for people; see `Condition.variant`."""
    return f"{method}, {variant}" if variant else method
