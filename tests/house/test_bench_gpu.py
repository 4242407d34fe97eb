"""`scripts/bench_gpu.py`: a small run on the CPU measures everything, and the clock is kept."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

pytest.importorskip("rich", reason="the benchmarks print with it")
pytest.importorskip("transformers", reason="the models are transformers'")

from tokenprune import Selector, TokenBatch, VisualTokens

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"


def call(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPTS / "bench_gpu.py", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        timeout=300,
    )


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module("bench_gpu")
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def bench_results(bench: Any) -> Any:
    return importlib.import_module("bench_gpu_results")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Return what a small run wrote and printed."""
    out = tmp_path_factory.mktemp("bench") / "out.json"
    done = call("--small", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text()), done.stdout


def test_a_small_run_measures_every_case(small: tuple[dict[str, Any], str], bench: Any) -> None:
    held, printed = small
    assert held["complete"]
    assert held["small"]
    assert {"device", "threads"} <= held["machine"].keys()
    assert {"torch", "transformers", "Python"} <= held["releases"].keys()
    assert {name: list(cases) for name, cases in held["results"].items()} == bench.cases_of(
        bench.SMALL
    )
    for cases in held["results"].values():
        for case in cases.values():
            assert case["status"] == "measured", case
            for run in case.get("runs", {}).values():
                assert 0 < run["low"] <= run["ms"] <= run["high"]
                assert run["peak_mib"] is None  # of a GPU alone
    assert "not measured: " not in printed
    # Tiny shapes say nothing about a GPU, so nothing is judged.
    assert {target["holds"] for target in held["targets"]} == {None}


def test_every_method_is_timed_at_every_budget(
    small: tuple[dict[str, Any], str], bench: Any
) -> None:
    results = small[0]["results"]
    for case in results["selection"].values():
        for method in ("information", "divprune", "zeroth-order", "feature-norm", "uniform"):
            assert {f"{method}, 1/9", f"{method}, 1/4"} <= case["runs"].keys()
        assert case["runs"].keys() >= bench.SMALL.towers.keys()
    assert results["selection"]["N = 180 in 5 crops, 2 images"]["items"] == 10
    for name, case in results["prefill"].items():
        assert {"unpruned", "really short", *bench.RECOMMENDED} <= case["runs"].keys()
        assert case["kept"] == 4  # a ninth of 36
        if name.startswith("prefill"):
            assert "relevant-information, selecting" in case["runs"]
    video = results["video"]["8 frames"]
    assert {"unpruned", "really short", "flexselect", "flexselect-lite"} <= video["runs"].keys()
    assert video["tokens"] == 8 * 25
    assert video["kept"] == 13  # a sixteenth, half up
    for case in results["masks"].values():
        assert {"fused", "heads, mask counted", "pooled, mask made before"} <= case["runs"].keys()
        assert case["pairs"].keys() == {"heads", "pooled"}
        assert min(case["pairs"].values()) > 0


def test_the_recommended_methods_are_those_of_the_readme(bench: Any) -> None:
    text = " ".join((ROOT / "README.md").read_text("utf-8").split())
    found = re.search(r"Begin with (.*?)\. ", text)
    assert found is not None
    assert tuple(re.findall(r"`([\w-]+)`", found[1])) == bench.RECOMMENDED


