"""How open answers are read and scored, and what the scores come to, against straight-line sums."""

from __future__ import annotations

import json
import random
import statistics
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

pytest.importorskip("statsmodels", reason="the results need the extra `eval`")

from tokenprune_eval.data.question import BoxUnit, Question, Scoring
from tokenprune_eval.evaluation.engines.base import EngineAnswer
from tokenprune_eval.evaluation.scoring import BOX_INSTRUCTIONS, prompt_of, score
from tokenprune_eval.evaluation.settings import Settings
from tokenprune_eval.results.records import Condition, Record
from tokenprune_eval.results.scores import FIGURES, metric_of
from tokenprune_eval.results.scoring import RULES, overlap, read_box, vqa_normalised
from tokenprune_eval.results.statistics import answer_of, f1_intervals, f1_of, mean_interval
from tokenprune_eval.results.summary import QuestionInfo, Results, Row, summarise
from tokenprune_eval.results.table import markdown

FULL = Condition(method="unpruned", keep=1.0)
HALF = Condition(method="random", keep=0.5)


def asked(scoring: Scoring, *answers: str, **more: Any) -> Question:
    return Question(
        "q", "image", Path("p.png"), "?", answers[0], scoring=scoring, answers=answers, **more
    )


def worth(
    question: Question, text: str, *, cut: bool = False, unit: BoxUnit = "fraction"
) -> float | None:
    reading = RULES[question.scoring].read(text, question, cut, unit)
    return None if reading is None else reading.score


def said(question: Question, text: str, unit: BoxUnit = "fraction") -> str:
    reading = RULES[question.scoring].read(text, question, False, unit)
    assert reading is not None
    return reading.said


def test_every_word_has_a_rule() -> None:
    assert set(RULES) == set(get_args(Scoring))
    assert set(BOX_INSTRUCTIONS) == set(get_args(BoxUnit))


# Reading ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "text", "expected"),
    [
        (["CENTRE"], 'The sign says "Centre".', 1.0),
        (["CENTRE"], "The sign says\ncent re", 0.0),
        (["two words"], "It reads two\nwords", 1.0),
        (["$5.00"], "$5.00", 1.0),  # no sign of a picture's text is decoration
        (["no", "yes"], "<think>no</think> perhaps yes", 1.0),
        (["no"], "<think>no</think> maybe", 0.0),
    ],
)
def test_contains(answers: list[str], text: str, expected: float) -> None:
    assert worth(asked("contains", *answers), text) == expected


def test_formulas_are_spaced_freely_and_keep_their_case() -> None:
    formula = asked("formula", r"\frac { A } { 2 }")
    assert worth(formula, "It is $\\frac{A}\n{2}$.") == 1.0
    assert worth(formula, r"\frac{a}{2}") == 0.0
    assert worth(asked("contains", r"\frac { A } { 2 }"), r"\frac{A}{2}") == 0.0


@cache
def edits(one: str, other: str) -> int:
    """Return the edit distance by its definition."""
    if not one or not other:
        return len(one) + len(other)
    if one[0] == other[0]:
        return edits(one[1:], other[1:])
    return 1 + min(edits(one[1:], other), edits(one, other[1:]), edits(one[1:], other[1:]))


def test_anls_against_its_definition() -> None:
    draw = random.Random(0)
    scores = []
    for _ in range(60):
        words = ["".join(draw.choices("ab c", k=draw.randint(1, 7))) for _ in range(3)]
        one, *answers = words
        plain = [" ".join(word.split()) for word in words]
        if not all(plain):
            continue
        nearest = max(
            1 - edits(plain[0], other) / max(len(plain[0]), len(other)) for other in plain[1:]
        )
        expected = nearest if nearest >= 0.5 else 0.0
        scores.append(worth(asked("anls", *answers), one.upper()))
        assert scores[-1] == pytest.approx(expected)
    assert len(set(scores)) > 4
    assert worth(asked("anls", "abcd"), "abxy") == 0.5
    assert worth(asked("anls", "abcd"), "axyz") == 0.0
    assert worth(asked("anls", "$1,234"), "$1,234") == 1.0
    assert worth(asked("anls", "x"), "") == 0.0


