"""Calibration that abstains, and one whose bound holds for every type of question."""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("statsmodels", reason="calibration needs the extra `eval`")

from tests.eval.test_calibrate import BASE, _canned, _records, _right
from tokenprune.cli import main
from tokenprune.config import PruningConfig
from tokenprune.errors import AbstainedError, ConfigError
from tokenprune_eval.calibrate.search import Bisection, Bounds, draw, of_part, shared_out
from tokenprune_eval.calibrate.sequential import MeanTest, least_bound, needed
from tokenprune_eval.data.load import load_data
from tokenprune_eval.data.question import DataSet, Question

TYPES = ("color", "count", "exists", "kind", "place")
"""Of the questions in `scenes`."""

KNOWN = {f"scenes/{item.id}": item for item in load_data("scenes").questions}


def _outcome(test: MeanTest, values: Iterable[float]) -> str:
    """Return what a test comes to on values looked at one after the other."""
    for value in values:
        test.add(float(value))
        if test.accepted:
            return "accepted"
        if test.rejected:
            return "too lossy"
    return "undecided"


# What is claimed --------------------------------------------------------------------------------


def _search(bounds: Bounds, losses: Sequence[dict[str, np.ndarray[Any, Any]]]) -> tuple[int, bool]:
    """Return the budget found, and whether one was refused as too lossy, by hand."""
    bisection, refused = Bisection(len(bounds.grid)), False
    while (number := bisection.next) is not None:
        outcomes = set()
        for name, bound in bounds.types.items():
            test = MeanTest(bound, bounds.accept_at, bounds.reject_at)
            outcomes.add(_outcome(test, losses[number - 1][name]))
            if outcomes != {"accepted"}:
                break
        refused |= "too lossy" in outcomes
        bisection.tell(outcomes == {"accepted"})
    return bisection.best, refused


@pytest.mark.parametrize("lossy", [("a",), ("a", "b", "c", "d")], ids=["one type", "every type"])
def test_a_budget_that_one_type_cannot_bear_is_as_rarely_accepted_as_said(
    lossy: tuple[str, ...],
) -> None:
    """One type that loses exactly its bound is the worst case: all others accept for certain."""
    bounds = Bounds(0.3, 0.9, (0.5, 0.25, 0.125), dict.fromkeys("abcd", 0.3))
    assert bounds.accept_at == pytest.approx(2 / 0.1)
    generator = np.random.default_rng(5)
    runs = 300
    wrong = found = 0
    for _ in range(runs):
        draws = {name: generator.random(80) for name in bounds.types}
        good = {name: (own < 0.01) for name, own in draws.items()}
        bad = {name: own < (0.3 if name in lossy else 0.01) for name, own in draws.items()}
        best, _ = _search(bounds, [good, bad, bad])
        wrong += best > 1
        found += best == 1
    assert wrong / runs <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / runs)
    assert found / runs > 0.85


def test_no_type_refuses_a_good_budget_more_often_than_said() -> None:
    """Eight types just under their bound: a claim of one of them is one of their union."""
    bounds = Bounds(0.3, 0.9, (0.5,), dict.fromkeys("abcdefgh", 0.3))
    assert bounds.reject_at == pytest.approx(8 / 0.1)
    assert Bounds(0.3, 0.9, (0.5,)).reject_at == pytest.approx(1 / 0.1)
    generator = np.random.default_rng(6)
    runs = 200
    refused = 0
    for _ in range(runs):
        outcomes = (
            _outcome(MeanTest(0.3, math.inf, bounds.reject_at), generator.random(60) < 0.29)
            for _ in bounds.types
        )
        refused += "too lossy" in outcomes
    assert refused / runs <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / runs)


def test_what_a_few_questions_can_show() -> None:
    for count, wanted in ((12, 60.0), (200, 20.0)):
        bound = least_bound(count, wanted)
        assert needed(bound + 1e-6, wanted) <= count < needed(bound - 1e-6, wanted)
    assert least_bound(0, 20.0) == 1
    assert least_bound(1, 1e9) == 1


