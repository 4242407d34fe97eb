"""What all tests share: no model hub, no deprecated call unnoticed, and who runs beside whom."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

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
    """Leave out models like another one, which is run, unless all are asked for."""
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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let one of several processes have all of vLLM's engines, and files stay whole.

    An engine takes its memory when it starts, and two that start together starve each other.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Lanes(LoadScopeScheduling):  # type: ignore[misc]  # not typed
        def _split_scope(self, nodeid: str) -> str:
            engines = nodeid.startswith("tests/vllm/")
            return "engines" if engines else nodeid.partition("::")[0]

    return Lanes(config, log)


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