def leave_one_out(text: str, answers: list[str]) -> float:
    """Return VQA accuracy as its authors' evaluation adds it up."""
    accuracies = []
    for number in range(len(answers)):
        others = answers[:number] + answers[number + 1 :]
        accuracies.append(min(1.0, sum(other == text for other in others) / 3))
    return statistics.mean(accuracies)


def test_vqa_accuracy_against_loops_over_annotators() -> None:
    for equal in range(11):
        answers = ["nokia"] * equal + [f"other {number}" for number in range(10 - equal)]
        found = worth(asked("vqa", *answers), "Nokia.")
        assert found == pytest.approx(leave_one_out("nokia", answers))
    assert found == 1.0
    assert worth(asked("vqa", *["a"] * 2, *["b"] * 3), "a") == pytest.approx(
        leave_one_out("a", ["a", "a", "b", "b", "b"])
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Dog", "dog"),
        ("Two dogs, one cat", "2 dogs 1 cat"),
        ("none", "0"),
        ("3.5 m.", "3.5 m"),
        ("1,000", "1000"),
        ("t-shirt", "t shirt"),
        ("a - b", "b"),
        ("dont know", "don't know"),
        ("its hell", "its hell"),
        ("The dog's", "dog 's"),
        ("10:30", "10:30"),
        ("what?!\n(yes)", "what yes"),
    ],
)
def test_texts_are_compared_as_in_vqa(text: str, expected: str) -> None:
    assert vqa_normalised(text) == expected


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("Yes", "yes"),
        ("No.", "no"),
        ("yes, there is a dog", "yes"),
        ("The answer is no.", "no"),
        ("There is a dog in the image.", "yes"),
        ("There is no dog. Yes, I am sure.", "no"),
        ("There isn't any dog.", "no"),
        ("I do not see one", "no"),
        ("<think>no</think> yes", "yes"),
        ("", ""),
    ],
)
def test_yes_or_no(text: str, read: str) -> None:
    question = asked("yes-no", "yes")
    assert said(question, text) == read
    assert worth(question, text) == float(read == "yes")
    assert worth(asked("yes-no", "no"), text) == float(read == "no")


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("3", "3"),
        ("three", "3"),
        ("There are 3 dogs.", "3"),
        ("There are three.", "3"),
        ("The answer is 12.", "12"),
        ("12 dogs (twelve)", "12"),
        ("2 or 3", ""),
        ("There are no dogs", "0"),
        ("None", "0"),
        ("some", ""),
        ("3.5", ""),
        ("about 1,000", ""),
        ("", ""),
    ],
)
def test_counts(text: str, read: str) -> None:
    question = asked("count", "3")
    assert said(question, text) == read
    assert worth(question, text) == float(read == "3")


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2, 3.5, 4]",
        "The dog is at [1,2,3.5,4], I think.",
        "<box>[[1, 2, 3.5, 4]]</box>",
        "<ref>dog</ref><box>1,2,3.5,4</box>",
        "<|box_start|>(1,2),(3.5,4)<|box_end|>",
        "(1, 2), (3.5, 4)",
        "from (1, 2) to (3.5, 4)",
        "(1, 2, 3.5, 4)",
        "1, 2, 3.5, 4",
        "1,2,3.5,4.",
        '```json\n[{"bbox_2d": [1, 2, 3.5, 4], "label": "dog [5, 6, 7, 8]"}]\n```',
        '[{"label": "[5, 6, 7, 8]", "bbox_2d": [1,\n2,\n3.5,\n4]}]',
        "[1, 2, 3.5, 4] or [5, 6, 7, 8]",
    ],
)
def test_boxes_as_models_write_them(text: str) -> None:
    assert read_box(text) == (1.0, 2.0, 3.5, 4.0)


