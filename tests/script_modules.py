"""Scripts of the checkout, as modules: they import each other by their bare names."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


@contextmanager
def imported(name: str) -> Iterator[ModuleType]:
    """Import a script of ``scripts/``, whose folder is on the path until the end."""
    folder = str(Path(__file__).parents[1] / "scripts")
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(folder)