def test_what_does_not_fit_into_the_time_is_reported_as_not_measured(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = call("--small", "--seconds", "0.5", "--only", "prefill", "--out", out)
    assert done.returncode == 0, done.stderr
    held = json.loads(out.read_text())
    assert not held["complete"]
    assert held["results"].keys() == {"prefill"}
    assert {case["status"] for case in held["results"]["prefill"].values()} == {"not measured"}
    assert {target["measured"] for target in held["targets"]} == {"not measured"}
    assert done.stdout.count("not measured: prefill: ") == 4


def test_without_a_gpu_it_says_what_runs(bench: Any, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    out = tmp_path / "out.json"
    done = call("--out", out)
    assert done.returncode == 2
    assert "--small" in done.stderr
    assert not out.exists()


# The board


@pytest.fixture
def board(bench: Any, tmp_path: Path) -> Any:
    cases = {"agreement": ["a", "b"], "masks": ["c", "d"]}
    return bench.Board.of(tmp_path / "out.json", {"small": False}, time.perf_counter(), 1000, cases)


def written(board: Any) -> Any:
    return json.loads(board.file.read_text())["results"]


def test_each_case_is_written_when_it_is_measured(board: Any) -> None:
    assert written(board)["agreement"]["a"]["status"] == "not measured"
    agreed = {"same": True, "different": {}, "not compared": []}
    board.run("agreement", "a", lambda until: agreed)
    assert written(board)["agreement"] == {
        "a": {"status": "measured", **agreed},
        "b": {"status": "not measured", "why": "the run did not get there"},
    }


def test_an_error_costs_its_own_case_alone(board: Any) -> None:
    def breaks(until: float) -> dict[str, Any]:
        raise RuntimeError("out of memory\nand more")

    board.run("masks", "c", breaks)
    board.run("masks", "d", lambda until: {"runs": {}})
    assert written(board)["masks"]["c"]["why"] == "RuntimeError: out of memory"
    assert written(board)["masks"]["d"]["status"] == "measured"
    assert board.finish() == 1


def test_a_section_without_time_leaves_its_cases_open_and_its_time_to_the_next(board: Any) -> None:
    first, last = board.until("agreement"), board.until("masks")
    assert board.begun < first < last < board.end
    board.run("agreement", "a", lambda until: {"until": until}, least=first)
    assert written(board)["agreement"]["a"] == {
        "status": "not measured",
        "why": "no time was left",
    }
    board.run("masks", "c", lambda until: {"until": until})
    assert written(board)["masks"]["c"] == {"status": "measured", "until": last}


def test_a_case_that_runs_when_the_time_is_over_is_not_measured(board: Any) -> None:
    def ends(until: float) -> dict[str, Any]:
        assert board.finish() == 0  # as the thread does that watches the clock
        return {"runs": {}}

    board.run("masks", "c", ends)
    assert written(board)["masks"]["c"]["why"] == "the time ran out while it was measured"


STUCK = """
import sys, time
from pathlib import Path
import bench_gpu
now = time.perf_counter()
cases = {"agreement": ["a"], "masks": ["c"]}
board = bench_gpu.Board.of(Path(sys.argv[1]), {"small": True}, now, 1, cases)
bench_gpu.end_in_time(board)
board.end += 1000  # a case begins that was expected to fit
board.run("agreement", "a", lambda until: {"different": {}, "not compared": []})
board.run("masks", "c", lambda until: time.sleep(120))
"""


def test_a_case_that_never_ends_costs_its_own_case_alone(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, "-c", STUCK, out],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SCRIPTS), "OMP_NUM_THREADS": "1"},
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())["results"]
    assert results["agreement"]["a"]["status"] == "measured"
    assert results["masks"]["c"]["why"] == "the time ran out while it was measured"
    assert "not measured: masks: c" in done.stdout


def test_other_tokens_than_the_cpus_are_found_and_end_with_an_error(board: Any, bench: Any) -> None:
    @dataclass(frozen=True)
    class ByBatch(Selector):
        name: ClassVar[str] = "by-batch"
        summary: ClassVar[str] = "another choice in a batch than alone"
        paper: ClassVar[str] = ""
        needs: ClassVar[tuple[str, ...]] = ("embeddings",)

        def score(self, tokens: TokenBatch) -> Tensor:
            order = torch.arange(tokens.total, dtype=torch.float32)
            return (order if tokens.size > 1 else -order).expand(tokens.size, -1)

    items = [VisualTokens(grid=(1, 1, 8), embeddings=torch.randn(8, 4)) for _ in range(2)]
    count = bench.different(items, items, ByBatch(), 0.25)
    assert count == 2 * 2 * 2  # items, alone on either device, tokens kept
    assert bench.different(items, items, bench.build("information", {}), 0.25) == 0
    disagreed = {"same": False, "different": {"by-batch": count}, "not compared": []}
    board.run("agreement", "a", lambda until: disagreed)
    assert board.targets()[0].holds is False
    assert board.finish() == 1


# Targets