@pytest.mark.parametrize(
    "text",
    ["", "no box", "[1, 2, 3]", "1 2 3 4", '{"box_2d": 4}', "<loc0012><loc0034>", "a 1, b 2"],
)
def test_no_box_is_guessed(text: str) -> None:
    assert read_box(text) is None


def test_fractions_and_signs_of_boxes() -> None:
    assert read_box(".5, 0.25, .75, 1") == (0.5, 0.25, 0.75, 1.0)
    assert read_box("[-0.1, 0.25, .75, 1.]") == (-0.1, 0.25, 0.75, 1.0)


def test_overlap_against_counted_pixels() -> None:
    draw = random.Random(1)
    seen = set()
    for _ in range(200):
        boxes = []
        masks = []
        for _ in range(2):
            (left, right), (top, bottom) = (sorted(draw.choices(range(12), k=2)) for _ in "xy")
            boxes.append((float(left), float(top), float(right), float(bottom)))
            mask = np.zeros((12, 12), dtype=bool)
            mask[top:bottom, left:right] = True
            masks.append(mask)
        both, either = (masks[0] & masks[1]).sum(), (masks[0] | masks[1]).sum()
        expected = both / either if either else 0.0
        assert overlap(boxes[0], boxes[1]) == pytest.approx(expected)
        seen.add(round(float(expected), 3))
    assert len(seen) > 10
    assert overlap((3.0, 3.0, 1.0, 1.0), (1.0, 1.0, 3.0, 3.0)) == 0.0


def test_a_box_is_read_in_the_unit_that_was_asked_for() -> None:
    question = asked("box", "[20, 10, 60, 40]", size=(80, 50))
    texts: dict[BoxUnit, str] = {
        "fraction": "[0.25, 0.2, 0.75, 0.8]",
        "thousandth": "[250, 200, 750, 800]",
        "pixel": "[20, 10, 60, 40]",
    }
    for unit, text in texts.items():
        for other in get_args(BoxUnit):
            expected = 1.0 if other == unit else 0.0
            found = worth(question, text, unit=other)
            assert found == pytest.approx(expected, abs=0.1), (unit, other)
    assert json.loads(said(question, texts["pixel"], "pixel")) == [0.25, 0.2, 0.75, 0.8]
    assert worth(question, "[0.25, 0.2, 0.75, 0.5]") == pytest.approx(0.5)
    assert worth(question, "somewhere") == 0.0


def test_what_was_cut_off_counts_only_where_it_is_whole() -> None:
    def cut(scoring: Scoring, answer: str, text: str, **more: Any) -> float | None:
        return worth(asked(scoring, *[answer] * 4, **more), text, cut=True)

    assert cut("contains", "stop", "the sign says stop and") == 1.0
    assert cut("contains", "stop", "the sign says") is None
    assert cut("formula", "a+b", "x a + b") == 1.0
    assert cut("anls", "long answer", "long ans") is None
    assert cut("anls", "red", "The answer is red. I") == pytest.approx(0.0)
    assert cut("vqa", "red", "Red. It is") == 0.0
    assert cut("vqa", "red", "The picture shows") is None
    assert cut("yes-no", "yes", "Yes, there") == 1.0
    assert cut("yes-no", "yes", "The picture") is None
    assert cut("count", "3", "Three. They") == 1.0
    assert cut("count", "3", "I see 3") is None
    size = (10, 10)
    assert cut("box", "[0, 0, 10, 10]", "[0, 0, 1, 1] is", size=size) == 1.0
    assert cut("box", "[0, 0, 10, 10]", "[0, 0, 1,", size=size) is None
    for scoring in get_args(Scoring):
        assert cut(scoring, "3" if scoring != "box" else "[0, 0, 1, 1]", "") in (None, 0.0)


