"""Calibration: its error rate by enumeration and simulation, its search, and the command."""

from __future__ import annotations

import itertools
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("statsmodels", reason="calibration needs the extra `eval`")

import torch
from PIL import Image

import tokenprune_hf
from tokenprune.arguments import parse_share
from tokenprune.cli import main
from tokenprune.config import PruningConfig
from tokenprune.errors import ConfigError
from tokenprune.media.images import load_image
from tokenprune_eval.calibrate.report import serve_command
from tokenprune_eval.calibrate.search import Bisection, Bounds, draw, steps
from tokenprune_eval.calibrate.sequential import STAKES, MeanTest, needed
from tokenprune_eval.data.load import load_data
from tokenprune_eval.data.question import DataSet, Question
from tokenprune_eval.evaluation.engines.base import EngineAnswer
from tokenprune_hf.loading import load

# The test of a mean -----------------------------------------------------------------------------


def _tested(values: Sequence[float], bound: float, wanted: float = 20.0) -> MeanTest:
    test = MeanTest(bound, wanted, wanted)
    for value in values:
        test.add(value)
    return test


@pytest.mark.parametrize("bound", [0.05, 0.4])
def test_wealth_is_a_fair_game_at_the_bound(bound: float) -> None:
    """Over all sequences, weighed by their probability, it is 1 on average: also when stopped."""
    chances = {1.0: (1 + bound) / 2 - 0.1, 0.0: 0.2, -1.0: (1 - bound) / 2 - 0.1}
    assert sum(x * p for x, p in chances.items()) == pytest.approx(bound)
    fixed = stopped = 0.0
    for values in itertools.product(chances, repeat=5):
        chance = math.prod(chances[value] for value in values)
        by_hand = [
            math.prod(1 + stake * (bound - x) / (1 - bound) for x in values) for stake in STAKES
        ]
        assert _tested(values, bound).wealth == pytest.approx(sum(by_hand) / len(STAKES))
        fixed += chance * _tested(values, bound).wealth
        wealths = [_tested(values[:count], bound).wealth for count in range(1, 6)]
        stopped += chance * next((one for one in wealths if one >= 1.5), wealths[-1])
    assert fixed == pytest.approx(1)
    assert stopped == pytest.approx(1)


def test_false_acceptance_is_as_rare_as_said() -> None:
    """Losses at exactly the bound, looked at after every question."""
    bound, runs = 0.2, 2000
    generator = np.random.default_rng(0)
    accepted = 0
    for _ in range(runs):
        test = MeanTest(bound, 20, math.inf)
        for value in generator.choice([1.0, 0.0, -1.0], 150, p=[0.25, 0.7, 0.05]):
            test.add(value)
            if test.accepted:
                accepted += 1
                break
    # Not never either: what is far too careful asks too many questions.
    assert 0.01 < accepted / runs <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)


def test_power() -> None:
    assert _tested([0.0] * 120, 0.05, 80).accepted
    assert not _tested([0.0] * 100, 0.05, 80).accepted
    generator = np.random.default_rng(1)
    counts = []
    for _ in range(50):
        test = MeanTest(0.05, 80, 20)
        # One in a hundred is lost, as many again change either way.
        for value in generator.choice([1.0, 0.0, -1.0], 2000, p=[0.02, 0.97, 0.01]):
            test.add(value)
            if test.accepted or test.rejected:
                break
        assert test.accepted
        counts.append(test.count)
    assert np.median(counts) < 400
    assert _tested([1.0, 0.0, 0.0] * 20, 0.05).rejected


def test_bounds_are_where_the_test_turns() -> None:
    generator = np.random.default_rng(2)
    values = [float(one) for one in generator.choice([1, 0.5, 0, -0.25, -1], 60)]
    test = _tested(values, 0.3)
    assert test.mean == pytest.approx(np.mean(values))
    assert -1 < test.at_least < test.mean < test.at_most < 1
    for end, sign in ((test.at_most, 1), (test.at_least, -1)):
        turned = [_tested(values, end + sign * step) for step in (1e-6, -1e-6)]
        assert [one.accepted if sign > 0 else one.rejected for one in turned] == [True, False]
    assert _tested([1.0] * 30, 0.3).at_most == 1
    assert _tested([0.0] * 30, 0.3).at_most < 0.3