def test_what_is_expected_is_where_more_of_the_same_accepts() -> None:
    values = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    test = MeanTest(0.3, 200, 20)
    assert test.expected() is None
    for value in values:
        test.add(value)
    expected = test.expected()
    assert expected is not None
    for times, accepted in ((expected // 10, False), (expected // 10 + 1, True)):
        longer = MeanTest(0.3, 200, 20)
        for value in values * times:
            longer.add(value)
        assert longer.accepted == accepted
    lossy = MeanTest(0.3, 200, 20)
    for value in [1.0, 0.0, 1.0]:
        lossy.add(value)
    assert lossy.expected() is None


# Drawing ----------------------------------------------------------------------------------------


def test_types_get_as_many_questions_as_each_other() -> None:
    assert shared_out({"a": 100, "b": 3, "c": 50}, 33) == {"b": 3, "c": 15, "a": 15}
    assert shared_out({"a": 2, "b": 3}, 99) == {"a": 2, "b": 3}
    assert sum(shared_out({"a": 9, "b": 9, "c": 9}, 10).values()) == 10
    items = [
        Question(str(n), "image", Path(f"{n // 4}.png"), "?", "yes", type="xxxy"[n % 4])
        for n in range(80)
    ]
    items.append(Question("z", "image", Path("0.png"), "?", "yes", type="z"))
    sets = [DataSet("one", items)]
    whole = draw(sets, 1, None, 0, ("x", "y", "z"))
    assert Counter(one.type for own in whole for one in own) == {"x": 20, "y": 20, "z": 1}
    assert all(len({one.path for one in own}) == 1 for own in whole)
    some = draw(sets, 1, 15, 0, ("x", "y", "z"))
    assert Counter(one.type for own in some for one in own) == {"x": 7, "y": 7, "z": 1}
    assert some == draw(sets, 1, 15, 0, ("x", "y", "z"))
    # The order of a type is that of the whole draw, whose beginning a smaller one takes.
    for name in "xyz":
        part = of_part(whole, name)
        assert of_part(some, name) == part[: len(of_part(some, name))]
    assert {one.type for own in draw(sets, None, None, 0, ("y",)) for one in own} == {"y"}
    assert sum(map(len, draw(sets, 2, None, 0, ("x",)))) == 40


# The command ------------------------------------------------------------------------------------


def _loses(*types: str, keep: float = 0.5, every: int = 1) -> Callable[[Question, Any], str]:
    """Return answers that are right but for some types at this keep and below."""

    def says(item: Question, condition: Any) -> str:
        number = int(item.id.split("-")[1])
        wrong = condition.method != "unpruned" and condition.keep <= keep
        return "wrong" if wrong and item.type in types and number % every == 0 else item.answer

    return says


def _by_hand(log: dict[str, Any], name: str, lossy: Sequence[str]) -> tuple[str, int]:
    """Return what the test of a type comes to, and after how many images, by other code."""
    order = [one for own in log["order"] for one in own if KNOWN[one].type == name]
    bound = log["types"][name]
    chance = 1 - log["confidence"]
    steps = math.ceil(math.log2(len(log["grid"]) + 1))
    test = MeanTest(bound, steps / chance, len(log["types"]) / chance)
    for count, one in enumerate(order, 1):
        test.add(float(KNOWN[one].type in lossy))
        if test.accepted or test.rejected:
            return ("accepted" if test.accepted else "too lossy"), count
    return "undecided", len(order)


def test_the_type_that_stops_a_budget_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _canned(monkeypatch, _loses("count", keep=0.25))
    out = tmp_path / "out"
    arguments = [*BASE, "--data", "scenes", "--method", "uniform", "--max-drop", "15%"]
    arguments += ["--keep-grid", "0.5", "0.25", "0.125", "--out", str(out)]
    assert main([*arguments, "--per-type", "--type-drop", "kind=20%"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    log = json.loads((out / "calibration.json").read_text())
    assert log["types"] == {name: 0.2 if name == "kind" else 0.15 for name in TYPES}
    assert log["found"] == {"uniform": 0.5}
    assert log["abstained"] == {}
    first, second = log["decisions"]
    assert (first["keep"], first["outcome"]) == (0.25, "too lossy")
    assert first["stopped_by"] == ["count"] == [first["type"]]
    assert {first["types"][name]["state"] for name in TYPES} >= {"too lossy", "open"}
    assert (second["keep"], second["outcome"], second["stopped_by"]) == (0.5, "accepted", [])
    for decision, lossy in ((first, ("count",)), (second, ())):
        for name, part in decision["types"].items():
            state, count = _by_hand(log, name, lossy)
            assert part["bound"] == log["types"][name]
            if part["state"] == "open":  # stopped by another type before it came to an end
                assert part["media"] < count
            else:
                assert (part["state"], part["media"]) == (state, count)
                assert part["drop"] == (1.0 if name in lossy else 0.0)
    assert decision["media"] == sum(part["media"] for part in decision["types"].values())
    # Types that are decided are not asked about any more, but for what one batch holds.
    answers = Counter(KNOWN[item].type for key, item in _records(out) if key == "uniform@0.5")
    for name, part in second["types"].items():
        assert part["media"] <= answers[name] <= part["media"] + 8
    assert "0.25 too lossy for count, drop 100.00 %" in printed
    assert "type count: 200 questions about 200 images or videos, needs at least" in printed
    assert "in every type of question" in printed
    assert PruningConfig.from_json((out / "uniform.json").read_text()).keep == 0.5


def test_a_type_without_a_bound_is_not_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _canned(monkeypatch, _loses("count"))
    out = tmp_path / "out"
    arguments = [*BASE, "--data", "scenes", "--method", "uniform", "--max-drop", "20%"]
    arguments += ["--keep-grid", "0.5", "--per-type", "--out", str(out)]
    assert main(arguments) == 1
    abstained = json.loads((out / "uniform.json").read_text())
    assert abstained["nearest"]["type"] == "count"
    assert "--type-drop 'count'=SHARE" in capsys.readouterr().out
    assert main([*arguments, "--type-drop", "count=none"]) == 0
    assert "not asked about and not bounded: count" in capsys.readouterr().out
    log = json.loads((out / "calibration.json").read_text())
    assert set(log["types"]) == set(TYPES) - {"count"}
    assert {KNOWN[one].type for own in log["order"] for one in own} == set(log["types"])
    assert PruningConfig.from_json((out / "uniform.json").read_text()).keep == 0.5


def test_the_bundled_model_type_by_type(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [*BASE, "--data", "scenes", "--method", "divprune", "--max-drop", "40%"]
    arguments += ["--keep-grid", "0.5", "--limit", "80", "--per-type", "--out", str(out)]
    arguments += ["--type-drop", "count=60%", "place=60%"]
    status = main(arguments)
    log = json.loads((out / "calibration.json").read_text())
    assert status == (0 if log["found"]["divprune"] else 1)
    assert sum(map(len, log["order"])) == 80
    (decision,) = log["decisions"]
    assert set(decision["types"]) == set(TYPES)
    asked = 0
    for name, part in decision["types"].items():
        order = [one for own in log["order"] for one in own if KNOWN[one].type == name]
        own = order[: part["media"]]
        asked += len(own)
        unpruned, pruned = _right([KNOWN[one] for one in own], PruningConfig("divprune", 0.5))
        pairs = list(zip(own, unpruned, pruned, strict=True))
        lost = {one for one, before, after in pairs if before and not after}
        gained = {one for one, before, after in pairs if after and not before}
        assert lost == {one for one in decision["lost"] if KNOWN[one].type == name}
        assert gained == {one for one in decision["gained"] if KNOWN[one].type == name}
        assert part["drop"] == pytest.approx((len(lost) - len(gained)) / len(own))
        assert log["unpruned"]["types"][name]["answered"] >= len(own)
    assert decision["questions"] == asked


def test_an_interrupted_search_by_type_finds_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says = _loses("count", keep=0.25)
    answered = Counter[str]()

    def stops(item: Question, condition: Any) -> str:
        answered["all"] += 1
        if answered["all"] == 300:
            raise KeyboardInterrupt
        return says(item, condition)

    arguments = [*BASE, "--data", "scenes", "--method", "uniform", "random", "--max-drop", "20%"]
    arguments += ["--keep-grid", "0.5", "0.25", "0.125", "--per-type"]
    _canned(monkeypatch, says)
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    _canned(monkeypatch, stops)
    assert main([*arguments, "--out", str(tmp_path / "part")]) == 130
    before = _records(tmp_path / "part")
    _canned(monkeypatch, says)
    assert main([*arguments, "--out", str(tmp_path / "part")]) == 0
    after = _records(tmp_path / "part")
    assert after[: len(before)] == before
    assert len(set(after)) == len(after)
    assert set(after) == set(_records(tmp_path / "whole"))
    logs = [
        json.loads((tmp_path / one / "calibration.json").read_text()) for one in ("whole", "part")
    ]
    for log in logs:
        log["settings"].pop("out", None)
    assert logs[0] == logs[1]


# Abstaining -------------------------------------------------------------------------------------


def test_a_method_without_a_budget_abstains_and_is_refused_where_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _canned(monkeypatch, _loses(*TYPES, every=3))
    out = tmp_path / "out"
    arguments = [*BASE, "--data", "scenes", "--method", "uniform", "--max-drop", "10%"]
    arguments += ["--keep-grid", "0.5", "0.25", "--out", str(out)]
    assert main(arguments) == 1
    printed = capsys.readouterr().out
    assert "uniform: abstained, no budget below 1.0 can be accepted (" in printed
    file = out / "uniform.json"
    said = json.loads(file.read_text())
    assert said["abstained"] is True
    assert "keep" not in said
    assert (said["method"], said["reason"], said["max_drop"]) == ("uniform", "too lossy", 0.1)
    log = json.loads((out / "calibration.json").read_text())
    assert log["abstained"] == {"uniform": said}
    assert log["found"] == {"uniform": None}
    near = said["nearest"]
    (decision,) = [one for one in log["decisions"] if one["keep"] == near["keep"]]
    for name in ("drop", "at_least", "at_most", "media", "outcome", "bound"):
        assert near[name] == decision[name]
    assert 0.1 < near["at_least"] < near["drop"] == pytest.approx(1 / 3, abs=0.15)
    assert [one["keep"] for one in said["tried"]] == [one["keep"] for one in log["decisions"]]
    assert any("--max-drop" in one for one in said["next"])
    assert any("--keep-grid" in one for one in said["next"])
    assert any("resize" in one for one in said["next"])

    with pytest.raises(AbstainedError, match=r"abstained.*Nearest came keep .*leave the config"):
        PruningConfig.from_json(file.read_text())
    with pytest.raises(ConfigError, match=r"the log of `tokenprune calibrate`.*METHOD.json"):
        PruningConfig.from_json((out / "calibration.json").read_text())
    for command in (f"serve bundled --pruning {file}", f"export bundled X --pruning {file}"):
        assert main(shlex.split(command)) == 2
        refused = capsys.readouterr().err
        assert "`tokenprune calibrate` abstained. uniform: abstained, no budget below" in refused
        assert refused.count("\n") == 1

    # It is no obstacle for a search with what it advises, which takes its place.
    assert main([*arguments, "--max-drop", "60%"]) == 0
    assert PruningConfig.from_json(file.read_text()).keep in (0.5, 0.25)


def test_undecided_says_how_many_would_be_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _canned(monkeypatch, _loses(*TYPES, every=20))
    out = tmp_path / "out"
    arguments = [*BASE, "--data", "scenes", "--method", "resize", "uniform", "--max-drop", "10%"]
    arguments += ["--keep-grid", "0.5", "--out", str(out)]
    assert main([*arguments, "--limit", "60"]) == 1
    said = json.loads((out / "uniform.json").read_text())
    near = said["nearest"]
    assert (said["reason"], near["of_media"]) == ("undecided", 60)
    assert f"at least {near['media_least']:,}, if no other answer" in capsys.readouterr().out
    # One loss, and then none: as many as are named accept, and one fewer do not.
    assert near["drop"] * near["media"] == pytest.approx(1)
    for count, accepted in ((near["media_least"], True), (near["media_least"] - 1, False)):
        test = MeanTest(0.1, 20, 20)
        for number in range(count):
            test.add(float(number == 0))
        assert test.accepted == accepted
    assert not any("resize" in one for one in said["next"])
    # A method that resizes abstains, too; with all pictures both have a budget.
    assert json.loads((out / "resize.json").read_text())["abstained"] is True
    assert main(arguments) == 0
    assert not (out / "resize.json").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--type-drop count=1%", "without --per-type the bound is one of all questions"),
        ("--per-type --type-drop count", "is not TYPE=SHARE"),
        ("--per-type --type-drop =1%", "is not TYPE=SHARE"),
        ("--per-type --type-drop count=x", "--type-drop count= x is no share"),
        ("--per-type --type-drop count=1% count=2%", "gives count two bounds"),
        ("--per-type --type-drop cuont=1%", "no such type. Did you mean 'count'?"),
        ("--per-type --max-drop 2%", "count has 200 and needs"),
        ("--per-type --max-drop 30% --limit 20", "color has 4 and needs"),
        (
            "--per-type --type-drop count=none color=none exists=none kind=none place=none",
            "leaves no type",
        ),
    ],
)
def test_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, said: str
) -> None:
    base = [*BASE, "--data", "scenes", "--method", "divprune", "--max-drop", "20%"]
    assert main([*base, "--out", str(tmp_path / "out"), *shlex.split(arguments)]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_type_with_too_few_is_told_what_it_can_show(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the bound that is named is enough for the search to begin."""
    base = [*BASE, "--data", "scenes", "--method", "divprune", "--max-drop", "1%", "--per-type"]
    base += ["--out", str(tmp_path / "out"), "--limit", "100", "--keep-grid", "0.5"]
    assert main(base) == 2
    printed = capsys.readouterr().err
    assert printed.count("has 20 and needs") == len(TYPES)
    share = printed.partition("(20 can show ")[2].partition(" %)")[0]
    assert needed(float(share) / 100, 20) <= 20 < needed(float(share) / 100 - 0.002, 20)


def test_questions_without_a_type_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "own.jsonl"
    rows = [{"image": "a.png", "question": "?", "answer": "x", "id": "one"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = [*BASE, "--data", str(data), "--method", "divprune", "--max-drop", "20%"]
    assert main([*base, "--per-type", "--out", str(tmp_path / "out")]) == 2
    assert "1 have none, for example own/one" in capsys.readouterr().err
