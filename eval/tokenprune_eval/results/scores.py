"""What the answers to a data set come to in its own measure: more than how many are right.

`scores_of` works out the measure that the set's authors report (ANLS, VQA accuracy, F1, mean IoU),
its interval, its difference to the unpruned model, and further figures of the same answers. Right
and wrong answers are counted beside it as for every set, from a score of 0.5 on.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from tokenprune_eval.data.question import Scoring
from tokenprune_eval.results.scoring import ACCURACY, RULES
from tokenprune_eval.results.statistics import f1_intervals, f1_of, mean_interval

F1 = RULES["yes-no"].metric
MIXED = "mean score"
"""The measure of a set whose questions have several."""


@dataclass(frozen=True)
class Measure:
    """A further figure.

    Attributes
    ----------
    title
        In tables, without its unit.
    meaning
        One clause.
    share
        Whether it is a share, shown in per cent.
    trouble
        Whether it says that answers could not be read; it is then shown only where it is not 0.
    """

    title: str
    meaning: str
    share: bool = True
    trouble: bool = False


FIGURES: Mapping[str, Measure] = {
    "precision": Measure("precision", "of the questions answered yes, those where yes is right"),
    "recall": Measure("recall", "of the questions where yes is right, those answered yes"),
    "yes_ratio": Measure("yes", "questions answered yes"),
    "rmse": Measure("RMSE", "root of the mean squared error of the numbers given", share=False),
    "circular": Measure("circular", "questions right with their choices in every order"),
    "neither": Measure("neither", "answers without yes or no", trouble=True),
    "no_number": Measure("no number", "answers without one number", trouble=True),
    "no_box": Measure("no box", "answers without a box", trouble=True),
    "outside": Measure(
        "outside",
        "boxes that leave the picture, mostly because the model counts in another unit "
        "(--box-unit)",
        trouble=True,
    ),
}
"""Further figures of a data set's answers by their names in results.json, as tables order them."""


class ScoreDifference(BaseModel):
    """The measure under one condition less that of the unpruned one.

    Attributes
    ----------
    questions
        Answered under both, without those that failed under any.
    difference, low, high
        Over these questions, with its 95 % paired bootstrap interval.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    questions: int
    difference: float
    low: float
    high: float


class TypeScore(BaseModel):
    """The measure over the questions of one type.

    Attributes
    ----------
    questions
        Answered ones.
    value
        None where there are none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    questions: int
    value: float | None


class Scores(BaseModel):
    """A data set's own measure under one condition.

    Attributes
    ----------
    metric
        Its name: ``"accuracy"``, ``"ANLS"``, ``"VQA accuracy"``, ``"mean IoU"``, ``"F1"``, or
        ``"mean score"`` where questions have different ones.
    questions
        Answered ones.
    value, low, high
        The measure, from 0 to 1, with its 95 % bootstrap interval; None without answers.
    against_unpruned
        None for the unpruned condition itself and where it did not run.
    by_type
        Type of question -> the measure; empty where the data set has no types.
    figures
        Further figures by name, see `FIGURES`; None where it is not defined.
    """

    model_config = ConfigDict(extra="forbid")

    metric: str
    questions: int
    value: float | None
    low: float | None
    high: float | None
    against_unpruned: ScoreDifference | None
    by_type: dict[str, TypeScore]
    figures: dict[str, float | None]


@dataclass(frozen=True)
class Scored:
    """An answered question.

    Attributes
    ----------
    type, scoring, answer, group
        Of the question, see `tokenprune_eval.data.question.Question`.
    score
        Of the answer, from 0 to 1.
    said
        What it was read as.
    """

    type: str
    scoring: Scoring
    answer: str
    group: str
    score: float
    said: str

    @property
    def says_yes(self) -> bool:
        """Whether it was read as yes."""
        return self.said == "yes"

    @property
    def is_yes(self) -> bool:
        """Whether yes is right."""
        return self.answer.strip().lower() == "yes"


def metric_of(scorings: Collection[Scoring], grouped: bool) -> str | None:
    """Return a data set's measure; None where right and wrong are all there is.

    Parameters
    ----------
    scorings
        Of its questions.
    grouped
        Whether some of them are one question with its choices in other orders.
    """
    if set(scorings) <= {"exact"}:
        return ACCURACY if grouped else None
    names = {RULES[scoring].metric for scoring in scorings}
    return names.pop() if len(names) == 1 else MIXED


