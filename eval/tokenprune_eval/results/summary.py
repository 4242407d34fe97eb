"""results.json: one row for each data set and condition, worked out from a run's records.

`summarise` makes `Results`, `read_results` reads them back, and `tokenprune_eval.results.write`
writes them. Whatever was not measured is None.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tokenprune.baselines import RESIZE
from tokenprune.config import Positions
from tokenprune.errors import InputFileError, reason_of
from tokenprune.formats import check_format
from tokenprune.providers import BUNDLED_MODELS
from tokenprune_eval.data.question import Question, Scoring
from tokenprune_eval.results.records import (
    UNPRUNED,
    Condition,
    Depth,
    ModalityIndices,
    Record,
    Seconds,
    variant,
)
from tokenprune_eval.results.scores import Scored, Scores, metric_of, scores_of
from tokenprune_eval.results.statistics import (
    Accuracy,
    Answer,
    Paired,
    SpeedUp,
    accuracy_of,
    answer_of,
    failed_questions,
    paired,
    speed_up,
)

SCHEMA_VERSION: Literal[1] = 1
RESULTS = "results.json"
MAX_LOSSES = 12
MAX_ERRORS = 50


class QuestionInfo(BaseModel):
    """What the report needs of a question; one line of a run's ``items.jsonl``.

    Attributes
    ----------
    id
        Data set and id within it, for example ``"easy-vqa/easy-vqa-test-3"``.
    data_set
        Name of the data set.
    kind, path, question, answer, choices, type, times, evidence, further
        See `Question`.
    scoring, answers, group
        See `Question`; files from before there were others than ``"exact"`` have none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    data_set: str
    kind: Literal["image", "video"]
    path: Path
    question: str
    answer: str
    choices: tuple[str, ...] = ()
    type: str = ""
    times: tuple[float, ...] = ()
    evidence: tuple[tuple[int, int, int, int], ...] = ()
    further: tuple[Path, ...] = ()
    scoring: Scoring = "exact"
    answers: tuple[str, ...] = ()
    group: str = ""

    @classmethod
    def of(cls, data_set: str, question: Question) -> QuestionInfo:
        """Return what the report needs of a question of that data set."""
        return cls(
            id=f"{data_set}/{question.id}",
            data_set=data_set,
            kind=question.kind,
            path=question.path,
            question=question.question,
            answer=question.answer,
            choices=question.choices,
            type=question.type,
            times=question.times,
            evidence=question.evidence,
            further=question.further,
            scoring=question.scoring,
            answers=question.answers,
            group=question.group,
        )


class Dominance(BaseModel):
    """Mean Modality Dominance and Attention Efficiency Indices of one condition.

    Attributes
    ----------
    questions
        On how many they were measured.
    early, middle, late
        Means over these questions, for the first, middle and last two layers of the language
        model; None where an index is infinite on one of them.
    """

    model_config = ConfigDict(extra="forbid")

    questions: int
    early: ModalityIndices
    middle: ModalityIndices
    late: ModalityIndices


