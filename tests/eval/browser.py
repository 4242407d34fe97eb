"""Pages in a real browser."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def browse(file: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open a page without a window; `options` say what to do with it."""
    assert CHROMIUM is not None
    return subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--disable-background-networking",
            "--disable-component-update",
            f"--user-data-dir={file.parent / 'profile'}",
            *options,
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
