"""What `bench_gpu.py` has measured: a file that is always whole, the clock, and the targets."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench_common import Measured, table_of
from bench_gpu_shapes import FULL
from rich.console import Console

import tokenprune
from tokenprune.files import replacing
from tokenprune.tokens import FROM_CALLER, FROM_PROMPT

RECOMMENDED = ("relevant-information", "information")  # README, "Methods"
BLIND = tuple(
    name
    for name, selector in tokenprune.methods().items()
    if not (FROM_PROMPT | FROM_CALLER) & set(selector.needs)
)
PREFILLED = (*RECOMMENDED, "flexselect", "cls-attention", "zeroth-order", "divprune")
UNPRUNED, SHORT = "unpruned", "really short"
BLIND_SHARE, READING_SHARE, OF_BOUND = 0.03, 0.10, 0.90
GRACE = 3  # seconds between the last case's limit and the end: to write and print

SECTIONS = {"agreement": 0.1, "selection": 0.3, "prefill": 0.25, "video": 0.2, "masks": 0.15}
"""Section -> its share of the time. What one leaves over, the next ones have."""

Json = dict[str, Any]
console = Console(width=120, highlight=False)


# The file --------------------------------------------------------------------------------------


@dataclass
class Board:
    """All cases, measured or not, in a file that is written after each of them.

    Attributes
    ----------
    file
        A JSON file.
    about
        Machine, releases and shapes.
    started, end
        Times of `time.perf_counter` at which the run began and ends.
    results
        Section -> case -> what was measured, under ``"status": "measured"``; otherwise
        ``"not measured"`` or ``"failed"``, and ``"why"``.
    """

    file: Path
    about: Json
    started: float
    end: float
    results: dict[str, dict[str, Json]]
    begun: float = field(default_factory=time.perf_counter)
    ended: bool = False
    running: tuple[str, str] | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)

    @classmethod
    def of(
        cls,
        file: Path,
        about: Json,
        started: float,
        limit: float,
        cases: Mapping[str, list[str]],
    ) -> Board:
        """Return a board of cases none of which is measured yet, and write it.

        `limit` is how many seconds the run may take in all.
        """
        missing = {"status": "not measured", "why": "the run did not get there"}
        results = {
            section: {name: dict(missing) for name in names} for section, names in cases.items()
        }
        board = cls(file, about, started, started + limit, results)
        board.write()
        return board

    def write(self) -> None:
        """Replace the file."""
        with self.lock:
            text = json.dumps(
                {
                    **self.about,
                    "seconds": round(time.perf_counter() - self.started, 1),
                    "complete": not self.cases("not measured", "failed"),
                    "results": self.results,
                    "targets": [vars(target) for target in self.targets()],
                },
                indent=1,
            )
            with replacing(self.file) as part:
                part.write_text(text + "\n", "utf-8")

    def targets(self) -> list[Target]:
        """Return the targets; a small run judges none."""
        found = targets(self.results)
        return [replace(one, holds=None) for one in found] if self.about["small"] else found

    def cases(self, *statuses: str) -> list[str]:
        """Return the cases that have one of some statuses, as ``"section: case (why)"``."""
        return [
            f"{section}: {name} ({case['why']})"
            for section, of_section in self.results.items()
            for name, case in of_section.items()
            if case["status"] in statuses
        ]

    def until(self, section: str) -> float:
        """Return the time of `time.perf_counter` at which a section ends."""
        names = list(self.results)
        shares = [SECTIONS[name] for name in names]
        passed = sum(shares[: names.index(section) + 1]) / sum(shares)
        return self.begun + passed * (self.end - GRACE - self.begun)

    def run(self, section: str, name: str, work: Callable[[float], Json], least: float = 0) -> None:
        """Measure a case, unless its section has less than `least` seconds left.

        An error is noted with the case, and the others go on.

        Parameters
        ----------
        section, name
            One of `results`.
        work
            Takes the time until which it may go on measuring; returns what it measured.
        least
            Seconds.
        """
        until = self.until(section)
        if time.perf_counter() + least >= until:
            self._note(section, name, {"status": "not measured", "why": "no time was left"})
            return
        self.running = section, name
        try:
            measured = {"status": "measured", **work(until)}
        except Exception as error:
            measured = failure(error)
        self._note(section, name, measured)

    def _note(self, section: str, name: str, case: Json) -> None:
        with self.lock:
            if not self.ended:
                self.running = None
                self.results[section][name] = case
                self.write()

    def fail(self, section: str, error: Exception) -> None:
        """Note an error with all cases of a section that are not measured."""
        for name, case in self.results[section].items():
            if case["status"] != "measured":
                self._note(section, name, failure(error))

    def finish(self) -> int:
        """Write and print what is known now; return the exit code."""
        with self.lock:
            if self.running is not None:
                section, name = self.running
                why = "the time ran out while it was measured"
                self.results[section][name] = {"status": "not measured", "why": why}
            self.write()
            self.ended = True
            print_end(self)
        same = all(
            case["same"] for case in self.results.get("agreement", {}).values() if "same" in case
        )
        return int(bool(self.cases("failed")) or not same)


def failure(error: Exception) -> Json:
    """Return what is noted of a case that failed."""
    lines = str(error).strip().splitlines() or [""]
    return {"status": "failed", "why": f"{type(error).__name__}: {lines[0]}"}


def numbers(measured: Mapping[str, Measured]) -> Json:
    """Return times in ms and peaks in MiB, by variant."""
    return {
        name: {
            "ms": round(one.median * 1e3, 4),
            "low": round(min(one.seconds) * 1e3, 4),
            "high": round(max(one.seconds) * 1e3, 4),
            "turns": len(one.seconds),
            "peak_mib": None if one.peak is None else round(one.peak / 2**20, 1),
        }
        for name, one in measured.items()
    }


def print_end(board: Board) -> None:
    """Print the targets, and what was not measured."""
    table = table_of("targets", "target", "measured, at worst", "", words=["target", ""])
    for target in board.targets():
        verdict = {True: "holds", False: "does not hold", None: ""}[target.holds]
        table.add_row(target.name, target.measured, verdict)
    console.print(table)
    if board.about["small"]:
        console.print("--small shows that the script runs; at its sizes the targets say nothing.")
    for status in ("not measured", "failed"):
        for case in board.cases(status):
            console.print(f"{status}: {case}")
    console.print(f"{time.perf_counter() - board.started:.0f} s. Written: {board.file}")


def end_in_time(board: Board) -> threading.Timer:
    """Start a thread that ends the process when the time is over, whatever the device does."""

    def end() -> None:
        code = board.finish()
        sys.stdout.flush()
        os._exit(code)  # the main thread may wait for a kernel or a compiler

    timer = threading.Timer(max(0.0, board.end - time.perf_counter()), end)
    timer.daemon = True
    timer.start()
    return timer


# Targets ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """What is aimed at, what was measured, and whether that is enough; None: not measured."""

    name: str
    measured: str
    holds: bool | None


def targets(results: Mapping[str, Mapping[str, Json]]) -> list[Target]:
    """Return the targets, judged by the cases that are measured."""
    cases = {
        section: {name: case for name, case in of.items() if case["status"] == "measured"}
        for section, of in results.items()
    }
    prefills = _starting(cases, "prefill, ")
    answers = _starting(cases, "generate, ")
    return [
        _agreement_target(cases.get("agreement", {})),
        *(_share_target(cases.get("selection", {}), method) for method in BLIND),
        *(_reading_target(prefills, name) for name in PREFILLED if name not in BLIND),
        *(_bound_target(prefills, name) for name in PREFILLED),
        *(_answer_target(answers, name) for name in RECOMMENDED),
    ]


def _starting(cases: Mapping[str, Mapping[str, Json]], start: str) -> dict[str, Json]:
    found = cases.get("prefill", {})
    return {name: case["runs"] for name, case in found.items() if name.startswith(start)}


def _worst(name: str, found: Sequence[tuple[float, str]], limit: float, most: bool) -> Target:
    """Judge the worst of some numbers: the highest where `most`, otherwise the lowest."""
    if not found:
        return Target(name, "not measured", None)
    value, where = max(found) if most else min(found)
    holds = value <= limit if most else value >= limit
    return Target(name, f"{value:.1%} ({where})", holds)


def _agreement_target(cases: Mapping[str, Json]) -> Target:
    name = "the device keeps what the CPU keeps, alone and in a batch"
    if not cases:
        return Target(name, "not measured", None)
    count = sum(sum(case["different"].values()) for case in cases.values())
    missing = sum(len(case["not compared"]) for case in cases.values())
    rest = f", {missing} comparisons were not made" if missing else ""
    return Target(name, f"{count} tokens differ{rest}", count == 0)


def _share_target(cases: Mapping[str, Json], method: str) -> Target:
    """Judge selection against every tower."""
    shares = []
    for name, case in cases.items():
        runs = case["runs"]
        towers = [tower for tower in FULL.towers if tower in runs]
        for run, one in runs.items():
            what, _, label = run.rpartition(", ")
            shares += [
                (one["ms"] / runs[tower]["ms"], f"{tower}, {name}, keep {label}")
                for tower in towers
                if what in (method, f"{method} of {tower}")
            ]
    name = f"{method}: selection at most {BLIND_SHARE:.0%} of the tower"
    return _worst(name, shares, BLIND_SHARE, most=True)


def _reading_target(prefills: Mapping[str, Json], method: str) -> Target:
    """Judge selection against what it saves of the prefill."""
    shares = []
    for case, runs in prefills.items():
        saved = runs[UNPRUNED]["ms"] - runs[SHORT]["ms"]
        taken = runs[f"{method}, selecting"]["ms"]
        shares.append((taken / saved if saved > 0 else math.inf, case))
    name = f"{method}: selection at most {READING_SHARE:.0%} of the saved prefill"
    return _worst(name, shares, READING_SHARE, most=True)


def _bound_target(prefills: Mapping[str, Json], method: str) -> Target:
    """Judge prefill, encoding and selecting counted, against a prompt that really is short."""
    shares = [(runs[SHORT]["ms"] / runs[method]["ms"], case) for case, runs in prefills.items()]
    name = f"{method}: prefill at least {OF_BOUND:.0%} of the bound"
    return _worst(name, shares, OF_BOUND, most=False)


def _answer_target(answers: Mapping[str, Json], method: str) -> Target:
    """Judge `generate` against the unpruned one."""
    shares = [(runs[method]["ms"] / runs[UNPRUNED]["ms"], case) for case, runs in answers.items()]
    name = f"{method}: generate takes less time than unpruned"
    return _worst(name, shares, 1.0, most=True)