class Row(BaseModel):
    """One data set under one condition.

    Attributes
    ----------
    data_set
        Its name.
    condition
        `Condition.key`.
    method, keep, positions, proportional_attention
        See `Condition`.
    questions, answered, cut, errors, missing
        Questions of the data set: all; answered, right or wrong; cut off before the answer named
        anything; failed with an error; not yet asked. The last four add up to the first.
    accuracy
        Over the answered questions.
    against_unpruned
        Against the unpruned condition, over the questions that both answered and that failed under
        no condition (`failed_questions`); None for itself and where it did not run.
    group_a
        Over the questions that are right unpruned and wrong where the picture was made smaller to
        the same budget (condition ``resize``): group A of VTC-Bench (ACL 2026). A method beats a
        smaller picture only there. None where that did not run, and for both of these conditions.
    by_type
        Type of question -> accuracy over the answered ones of that type, None where there are
        none. Empty where the data set has no types.
    scores
        The data set's own measure; None where right and wrong answers are all there is.
    visual_tokens, of_visual_tokens, prompt_tokens, answer_tokens
        Means over the questions answered or cut; see `Record`.
    seconds
        Medians over the same questions, in seconds; see `Seconds`.
    first_token_speed_up, answer_speed_up
        Against the unpruned condition, `Seconds.first_token` and `Seconds.total` of the questions
        that ended with no error under both and that failed under no condition; None for itself,
        and where it did not run or nothing was timed.
    items_per_second
        Questions divided by the sum of their `Seconds.total`.
    peak_bytes
        The most that any question took.
    kv_bytes, mass_kept
        Means over the questions answered or cut; see `Record`.
    dominance
        Where it was measured.
    """

    model_config = ConfigDict(extra="forbid")

    data_set: str
    condition: str
    method: str
    keep: int | float = Field(union_mode="smart")
    positions: Positions
    proportional_attention: bool = False
    questions: int
    answered: int
    cut: int = 0
    errors: int
    missing: int
    accuracy: Accuracy | None
    against_unpruned: Paired | None
    # Files from before it was counted have none.
    group_a: Accuracy | None = None
    by_type: dict[str, Accuracy | None]
    # Files from before it was measured have none.
    scores: Scores | None = None
    visual_tokens: float | None
    of_visual_tokens: float | None
    prompt_tokens: float | None
    answer_tokens: float | None
    seconds: Seconds
    # Files from before they were worked out have none.
    first_token_speed_up: SpeedUp | None = None
    answer_speed_up: SpeedUp | None = None
    items_per_second: float | None
    peak_bytes: int | None
    kv_bytes: float | None
    mass_kept: float | None
    dominance: Dominance | None = None

    @property
    def variant(self) -> str:
        """See `Condition.variant`."""
        return variant(self.positions, self.proportional_attention)

    @property
    def at_least(self) -> float | None:
        """Share of right answers if all that were cut were wrong; `accuracy` knows nothing of them.

        A method that makes a model ramble has many cut answers, and a good accuracy on the few
        that are left.
        """
        told = self.answered + self.cut
        return (self.accuracy.correct if self.accuracy else 0) / told if told else None


class GivenAnswer(BaseModel):
    """What was answered to one question.

    Attributes
    ----------
    text, choice, correct
        See `Record`.
    """

    model_config = ConfigDict(extra="forbid")

    text: str | None
    choice: str | None
    correct: bool


class Loss(BaseModel):
    """A question that is right unpruned and wrong under at least one pruned condition.

    Attributes
    ----------
    item
        The question.
    wrong, answered
        Pruned conditions that answered it wrong, and that answered it.
    unpruned
        The answer with all tokens.
    said
        Key of each pruned condition that answered -> its answer.
    shown
        Key of the condition whose kept tokens are drawn: of those that are wrong, the one with the
        most visual tokens, where possible one with `kept` noted.
    visual_tokens, of_visual_tokens, kept, grid
        Of that condition's record; see `Record`.
    """

    model_config = ConfigDict(extra="forbid")

    item: QuestionInfo
    wrong: int
    answered: int
    unpruned: GivenAnswer
    said: dict[str, GivenAnswer]
    shown: str
    visual_tokens: int | None
    of_visual_tokens: int | None
    kept: list[int] | None
    grid: tuple[int, int, int] | None


class ErrorGroup(BaseModel):
    """All errors with one message.

    Attributes
    ----------
    message
        What was said.
    count
        How many questions under how many conditions failed so, counted together.
    conditions
        Keys of these conditions.
    items
        Ids of the first three questions.
    """

    model_config = ConfigDict(extra="forbid")

    message: str
    count: int
    conditions: list[str]
    items: list[str]


