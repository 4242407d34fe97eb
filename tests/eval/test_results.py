"""A run's results: statistics against straight-line ones, numbers by hand, report in a browser."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("statsmodels", reason="the results need the extra `eval`")

from PIL import Image
from rich.console import Console

from tests.eval.browser import CHROMIUM, browse
from tokenprune.errors import ConfigError, InputFileError
from tokenprune_eval.data.question import Question
from tokenprune_eval.results.compare import compare, comparison_markdown, print_comparison
from tokenprune_eval.results.files import read_run, write_questions
from tokenprune_eval.results.plots import cost_plot, curves
from tokenprune_eval.results.records import Condition, Record, Seconds
from tokenprune_eval.results.report import render
from tokenprune_eval.results.statistics import (
    SpeedUp,
    answer_of,
    difference_interval,
    mcnemar_p,
    paired,
    speed_up,
)
from tokenprune_eval.results.summary import (
    MAX_LOSSES,
    QuestionInfo,
    Results,
    read_results,
    summarise,
)
from tokenprune_eval.results.table import markdown, print_tables
from tokenprune_eval.results.words import slower, times
from tokenprune_eval.results.write import write_results

EVIL = "<script>document.title = 'owned'</script> & \"quoted\" {{ 7 * 7 }} $x_1$ |"

FULL = Condition(method="unpruned", keep=1.0)
HALF = Condition(method="divprune", keep=0.5)
TWO = Condition(method="random", keep=2)


# Statistics -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gained", "lost", "questions"), [(12, 30, 200), (3, 0, 40), (50, 50, 120)]
)
def test_bootstrap_against_a_loop_over_questions(gained: int, lost: int, questions: int) -> None:
    values = np.array([1] * gained + [-1] * lost + [0] * (questions - gained - lost))
    rng = np.random.default_rng(7)
    means = [values[rng.integers(0, questions, questions)].mean() for _ in range(20_000)]
    low, high = difference_interval(gained, lost, questions)
    # Differences come in steps of one question; two such estimates may be one step apart.
    assert low == pytest.approx(np.percentile(means, 2.5), abs=1.01 / questions)
    assert high == pytest.approx(np.percentile(means, 97.5), abs=1.01 / questions)
    assert low < (gained - lost) / questions < high
    assert (low, high) == difference_interval(gained, lost, questions)


def test_bootstrap_is_fast_and_a_point_where_nothing_differs() -> None:
    began = time.perf_counter()
    difference_interval(1_000, 1_500, 10_000)
    assert time.perf_counter() - began < 2
    assert difference_interval(0, 0, 25) == (0.0, 0.0)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (2, 9), (9, 2), (5, 5), (40, 61)])
def test_mcnemar_against_binomial_sums(gained: int, lost: int) -> None:
    count = gained + lost
    tail = sum(math.comb(count, k) for k in range(min(gained, lost) + 1))
    assert mcnemar_p(gained, lost) == pytest.approx(min(1.0, 2 * tail / 2**count), rel=1e-9)


@pytest.mark.parametrize(("gained", "lost", "questions"), [(-1, 0, 5), (3, 3, 5), (0, 0, 0)])
def test_impossible_counts_are_refused(gained: int, lost: int, questions: int) -> None:
    with pytest.raises(ConfigError, match="cannot be counts"):
        difference_interval(gained, lost, questions)


@pytest.mark.parametrize(("count", "batch"), [(9, 1), (40, 1), (63, 1), (64, 4)])
def test_speed_up_against_a_loop_over_resamples(count: int, batch: int) -> None:
    """The interval without drawing is that of very many drawn medians."""
    rng = np.random.default_rng(count)
    here, there = rng.uniform(0.5, 2, count), rng.uniform(0.5, 3, count)
    ratios = there / here
    drawn = np.sort(rng.choice(ratios, (40_000, count // batch)), axis=1)
    middle = count // batch
    lower, upper = drawn[:, (middle + 1) // 2 - 1], drawn[:, middle // 2]
    found = speed_up(list(here), list(there), batch)
    assert found is not None
    assert (found.questions, found.ratio) == (count, float(np.median(ratios)))
    assert found.low is not None
    assert found.high is not None
    # Drawn quantiles may lie one of the values to the left or right.
    order = np.sort(ratios)
    for end, medians, share in ((found.low, lower, 0.025), (found.high, upper, 0.975)):
        expected = np.quantile(medians, share, method="inverted_cdf")
        steps = abs(int(np.searchsorted(order, end)) - int(np.searchsorted(order, expected)))
        assert steps <= 1
    assert found.low <= found.ratio <= found.high


def test_few_times_have_no_interval_and_say_nothing() -> None:
    assert speed_up([], []) is None
    five = speed_up([2.0] * 5, [1.0] * 5)
    assert five == SpeedUp(questions=5, ratio=0.5, low=None, high=None)
    assert not five.is_slower
    assert slower("divprune", five, five) == ""
    six = speed_up([2.0] * 6, [1.0] * 6)
    assert six == SpeedUp(questions=6, ratio=0.5, low=0.5, high=0.5)
    # A batch of eight is one measurement.
    in_batches = speed_up([2.0] * 40, [1.0] * 40, batch=8)
    assert in_batches is not None
    assert in_batches.high is None


def test_words_for_what_is_slower() -> None:
    def one(ratio: float) -> SpeedUp:
        return SpeedUp(questions=9, ratio=ratio, low=ratio - 0.001, high=ratio + 0.001)

    assert slower("divprune", one(1.2), one(1.1)) == ""
    assert slower("divprune", one(0.9995), one(1.1)) == "", "the interval reaches beyond 1"
    assert slower("divprune", None, None) == ""
    said = slower("divprune", one(0.8), one(1.1))
    assert said == "slower to the first token than not pruning (x0.80)"
    assert "to the answer than not pruning (x0.90)" in slower("divprune", None, one(0.9))
    both = slower("resize", one(0.8), one(0.9))
    assert both == "slower than not resizing (x0.80 to the first token, x0.90 to the answer)"
    assert [times(ratio) for ratio in (1, 0.998, 0.99, 12.345)] == [
        *("x1.00", "x0.998", "x0.99", "x12.35"),
    ]


def test_the_same_answer_is_the_same_letter_or_text() -> None:
    def said(by: str | None = None, **fields: Any) -> str:
        answer = answer_of(Record(item="i", condition="c", correct=True, **fields), by)
        assert answer is not None
        return answer.said

    assert said(text=" A  Red\nseven") == said(text="a red seven") != said(text="a red six")
    assert said(text="B. blue", choice="B") == said(text="It is B", choice="B")
    assert said(text="no idea", choice="") == "no idea"
    for by, letter in ((None, "A"), ("likelihood", "A"), ("text", "B")):
        assert said(by, text="B", choice="B", likelihoods={"A": -0.1, "B": -2.0}) == letter
    assert answer_of(Record(item="i", condition="c", error="cut")) is None
    with pytest.raises(ConfigError, match="neither an error nor"):
        answer_of(Record(item="i", condition="c", text="x"))


# Summary ----------------------------------------------------------------------------------------


def _item(name: str, kind: str = "color", data_set: str = "set", **fields: Any) -> QuestionInfo:
    given: dict[str, Any] = {
        "path": Path("/nowhere/picture.png"),
        "question": "what?",
        "answer": "red",
    }
    given |= fields
    return QuestionInfo(
        id=f"{data_set}/{name}", data_set=data_set, kind="image", type=kind, **given
    )


def _record(item: str, condition: Condition, text: str, **fields: Any) -> Record:
    given: dict[str, Any] = {"text": text, "correct": text == "red"}
    return Record(item=item, condition=condition.key, **(given | fields))


def _about(**fields: Any) -> dict[str, Any]:
    return {
        "settings": {"model": "some/model", "seed": 0},
        "versions": {"torch": "2"},
        "machine": {"cores": 2},
        "started": "2026-01-01T00:00:00+00:00",
        "seconds": 5.0,
        "complete": True,
    } | fields


@pytest.fixture
def by_hand() -> Results:
    """Return five questions under three conditions, with an error, a retry and holes."""
    items = [_item("a"), _item("b"), _item("c", "shape"), _item("d", "shape"), _item("e", "size")]
    fast = Seconds(first_token=0.1, total=0.2, encode=0.05)
    slow = Seconds(first_token=0.4, total=0.6)
    records = [
        _record("set/a", FULL, "red", seconds=slow, visual_tokens=8, of_visual_tokens=8),
        _record("set/b", FULL, "red"),
        _record("set/c", FULL, "blue"),
        _record("set/d", FULL, "red"),
        Record(item="set/e", condition=FULL.key, error="cut off"),
        # a: lost, b: both right, c: gained, d: an error, e: right, but there is nothing to pair.
        _record("set/a", HALF, "green", seconds=fast, visual_tokens=4, peak_bytes=10, kv_bytes=4),
        Record(item="set/b", condition=HALF.key, error="out of memory"),
        _record("set/b", HALF, "RED", correct=True, seconds=slow, visual_tokens=5, peak_bytes=30),
        _record("set/c", HALF, "red", seconds=fast, mass_kept=0.5, kv_bytes=8),
        Record(item="set/d", condition=HALF.key, error="cut off"),
        _record("set/e", HALF, "red"),
        _record("set/d", TWO, "green", kept=[0, 3], grid=(1, 2, 2), visual_tokens=2),
    ]
    return summarise(_about(), items, [FULL, HALF, TWO], records)


def test_summary_counts_by_hand(by_hand: Results) -> None:
    full, half, two = by_hand.rows
    assert (full.questions, full.answered, full.errors, full.missing) == (5, 4, 1, 0)
    assert (half.questions, half.answered, half.errors, half.missing) == (5, 4, 1, 0)
    assert (two.questions, two.answered, two.errors, two.missing) == (5, 1, 0, 4)
    assert full.accuracy
    assert (full.accuracy.correct, full.accuracy.questions, full.accuracy.share) == (3, 4, 0.75)
    assert full.against_unpruned is None
    pair = half.against_unpruned
    assert pair
    assert (pair.questions, pair.gained, pair.lost, pair.difference) == (3, 1, 1, 0.0)
    assert (pair.p_value, pair.agreement) == (1.0, 1 / 3)
    assert list(half.by_type) == ["color", "shape", "size"]
    assert half.by_type["color"]
    assert (half.by_type["color"].correct, half.by_type["color"].questions) == (1, 2)
    assert two.by_type["color"] is None
    # Three of four have times: 0.1, 0.4, 0.1 and 0.2, 0.6, 0.2.
    assert half.seconds == Seconds(first_token=0.1, total=0.2, encode=0.05)
    assert half.items_per_second == pytest.approx(3 / 1.0)
    assert (half.visual_tokens, half.peak_bytes, half.kv_bytes, half.mass_kept) == (4.5, 30, 6, 0.5)
    assert (half.prompt_tokens, two.items_per_second, two.peak_bytes) == (None, None, None)
    assert [(error.message, error.count, error.items) for error in by_hand.errors] == [
        ("cut off", 2, ["set/e", "set/d"])
    ]
    # b is right under both; a and d are lost by one condition each, d's tokens were noted.
    assert [(loss.item.id, loss.wrong, loss.answered) for loss in by_hand.losses] == [
        ("set/d", 1, 1),
        ("set/a", 1, 1),
    ]
    assert (by_hand.losses[0].shown, by_hand.losses[0].kept) == (TWO.key, [0, 3])


def _timed(unpruned: float, half: float, two: float, count: int = 12) -> Results:
    """Return a run in which a question takes these seconds to its first token, and 1 s more."""
    items = [_item(f"{number}") for number in range(count)]
    resize = Condition(method="resize", keep=0.5)
    seconds = {FULL: unpruned, HALF: half, TWO: two, resize: 0.5 * unpruned}
    records = [
        _record(
            item.id,
            condition,
            "red" if place % 3 else "blue",
            visual_tokens=8,
            of_visual_tokens=16,
            seconds=Seconds(first_token=first, total=first + 1),
        )
        for condition, first in seconds.items()
        for place, item in enumerate(items)
    ]
    return summarise(_about(), items, list(seconds), records)


def test_time_stands_beside_accuracy() -> None:
    results = _timed(unpruned=0.4, half=0.1, two=0.8)
    full, half, two, resize = results.rows
    assert full.first_token_speed_up is None
    assert half.first_token_speed_up == SpeedUp(questions=12, ratio=4.0, low=4.0, high=4.0)
    assert two.first_token_speed_up == SpeedUp(questions=12, ratio=0.5, low=0.5, high=0.5)
    assert two.answer_speed_up
    assert two.answer_speed_up.ratio == pytest.approx(1.4 / 1.8)
    assert resize.first_token_speed_up
    assert resize.first_token_speed_up.ratio == 2.0
    assert two.items_per_second == pytest.approx(1 / 1.8)
    lines = [line.split("|") for line in markdown(results).splitlines() if line.startswith("| ")]
    titles = [cell.strip() for cell in lines[0]]
    rows = [dict(zip(titles, (cell.strip() for cell in line), strict=True)) for line in lines[2:]]
    assert [row["first token, s"] for row in rows] == ["0.400", "0.100", "0.800", "0.200"]
    assert [row["answers/s"] for row in rows] == ["0.714", "0.909", "0.556", "0.833"]
    assert [row["speed-up"] for row in rows] == ["\N{EN DASH}", "x4.00", "x0.50", "x2.00"]
    said = "slower than not pruning (x0.50 to the first token, x0.78 to the answer)"
    assert [row["slower"] for row in rows] == [*["\N{EN DASH}"] * 2, said, "\N{EN DASH}"]
    page = _Page(render(results))
    assert said in page.text
    assert page.text.count("slower than not") == 1
    (plot,) = (text for text in page.alternatives if "the time to the first token" in text)
    for part in ("unpruned: 66.7 % at 0.400 s", "random: 66.7 % at 0.800 s", "resize: 66.7 %"):
        assert part in plot


def test_the_figure_of_time_marks_the_unpruned_and_the_resized() -> None:
    rows = _timed(unpruned=0.4, half=0.1, two=0.8).rows
    uri = cost_plot(rows, "first_token")
    assert uri is not None
    drawing = base64.b64decode(uri.partition(",")[2]).decode()
    for words in (
        "unpruned \N{RIGHTWARDS ARROW} slower",
        "seconds to the first token",
        "unpruned: 66.7 %",
    ):
        assert words in drawing
    # Once in the legend, and once beside its points.
    assert len(re.findall(r">resize<", drawing)) == 2
    tokens = cost_plot(rows, "visual_tokens")
    assert tokens is not None
    assert "\N{RIGHTWARDS ARROW}" not in base64.b64decode(tokens.partition(",")[2]).decode()


def test_without_times_nothing_is_said_of_them() -> None:
    items = [_item(name) for name in "abcdefgh"]
    records = [_record(item.id, one, "red") for one in (FULL, HALF) for item in items]
    results = summarise(_about(), items, [FULL, HALF], records)
    assert [row.first_token_speed_up for row in results.rows] == [None, None]
    assert [row.answer_speed_up for row in results.rows] == [None, None]
    header = next(line for line in markdown(results).splitlines() if line.startswith("| method"))
    for title in ("first token", "answers/s", "speed-up", "slower"):
        assert title not in header
    assert cost_plot(results.rows, "first_token") is None


def test_only_questions_timed_under_both_are_compared() -> None:
    items = [_item(f"{number}") for number in range(10)]
    slow, fast = Seconds(first_token=0.2), Seconds(first_token=0.1)
    records = [_record(item.id, FULL, "red", seconds=slow) for item in items[:9]]
    records += [Record(item=items[9].id, condition=FULL.key, error="cut off")]
    records += [_record(items[0].id, HALF, "red")]  # without its time
    records += [_record(item.id, HALF, "red", seconds=fast, batch=4) for item in items[1:]]
    (_, half) = summarise(_about(), items, [FULL, HALF], records).rows
    # 0 has no time here and 9 failed there; two batches are too few for an interval.
    assert half.first_token_speed_up == SpeedUp(questions=8, ratio=2.0, low=None, high=None)
    assert half.answer_speed_up is None


def test_group_a_are_the_questions_that_a_smaller_picture_loses() -> None:
    whole, small, smaller, half, other = conditions = [
        FULL,
        Condition(method="resize", keep=0.5),
        Condition(method="resize", keep=0.25),
        HALF,
        Condition(method="resize+divprune", keep=0.25),
    ]
    right = {
        # a and c are lost at a half, a and b at a quarter; d is wrong unpruned, e not answered.
        whole.key: "abce",
        small.key: "bd",
        smaller.key: "c",
        half.key: "ad",
        other.key: "bcd",
    }
    items = [_item(name) for name in "abcde"]
    records = [
        _record(f"set/{name}", one, "red" if name in right[one.key] else "blue")
        for one in conditions
        for name in "abcd"
    ]
    records += [
        _record("set/e", whole, "red"),
        *(Record(item="set/e", condition=one.key, error="too small") for one in conditions[1:]),
    ]
    results = summarise(_about(), items, conditions, records)
    found = {row.condition: row.group_a for row in results.rows}
    assert [found[one.key] for one in (whole, small, smaller)] == [None, None, None]
    of_half, of_other = found[half.key], found[other.key]
    assert of_half
    assert of_other
    assert (of_half.correct, of_half.questions) == (1, 2)
    assert (of_other.correct, of_other.questions) == (1, 2)
    lines = [line for line in markdown(results).splitlines() if line.startswith("| ")]
    place = [cell.strip() for cell in lines[0].split("|")].index("group A, %")
    cells = [line.split("|")[place].strip().split(" ")[0] for line in lines[2:]]
    assert cells == ["\N{EN DASH}", "\N{EN DASH}", "\N{EN DASH}", "50.0", "50.0"]
    assert "group A, %" in render(results)
    without = [one for one in conditions if not one.resizes]
    kept = {one.key for one in without}
    plain = summarise(_about(), items, without, [one for one in records if one.condition in kept])
    assert all(row.group_a is None for row in plain.rows)
    assert "| group A" not in markdown(plain)


def test_variants_of_a_method_stand_apart(tmp_path: Path) -> None:
    variants = [
        HALF,
        HALF.model_copy(update={"proportional_attention": True}),
        HALF.model_copy(update={"proportional_attention": True, "positions": "compact"}),
    ]
    assert [one.key for one in variants] == [
        "divprune@0.5",
        "divprune@0.5,proportional",
        "divprune@0.5,compact,proportional",
    ]
    items = [_item("a"), _item("b", "shape")]
    texts = {FULL.key: "red", variants[1].key: "red"}
    records = [
        _record(item.id, one, texts.get(one.key, "blue"), visual_tokens=4, of_visual_tokens=8)
        for one in (FULL, *variants)
        for item in items
    ]
    results = summarise(_about(), items, [FULL, *variants], records)
    assert [row.accuracy.correct for row in results.rows if row.accuracy] == [2, 0, 2, 0]
    assert list(curves(results.rows)) == [
        ("divprune", ""),
        ("divprune", "proportional"),
        ("divprune", "compact, proportional"),
    ]
    names = [line.split("|")[1].strip() for line in markdown(results).splitlines() if "| " in line]
    assert names[2:] == [
        "unpruned",
        *("divprune", "divprune, proportional", "divprune, compact, proportional"),
    ]
    page = " ".join(render(results).split())
    # By type of question: both ways to attend, of the usual positions.
    assert '<th scope="col">divprune</th><th scope="col">divprune, proportional</th></tr>' in page
    for folder in (a := tmp_path / "a", b := tmp_path / "b"):
        _write_run(folder, items, [FULL, *variants], records)
    assert [pair.variant for pair in compare(a, b).pairs[1:]] == [
        *("", "proportional", "compact, proportional")
    ]


def test_cut_answers_stand_beside_right_and_wrong(tmp_path: Path) -> None:
    items = [_item(name) for name in "abcd"]
    cut: dict[str, Any] = {"cut": True, "correct": None, "visual_tokens": 8}
    records = [
        _record("set/a", FULL, "red", visual_tokens=4),
        _record("set/b", FULL, "the thing in", **cut),
        _record("set/c", FULL, "red", visual_tokens=4),
        _record("set/d", FULL, "blue", visual_tokens=4),
        _record("set/a", HALF, "blue"),
        _record("set/b", HALF, "red"),
        _record("set/c", HALF, "well, I", **cut),
        _record("set/d", HALF, "red"),
        # A likelihood decides without the text.
        *(_record(f"set/{name}", TWO, "red", cut=True, correct=True) for name in "abcd"),
    ]
    results = summarise(_about(), items, [FULL, HALF, TWO], records)
    full, half, two = results.rows
    for row in (full, half):
        assert (row.questions, row.answered, row.cut, row.errors, row.missing) == (4, 3, 1, 0, 0)
    assert full.accuracy
    assert (full.accuracy.correct, full.accuracy.questions) == (2, 3)
    assert full.visual_tokens == 5  # what a cut answer cost counts
    assert half.against_unpruned
    # a: lost, d: gained; b and c are cut under one of both.
    pair = half.against_unpruned
    assert (pair.questions, pair.gained, pair.lost) == (2, 1, 1)
    assert (two.answered, two.cut) == (4, 0)
    assert not results.errors
    text = markdown(results)
    assert "unpruned 1, divprune@0.5 1" in text.replace("\\", "")
    assert "--max-new-tokens" in text
    assert [cell.strip() for cell in text.splitlines()[4].split("|")][-4:-1] == [
        *("cut", "at least, %", "answered"),
    ]
    assert [row.at_least for row in results.rows] == [2 / 4, 2 / 4, 1]
    page = render(results)
    assert "2 answers were cut off before they named anything" in page
    assert "of the answers are right with" not in page, "no headline over what was not cut"
    # Files from before have no such field.
    write_results(tmp_path, results)
    content = json.loads((tmp_path / "results.json").read_text("utf-8"))
    for row in (*content["rows"], *content["conditions"]):
        row.pop("cut", None)
        del row["proportional_attention"]
    for data in content["data"]:
        del data["failed"]
    (tmp_path / "results.json").write_text(json.dumps(content), "utf-8")
    assert [row.cut for row in read_results(tmp_path).rows] == [0, 0, 0]


def test_what_failed_under_one_condition_is_compared_under_none() -> None:
    items = [_item(name) for name in "abcde"]
    gone = Condition(method="uniform", keep=0.5)
    records = [_record(item.id, FULL, "red") for item in items]
    records += [_record(f"set/{name}", HALF, "blue") for name in "abde"]
    records += [_record(f"set/{name}", TWO, "red") for name in "acde"]
    records += [
        Record(item="set/c", condition=HALF.key, error="too long"),
        Record(item="set/b", condition=TWO.key, error="too long"),
        # What failed altogether says nothing about the others.
        *(Record(item=item.id, condition=gone.key, error="no such thing") for item in items),
    ]
    results = summarise(_about(), items, [FULL, HALF, TWO, gone], records)
    full, half, two, none = results.rows
    assert results.data[0].failed == 2
    assert full.accuracy
    assert full.accuracy.questions == 5
    for row, lost in ((half, 3), (two, 0)):
        assert row.accuracy
        assert row.accuracy.questions == 4
        assert row.against_unpruned
        assert (row.against_unpruned.questions, row.against_unpruned.lost) == (3, lost)
    assert (none.answered, none.errors, none.against_unpruned) == (0, 5, None)
    assert "2 questions failed under at least one condition" in markdown(results)
    page = render(results)
    assert "2 questions failed under at least one condition" in page
    assert "too long" in page


def test_losses_take_turns_and_the_most_tokens_are_shown() -> None:
    sets = {"x": 20, "y": 2}
    items = [_item(str(i), data_set=name) for name, count in sets.items() for i in range(count)]
    records = [_record(item.id, FULL, "red") for item in items]
    records += [_record(item.id, TWO, "no", visual_tokens=2) for item in items]
    records += [_record(item.id, HALF, "no", visual_tokens=32) for item in items[4:5]]
    results = summarise(_about(), items, [FULL, TWO, HALF], records)
    assert len(results.losses) == MAX_LOSSES
    names = [loss.item.id for loss in results.losses]
    assert names[:6] == ["x/4", "y/0", "x/0", "y/1", "x/1", "x/2"]
    assert (results.losses[0].wrong, results.losses[0].shown) == (2, HALF.key)


def test_what_does_not_belong_together_is_refused() -> None:
    items = [_item("a")]
    with pytest.raises(InputFileError, match=r"'set/z'.*no question of the run"):
        summarise(_about(), items, [FULL], [_record("set/z", FULL, "red")])
    with pytest.raises(InputFileError, match=r"divprune@0\.5.*conditions unpruned"):
        summarise(_about(), items, [FULL], [_record("set/a", HALF, "red")])
    with pytest.raises(InputFileError, match="twice"):
        summarise(_about(), items * 2, [FULL], [])


def test_item_info_of_an_item() -> None:
    item = Question("3", "video", Path("v.mp4"), "what?", "B", ("x", "y"), "colour", (0.5, 1.0))
    info = QuestionInfo.of("clips", item)
    assert (info.id, info.choices, info.times) == ("clips/3", ("x", "y"), (0.5, 1.0))
    assert QuestionInfo.model_validate_json(info.model_dump_json()) == info


# Files and tables -------------------------------------------------------------------------------


def test_results_come_back_and_damage_is_told(by_hand: Results, tmp_path: Path) -> None:
    write_results(tmp_path, by_hand)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "report.html",
        "results.json",
        "table.md",
    ]
    assert read_results(tmp_path) == by_hand
    file = tmp_path / "results.json"
    content = json.loads(file.read_text())
    for change, said in (
        (
            {"schema_version": 99},
            "schema_version 99.*newer version.*schema_version 1 and older",
        ),
        ({"rows": [{"data_set": 3}]}, r"damaged at rows\.0\.data_set"),
    ):
        file.write_text(json.dumps(content | change))
        with pytest.raises(InputFileError, match=said):
            read_results(tmp_path)
    file.write_text("{")
    with pytest.raises(InputFileError, match="no JSON"):
        read_results(tmp_path)
    file.unlink()
    with pytest.raises(InputFileError, match="cannot be read"):
        read_results(tmp_path)


def test_tables_show_the_numbers(by_hand: Results) -> None:
    text = markdown(by_hand)
    (half,) = [line for line in text.splitlines() if line.startswith("| divprune")]
    cells = [cell.strip() for cell in half.strip("|").split("|")]
    assert cells[:3] == ["divprune", "0.5", "4.5"]
    assert cells[3].startswith("75.0 (30.1-95.4")
    assert cells[4].startswith("0.0 \\[")
    assert cells[5:] == ["1.000", "33.3", "0.100", "3.00", "x4.00", "4"]
    assert "error: unpruned 1, divprune@0.5 1." in text
    console = Console(width=110, record=True, file=io.StringIO())
    print_tables(console, by_hand)
    printed = console.export_text()
    assert "75.0 (30.1-95.4)" in printed
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= 110


# The report -------------------------------------------------------------------------------------


class _Page(HTMLParser):
    """Collects elements, what they refer to, texts for pictures, and the text that is shown."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.references: list[str] = []
        self.alternatives: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.alternatives += [value or "" for name, value in attrs if name == "alt"]
        self.references += [
            value or ""
            for name, value in attrs
            if name in ("src", "href", "srcset", "xlink:href", "action", "data", "poster")
        ]

    def handle_data(self, data: str) -> None:
        if self.elements[-1:] not in (["style"], ["script"]):
            self.text += data


