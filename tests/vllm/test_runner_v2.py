"""Model Runner V2, vLLM's default on GPUs, answers as transformers does on the same kept rows.

`test_families` compares the engine of the runner V1 with the same calculation.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from tests.vllm import checkpoints
from tests.vllm.runner_v2 import RUNNER, a_process_of_runner_v2, ask
from tests.vllm.test_families import cases, reference


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPoolExecutor]:
    with a_process_of_runner_v2(tmp_path_factory.mktemp("triton")) as running:
        yield running


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_the_same_tokens_are_kept_and_generated(
    family: str, process: ProcessPoolExecutor, tmp_path: Path
) -> None:
    """Prompts are cut into chunks of 20 tokens, and a batch overfills the cache.

    A request that begins again has its positions counted with what it has answered so far.
    """
    folder = checkpoints.save(family, tmp_path / "model")
    asked = cases(family)
    found = process.submit(ask, family, folder, asked).result()
    assert found.runner == RUNNER
    assert found.preemptions > 0, "the cache was meant to be too small"
    hf = reference(family, folder)
    for case, (alone, chosen), together in zip(asked, found.alone, found.together, strict=True):
        tokens, indices = hf.ask(case)
        assert chosen == ([] if case.whole else indices), case
        assert alone == tokens, case
        assert together == tokens, case