class DataInfo(BaseModel):
    """A data set of the run.

    Attributes
    ----------
    name
        Its name.
    questions
        How many were to be asked.
    of_questions
        Of how many they were drawn, with ``--limit`` or ``--shard``; None where they are all.
    failed
        How many of them failed under at least one condition and are left out of all paired figures.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    questions: int
    of_questions: int | None = None
    failed: int = 0


class Results(BaseModel):
    """All of results.json.

    Attributes
    ----------
    schema_version
        Rises when a field changes its meaning or goes.
    complete
        Whether every question has been asked under every condition.
    model
        Name of the model, as in the settings.
    bundled
        Whether that is the bundled model, a test object.
    started, wall_seconds
        When the run began, ISO 8601, and how long it took.
    data, conditions
        What was to be run, in order.
    rows
        For each data set, each condition.
    losses
        At most `MAX_LOSSES` questions that most pruned conditions lose, data sets taking turns.
    errors
        The most frequent messages, at most `MAX_ERRORS`.
    settings, versions, machine
        As the run noted them.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = SCHEMA_VERSION
    complete: bool
    model: str
    bundled: bool
    started: str | None
    wall_seconds: float | None
    data: list[DataInfo]
    conditions: list[Condition]
    rows: list[Row]
    losses: list[Loss]
    errors: list[ErrorGroup]
    settings: dict[str, Any]
    versions: dict[str, Any]
    machine: dict[str, Any]


_Given = Mapping[str, Mapping[str, Record]]
"""Key of a condition -> id of a question -> its record."""

_Answers = Mapping[str, Mapping[str, Answer]]


def summarise(
    about: Mapping[str, Any],
    questions: Sequence[QuestionInfo],
    conditions: Sequence[Condition],
    records: Iterable[Record],
) -> Results:
    """Work out everything that is reported of a run, finished or not.

    Parameters
    ----------
    about
        The content of ``run.json``.
    questions
        All questions of the run, in order.
    conditions
        All conditions of the run, in order.
    records
        Those there are. Where a question was asked more than once under a condition, as after an
        error, the last counts.

    Returns
    -------
    Results

    Raises
    ------
    InputFileError
        If two questions or conditions have the same name, or a record is about a question or
        condition that the run does not have.
    ConfigError
        If a record holds neither an error nor whether it is right, and was not cut.
    """
    given = _by_condition(questions, conditions, records)
    settings = dict(about.get("settings") or {})
    choose_by = settings.get("choose_by")
    answers = {
        key: {
            question: answer
            for question, record in of_condition.items()
            if (answer := answer_of(record, choose_by)) is not None
        }
        for key, of_condition in given.items()
    }
    sets: dict[str, list[QuestionInfo]] = {}
    for question in questions:
        sets.setdefault(question.data_set, []).append(question)
    failed = {name: _failed(own, given, answers) for name, own in sets.items()}
    model = settings.get("model")
    return Results(
        complete=bool(about.get("complete")),
        model="" if model is None else str(model),
        bundled=about.get("bundled") is True or model in BUNDLED_MODELS,
        started=about.get("started"),
        wall_seconds=about.get("seconds"),
        data=[
            DataInfo(
                name=name,
                questions=len(own),
                of_questions=_drawn_from(about, name, len(own)),
                failed=len(failed[name]),
            )
            for name, own in sets.items()
        ],
        conditions=list(conditions),
        rows=[
            _row(
                name,
                own,
                condition,
                given,
                answers,
                failed[name],
                _lost_by_resizing(condition, conditions, answers),
                given.get(UNPRUNED, {}),
            )
            for name, own in sets.items()
            for condition in conditions
        ],
        losses=_losses(list(sets.values()), conditions, given, answers),
        errors=_errors(given),
        settings=settings,
        versions=dict(about.get("versions") or {}),
        machine=dict(about.get("machine") or {}),
    )


def read_results(folder: Path) -> Results:
    """Read a run's ``results.json``.

    Parameters
    ----------
    folder
        The run's folder.

    Raises
    ------
    InputFileError
        If the file is missing, no JSON, of a newer `schema_version` or not as `Results` says.
    """
    file = folder / RESULTS
    try:
        content = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise InputFileError(
            f"{file} cannot be read: {reason_of(error)}. Give the folder of a run."
        ) from None
    except ValueError as error:
        raise InputFileError(
            f"{file} is no JSON ({reason_of(error)}). Have it written again from the run's records."
        ) from None
    again = "Or have it written again from the run's records."
    if isinstance(content, dict):
        content = check_format(content, SCHEMA_VERSION, file, again, key="schema_version")
    try:
        return Results.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputFileError(
            f"{file} is damaged{f' at {place}' if place else ''}: {first['msg']}. Have it written "
            "again from the run's records."
        ) from None


