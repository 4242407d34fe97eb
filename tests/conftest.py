"""What all tests share: no model hub, no deprecated call unnoticed, and what runs first."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

from tests.every_model import ALIKE, ALIKE_IN_VLLM

os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-model",
        action="store_true",
        help="also run the models that are pruned like another one (scripts/test-models)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "every_model: run by scripts/test-models alone")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out models like another one, which is run, unless all are asked for.

    Engines come first: their files take longest, and of several processes none is to be left alone
    with one of them in the end.
    """
    items.sort(key=lambda item: not item.nodeid.startswith("tests/vllm/"))
    if config.getoption("--every-model"):
        return
    left_out = [
        item
        for item in items
        if _alike(item) & _words(item) or item.get_closest_marker("every_model")
    ]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


def _alike(item: pytest.Item) -> set[str]:
    """Return the models that a test need not run."""
    of_engine = ALIKE_IN_VLLM if item.nodeid.startswith("tests/vllm/test_families.py") else {}
    return {*ALIKE, *of_engine}


def _words(item: pytest.Item) -> set[str]:
    """Return the parameters of a test that are text."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    return {value for value in parameters.values() if isinstance(value, str)}


@pytest.fixture(autouse=True)
def selectors_registered_here_are_gone_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test, or an example that it runs, registers for its process is no other test's."""
    from tokenprune import registry

    monkeypatch.setattr(registry, "_here", dict(registry._here))


class _Deprecations(logging.Handler):
    """Collects what transformers logs, and does not warn, about deprecated calls."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage()
        # Nemotron VL asks its own tower's config for torch_dtype, and PaddleOCR-VL's processor says
        # how its images are processed in an old way; nothing of ours does.
        theirs = "`torch_dtype`" in said or "`PaddleOCRVLProcessor` defines" in said
        if "deprecat" in said.lower() and not theirs:
            self.found.append(said)


@pytest.fixture(autouse=True)
def no_deprecated_calls() -> Iterator[None]:
    handler = _Deprecations()
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert not handler.found
