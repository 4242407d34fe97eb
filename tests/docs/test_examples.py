"""The files in examples/ run, as anybody would run them; the server's is in tests/vllm."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pydantic", reason="the examples need the extra `eval`")

from tests.docs.blocks import ROOT

EXAMPLES = ROOT / "examples"


def run(name: str, folder: Path, *arguments: str) -> str:
    """Run an example in a folder and return what it prints."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_page_lists_every_example() -> None:
    page = (EXAMPLES / "README.md").read_text("utf-8")
    assert set(re.findall(r"\]\((\w+\.py)\)", page)) == {
        file.name for file in EXAMPLES.glob("*.py")
    }
    for file in EXAMPLES.glob("*.py"):
        assert len(file.read_text("utf-8").splitlines()) < 110, f"{file.name} is not short"


def test_own_selector(tmp_path: Path) -> None:
    lines = run("own_selector.py", tmp_path).splitlines()
    assert lines[0] == "divprune keeps 40 of 256 patches:"
    rows = [line.strip() for line in lines[1:17]]
    assert {len(row) for row in rows} == {16}
    assert sum(row.count("#") for row in rows) == 40
    own, chance = (
        re.fullmatch(r"(\S+): (\d+) of 40 right with 12 of 64", line) for line in lines[17:]
    )
    assert own is not None
    assert chance is not None
    assert (own[1], chance[1]) == ("contrast", "random")
    assert int(own[2]) > int(chance[2])


def test_evaluate_offline(tmp_path: Path) -> None:
    printed = run("evaluate_offline.py", tmp_path, "out")
    results = json.loads((tmp_path / "out" / "run" / "results.json").read_text("utf-8"))
    assert results["complete"]
    assert results["data"][0]["questions"] == 60
    found = re.findall(r"^(\S+), (\d+) tokens: (\d+)% right \((\d+)% to (\d+)%\)$", printed, re.M)
    accuracy = {(method, int(tokens)): int(share) for method, tokens, share, _, _ in found}
    methods = ("relevant-information", "divprune", "random")
    assert set(accuracy) == {("unpruned", 64), *((name, n) for name in methods for n in (16, 8))}
    assert accuracy["unpruned", 64] > 90
    assert accuracy["relevant-information", 8] > accuracy["random", 8]
    assert (tmp_path / "out" / "run" / "report.html").is_file()