def _by_condition(
    questions: Sequence[QuestionInfo], conditions: Sequence[Condition], records: Iterable[Record]
) -> dict[str, dict[str, Record]]:
    ids = {question.id for question in questions}
    given: dict[str, dict[str, Record]] = {condition.key: {} for condition in conditions}
    if len(ids) < len(questions) or len(given) < len(conditions):
        raise InputFileError(
            "the run names a question or a condition twice. Give each an id of its own."
        )
    for record in records:
        if record.condition not in given:
            raise InputFileError(
                f"there is a record under {record.condition!r}, and the run has the conditions "
                f"{', '.join(given) or '(none)'}. Do not mix the files of two runs."
            )
        if record.item not in ids:
            raise InputFileError(
                f"there is a record of {record.item!r}, which is no question of the run. Do not "
                "mix the files of two runs."
            )
        given[record.condition][record.item] = record
    return given


def _drawn_from(about: Mapping[str, Any], name: str, questions: int) -> int | None:
    """Return of how many questions those of a run were drawn; None where they are all."""
    noted = {one["name"]: one.get("of") for one in about.get("data") or ()}
    whole = noted.get(name)
    return None if whole is None or whole <= questions else int(whole)


def _row(
    name: str,
    questions: Sequence[QuestionInfo],
    condition: Condition,
    everything: _Given,
    answers: _Answers,
    failed: set[str],
    lost_by_resizing: set[str],
    unpruned: Mapping[str, Record],
) -> Row:
    """Return one data set under one condition.

    Parameters
    ----------
    name, questions
        The data set and its questions.
    condition
        The condition.
    everything, answers
        Of all conditions.
    failed
        The questions that no paired figure counts.
    lost_by_resizing
        What `_lost_by_resizing` returned.
    unpruned
        The records of the unpruned condition by question; empty where it did not run.
    """
    given, of_condition = everything[condition.key], answers[condition.key]
    answered = {
        question.id: of_condition[question.id]
        for question in questions
        if question.id in of_condition
    }
    asked = [given[question.id] for question in questions if question.id in given]
    # An answer that was cut has taken its tokens and seconds like any other.
    records = [record for record in asked if record.error is None]
    return Row(
        data_set=name,
        condition=condition.key,
        method=condition.method,
        keep=condition.keep,
        positions=condition.positions,
        proportional_attention=condition.proportional_attention,
        questions=len(questions),
        answered=len(answered),
        cut=len(records) - len(answered),
        errors=len(asked) - len(records),
        missing=len(questions) - len(asked),
        accuracy=accuracy_of([answer.correct for answer in answered.values()]),
        against_unpruned=_against_unpruned(condition, answered, answers, failed),
        group_a=accuracy_of(
            [
                answer.correct
                for question, answer in answered.items()
                if question in lost_by_resizing - failed
            ]
        ),
        by_type=_by_type(questions, answered),
        first_token_speed_up=_speed_up("first_token", condition, records, everything, failed),
        answer_speed_up=_speed_up("total", condition, records, everything, failed),
        scores=_scores(questions, condition, given, answered, unpruned, failed),
        **_costs(records),
    )


def _against_unpruned(
    condition: Condition, answered: Mapping[str, Answer], answers: _Answers, failed: set[str]
) -> Paired | None:
    """Compare a condition's answers with the unpruned ones, if both ran and it is another."""
    if condition.method == UNPRUNED or UNPRUNED not in answers:
        return None
    compared = {question: answer for question, answer in answered.items() if question not in failed}
    return paired(compared, answers[UNPRUNED])


