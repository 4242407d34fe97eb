"""Statistics of right and wrong answers, all over questions that are taken as independent.

What compares two conditions is paired: it looks at the questions that both have answered, and of
these only at how many one got right and the other wrong. Everything is exact or has a fixed seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from tokenprune.errors import ConfigError
from tokenprune_eval.results.answer_text import read_open
from tokenprune_eval.results.records import Record

RESAMPLES = 10_000
SEED = 0
_FEWEST = 6
"""Measurements from which on a median has a 95 % interval: all lie on one side of the true one with
probability 2 / 2**6 = 0.03, and with five 0.06."""
_DRAWS_AT_ONCE = 2_000_000
"""Of questions in resamples, so that a large data set's bootstrap takes little memory."""

BY_TEXT = "text"
"""`choose_by` of a run that reads letters from the text even where it knows likelihoods."""


class Accuracy(BaseModel):
    """A share of right answers.

    Attributes
    ----------
    correct, questions
        How many were right, of how many.
    share
        ``correct / questions``.
    low, high
        95 % Wilson interval of the share.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    correct: int
    questions: int
    share: float
    low: float
    high: float


class Paired(BaseModel):
    """One condition against a reference, over the questions that both answered.

    Attributes
    ----------
    questions
        How many both answered.
    gained, lost
        Right here and wrong in the reference; wrong here and right in the reference.
    difference
        ``(gained - lost) / questions``: accuracy here less that of the reference.
    low, high
        95 % paired bootstrap interval of the difference.
    p_value
        Exact two-sided McNemar test; not adjusted for the number of conditions.
    agreement
        Share of the questions with the same answer in both, right or wrong.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    questions: int
    gained: int
    lost: int
    difference: float
    low: float
    high: float
    p_value: float
    agreement: float


class SpeedUp(BaseModel):
    """How many times as fast one condition is as a reference, over the questions of both.

    Attributes
    ----------
    questions
        How many were timed under both.
    ratio
        Median over these questions of the reference's seconds over those here: 2 is twice as fast,
        and below 1 is slower.
    low, high
        95 % bootstrap interval of that median; None with fewer than six measurements of their own,
        of which no median is known so well.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    questions: int
    ratio: float
    low: float | None
    high: float | None

    @property
    def is_slower(self) -> bool:
        """Whether it is slower beyond the interval."""
        return self.high is not None and self.high < 1


@dataclass(frozen=True)
class Answer:
    """What a record counts as.

    Attributes
    ----------
    correct
        Whether it is right.
    said
        What is compared to tell whether two answers are the same.
    """

    correct: bool
    said: str


def wilson(correct: float, questions: float) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a share.

    Parameters
    ----------
    correct
        Between 0 and `questions`.
    questions
        At least 1. Neither has to be whole, see `independent`.

    Returns
    -------
    tuple of float
        Low and high, between 0 and 1.
    """
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(correct, questions, alpha=0.05, method="wilson")
    # Rounding may leave the share itself outside, where none or all are correct.
    share = correct / questions
    return min(max(0.0, float(low)), share), max(min(1.0, float(high)), share)


def independent(right: Sequence[bool], images: Sequence[Hashable]) -> float:
    """Return as how many independent questions these count.

    Questions about one image tend to be right or wrong together, so they tell less than as many
    about images of their own. Their number is divided by the design effect: the variance of the
    share with images as clusters, over that of independent questions (Rao and Scott, "A simple
    method for the analysis of clustered binary data", Biometrics 48, 1992, section 2).

    Parameters
    ----------
    right
        Whether each question was answered right; at least one.
    images
        The image of each.

    Returns
    -------
    float
        At least 1 and at most ``len(right)``: a design effect below 1 is taken for chance. Where
        all answers are right or all wrong there is no variance to compare, and it is
        ``len(right)``; where all are about one image it is 1.
    """
    count = len(right)
    excess: dict[Hashable, float] = {}
    share = sum(right) / count
    for is_right, image in zip(right, images, strict=True):
        excess[image] = excess.get(image, 0.0) + is_right - share
    clusters = len(excess)
    if share in (0.0, 1.0):
        return float(count)
    if clusters == 1:
        return 1.0
    clustered = clusters / (clusters - 1) * sum(value**2 for value in excess.values())
    effect = clustered / (count * share * (1 - share))
    return max(1.0, count / max(1.0, effect))


def accuracy_of(correct: Sequence[bool]) -> Accuracy | None:
    """Return the share of right answers and its Wilson interval; None where there are none."""
    if not correct:
        return None
    right, count = sum(correct), len(correct)
    low, high = wilson(right, count)
    return Accuracy(correct=right, questions=count, share=right / count, low=low, high=high)