@pytest.mark.parametrize(("bound", "wanted"), [(0.01, 80.0), (0.05, 20.0), (0.5, 1.0)])
def test_needed_is_the_first_to_accept(bound: float, wanted: float) -> None:
    count = needed(bound, wanted)
    assert _tested([0.0] * count, bound, wanted).accepted
    assert count == 1 or not _tested([0.0] * (count - 1), bound, wanted).accepted


def test_what_no_test_can_use_is_refused() -> None:
    for bound, wanted in ((1.0, 20.0), (-1.0, 20.0), (math.nan, 20.0), (0.1, 0.5)):
        with pytest.raises(ConfigError, match="must"):
            MeanTest(bound, wanted, 20)
    for value in (1.5, math.nan):
        with pytest.raises(ConfigError, match="must lie in"):
            MeanTest(0.1, 20, 20).add(value)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        needed(0.0, 20)


# The search -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 12])
def test_bisection_finds_the_smallest(count: int) -> None:
    for smallest in range(count + 1):
        bisection, tried = Bisection(count), 0
        while (keep := bisection.next) is not None:
            assert 1 <= keep <= count
            bisection.tell(keep <= smallest)
            tried += 1
        assert bisection.best == smallest
        assert tried <= steps(count) == math.ceil(math.log2(count + 1))
        with pytest.raises(ConfigError, match="no budget is left"):
            bisection.tell(True)


def test_the_whole_search_is_as_rarely_wrong_as_said() -> None:
    """All budgets see the same questions; from the fourth on the loss is exactly the bound."""
    bounds = Bounds(0.25, 0.9, tuple(1 / (2 + number) for number in range(7)))
    assert bounds.accept_at == pytest.approx(3 * 10)
    generator = np.random.default_rng(3)
    runs = 400
    wrong = right = 0
    for _ in range(runs):
        draws = generator.random(150)
        bisection = Bisection(7)
        while (number := bisection.next) is not None:
            # The last budgets lose the very same questions: mistakes come together.
            lossy = draws < (0.25 if number >= 4 else 0.03 * number)
            test = MeanTest(bounds.max_drop, bounds.accept_at, bounds.reject_at)
            for lost in lossy:
                test.add(float(lost))
                if test.accepted or test.rejected:
                    break
            bisection.tell(test.accepted)
        wrong += bisection.best >= 4
        right += bisection.best == 3
    assert wrong / runs <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / runs)
    assert right / runs > 0.8


def test_draw() -> None:
    items = [
        Question(str(number), "image", Path(f"{number // 3}.png"), "?", "yes")
        for number in range(30)
    ]
    sets = [DataSet("one", items[:15]), DataSet("two", items[15:])]
    alone = draw(sets, 1, None, seed=0)
    assert [len(own) for own in alone] == [1] * 10
    assert {own[0].path for own in alone} == {item.path for item in items}
    assert alone == draw(sets, 1, None, seed=0) != draw(sets, 1, None, seed=1)
    assert draw(sets, 1, 4, seed=0) == alone[:4]
    whole = draw(sets, None, 7, seed=0)
    assert [len(own) for own in whole] == [3, 3, 1]
    assert all(len({item.path for item in own}) == 1 for own in whole)
    ids = [item.id for own in draw(sets, None, None, 0) for item in own]
    assert sorted(ids) == sorted(
        [f"one/{i}" for i in range(15)] + [f"two/{i}" for i in range(15, 30)]
    )


# The command ------------------------------------------------------------------------------------

BASE = ["calibrate", "--model", "bundled", "--batch", "8"]