def scores_of(
    metric: str,
    answered: Mapping[str, Scored],
    reference: Mapping[str, Scored] | None,
    types: Iterable[str],
    group_sizes: Mapping[str, int],
) -> Scores:
    """Work out a data set's own measure.

    Parameters
    ----------
    metric
        What `metric_of` returned.
    answered
        Id of a question -> its answer.
    reference
        The same for the unpruned condition, without the questions that failed under any; None for
        that condition itself.
    types
        Types of question in the order of the tables.
    group_sizes
        Name of a group -> how many questions it has.
    """
    everything = list(answered.values())
    low, high = _interval(metric, everything)
    of_type: dict[str, list[Scored]] = {kind: [] for kind in types}
    for one in everything:
        if one.type in of_type:
            of_type[one.type].append(one)
    return Scores(
        metric=metric,
        questions=len(everything),
        value=_value(metric, everything),
        low=low,
        high=high,
        against_unpruned=None if reference is None else _difference(metric, answered, reference),
        by_type={
            kind: TypeScore(questions=len(own), value=_value(metric, own))
            for kind, own in of_type.items()
        },
        figures=_figures(everything, group_sizes),
    )


def _value(metric: str, answered: Sequence[Scored]) -> float | None:
    if metric == F1:
        both = sum(one.says_yes and one.is_yes for one in answered)
        said, right = (sum(getattr(one, name) for one in answered) for name in _YES)
        return f1_of(both, said, right)
    return statistics.fmean(one.score for one in answered) if answered else None


_YES = ("says_yes", "is_yes")


def _interval(metric: str, answered: Sequence[Scored]) -> tuple[float, float] | tuple[None, None]:
    if not answered:
        return None, None
    if metric == F1:
        return f1_intervals([(one.is_yes, one.says_yes, False) for one in answered])[0]
    return mean_interval([one.score for one in answered])


def _difference(
    metric: str, answered: Mapping[str, Scored], reference: Mapping[str, Scored]
) -> ScoreDifference | None:
    pairs = [(one, reference[name]) for name, one in answered.items() if name in reference]
    if not pairs:
        return None
    here, there = (_value(metric, side) for side in zip(*pairs, strict=True))
    if metric == F1:
        said = [(one.is_yes, one.says_yes, other.says_yes) for one, other in pairs]
        low, high = f1_intervals(said)[1]
    else:
        low, high = mean_interval([one.score - other.score for one, other in pairs])
    difference = (here or 0.0) - (there or 0.0)
    return ScoreDifference(questions=len(pairs), difference=difference, low=low, high=high)


def _figures(answered: Sequence[Scored], group_sizes: Mapping[str, int]) -> dict[str, float | None]:
    """Return the further figures that the questions' scorings have."""

    def of(scoring: Scoring) -> list[Scored]:
        return [one for one in answered if one.scoring == scoring]

    figures: dict[str, float | None] = {}
    if asked := of("yes-no"):
        yes = [one for one in asked if one.says_yes]
        right = [one for one in asked if one.is_yes]
        both = sum(one.is_yes for one in yes)
        figures["precision"] = both / len(yes) if yes else None
        figures["recall"] = both / len(right) if right else None
        figures["yes_ratio"] = len(yes) / len(asked)
        figures["neither"] = sum(not one.said for one in asked) / len(asked)
    if counted := of("count"):
        errors = [(int(one.said) - int(one.answer)) ** 2 for one in counted if one.said]
        figures["rmse"] = math.sqrt(statistics.fmean(errors)) if errors else None
        figures["no_number"] = sum(not one.said for one in counted) / len(counted)
    if located := of("box"):
        boxes = [json.loads(one.said) for one in located if one.said]
        figures["no_box"] = 1 - len(boxes) / len(located)
        outside = sum(not all(-0.01 <= value <= 1.01 for value in box) for box in boxes)
        figures["outside"] = outside / len(located)
    if group_sizes:
        groups: dict[str, list[Scored]] = {}
        for one in answered:
            if one.group:
                groups.setdefault(one.group, []).append(one)
        whole = [own for name, own in groups.items() if len(own) == group_sizes[name]]
        right_always = sum(all(one.score >= 1.0 for one in own) for own in whole)
        figures["circular"] = right_always / len(whole) if whole else None
    return {name: figures[name] for name in FIGURES if name in figures}
