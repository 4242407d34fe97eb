"""`scripts/record_behaviour.py`: two records of one checkout agree, and a change is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "record_behaviour.py"


def run(*words: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("record") / "one.json"
    done = run("record", out, "--only", "names", "help", "selections")
    assert done.returncode == 0, done.stderr
    return out


def changed(record: Path, folder: Path, change: Any) -> Path:
    """Write a record with one change."""
    held = json.loads(record.read_text())
    change(held)
    path = folder / "other.json"
    path.write_text(json.dumps(held))
    return path


def test_a_record_has_what_users_hold_on_to(recorded: Path) -> None:
    held = json.loads(recorded.read_text())
    names = held["names"]
    assert "keep: 'Keep | None' = None" in names["tokenprune_hf.prune"]
    assert names["tokenprune.PruningConfig"]["fields"]["keep"] == "Keep = required"
    assert "tokenprune.masks.PooledBlocks" in names
    assert not [name for name, value in names.items() if "missing" in str(value)[:8]]
    assert "--positions" in held["help"]["serve"]
    assert {"eval compare", "output of methods"} <= held["help"].keys()
    methods = {case.split()[0] for case in held["selections"]}
    assert {"zeroth-order", "flexselect", "flexselect-lite", "random"} <= methods
    uniform = held["selections"]["uniform defaults row float32 keep=5"]
    assert uniform["first"] == [4, 12, 20, 28, 36]
    assert uniform["total"] == 40


def test_a_second_record_is_the_same(recorded: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.json"
    assert run("record", again, "--only", "names").returncode == 0
    done = run("compare", recorded, again)
    assert (done.returncode, done.stdout) == (0, "")
    assert f"only {recorded} has the section selections: not compared" in done.stderr


def test_every_difference_is_named(recorded: Path, tmp_path: Path) -> None:
    def change(held: Any) -> None:
        del held["names"]["tokenprune.select"]
        held["names"]["tokenprune.chosen"] = "(tokens)"
        held["help"]["serve"] = held["help"]["serve"].replace("--keep KEEP", "--left LEFT")
        held["selections"]["random defaults image float32 keep=5"]["kept"] = "0"

    done = run("compare", recorded, changed(recorded, tmp_path, change))
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert "names: tokenprune.select: gone" in lines
    assert "names: tokenprune.chosen: new" in lines
    (of_help,) = [line for line in lines if line.startswith("help: serve: was ")]
    assert "--keep KEEP" in of_help.split(", is ")[0]
    assert "--left LEFT" in of_help.split(", is ")[1]
    (of_random,) = [line for line in lines if line.startswith("selections: random defaults image")]
    assert of_random.endswith("is '0'")
    assert len(lines) == 4


def test_what_cannot_be_recorded_or_compared_is_said(recorded: Path, tmp_path: Path) -> None:
    done = run("record", tmp_path / "x.json", cwd=tmp_path)
    assert done.returncode == 2
    assert "is no checkout of tokenprune" in done.stderr
    foreign = tmp_path / "checkout" / "tests" / "hf"
    foreign.mkdir(parents=True)
    (foreign / "models.py").touch()
    done = run("record", tmp_path / "x.json", cwd=tmp_path / "checkout")
    assert done.returncode == 2
    assert f"Python finds tokenprune in {ROOT}" in done.stderr
    assert not (tmp_path / "x.json").exists()
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    assert run("compare", recorded, broken).returncode == 2
