"""Two ranks of tensor parallelism choose what one does."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vllm import checkpoints
from tests.vllm.checkpoints import WORDS
from tests.vllm.engines import answer, greedy, kept
from tests.vllm.test_families import METHODS, Case, reference, request, start


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_two_ranks_choose_what_one_does(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    folder = checkpoints.save(family, tmp_path / "model")
    hf = reference(family, folder)
    with start(family, folder, tensor_parallel_size=2) as llm:
        for number, method in enumerate(METHODS):
            case = Case("tit", (number,), {"method": method})
            tokens, indices = hf.ask(case)
            (answered,) = answer(llm, [request(family, case)], greedy(words=WORDS))
            # `kept` also checks that the ranks agree.
            assert [segment for item in kept(llm) for segment in item] == indices, method
            assert answered == tokens, method