def _right(items: Sequence[Question], config: PruningConfig) -> tuple[list[bool], list[bool]]:
    """Return whether each answer is right, unpruned and pruned: one by one, by other code."""
    model, processor = load("bundled")

    def ask(item: Question) -> bool:
        inputs: Any = tokenprune_hf.ask(processor, item.question, image=load_image(item.path))
        output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]
        said = processor.batch_decode(new, skip_special_tokens=True)[0]
        return bool(said.strip().lower() == item.answer.lower())

    with torch.inference_mode():
        unpruned = [ask(item) for item in items]
        with tokenprune_hf.prune(
            model, config.method, config.keep, config.positions, **config.options
        ):
            return unpruned, [ask(item) for item in items]


def test_the_command_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made" / "config.json"
    arguments = [*BASE, "--data", "scenes", "--method", "divprune", "--max-drop", "20%"]
    arguments += ["--limit", "200", "--keep-grid", "0.015625", "0.707"]
    assert main([*arguments, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    config = PruningConfig.from_json(out.read_text())
    assert config.method == "divprune"
    assert config.keep == 0.707
    assert serve_command("bundled", config) in printed

    log = json.loads((tmp_path / "made" / "config.calibration.json").read_text())
    assert log["complete"]
    assert log["found"] == {"divprune": config.keep}
    assert len(log["decisions"]) <= log["steps"] == 2
    assert log["calls"]["exhaustive"] == 200 * 3
    assert log["calls"]["pruned"] == sum(one["calls"] for one in log["decisions"])
    assert log["calls"]["total"] < 0.5 * log["calls"]["exhaustive"]
    decision = next(one for one in log["decisions"] if one["keep"] == config.keep)
    assert decision["outcome"] == "accepted"
    assert decision["at_least"] <= decision["drop"] < decision["at_most"] <= 0.2

    known = {f"scenes/{item.id}": item for item in load_data("scenes").questions}
    assert [one["outcome"] for one in log["decisions"]] == ["accepted", "too lossy"]
    for decision in log["decisions"]:
        asked = [one for own in log["order"][: decision["media"]] for one in own]
        assert len(set(asked)) == decision["questions"] == decision["media"] < 200
        items = [known[one] for one in asked]
        assert len({item.path for item in items}) == len(items)
        unpruned, pruned = _right(items, PruningConfig("divprune", decision["keep"]))
        pairs = list(zip(asked, unpruned, pruned, strict=True))
        assert decision["lost"] == [one for one, before, after in pairs if before and not after]
        assert decision["gained"] == [one for one, before, after in pairs if after and not before]
        drop = (sum(unpruned) - sum(pruned)) / len(items)
        assert decision["drop"] == pytest.approx(drop)
        assert (drop < 0.2) == (decision["keep"] == config.keep)

    # What is there is not overwritten.
    assert main([*arguments, "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert PruningConfig.from_json(out.read_text()) == config


def _lines(file: Path, items: Sequence[Question], broken: int) -> Path:
    """Write questions as JSON lines, with as many about files that hold no image in front."""
    for path in {item.path for item in items}:
        shutil.copy(path, file.parent)
    rows = [
        {"image": item.path.name, "question": item.question, "answer": item.answer, "id": item.id}
        for item in items
    ]
    for number in range(broken):
        bad = file.parent / f"bad{number}.png"
        bad.write_text("no picture")
        rows.insert(0, {"image": bad.name, "question": "?", "answer": "x", "id": f"bad{number}"})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_resized_picture_has_a_budget_and_no_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["--data", "scenes", "--limit", "30", "--max-drop", "90%", "--out", str(out)]
    methods = ["--method", "resize", "uniform", "--keep-grid", "0.5", "0.25"]
    assert main(["calibrate", "bundled", *arguments, *methods, "--positions", "compact"]) == 0
    said = capsys.readouterr().out
    assert "resize: no configuration is written" in said
    log = json.loads((out / "calibration.json").read_text("utf-8"))
    assert set(log["found"]) == {"resize", "uniform"}
    assert None not in log["found"].values()
    assert not (out / "resize.json").exists()
    assert json.loads((out / "uniform.json").read_text("utf-8"))["positions"] == "compact"


def test_no_budget_and_files_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two questions of each image make one observation of it."""
    data = _lines(tmp_path / "own.jsonl", load_data("scenes").questions[: 7 * 200], broken=30)
    arguments = [*BASE, "--data", str(data), "--max-drop", "20%", "--keep-grid", "0.015625"]
    arguments += ["--per-media", "2", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--method", "feature-norm", "uniform"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("no budget below 1.0 can be accepted (0.015625 too lossy)") == 2
    there = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert there == ["answers", "calibration.json", "feature-norm.json", "uniform.json"]
    log = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert log["found"] == {"feature-norm": None, "uniform": None}
    assert log["steps"] == 1
    assert all(one.startswith("own/bad") for one in log["unpruned"]["errors"])
    for decision in log["decisions"]:
        media = [own for own in log["order"] if own[0] not in log["unpruned"]["errors"]][
            : decision["media"]
        ]
        lost, gained = set(decision["lost"]), set(decision["gained"])
        drops = [np.mean([(one in lost) - (one in gained) for one in own]) for own in media]
        assert decision["questions"] == sum(map(len, media))
        assert decision["drop"] == pytest.approx(np.mean(drops))
        assert decision["at_least"] > 0.2


def test_a_model_that_answers_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = _lines(tmp_path / "bad.jsonl", [], broken=12)
    arguments = [*BASE, "--data", str(data), "--method", "random", "--max-drop", "60%"]
    assert main([*arguments, "--keep-grid", "4", "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert "answered none of" in printed.err
    assert "no image that can be read" in printed.err
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["answers"]


# Questions without an answer --------------------------------------------------------------------


class Canned:
    """An engine without a model: what it says is a function of the question and the condition."""

    media_at_once: dict[str, int] = {"image": 4, "video": 1}  # noqa: RUF012

    def __init__(self, says: Any) -> None:
        self._says = says

    def about(self) -> dict[str, Any]:
        return {"architecture": "Canned"}

    def prepare(self, asked: Any) -> None:
        asked.prepared = "prepared"

    def begin(self, media: Any) -> None:
        assert all(one.prepared for one in media)

    def answer(self, media: Any, wanted: Sequence[Question], condition: Any, done: Any) -> None:
        there = {item.id for one in media for item in one.questions}
        for item in wanted:
            assert item.id in there
            said = self._says(item, condition)
            done(item, said if isinstance(said, EngineAnswer) else EngineAnswer(text=said))

    def close(self) -> None:
        pass


def _canned(monkeypatch: pytest.MonkeyPatch, says: Any) -> None:
    from tokenprune_eval.evaluation import runner

    monkeypatch.setattr(runner, "build_engine", lambda settings: Canned(says))


def test_a_method_that_answers_nothing_has_no_budget_and_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def says(item: Question, condition: Any) -> Any:
        refused = EngineAnswer(error="odd tensors")
        return refused if condition.method == "divprune" else item.answer

    _canned(monkeypatch, says)
    out = tmp_path / "out"
    arguments = [*BASE, "--data", "scenes", "--method", "divprune", "uniform", "--max-drop", "20%"]
    assert main([*arguments, "--keep-grid", "0.5", "0.25", "--out", str(out)]) == 1
    log = json.loads((out / "calibration.json").read_text())
    assert log["found"] == {"divprune": None, "uniform": 0.25}
    decisions = [one for one in log["decisions"] if one["method"] == "divprune"]
    assert [(one["keep"], one["outcome"]) for one in decisions] == [(0.5, "unanswered")] or {
        one["outcome"] for one in decisions
    } == {"unanswered"}
    for one in decisions:
        assert set(one["errors"].values()) == {"odd tensors"}
        assert len(one["errors"]) == one["questions"] <= 10
    printed = " ".join(capsys.readouterr().out.split())
    assert "unanswered" in printed
    assert "missing and count as wrong, for example to scenes/" in printed
    assert ": odd tensors" in printed


def test_one_odd_question_is_left_out_or_counts_as_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unpruned it has no place in any comparison; pruned alone it is a loss a user would see."""
    odd: dict[str, set[str]] = {"unpruned": set(), "uniform@0.25": set()}

    def says(item: Question, condition: Any) -> Any:
        number = int(item.id.rpartition("-")[2])
        for key, rest in (("unpruned", 3), ("uniform@0.25", 5)):
            if condition.key == key and number % 11 == rest:
                odd[key].add(item.id)
                return EngineAnswer(error="odd")
        return item.answer

    _canned(monkeypatch, says)
    out = tmp_path / "out"
    arguments = [*BASE, "--data", "scenes", "--method", "uniform", "--max-drop", "40%"]
    assert main([*arguments, "--keep-grid", "0.25", "--out", str(out)]) == 0
    log = json.loads((out / "calibration.json").read_text())
    (decision,) = log["decisions"]
    assert set(log["unpruned"]["errors"]) == odd["unpruned"]
    assert odd["unpruned"]
    assert odd["uniform@0.25"]
    assert set(decision["lost"]) == set(decision["errors"]) <= odd["uniform@0.25"]
    assert decision["drop"] == pytest.approx(len(decision["lost"]) / decision["questions"])


# A search that goes on -------------------------------------------------------------------------

SEARCH = [
    *(*BASE, "--data", "scenes", "--method", "divprune", "uniform", "--max-drop", "45%"),
    *("--keep-grid", "0.707", "0.25", "0.015625", "--limit", "60"),
]


def _records(folder: Path) -> list[tuple[str, str]]:
    """Return what was answered, in order; nothing where there is no file yet."""
    file = folder / "answers" / "records.jsonl"
    lines = file.read_text("utf-8").split("\n")[:-1] if file.is_file() else []
    return [(one["condition"], one["item"]) for one in map(json.loads, lines)]


def _kill_after(out: Path, answers: int) -> None:
    """Start the search and kill it as soon as that many answers are on disk."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tokenprune.cli", *SEARCH, "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 120
        while len(_records(out)) < answers:
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


class Counting:
    """An engine that notes which questions it is asked."""

    def __init__(self, engine: Any, asked: list[tuple[str, str]]) -> None:
        self._engine, self._asked = engine, asked

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def answer(self, media: Any, wanted: Sequence[Question], condition: Any, done: Any) -> None:
        self._asked += [(condition.key, item.id) for item in wanted]
        self._engine.answer(media, wanted, condition, done)


def test_a_killed_search_goes_on_and_finds_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenprune_eval.evaluation import runner

    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert main([*SEARCH, "--out", str(undisturbed)]) == 0
    whole = len(_records(undisturbed))
    _kill_after(killed, whole // 4)
    first = len(_records(killed))
    assert not (killed / "divprune.json").exists()
    _kill_after(killed, max(first + 1, whole // 2))
    before = _records(killed)
    assert first < len(before) < whole
    # A line that the kill cut short, as a full disk may leave one too.
    with (killed / "answers" / "records.jsonl").open("a") as file:
        file.write('{"item": "scenes/')

    asked: list[tuple[str, str]] = []
    build = runner.build_engine
    monkeypatch.setattr(runner, "build_engine", lambda settings: Counting(build(settings), asked))
    capsys.readouterr()
    assert main([*SEARCH, "--out", str(killed)]) == 0
    assert f"{len(before):,} answers are there from before" in capsys.readouterr().out
    after = _records(killed)
    assert after[: len(before)] == before
    assert after[len(before) :] == asked or sorted(after[len(before) :]) == sorted(asked)
    assert len(set(after)) == len(after)
    assert set(after) == set(_records(undisturbed))
    logs = [json.loads((one / "calibration.json").read_text()) for one in (undisturbed, killed)]
    for log in logs:
        assert log["complete"]
        assert log["calls"]["total"] == whole
        log["settings"].pop("out", None)
    assert logs[0] == logs[1]
    for name in ("divprune.json", "uniform.json"):
        assert (undisturbed / name).read_bytes() == (killed / name).read_bytes()


def test_a_configuration_of_an_unfinished_search_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first method is at its end when the second is interrupted."""
    from tokenprune_eval.calibrate.report import Report

    out = tmp_path / "out"
    note = Report.note

    def stop(self: Any, decision: Any) -> None:
        note(self, decision)
        if (out / f"{decision.method}.json").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(Report, "note", stop)
    assert main([*SEARCH, "--out", str(out)]) == 130
    monkeypatch.undo()
    (written,) = [one for one in out.glob("*.json") if one.name != "calibration.json"]
    # Of another search it would be taken for what that one finds.
    for other in (["--seed", "1"], ["--confidence", "0.9"], ["--limit", "59"]):
        assert main([*SEARCH, *other, "--out", str(out)]) == 2
        assert f"{written} is there already" in capsys.readouterr().err
    assert main([*SEARCH, "--out", str(out)]) == 0
    assert main([*SEARCH, "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_answers_of_other_settings_are_not_mixed_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    few = [*BASE, "--data", "scenes", "--method", "random", "--max-drop", "60%", "--limit", "20"]
    few += ["--keep-grid", "0.015625", "--out", str(out)]
    main(few)
    for file in out.glob("random.json"):
        file.unlink()
    assert main([*few, "--max-new-tokens", "4"]) == 2
    assert "holds a run with other settings (max_new_tokens=16)" in capsys.readouterr().err


def test_what_ended_in_an_error_can_be_asked_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = load_data("scenes").questions[: 7 * 20 : 7]
    data = _lines(tmp_path / "own.jsonl", items, broken=12)
    out = tmp_path / "out"
    arguments = [*BASE, "--data", str(data), "--method", "uniform", "--max-drop", "60%"]
    arguments += ["--keep-grid", "0.015625", "--out", str(out)]
    main(arguments)
    log = json.loads((out / "calibration.json").read_text())
    failed = set(log["unpruned"]["errors"])
    assert failed
    for number in range(12):
        Image.new("RGB", (32, 32)).save(tmp_path / f"bad{number}.png")
    (out / "calibration.json").unlink()
    for file in out.glob("uniform.json"):
        file.unlink()
    capsys.readouterr()
    # Recorded errors count as done.
    main(arguments)
    assert set(json.loads((out / "calibration.json").read_text())["unpruned"]["errors"]) == failed
    for file in out.glob("uniform.json"):
        file.unlink()
    main([*arguments, "--retry-errors"])
    assert json.loads((out / "calibration.json").read_text())["unpruned"]["errors"] == {}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--max-drop 0", "must lie above 0"),
        ("--max-drop 150%", "below 1, which is 100%"),
        ("--max-drop 1", "For 1 percent write 1%"),
        ("--max-drop x%", "is no share"),
        ("--max-drop nan", "is no share"),
        ("--confidence 0.2", "is too low"),
        ("--method nix", "there is no method 'nix'"),
        ("--data nope", "there is no data set 'nope'"),
        ("--keep-grid 4 0.5", "mixes fractions and numbers of tokens"),
        ("--keep-grid 1.0", "no budget below 1.0"),
        ("--keep-grid many", "is no number"),
        ("--per-media 0", "neither a number"),
        ("--limit 0", "draws nothing"),
        ("--limit 30", "30 images or videos cannot show"),
        ("--max-drop 1%", "400 images or videos cannot show"),
        ("--option divprune.seeds=1", "no option 'seeds'"),
        ("--method divprune random --out OUT/one.json", "2 methods. Give a folder"),
    ],
)
def test_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, said: str
) -> None:
    given = shlex.split(arguments.replace("OUT", str(tmp_path)))
    base = [*BASE, "--data", "scenes", "--method", "divprune", "--max-drop", "5%"]
    assert main([*base, "--out", str(tmp_path / "out"), *given]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_shares() -> None:
    assert parse_share("--max-drop", "1%") == parse_share("--max-drop", "0.01") == 0.01
    assert parse_share("--max-drop", " 0.5 %") == 0.005


def test_the_command_line_says_all_of_a_configuration() -> None:
    config = PruningConfig("random", 16, "compact", {"seed": 3})
    assert serve_command("my model", config) == (
        "tokenprune serve 'my model' --method random --keep 16 --positions compact --option seed=3"
    )
