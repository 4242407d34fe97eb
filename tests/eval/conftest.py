"""What several tests of the evaluation need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.vllm.checkpoints import save

tf: Any = transformers  # not typed the way it is called


@pytest.fixture(autouse=True)
def verbosity() -> Iterator[None]:
    """Loading makes transformers quiet; other tests listen to it."""
    before = tf.utils.logging.get_verbosity()
    yield
    tf.utils.logging.set_verbosity(before)


@pytest.fixture(scope="module")
def checkpoints(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A folder for each of the module's ``FAMILIES``."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: save(name, folder / name) for name in request.module.FAMILIES}