def test_several_answers_are_right() -> None:
    question = asked("exact", "car", "automobile")
    assert worth(question, "An automobile.") == 1.0
    assert worth(question, "a bus") == 0.0
    record = score(question, FULL, EngineAnswer(text="It is a car"), "text")
    assert (record.correct, record.score, record.read) == (True, None, None)


def test_the_record_has_score_and_what_was_read() -> None:
    question = asked("anls", "abcd")
    record = score(question, FULL, EngineAnswer(text="abxy"), "likelihood")
    assert (record.correct, record.score, record.read) == (True, 0.5, "abxy")
    again = Record.model_validate_json(record.model_dump_json(exclude_none=True))
    answer = answer_of(again)
    assert answer is not None
    assert answer.said == "abxy"
    wrong = score(question, FULL, EngineAnswer(text="axyz"), "likelihood")
    assert (wrong.correct, wrong.score) == (False, 0.0)
    undecided = score(question, FULL, EngineAnswer(text="ab", cut=True), "likelihood")
    assert (undecided.correct, undecided.cut, undecided.score) == (None, True, None)
    assert answer_of(undecided) is None


def test_prompts() -> None:
    short = asked("vqa", "x", instruction="Be short.")
    assert prompt_of(short) == "?\nBe short."
    assert prompt_of(short, "Be long.") == "?\nBe long."
    assert prompt_of(asked("contains", "x")) == "?"
    box = asked("box", "[0, 0, 1, 1]", size=(1, 1))
    assert "between 0 and 1." in prompt_of(box)
    assert "between 0 and 1000." in prompt_of(box, box_unit="thousandth")
    assert "pixels" in prompt_of(box, box_unit="pixel")
    assert prompt_of(box, "Where?", "pixel") == "?\nWhere?"


# Intervals --------------------------------------------------------------------------------------


def test_the_interval_of_a_mean_against_a_loop() -> None:
    draw = np.random.default_rng(3)
    values = draw.choice([0.0, 0.3, 0.6, 0.9, 1.0], 150)
    means = [draw.choice(values, len(values)).mean() for _ in range(20_000)]
    low, high = mean_interval(list(values))
    assert low == pytest.approx(np.percentile(means, 2.5), abs=0.005)
    assert high == pytest.approx(np.percentile(means, 97.5), abs=0.005)
    assert (low, high) == mean_interval(list(values))
    assert mean_interval([0.25] * 7) == (0.25, 0.25)


def test_the_intervals_of_f1_against_a_loop() -> None:
    draw = np.random.default_rng(4)
    answers = [(bool(a), bool(b), bool(c)) for a, b, c in draw.integers(0, 2, (120, 3))]

    def f1(rows: list[tuple[bool, bool, bool]], place: int) -> float:
        both = sum(row[0] and row[place] for row in rows)
        precision = both / max(1, sum(row[place] for row in rows))
        recall = both / max(1, sum(row[0] for row in rows))
        return 2 * precision * recall / (precision + recall) if both else 0.0

    samples = [[answers[n] for n in draw.integers(0, 120, 120)] for _ in range(4_000)]
    scores = [f1(rows, 1) for rows in samples]
    differences = [f1(rows, 1) - f1(rows, 2) for rows in samples]
    own, against = f1_intervals(answers)
    assert own == pytest.approx(np.percentile(scores, [2.5, 97.5]), abs=0.01)
    assert against == pytest.approx(np.percentile(differences, [2.5, 97.5]), abs=0.015)
    assert f1_of(0, 0, 0) is None
    assert f1_of(2, 4, 3) == pytest.approx(2 * 0.5 * (2 / 3) / (0.5 + 2 / 3))


# Summary ----------------------------------------------------------------------------------------


def _info(name: str, scoring: Scoring, answer: str, kind: str = "", **more: Any) -> QuestionInfo:
    return QuestionInfo(
        id=f"set/{name}",
        data_set="set",
        kind="image",
        path=Path("p.png"),
        question="?",
        answer=answer,
        type=kind,
        scoring=scoring,
        **more,
    )