def difference_interval(
    gained: int, lost: int, questions: int, *, resamples: int = RESAMPLES, seed: int = SEED
) -> tuple[float, float]:
    """Return the 95 % paired bootstrap interval of a difference of accuracies.

    Questions are drawn with replacement, each with both its answers, and the interval runs from
    the 2.5th to the 97.5th percentile of the resampled differences. A question adds 1, -1 or 0,
    so the numbers of each in a resample are a draw from a multinomial distribution. Where no
    answer differs in correctness, every resample is alike and the interval is the point 0.

    Parameters
    ----------
    gained, lost
        See `Paired`.
    questions
        At least 1 and at least ``gained + lost``.
    resamples
        How many resamples, at least 1.
    seed
        Of the draws.

    Returns
    -------
    tuple of float
        Low and high, between -1 and 1.

    Raises
    ------
    ConfigError
        If the counts contradict each other.
    """
    _check_counts(gained, lost, questions)
    if resamples < 1:
        raise ConfigError(f"resamples={resamples} draws nothing. Give at least 1.")
    shares = np.array([gained, lost, questions - gained - lost]) / questions
    drawn = np.random.default_rng(seed).multinomial(questions, shares, size=resamples)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / questions, [0.025, 0.975])
    return float(low), float(high)


def mean_interval(
    values: Sequence[float], *, resamples: int = RESAMPLES, seed: int = SEED
) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a mean over questions.

    Questions are drawn with replacement, and the interval runs from the 2.5th to the 97.5th
    percentile of the resampled means. Of differences of two answers to each question it is the
    paired bootstrap interval.

    Parameters
    ----------
    values
        One for each question, at least one.
    resamples
        How many resamples, at least 1.
    seed
        Of the draws.

    Returns
    -------
    tuple of float
        Low and high; both the mean where all values are equal.
    """
    known = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    count = len(known)
    at_once = max(1, _DRAWS_AT_ONCE // count)
    means = [
        known[rng.integers(0, count, (min(at_once, resamples - done), count))].mean(axis=1)
        for done in range(0, resamples, at_once)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def f1_of(yes_and_yes: float, said_yes: float, is_yes: float) -> float | None:
    """Return the F1 score of "yes".

    Parameters
    ----------
    yes_and_yes
        Questions where "yes" is right and was said.
    said_yes, is_yes
        Questions where it was said; where it is right.

    Returns
    -------
    float or None
        The harmonic mean of precision and recall; None where "yes" was neither right nor said.
    """
    total = said_yes + is_yes
    return 2 * yes_and_yes / total if total else None


def f1_intervals(
    answers: Sequence[tuple[bool, bool, bool]], *, resamples: int = RESAMPLES, seed: int = SEED
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the 95 % bootstrap intervals of an F1 score and of its difference to another.

    Questions are drawn with replacement, each with both its answers; only how many there are of
    each kind matters, so a resample is a draw from a multinomial distribution.

    Parameters
    ----------
    answers
        Of each question: whether "yes" is right, was said here, and was said in the reference.
    resamples
        How many resamples, at least 1.
    seed
        Of the draws.

    Returns
    -------
    tuple of tuple of float
        Low and high of the score here, and of the score here less that of the reference. Resamples
        in which "yes" is neither right nor said count as 0.
    """
    counted = sorted(Counter(answers).items())
    kinds = [kind for kind, _ in counted]
    shares = np.array([count for _, count in counted]) / len(answers)
    drawn = np.random.default_rng(seed).multinomial(len(answers), shares, size=resamples)
    right, here, there = np.array(kinds, dtype=np.int64).T

    def scores(said: NDArray[np.int64]) -> NDArray[np.float64]:
        total = drawn @ (said + right)
        return np.asarray(2 * (drawn @ (said * right)) / np.maximum(total, 1), dtype=np.float64)

    own = scores(here)
    (low, high), (below, above) = (
        np.quantile(values, [0.025, 0.975]) for values in (own, own - scores(there))
    )
    return (float(low), float(high)), (float(below), float(above))


def mcnemar_p(gained: int, lost: int) -> float:
    """Return the exact two-sided p-value of McNemar's test.

    Where both conditions are equally good, each question on which one is right and the other wrong
    goes either way with probability 1/2.

    Parameters
    ----------
    gained, lost
        See `Paired`.

    Returns
    -------
    float
        1.0 where no question went either way.

    Raises
    ------
    ConfigError
        If a count is negative.
    """
    _check_counts(gained, lost, gained + lost or 1)
    from statsmodels.stats.contingency_tables import mcnemar

    return min(1.0, float(mcnemar([[0, gained], [lost, 0]], exact=True).pvalue))


