"""examples/serve_pruned.py starts a real server, asks it and stops it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_serve_pruned(tmp_path: Path) -> None:
    pytest.importorskip("openai")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "serve_pruned.py"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PORT": str(port)},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = re.findall(r"^(what .+\?) (\w+) \(tokens of the prompt: (\d+)\)$", done.stdout, re.M)
    assert len(found) == 2, done.stdout[-4000:]
    (question, answer, served), (again, _, own) = found
    assert question == again
    assert answer == "bag"  # the right answer of the first scene, with 16 of 64 tokens
    assert int(served) - int(own) == 16 - 4
    # The server is gone.
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