def test_targets_are_judged_by_the_worst_case(bench_results: Any) -> None:
    tower = "CLIP-L/14-336"
    runs = {
        tower: {"ms": 10.0},
        "information, 1/9": {"ms": 0.2},
        "information, 1/4": {"ms": 0.31},
        "divprune, 1/9": {"ms": 0.3},
        f"cls-attention of {tower}, 1/9": {"ms": 0.1},
    }
    prefill = {
        "unpruned": {"ms": 110.0},
        "really short": {"ms": 10.0},
        "information": {"ms": 11.0},
        "relevant-information": {"ms": 12.0},
        "relevant-information, selecting": {"ms": 11.0},
        "flexselect": {"ms": 10.0},
        "flexselect, selecting": {"ms": 9.0},
        **{name: {"ms": 10.5} for name in ("cls-attention", "zeroth-order", "divprune")},
    }
    answer = {"unpruned": 5.0, "really short": 3.0, "information": 4.0, "relevant-information": 6.0}
    results = {
        "selection": {"one": {"status": "measured", "runs": runs}},
        "prefill": {
            "prefill, 1 image": {"status": "measured", "runs": prefill},
            "generate, 1 image": {
                "status": "measured",
                "runs": {name: {"ms": ms} for name, ms in answer.items()},
            },
            "prefill, 5 images": {"status": "not measured", "why": "no time was left"},
        },
    }
    found = {target.name: target for target in bench_results.targets(results)}
    holds = {name: target.holds for name, target in found.items() if target.holds is not None}
    assert holds == {
        "information: selection at most 3% of the tower": False,
        "divprune: selection at most 3% of the tower": True,
        "cls-attention: selection at most 3% of the tower": True,
        "relevant-information: selection at most 10% of the saved prefill": False,
        "flexselect: selection at most 10% of the saved prefill": True,
        "relevant-information: prefill at least 90% of the bound": False,
        "information: prefill at least 90% of the bound": True,
        "flexselect: prefill at least 90% of the bound": True,
        "cls-attention: prefill at least 90% of the bound": True,
        "zeroth-order: prefill at least 90% of the bound": True,
        "divprune: prefill at least 90% of the bound": True,
        "relevant-information: generate takes less time than unpruned": False,
        "information: generate takes less time than unpruned": True,
    }
    worst = found["information: selection at most 3% of the tower"].measured
    assert worst == f"3.1% ({tower}, one, keep 1/4)"
    assert found["zeroth-order: selection at most 3% of the tower"].measured == "not measured"


# Turns


def test_runs_take_turns_and_stop_in_time(bench: Any) -> None:
    calls: list[str] = []

    @contextmanager
    def around() -> Iterator[None]:
        calls.append("in")
        yield
        calls.append("out")

    def entered() -> AbstractContextManager[None]:
        return around()

    variants = {
        "one": bench.Variant(lambda: calls.append("one")),
        "two": bench.Variant(lambda: calls.append("two"), entered),
    }
    found = bench.in_turn(variants, 2)
    assert calls == ["one", "in", "two", "out"] * 3
    assert [len(one.seconds) for one in found.values()] == [2, 2]
    calls.clear()
    found = bench.in_turn(variants, 5, until=0.0)
    assert [len(one.seconds) for one in found.values()] == [1, 1]
    assert calls.count("one") == 2
    found = bench.in_turn(variants, 1, warm_up=False)
    assert calls.count("one") == 3


# Shapes


def test_the_full_shapes_are_those_of_the_public_models(bench: Any) -> None:
    def millions(model: Any) -> int:
        return round(sum(int(weight.numel()) for weight in model.parameters()) / 1e6)

    plan = bench.FULL
    with torch.inference_mode(), bench.building(torch.device("meta")):
        towers = {name: bench.build_tower(tower) for name, tower in plan.towers.items()}
        language = bench.bench_generate.build_model(plan.vision, plan.text.settings())
        pictures = bench.tower_run(
            plan.towers["SigLIP-so400m/14-336"], towers["SigLIP-so400m/14-336"], plan.sizes[1], 2
        )()
    assert {name: millions(tower) for name, tower in towers.items()} == {
        "CLIP-L/14-336": 304,
        "SigLIP-so400m/14-336": 413,  # 428 with its pooling head
        "Qwen3-VL-8B": 576,
    }
    assert millions(language.model.language_model) == 7070  # Qwen2-7B's, without its head
    assert next(language.parameters()).dtype == torch.bfloat16
    assert pictures.last_hidden_state.shape == (2, 1200, 1152)