def answer_of(record: Record, choose_by: object = None) -> Answer | None:
    """Return what a record counts as; None where it holds an error or a cut answer.

    The answer is the letter of a question with choices: the most likely one where likelihoods are
    known and the run does not count by text, otherwise as read from the text. Where there is no
    letter, it is what the question's scoring read, or the text as an open answer is read, or else
    in lower case with single spaces.

    Parameters
    ----------
    record
        One answer or error.
    choose_by
        The run's setting of that name; None leaves it to what the record holds.

    Raises
    ------
    ConfigError
        If it holds neither an error nor whether it is right, and was not cut.
    """
    if record.error is not None or (record.cut and record.correct is None):
        return None
    if record.correct is None:
        raise ConfigError(
            f"the record of {record.item!r} under {record.condition!r} has neither an error nor a "
            "value for `correct`. Answer the question again."
        )
    if choose_by != BY_TEXT and record.likelihoods:
        said = max(sorted(record.likelihoods), key=record.likelihoods.__getitem__)
    else:
        text = record.text or ""
        said = record.choice or record.read or read_open(text) or " ".join(text.split()).casefold()
    return Answer(record.correct, said)


def failed_questions(errors: Mapping[str, set[str]], answered: Mapping[str, int]) -> set[str]:
    """Return the questions that failed under any condition: no paired figure counts them.

    So every condition is compared over the same questions, and none looks better because it
    refused the hard ones. A condition that answered nothing at all is no reason to leave out all.

    Parameters
    ----------
    errors
        Key of a condition -> ids of the questions that failed under it.
    answered
        Key of a condition -> how many questions it answered.
    """
    return {
        question for key, questions in errors.items() if answered.get(key) for question in questions
    }


def paired(here: Mapping[str, Answer], reference: Mapping[str, Answer]) -> Paired | None:
    """Compare two conditions on the questions that both answered.

    Parameters
    ----------
    here, reference
        Id of a question -> its answer.

    Returns
    -------
    Paired or None
        None where no question was answered by both.
    """
    pairs = [
        (answer, reference[question]) for question, answer in here.items() if question in reference
    ]
    if not pairs:
        return None
    gained = sum(one.correct and not other.correct for one, other in pairs)
    lost = sum(other.correct and not one.correct for one, other in pairs)
    low, high = difference_interval(gained, lost, len(pairs))
    return Paired(
        questions=len(pairs),
        gained=gained,
        lost=lost,
        difference=(gained - lost) / len(pairs),
        low=low,
        high=high,
        p_value=mcnemar_p(gained, lost),
        agreement=sum(one.said == other.said for one, other in pairs) / len(pairs),
    )


def speed_up(
    here: Sequence[float], reference: Sequence[float], batch: float = 1.0
) -> SpeedUp | None:
    """Compare two conditions' seconds, question by question.

    The interval is the percentile interval of the bootstrap of a median, exactly and without
    drawing (Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7,
    1979, section 3): of n values, a resample of m has its median at or below the k-th smallest
    where at least half of its draws are, and their number is binomial with share k / n. Where a
    resample has two middle values, the lower one counts for the low end and the upper one for the
    high end.

    Parameters
    ----------
    here, reference
        Seconds of each question, in one order; all above 0.
    batch
        Questions that were timed together. Their times are one measurement, so a resample has
        ``m = n / batch`` draws.

    Returns
    -------
    SpeedUp or None
        None without questions.
    """
    if not here:
        return None
    from scipy.stats import binom

    ratios = np.sort(np.asarray(reference, dtype=np.float64) / np.asarray(here, dtype=np.float64))
    count = len(ratios)
    low = high = None
    if (draws := int(count / max(1.0, batch))) >= _FEWEST:
        shares = np.arange(1, count + 1) / count
        # `sf` is the probability of more than that many.
        lower = binom.sf((draws + 1) // 2 - 1, draws, shares)
        upper = binom.sf(draws // 2, draws, shares)
        low = float(ratios[int(np.argmax(lower >= 0.025))])
        high = float(ratios[int(np.argmax(upper >= 0.975))])
    return SpeedUp(questions=count, ratio=float(np.median(ratios)), low=low, high=high)


def _check_counts(gained: int, lost: int, questions: int) -> None:
    if gained < 0 or lost < 0 or questions < 1 or gained + lost > questions:
        raise ConfigError(
            f"gained={gained}, lost={lost} and questions={questions} cannot be counts of the same "
            "questions. Give at least 1 question, and no more gained and lost than questions."
        )