def _record(name: str, condition: Condition, value: float, read: str, **more: Any) -> Record:
    given = {"text": read, "read": read, "score": value, "correct": value >= 0.5, **more}
    return Record(item=f"set/{name}", condition=condition.key, **given)


def _summary(questions: list[QuestionInfo], records: list[Record]) -> Results:
    return summarise({"complete": True}, questions, [FULL, HALF], records)


def _rows(results: Results) -> tuple[Row, Row]:
    full, half = results.rows
    return full, half


def test_graded_scores_by_hand() -> None:
    questions = [_info(str(n), "anls", "x", "form" if n < 2 else "letter") for n in range(4)]
    full = [1.0, 0.6, 0.0, 1.0]
    half = [1.0, 0.0, 0.5, None]
    records = [_record(str(n), FULL, value, f"f{n}") for n, value in enumerate(full)]
    records += [
        Record(item=f"set/{n}", condition=HALF.key, error="broken")
        if value is None
        else _record(str(n), HALF, value, f"h{n}")
        for n, value in enumerate(half)
    ]
    results = _summary(questions, records)
    unpruned, pruned = _rows(results)
    assert unpruned.scores is not None
    assert pruned.scores is not None
    assert (unpruned.scores.metric, unpruned.scores.questions) == ("ANLS", 4)
    assert unpruned.scores.value == pytest.approx(2.6 / 4)
    assert unpruned.scores.against_unpruned is None
    assert pruned.scores.value == pytest.approx(0.5)
    pair = pruned.scores.against_unpruned
    assert pair is not None
    # The question that failed under one condition is left out of the difference.
    assert pair.questions == 3
    assert pair.difference == pytest.approx((1.5 - 1.6) / 3)
    assert pair.low <= pair.difference <= pair.high
    assert unpruned.accuracy is not None
    assert unpruned.accuracy.correct == 3  # from 0.5 on
    by_type = {kind: (one.questions, one.value) for kind, one in pruned.scores.by_type.items()}
    assert by_type == {"form": (2, 0.5), "letter": (1, 0.5)}
    table = markdown(results)
    assert "ANLS, %" in table
    assert "ANLS difference" in table
    assert "65.0 (" in table
    assert "count as right from a score of 0.5 on" in table
    assert Results.model_validate_json(results.model_dump_json()) == results


def test_f1_and_its_figures_by_hand() -> None:
    right = ["yes", "yes", "yes", "no", "no", "no", "no", "yes"]
    full = ["yes", "yes", "no", "no", "yes", "no", "no", ""]
    half = ["no"] * 8
    questions = [_info(str(n), "yes-no", answer, "adversarial") for n, answer in enumerate(right)]
    records = [
        _record(str(n), condition, float(word == right[n]), word)
        for condition, words in ((FULL, full), (HALF, half))
        for n, word in enumerate(words)
    ]
    results = _summary(questions, records)
    unpruned, pruned = _rows(results)
    assert unpruned.scores is not None
    assert pruned.scores is not None
    precision, recall = 2 / 3, 2 / 4
    f1 = 2 * precision * recall / (precision + recall)
    assert unpruned.scores.metric == "F1"
    assert unpruned.scores.value == pytest.approx(f1)
    assert unpruned.scores.figures == pytest.approx(
        {"precision": precision, "recall": recall, "yes_ratio": 3 / 8, "neither": 1 / 8}
    )
    assert unpruned.scores.by_type["adversarial"].value == pytest.approx(f1)
    assert pruned.scores.value == 0.0
    assert pruned.scores.figures == {
        "precision": None,
        "recall": 0.0,
        "yes_ratio": 0.0,
        "neither": 0.0,
    }
    assert pruned.scores.against_unpruned is not None
    assert pruned.scores.against_unpruned.difference == pytest.approx(-f1)
    table = markdown(results)
    for title in ("F1, %", "F1 difference", "precision, %", "recall, %", "yes, %", "neither, %"):
        assert title in table