def _speed_up(
    part: Literal["first_token", "total"],
    condition: Condition,
    records: Sequence[Record],
    everything: _Given,
    failed: set[str],
) -> SpeedUp | None:
    """Compare a part of a condition's seconds with that of the unpruned one, where both have it."""
    if condition.method == UNPRUNED:
        return None
    unpruned = everything.get(UNPRUNED, {})
    pairs = [
        (record, unpruned[record.item])
        for record in records
        if record.item in unpruned and record.item not in failed
    ]
    # A pair without one of its times, or with a clock that stood still, tells nothing.
    timed = [
        (here, there)
        for one, other in pairs
        if (here := getattr(one.seconds, part)) and (there := getattr(other.seconds, part))
    ]
    batches = [_mean(record.batch for record in side) or 1.0 for side in zip(*pairs, strict=True)]
    return speed_up(
        [here for here, _ in timed], [there for _, there in timed], max(batches, default=1.0)
    )


def _lost_by_resizing(
    condition: Condition, conditions: Sequence[Condition], answers: _Answers
) -> set[str]:
    """Return the questions that are right unpruned and wrong in a picture made smaller instead.

    Of all data sets, to the budget of `condition`; none for the conditions that this is made of.
    """
    if condition.method in (UNPRUNED, RESIZE) or UNPRUNED not in answers:
        return set()
    # How positions are counted, and keys, makes no difference where no token is dropped.
    smaller: Mapping[str, Answer] = next(
        (
            answers[one.key]
            for one in conditions
            if one.method == RESIZE and one.keep == condition.keep
        ),
        {},
    )
    return {
        question
        for question, answer in answers[UNPRUNED].items()
        if answer.correct and question in smaller and not smaller[question].correct
    }


def _by_type(
    questions: Sequence[QuestionInfo], answered: Mapping[str, Answer]
) -> dict[str, Accuracy | None]:
    """Return the accuracy of each type of question; nothing where no question has a type."""
    right: dict[str, list[bool]] = {question.type: [] for question in questions}
    for question in questions:
        if question.id in answered:
            right[question.type].append(answered[question.id].correct)
    return {kind: accuracy_of(of_kind) for kind, of_kind in right.items()} if any(right) else {}


def _scores(
    questions: Sequence[QuestionInfo],
    condition: Condition,
    given: Mapping[str, Record],
    answered: Mapping[str, Answer],
    unpruned: Mapping[str, Record],
    failed: set[str],
) -> Scores | None:
    """Return the data set's own measure under a condition."""
    groups = Counter(question.group for question in questions if question.group)
    metric = metric_of({question.scoring for question in questions}, bool(groups))
    if metric is None:
        return None
    reference = None
    if condition.method != UNPRUNED and unpruned:
        reference = scored([one for one in questions if one.id not in failed], unpruned)
    types = dict.fromkeys(question.type for question in questions)
    here = scored([one for one in questions if one.id in answered], given)
    return scores_of(metric, here, reference, types if any(types) else (), groups)


def scored(questions: Iterable[QuestionInfo], records: Mapping[str, Record]) -> dict[str, Scored]:
    """Return the answers by question as `tokenprune_eval.results.scores` compares them.

    Parameters
    ----------
    questions
        Those that are wanted.
    records
        Id of a question -> its record. What has none, failed or was cut is left out.
    """
    return {
        question.id: Scored(
            type=question.type,
            scoring=question.scoring,
            answer=question.answer,
            group=question.group,
            score=float(record.correct) if record.score is None else record.score,
            said=record.read or "",
        )
        for question in questions
        if (record := records.get(question.id)) is not None and record.correct is not None
    }


def _costs(records: Sequence[Record]) -> dict[str, Any]:
    """Return the fields of a `Row` that are means, medians or extremes over its records."""
    means = (
        *("visual_tokens", "of_visual_tokens", "prompt_tokens", "answer_tokens"),
        *("kv_bytes", "mass_kept"),
    )
    seconds = {
        part: _median(getattr(record.seconds, part) for record in records)
        for part in Seconds.model_fields
    }
    totals = [record.seconds.total for record in records if record.seconds.total is not None]
    peaks = [record.peak_bytes for record in records if record.peak_bytes is not None]
    return {
        **{name: _mean(getattr(record, name) for record in records) for name in means},
        "seconds": Seconds(**seconds),
        "items_per_second": len(totals) / sum(totals) if sum(totals) > 0 else None,
        "peak_bytes": max(peaks, default=None),
        "dominance": _dominance(
            [record.dominance for record in records if record.dominance is not None]
        ),
    }


