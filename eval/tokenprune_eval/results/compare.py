"""Two runs side by side: the conditions and questions that both have, compared in pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from tokenprune_eval.results import words
from tokenprune_eval.results.files import StoredRun, read_run
from tokenprune_eval.results.records import Record
from tokenprune_eval.results.scores import Scores, metric_of, scores_of
from tokenprune_eval.results.scoring import ACCURACY
from tokenprune_eval.results.statistics import (
    Accuracy,
    Answer,
    Paired,
    accuracy_of,
    answer_of,
    failed_questions,
    paired,
)
from tokenprune_eval.results.summary import QuestionInfo, scored
from tokenprune_eval.results.table import Columns, escape, markdown_table, rich_table

_ABOUT = ("settings", "versions", "machine")


@dataclass(frozen=True)
class Pair:
    """One data set under one condition, in both runs.

    Attributes
    ----------
    data_set, condition
        Its name, and `Condition.key`.
    method, variant, keep
        Of the condition, as they stand in tables; see `Condition.variant`.
    a, b
        Accuracy of each run over the questions that both answered, without those that failed under
        any condition of both runs; None where there are none.
    b_against_a
        B against A as reference: positive is B better. None where no question was answered by both.
    cut_a, cut_b, errors_a, errors_b
        Cut answers and errors of each on the questions that both have.
    scores_a, scores_b
        The data set's own measure of each over the questions of `a` and `b`; of B also against A.
        None where right and wrong are all there is.
    """

    data_set: str
    condition: str
    method: str
    variant: str
    keep: str
    a: Accuracy | None
    b: Accuracy | None
    b_against_a: Paired | None
    cut_a: int
    cut_b: int
    errors_a: int
    errors_b: int
    scores_a: Scores | None = None
    scores_b: Scores | None = None


@dataclass(frozen=True)
class DataDifference:
    """Questions of one data set that cannot be compared.

    Attributes
    ----------
    data_set
        Its name.
    both
        Questions that are the same in both runs.
    only_a, only_b
        Questions that one alone has.
    changed
        Questions with the same id and another text, answer, scoring, choices or kind of file; left
        out.
    failed
        Questions of both that failed in either run under a condition that both have; left out.
    """

    data_set: str
    both: int
    only_a: int
    only_b: int
    changed: int
    failed: int


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side.

    Attributes
    ----------
    a, b
        Their folders.
    pairs
        Conditions that both have, for each data set with a question that both have.
    only_a, only_b
        Keys of the conditions that one alone has.
    data
        For each data set of either, what both have of it.
    differences
        Name, value in A and value in B of each setting, version or property of the machine that
        differs; None where one has no such entry.
    incomplete
        The folders of those that are not finished.
    """

    a: Path
    b: Path
    pairs: tuple[Pair, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    data: tuple[DataDifference, ...]
    differences: tuple[tuple[str, str | None, str | None], ...]
    incomplete: tuple[Path, ...]


def compare(a: Path, b: Path) -> Comparison:
    """Compare two runs on what both have.

    Parameters
    ----------
    a, b
        Folders of runs, finished or not.

    Raises
    ------
    InputFileError
        If a file of a run is missing or damaged.
    ConfigError
        If a record holds neither an error nor whether it is right.
    """
    first, second = read_run(a), read_run(b)
    ours, theirs = _Lookup(first), _Lookup(second)
    names = list(
        dict.fromkeys(question.data_set for question in (*first.questions, *second.questions))
    )
    data = []
    pairs = []
    shared = [one for one in first.conditions if one.key in theirs.given]
    for name in names:
        left, right = ours.questions_of(name), theirs.questions_of(name)
        known = left.keys() & right.keys()
        same = [
            question
            for question in left
            if question in known and _alike(left[question], right[question])
        ]
        keys = [one.key for one in shared]
        failed = ours.failed(keys, same) | theirs.failed(keys, same)
        data.append(
            DataDifference(
                data_set=name,
                both=len(same),
                only_a=len(left) - len(known),
                only_b=len(right) - len(known),
                changed=len(known) - len(same),
                failed=len(failed),
            )
        )
        if not same:
            continue
        for condition in shared:
            in_a, in_b = (one.answers(condition.key, same) for one in (ours, theirs))
            answers_a, answers_b = (
                {question: answer for question, answer in one.items() if question not in failed}
                for one in (in_a, in_b)
            )
            both = [
                question for question in same if question in answers_a and question in answers_b
            ]
            scores_a, scores_b = _scores([left[one] for one in both], condition.key, ours, theirs)
            pairs.append(
                Pair(
                    data_set=name,
                    condition=condition.key,
                    method=condition.method,
                    variant=condition.variant,
                    keep=words.keep_text(condition.method, condition.keep),
                    a=accuracy_of([answers_a[question].correct for question in both]),
                    b=accuracy_of([answers_b[question].correct for question in both]),
                    b_against_a=paired(answers_b, answers_a),
                    cut_a=ours.cut(condition.key, same),
                    cut_b=theirs.cut(condition.key, same),
                    errors_a=len(ours.errors(condition.key, same)),
                    errors_b=len(theirs.errors(condition.key, same)),
                    scores_a=scores_a,
                    scores_b=scores_b,
                )
            )
    return Comparison(
        a=a,
        b=b,
        pairs=tuple(pairs),
        only_a=tuple(one.key for one in first.conditions if one.key not in theirs.given),
        only_b=tuple(one.key for one in second.conditions if one.key not in ours.given),
        data=tuple(data),
        differences=_differences(first.about, second.about),
        incomplete=tuple(run.folder for run in (first, second) if not run.about.get("complete")),
    )


def _scores(
    questions: Sequence[QuestionInfo], key: str, ours: _Lookup, theirs: _Lookup
) -> tuple[Scores, Scores] | tuple[None, None]:
    """Return the data set's own measure of both runs; see `Pair`."""
    metric = metric_of({one.scoring for one in questions}, grouped=False)
    if metric is None or metric == ACCURACY:
        return None, None
    here, there = (scored(questions, one.given[key]) for one in (ours, theirs))
    return scores_of(metric, here, None, (), {}), scores_of(metric, there, here, (), {})


def comparison_markdown(comparison: Comparison) -> str:
    """Return a comparison as Markdown."""
    lines = [
        "# Two runs compared",
        "",
        f"A: {escape(str(comparison.a))}  ",
        f"B: {escape(str(comparison.b))}",
        "",
    ]
    lines += [f"- {escape(remark)}" for remark in _remarks(comparison)]
    for name, columns in _tables(comparison):
        lines += ["", f"## {escape(name)}", "", *markdown_table(columns)]
    if not comparison.pairs:
        lines += ["", _NOTHING_SHARED]
    else:
        lines += ["", _NOTE]
    if comparison.differences:
        lines += ["", "## Differences between the runs", ""]
        lines += markdown_table(_difference_columns(comparison))
    return "\n".join([*lines, ""])


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Print a comparison.

    Parameters
    ----------
    console
        Of at least 110 columns, to show every column whole.
    comparison
        What to print.
    """
    console.print(Text(f"A: {comparison.a}\nB: {comparison.b}"), soft_wrap=True)
    for remark in _remarks(comparison):
        console.print(Text(f"- {words.plain(remark)}"))
    if comparison.differences:
        console.print(
            rich_table("Differences between the runs", _difference_columns(comparison, 40))
        )
    for name, columns in _tables(comparison):
        console.print(rich_table(words.plain(name), columns))
    console.print(Text(_NOTE if comparison.pairs else _NOTHING_SHARED, style="dim"))


_NOTE = (
    "A, B: share of right answers with its 95 % Wilson interval, over the questions that both runs "
    "answered. B - A: in percentage points, 95 % paired bootstrap interval; p: exact McNemar test, "
    "not adjusted for the number of conditions. same: same answer in both. cut, errors: answers "
    "cut off before they named anything, and failures, in A and in B. A data set's own measure has "
    "its 95 % bootstrap interval, paired for B - A. Questions are taken as independent."
)
_NOTHING_SHARED = "No condition and question is in both runs, so there is nothing to compare."


class _Lookup:
    """A run's questions by data set, and its records by condition and question."""

    def __init__(self, run: StoredRun) -> None:
        self._choose_by = (run.about.get("settings") or {}).get("choose_by")
        self._questions: dict[str, dict[str, QuestionInfo]] = {}
        for question in run.questions:
            self._questions.setdefault(question.data_set, {})[question.id] = question
        self.given: dict[str, dict[str, Record]] = {one.key: {} for one in run.conditions}
        for record in run.records:
            # The last record of a question counts.
            self.given.setdefault(record.condition, {})[record.item] = record

    def questions_of(self, name: str) -> dict[str, QuestionInfo]:
        """Return the questions of a data set by id."""
        return self._questions.get(name, {})

    def answers(self, key: str, questions: Sequence[str]) -> dict[str, Answer]:
        """Return the answers to these questions under a condition."""
        return {
            record.item: answer
            for record in self._records(key, questions)
            if (answer := answer_of(record, self._choose_by)) is not None
        }

    def errors(self, key: str, questions: Sequence[str]) -> set[str]:
        """Return which of these questions failed under a condition."""
        return {record.item for record in self._records(key, questions) if record.error is not None}

    def cut(self, key: str, questions: Sequence[str]) -> int:
        """Return how many answers to these questions were cut off before they named anything."""
        asked = len(self._records(key, questions))
        return asked - len(self.answers(key, questions)) - len(self.errors(key, questions))

    def failed(self, keys: Sequence[str], questions: Sequence[str]) -> set[str]:
        """Return which of these questions no paired figure counts."""
        return failed_questions(
            {key: self.errors(key, questions) for key in keys},
            {key: len(self.answers(key, questions)) for key in keys},
        )

    def _records(self, key: str, questions: Sequence[str]) -> list[Record]:
        return [self.given[key][question] for question in questions if question in self.given[key]]


def _alike(one: QuestionInfo, other: QuestionInfo) -> bool:
    """Return whether two questions of one id ask the same; where the file lies may differ."""
    left, right = (
        (
            question.question,
            question.answer,
            question.choices,
            question.scoring,
            question.answers,
            question.kind,
            [path.name for path in (question.path, *question.further)],
            question.times,
        )
        for question in (one, other)
    )
    return left == right


def _differences(
    a: Mapping[str, Any], b: Mapping[str, Any]
) -> tuple[tuple[str, str | None, str | None], ...]:
    left = {name: value for part in _ABOUT for name, value in _flat(a.get(part) or {}, part)}
    right = {name: value for part in _ABOUT for name, value in _flat(b.get(part) or {}, part)}
    return tuple(
        (name, left.get(name), right.get(name))
        for name in dict.fromkeys((*left, *right))
        if left.get(name) != right.get(name)
    )


def _flat(values: Mapping[str, Any], prefix: str) -> list[tuple[str, str]]:
    flat: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat += _flat(value, f"{prefix}.{name}")
        else:
            flat.append((f"{prefix}.{name}", str(value)))
    return flat


def _remarks(comparison: Comparison) -> list[str]:
    """Return, a line each, what the reader must know before the numbers."""
    remarks = [f"{folder} is not complete." for folder in comparison.incomplete]
    if comparison.only_a:
        remarks.append(f"Only A has {', '.join(comparison.only_a)}.")
    if comparison.only_b:
        remarks.append(f"Only B has {', '.join(comparison.only_b)}.")
    for one in comparison.data:
        parts = []
        if one.only_a:
            parts.append(f"{one.only_a:,} in A alone")
        if one.only_b:
            parts.append(f"{one.only_b:,} in B alone")
        if one.failed:
            parts.append(f"{one.failed:,} that failed under some condition and are left out")
        if one.changed:
            parts.append(f"{one.changed:,} that differ under the same id and are left out")
        if parts:
            remarks.append(
                f"{one.data_set}: {one.both:,} questions are in both, {', '.join(parts)}."
            )
    if comparison.differences:
        names = [name for name, _, _ in comparison.differences]
        remarks.append(f"The runs differ in {', '.join(names)}.")
    return remarks


def _tables(comparison: Comparison) -> list[tuple[str, Columns]]:
    tables: list[tuple[str, Columns]] = []
    for one in comparison.data:
        pairs = [pair for pair in comparison.pairs if pair.data_set == one.data_set]
        if not pairs:
            continue
        columns: list[tuple[str, list[str]]] = [
            ("method", [words.plain(words.label(pair.method, pair.variant)) for pair in pairs]),
            ("keep", [pair.keep for pair in pairs]),
            (
                "both",
                [f"{pair.b_against_a.questions if pair.b_against_a else 0:,}" for pair in pairs],
            ),
            ("A, %", [words.share_with_interval(pair.a) for pair in pairs]),
            ("B, %", [words.share_with_interval(pair.b) for pair in pairs]),
            ("B - A", [words.difference_with_interval(pair.b_against_a) for pair in pairs]),
            (
                "p",
                [words.p_value(pair.b_against_a) for pair in pairs],
            ),
            (
                "same, %",
                [words.agreement(pair.b_against_a) for pair in pairs],
            ),
        ]
        columns += _score_columns(pairs)
        for title, counts in (
            ("cut", [(pair.cut_a, pair.cut_b) for pair in pairs]),
            ("errors", [(pair.errors_a, pair.errors_b) for pair in pairs]),
        ):
            if any(map(any, counts)):
                columns.append((title, [f"{a}/{b}" for a, b in counts]))
        tables.append((f"{one.data_set}: {one.both:,} questions in both", columns))
    return tables


def _score_columns(pairs: Sequence[Pair]) -> list[tuple[str, list[str]]]:
    metric = words.metric_of([pair.scores_a for pair in pairs if pair.scores_a])
    if metric is None:
        return []
    return [
        (f"A, {metric}, %", [words.score_with_interval(pair.scores_a) for pair in pairs]),
        (f"B, {metric}, %", [words.score_with_interval(pair.scores_b) for pair in pairs]),
        (
            f"B - A, {metric}",
            [
                words.difference_with_interval(
                    pair.scores_b.against_unpruned if pair.scores_b else None
                )
                for pair in pairs
            ],
        ),
    ]


def _difference_columns(comparison: Comparison, longest: int | None = None) -> Columns:
    def short(value: str | None) -> str:
        text = words.NOTHING if value is None else words.plain(value)
        return text if longest is None or len(text) <= longest else text[: longest - 1] + "…"

    return [
        ("name", [words.plain(name) for name, _, _ in comparison.differences]),
        ("A", [short(left) for _, left, _ in comparison.differences]),
        ("B", [short(right) for _, _, right in comparison.differences]),
    ]