def _made_up(folder: Path, model: str = EVIL) -> Results:
    """Return results with pictures, where every text from data tries to be code."""
    picture = folder / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 255, (112, 224, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(picture)
    items = [
        _item(
            f"{place}-{EVIL}",
            EVIL if place % 2 else "shape",
            data_set=EVIL if place < 20 else "second",
            path=picture if place else Path("/nowhere") / EVIL,
            question=f"{EVIL} {'long' * 40}",
            answer="A" if place % 3 else EVIL,
            choices=(EVIL, "blue") if place % 3 else (),
        )
        for place in range(40)
    ]
    conditions = [
        FULL,
        *(
            Condition(method=method, keep=keep)
            for method in ("divprune", "cls-attention", "random", EVIL)
            for keep in (0.5, 0.25, 0.125)
        ),
    ]
    rng = np.random.default_rng(1)
    records = []
    for condition in conditions:
        for item in items:
            right = bool(rng.random() < (0.95 if condition == FULL else condition.keep**0.3))
            kept = sorted(rng.choice(32, int(32 * condition.keep), replace=False).tolist())
            records.append(
                Record(
                    item=item.id,
                    condition=condition.key,
                    text=item.answer if right else EVIL,
                    correct=right,
                    visual_tokens=len(kept),
                    of_visual_tokens=32,
                    mass_kept=0.5,
                    peak_bytes=2**21,
                    kv_bytes=2**20,
                    seconds=Seconds(first_token=0.01 + 0.02 * condition.keep, total=0.05),
                    kept=kept,
                    grid=(1, 4, 8),
                )
            )
    records[-1] = Record(item=items[-1].id, condition=conditions[-1].key, error=EVIL)
    about = _about(
        settings={"model": model, "note": EVIL, "nested": {EVIL: [EVIL]}},
        versions={"torch": EVIL},
        machine={"processor": EVIL},
    )
    return summarise(about, items, conditions, records)


def test_report_is_one_file_and_escapes_what_it_shows(tmp_path: Path) -> None:
    results = _made_up(tmp_path)
    html = render(results)
    page = _Page(html)
    assert page.references
    assert all(one.startswith("data:image/") for one in page.references)
    assert page.elements.count("script") == 1
    assert not {"link", "iframe", "object", "embed", "form"} & set(page.elements)
    assert "url(" not in html
    assert "@import" not in html
    assert EVIL in page.text
    assert "<script>document" not in html
    assert len(html) < 900_000
    assert html.count('class="card"') == len(results.losses) == MAX_LOSSES
    # What is kept is left out of the veil.
    loss = next(one for one in results.losses if one.item.path.exists())
    assert loss.kept is not None
    veiled = set()
    found = re.findall(
        r"M([\d.]+) ([\d.]+)h([\d.]+)v20h-[\d.]+z", re.findall(r'<path d="([^"]*)"', html)[0]
    )
    for left, top, width in found:
        first = int(float(top)) // 20 * 8 + int(float(left)) // 20
        veiled |= set(range(first, first + int(float(width)) // 20))
    assert veiled == set(range(32)) - set(loss.kept)


@pytest.mark.parametrize("bundled", [True, False])
def test_report_says_what_the_bundled_model_is(tmp_path: Path, bundled: bool) -> None:
    results = _made_up(tmp_path, "bundled" if bundled else "some/model")
    for text in (render(results), markdown(results)):
        assert ("no public VLM" in text) is bundled


def test_unfinished_runs_have_a_report_too(tmp_path: Path) -> None:
    items = [_item("a"), _item("b")]
    conditions = [FULL, HALF, TWO]
    nothing = summarise(_about(complete=False), items, conditions, [])
    assert [row.accuracy for row in nothing.rows] == [None] * 3
    write_results(tmp_path, nothing)
    page = _Page((tmp_path / "report.html").read_text("utf-8"))
    assert "No question has been answered" in page.text
    assert "not complete" in page.text
    assert "img" not in page.elements
    assert read_results(tmp_path) == nothing
    errors = [Record(item=item.id, condition=FULL.key, error="cut off") for item in items]
    page = _Page(render(summarise(_about(), items, conditions[:1], errors)))
    assert "2 attempts ended without an answer" in page.text
    part = [_record("set/a", FULL, "red"), _record("set/a", HALF, "blue", visual_tokens=4)]
    page = _Page(render(summarise(_about(complete=False), items, conditions, part)))
    assert "4 are still to come" in page.text
    # No condition is through, so none is put into the headline.
    assert "2 answers under 3 conditions" in page.text
    # The picture is missing, and the report says so in its place.
    assert "/nowhere/picture.png" in page.text
    alone = summarise(_about(), items, [HALF], [_record("set/a", HALF, "red")])
    assert alone.rows[0].against_unpruned is None
    assert "1 answer under 1 condition" in _Page(render(alone)).text
    markdown(alone)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_report_in_a_browser(tmp_path: Path) -> None:
    """Nothing from data runs, nothing sticks out on a telephone, and the table sorts."""
    results = _made_up(tmp_path)
    probe = """<script>addEventListener('load', () => {
      for (const details of document.querySelectorAll('details')) details.open = true;
      const broken = [...document.images].filter(image => !image.naturalWidth).length;
      const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
      const table = document.querySelector('table.sortable');
      const buttons = [...table.querySelectorAll('th button')];
      const column = buttons.findIndex(button => button.textContent.startsWith('difference'));
      const order = () => [...table.tBodies[0].rows].map(
        row => row.cells[column].dataset.value).join(' ');
      const sort = () => buttons[column].parentNode.getAttribute('aria-sort');
      const steps = [sort()];
      for (let i = 0; i < 2; i++) { buttons[column].click(); steps.push(sort(), order()); }
      const state = {title: document.title, broken, wide, images: document.images.length, steps};
      document.body.setAttribute('data-state', btoa(JSON.stringify(state)));
    })</script>"""
    page = tmp_path / "page.html"
    page.write_text(render(results).replace("</body>", probe + "</body>"), encoding="utf-8")
    pairs = [row.against_unpruned for row in results.rows if row.data_set == EVIL]
    differences = sorted(pair.difference for pair in pairs if pair)
    for width in (1280, 390):
        shown = browse(page, "--dump-dom", f"--window-size={width},2000").stdout
        found = re.search(r'data-state="([^"]*)"', shown)
        assert found
        state = json.loads(base64.b64decode(found[1]))
        assert state["title"].startswith("tokenprune eval")
        assert (state["broken"], state["images"]) == (0, 4)
        assert state["wide"] == 0, f"{state['wide']} pixels too wide at {width}"
        before, up, rising, down, falling = state["steps"]
        assert (before, up, down) == ("none", "ascending", "descending")
        # The unpruned row has no difference and stays last.
        for order, expected in ((rising, differences), (falling, differences[::-1])):
            assert order.endswith(" ")
            assert [float(value) for value in order.split()] == pytest.approx(expected)
    picture = tmp_path / "page.png"
    browse(page, f"--screenshot={picture}", "--window-size=1280,2400")
    pixels = np.asarray(Image.open(picture).convert("L")).astype(float)
    assert all(quarter.std() > 8 for quarter in np.split(pixels, 4))
    assert (pixels > 250).mean() > 0.4


# Two runs ---------------------------------------------------------------------------------------


def _write_run(
    folder: Path,
    items: list[QuestionInfo],
    conditions: list[Condition],
    records: list[Record],
    **about: Any,
) -> None:
    folder.mkdir()
    described = _about(conditions=[one.model_dump() for one in conditions], **about)
    (folder / "run.json").write_text(json.dumps(described))
    write_questions(folder, items)
    lines = "".join(record.model_dump_json() + "\n" for record in records)
    (folder / "records.jsonl").write_text(lines + '{"item": "se')  # cut off


def test_two_runs_are_compared_on_what_both_have(tmp_path: Path) -> None:
    items = [_item(name) for name in "abcde"]
    a, b = tmp_path / "a", tmp_path / "b"
    _write_run(
        a,
        items[:4],
        [FULL, HALF],
        [_record(item.id, one, "red") for one in (FULL, HALF) for item in items[:3]]
        + [Record(item="set/d", condition=HALF.key, error="cut off")],
    )
    changed = items[0].model_copy(update={"question": "another?"})
    _write_run(
        b,
        [changed, *items[1:]],
        [FULL, TWO],
        [_record(item.id, FULL, "blue" if item.id == "set/b" else "red") for item in items],
        settings={"model": "other/model", "seed": 0},
        complete=False,
    )
    found = compare(a, b)
    assert (found.only_a, found.only_b) == (("divprune@0.5",), ("random@2",))
    (data,) = found.data
    assert (data.both, data.only_a, data.only_b, data.changed) == (3, 0, 1, 1)
    (pair,) = found.pairs
    # b and c: d has no answer in A, and a asks something else in B.
    assert pair.a
    assert pair.b
    assert pair.b_against_a
    assert (pair.condition, pair.a.share, pair.b.share) == ("unpruned", 1.0, 0.5)
    assert (pair.b_against_a.questions, pair.b_against_a.lost) == (2, 1)
    assert pair.b_against_a.agreement == 0.5
    assert found.differences == (("settings.model", "some/model", "other/model"),)
    assert found.incomplete == (b,)
    text = comparison_markdown(found)
    console = Console(width=110, record=True, file=io.StringIO())
    print_comparison(console, found)
    for shown in (text, console.export_text()):
        assert "-50.0" in shown
        assert "Only A has divprune@0.5." in shown
        assert "other/model" in shown
    assert paired({}, {}) is None


def test_two_runs_leave_out_what_failed_in_either(tmp_path: Path) -> None:
    items = [_item(name) for name in "abcd"]
    a, b = tmp_path / "a", tmp_path / "b"
    cut = _record("set/d", FULL, "it", cut=True, correct=None)
    for folder, text in ((a, "red"), (b, "blue")):
        records = [_record(item.id, one, text) for one in (FULL, HALF) for item in items[:3]]
        _write_run(folder, items, [FULL, HALF], [*records, cut] if folder == a else records)
    with (b / "records.jsonl").open("w") as stream:
        failed = Record(item="set/a", condition=HALF.key, error="too long")
        stream.writelines(f"{record.model_dump_json()}\n" for record in [*records, failed])
    comparison = compare(a, b)
    assert comparison.data[0].failed == 1
    full, half = comparison.pairs
    for pair in (full, half):
        assert pair.b_against_a
        # a failed under one condition of B, d was cut in A and never asked in B.
        assert (pair.b_against_a.questions, pair.b_against_a.lost) == (2, 2)
    assert (full.cut_a, full.cut_b, full.errors_a, full.errors_b) == (1, 0, 0, 0)
    assert (half.cut_a, half.cut_b, half.errors_a, half.errors_b) == (0, 0, 0, 1)
    text = comparison_markdown(comparison)
    assert "1 that failed under some condition and are left out" in text
    assert "1/0" in text
    assert "0/1" in text


def test_a_damaged_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match=r"run\.json cannot be read"):
        read_run(tmp_path)
    folder = tmp_path / "run"
    _write_run(folder, [_item("a")], [FULL], [_record("set/a", FULL, "red")])
    assert len(read_run(folder).records) == 1
    about = json.loads((folder / "run.json").read_text())
    for number in (2, "1", 0):
        (folder / "run.json").write_text(json.dumps({**about, "format": number}))
        with pytest.raises(InputFileError, match=rf"run\.json has format {number!r}.* anew"):
            read_run(folder)
    (folder / "run.json").write_text(json.dumps({**about, "format": 1}))
    assert read_run(folder).about == about
    records = folder / "records.jsonl"
    records.write_text("{}\n" + records.read_text())
    with pytest.raises(InputFileError, match=r"records\.jsonl, line 1 is damaged at item"):
        read_run(folder)
    (folder / "run.json").write_text("[]")
    with pytest.raises(InputFileError, match="does not list"):
        read_run(folder)
