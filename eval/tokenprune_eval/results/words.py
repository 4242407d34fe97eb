"""How numbers and names are written in the tables and the report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenprune.baselines import RESIZE
from tokenprune_eval.results.records import UNPRUNED
from tokenprune_eval.results.scores import F1, FIGURES, ScoreDifference, Scores
from tokenprune_eval.results.scoring import ACCURACY
from tokenprune_eval.results.statistics import Accuracy, Paired, SpeedUp
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


def seconds(value: float | None) -> str:
    """Return seconds with three digits at least where there are any: ``"0.0123"``."""
    return NOTHING if value is None else tables.three_digits(value)


def rate(per_second: float | None) -> str:
    """Return how many a second, with three digits at least: ``"0.312"``."""
    return NOTHING if per_second is None else tables.three_digits(per_second)


def times(ratio: float) -> str:
    """Return a ratio of speeds: ``"x1.52"``, never as 1 where it is not."""
    return f"x{ratio:.3f}" if ratio != 1 and 0.995 <= ratio < 1.005 else f"x{ratio:.2f}"


def speed_up(one: SpeedUp | None) -> str:
    """Return how many times as fast it is."""
    return NOTHING if one is None else times(one.ratio)


def slower(method: str, first_token: SpeedUp | None, answer: SpeedUp | None) -> str:
    """Return that a condition is slower than the unpruned one, where it is beyond the interval.

    Parameters
    ----------
    method
        The condition's.
    first_token, answer
        How many times as fast its first token, and its whole answer, is there.

    Returns
    -------
    str
        Empty where neither is slower, or it is not known.
    """
    known = (("first token", first_token), ("answer", answer))
    parts = [(what, one.ratio) for what, one in known if one is not None and one.is_slower]
    than = "not resizing" if method == RESIZE else "not pruning"
    match parts:
        case []:
            return ""
        case [(what, ratio)]:
            return f"slower to the {what} than {than} ({times(ratio)})"
    said = ", ".join(f"{times(ratio)} to the {what}" for what, ratio in parts)
    return f"slower than {than} ({said})"


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


def difference_with_interval(pair: Paired | ScoreDifference | None) -> str:
    """Return ``"-4.6 [-6.8, -2.4]"``, in percentage points."""
    if pair is None:
        return NOTHING
    return f"{points(pair.difference)} [{points(pair.low)}, {points(pair.high)}]"


def score_with_interval(scores: Scores | None) -> str:
    """Return ``"61.3 (58.2-64.4)"``, in per cent."""
    if scores is None or scores.value is None:
        return NOTHING
    return f"{percent(scores.value)} ({percent(scores.low)}-{percent(scores.high)})"


def metric_of(scores: Sequence[Scores]) -> str | None:
    """Return the measure of a data set's rows where it is not what `Row.accuracy` says already."""
    return next((one.metric for one in scores if one.metric != ACCURACY), None)


def metric_meaning(metric: str) -> str:
    """Return what a measure is, a clause."""
    if metric == F1:
        return "of the answer yes"
    return "mean over the answered questions, which count as right from a score of 0.5 on"


def figures_shown(scores: Sequence[Scores]) -> list[str]:
    """Return the names of the further figures that tables show of a data set's rows."""
    return [
        name
        for name, measure in FIGURES.items()
        if any(
            one.figures.get(name) if measure.trouble else one.figures.get(name) is not None
            for one in scores
        )
    ]


def figure(name: str, value: float | None) -> str:
    """Return a further figure: a share in per cent, or a number with two digits."""
    if value is None:
        return NOTHING
    return percent(value) if FIGURES[name].share else f"{value:.2f}"


def figure_title(name: str) -> str:
    """Return a further figure's title with its unit."""
    measure = FIGURES[name]
    return f"{measure.title}, %" if measure.share else measure.title


def score_notes(scores: Iterable[Scores]) -> list[str]:
    """Return what the columns of the data sets' own measures mean; empty where there are none."""
    known = list(scores)
    metrics = dict.fromkeys(one.metric for one in known if one.metric != ACCURACY)
    parts = [f"{metric}: {metric_meaning(metric)}" for metric in metrics]
    if parts:
        parts.append(
            "intervals of these, and of their differences to unpruned in points: 95 % bootstrap, "
            "paired for the differences"
        )
    parts += [f"{FIGURES[name].title}: {FIGURES[name].meaning}" for name in figures_shown(known)]
    return [f"{'; '.join(parts)}."] if parts else []


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
