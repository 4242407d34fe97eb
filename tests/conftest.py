"""What all tests share: no model hub, and no deprecated call of transformers goes unnoticed."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"


class _Deprecations(logging.Handler):
    """Collects what transformers logs, and does not warn, about deprecated calls."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecat" in record.getMessage().lower():
            self.found.append(record.getMessage())


@pytest.fixture(autouse=True)
def no_deprecated_calls() -> Iterator[None]:
    handler = _Deprecations()
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert not handler.found
