"""Running a program of the environment that holds lmms-eval, without the network."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

BIN = Path(__file__).parents[2] / ".venv-lmms" / "bin"


def run_there(program: str, *arguments: str, folder: Path) -> str:
    """Return what a program said, on both streams; fail if it did not end well."""
    if not (BIN / program).exists():
        pytest.fail(f"{BIN / program} is missing. Run scripts/setup-lmms first.")
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
    }
    done = subprocess.run(
        [str(BIN / program), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