def test_counts_and_boxes_by_hand() -> None:
    questions = [_info(str(n), "count", "3") for n in range(3)]
    records = [
        _record("0", FULL, 1.0, "3"),
        _record("1", FULL, 0.0, "5"),
        _record("2", FULL, 0.0, ""),
    ]
    row, _ = _rows(_summary(questions, records))
    assert row.scores is not None
    assert row.scores.metric == "accuracy"
    assert row.scores.figures == pytest.approx({"rmse": np.sqrt(4 / 2), "no_number": 1 / 3})

    questions = [_info(str(n), "box", "[0, 0, 4, 4]") for n in range(4)]
    records = [
        _record("0", FULL, 0.9, "[0, 0, 1, 0.9]"),
        _record("1", FULL, 0.0, "[0, 0, 640, 480]"),
        _record("2", FULL, 0.0, ""),
        _record("3", FULL, 0.5, "[0, 0, 0.5, 1]"),
    ]
    results = _summary(questions, records)
    row, _ = _rows(results)
    assert row.scores is not None
    assert row.scores.metric == "mean IoU"
    assert row.scores.value == pytest.approx(1.4 / 4)
    assert row.scores.figures == {"no_box": 0.25, "outside": 0.25}
    assert row.accuracy is not None
    assert row.accuracy.share == 0.5
    table = markdown(results)
    assert "outside, %" in table
    assert "box-unit" in table


def test_questions_in_all_orders_of_their_choices() -> None:
    questions = [
        _info(name, "exact", "A", choices=("x", "y"), group=group)
        for name, group in (("1", "1"), ("1000001", "1"), ("2", "2"), ("1000002", "2"), ("3", "3"))
    ]
    records = [
        Record(item=f"set/{name}", condition=FULL.key, choice="A", text="A", correct=right)
        for name, right in (("1", True), ("1000001", True), ("2", True), ("1000002", False))
    ]
    row, _ = _rows(_summary(questions, records))
    assert row.scores is not None
    assert row.scores.metric == "accuracy"
    # The third has no answer yet.
    assert row.scores.figures == {"circular": 0.5}
    assert row.accuracy is not None
    assert row.accuracy.share == 0.75


def test_what_is_only_right_or_wrong_has_no_measure_of_its_own() -> None:
    assert metric_of({"exact"}, False) is None
    assert metric_of({"exact"}, True) == "accuracy"
    assert metric_of({"contains", "formula", "exact"}, False) == "accuracy"
    assert metric_of({"vqa", "exact"}, False) == "mean score"
    assert metric_of({"yes-no"}, False) == "F1"
    questions = [QuestionInfo.model_validate({**_OLD_ITEM})]
    records = [Record.model_validate(_OLD_RECORD)]
    row, _ = _rows(_summary(questions, records))
    assert row.scores is None
    old = json.loads(row.model_dump_json())
    del old["scores"]
    assert Row.model_validate(old) == row


_OLD_ITEM = {
    "id": "set/1",
    "data_set": "set",
    "kind": "image",
    "path": "p.png",
    "question": "?",
    "answer": "red",
}
"""A line of items.jsonl, and below one of records.jsonl, as they were before there were scores."""

_OLD_RECORD = {"item": "set/1", "condition": "unpruned", "text": "red", "correct": True}


def test_settings_of_older_runs_are_those_of_today() -> None:
    old = {"model": "m", "data": ["x.jsonl"], "out": "out"}
    assert Settings.model_validate(old).box_unit == "fraction"
    assert not Settings.model_validate(old).differences(
        Settings.model_validate({**old, "box_unit": "fraction"})
    )
    other = Settings.model_validate({**old, "box_unit": "pixel"})
    assert other.differences(Settings.model_validate(old)) == ["box_unit"]


def test_figures_are_in_the_order_of_the_tables() -> None:
    assert len({measure.title for measure in FIGURES.values()}) == len(FIGURES)
