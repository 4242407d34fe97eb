"""`scripts/bench_masks.py` in vLLM's engine and with the kernel for GPUs: that both run here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def call(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / "bench_masks.py", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=600,
    )


def test_vllms_engine_reads_prompts_at_every_density() -> None:
    done = call("--engine", "vllm", "--quick", "--densities", "1", "0.25")
    assert done.returncode == 0, done.stdout + done.stderr
    for length in ("1024", "2048"):
        rows = [line for line in done.stdout.splitlines() if line.startswith(f"│   {length} │")]
        assert [row.split("│")[2].strip() for row in rows] == [
            "unmasked",
            "all dense",
            "asked for 0.25",
        ]
        # Layers with masks: none, none, both.
        assert [row.split("│")[4].strip() for row in rows] == ["0", "0", "2"]
    assert done.stdout.count("all-dense heads leave every") == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--kernel", "paged"], "--kernel paged is for GPUs. Give --device cuda, or --quick"),
        (["--kernel", "paged", "--quick", "--dtype", "bfloat16"], "interpreter run it once"),
        (["--engine", "vllm", "--densities", "0.5"], "have no 1, with which the others are"),
    ],
)
def test_what_cannot_be_measured_is_refused(words: list[str], says: str) -> None:
    done = call(*words)
    assert done.returncode == 2
    assert says in done.stderr


def test_the_kernel_for_gpus_is_interpreted() -> None:
    done = call("--kernel", "paged", "--quick", "--densities", "1", "0.25")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "attention over a paged cache" in done.stdout
    (line,) = (one for one in done.stdout.splitlines() if "outputs are within 1e-05" in one)
    assert "holds" in line
    assert "does not hold" not in line