def _failed(questions: Sequence[QuestionInfo], given: _Given, answers: _Answers) -> set[str]:
    """Return the questions of a data set that no paired figure counts."""
    ids = [question.id for question in questions]
    errors = {
        key: {
            question
            for question in ids
            if question in records and records[question].error is not None
        }
        for key, records in given.items()
    }
    answered = {key: sum(question in of_key for question in ids) for key, of_key in answers.items()}
    return failed_questions(errors, answered)


def _dominance(measured: Sequence[Mapping[Depth, ModalityIndices]]) -> Dominance | None:
    if not measured:
        return None

    def mean(part: Depth, name: str) -> float | None:
        values = [getattr(one[part], name) for one in measured]
        return None if None in values else statistics.fmean(values)

    def indices(part: Depth) -> ModalityIndices:
        return ModalityIndices(**{name: mean(part, name) for name in ModalityIndices.model_fields})

    return Dominance(
        questions=len(measured),
        early=indices("early"),
        middle=indices("middle"),
        late=indices("late"),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _losses(
    sets: Sequence[Sequence[QuestionInfo]],
    conditions: Sequence[Condition],
    given: _Given,
    answers: _Answers,
) -> list[Loss]:
    """Return the questions that most pruned conditions lose, data sets taking turns."""
    unpruned = answers.get(UNPRUNED, {})
    pruned = [condition.key for condition in conditions if condition.method != UNPRUNED]
    queues = []
    for questions in sets:
        found = []
        for question in questions:
            if question.id not in unpruned or not unpruned[question.id].correct:
                continue
            answered = [key for key in pruned if question.id in answers[key]]
            wrong = [key for key in answered if not answers[key][question.id].correct]
            if wrong:
                found.append(_loss(question, answered, wrong, given))
        # The sort is stable: what is equal keeps the data set's order.
        queues.append(sorted(found, key=lambda loss: (-loss.wrong, loss.kept is None)))
    turns = [queue[place] for place in range(MAX_LOSSES) for queue in queues if place < len(queue)]
    return turns[:MAX_LOSSES]


def _loss(
    question: QuestionInfo, answered: Sequence[str], wrong: Sequence[str], given: _Given
) -> Loss:
    def order(key: str) -> tuple[bool, int]:
        record = given[key][question.id]
        return record.kept is not None and record.grid is not None, record.visual_tokens or 0

    shown = max(wrong, key=order)
    record = given[shown][question.id]
    drawn = order(shown)[0]
    return Loss(
        item=question,
        wrong=len(wrong),
        answered=len(answered),
        unpruned=_said(given[UNPRUNED][question.id]),
        said={key: _said(given[key][question.id]) for key in answered},
        shown=shown,
        visual_tokens=record.visual_tokens,
        of_visual_tokens=record.of_visual_tokens,
        kept=record.kept if drawn else None,
        grid=record.grid if drawn else None,
    )


def _said(record: Record) -> GivenAnswer:
    return GivenAnswer(text=record.text, choice=record.choice, correct=bool(record.correct))


def _errors(given: _Given) -> list[ErrorGroup]:
    groups: dict[str, list[Record]] = {}
    for of_condition in given.values():
        for record in of_condition.values():
            if record.error is not None:
                groups.setdefault(record.error, []).append(record)
    made = [
        ErrorGroup(
            message=message,
            count=len(records),
            conditions=list(dict.fromkeys(record.condition for record in records)),
            items=list(dict.fromkeys(record.item for record in records))[:3],
        )
        for message, records in groups.items()
    ]
    return sorted(made, key=lambda group: -group.count)[:MAX_ERRORS]
