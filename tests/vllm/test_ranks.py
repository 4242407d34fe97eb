"""Two ranks of tensor parallelism choose what one does."""

from __future__ import annotations

from pathlib import Path

import pytest

import tokenprune
from tests.hf.lites import saved
from tests.vllm import checkpoints
from tests.vllm.checkpoints import WORDS
from tests.vllm.engines import answer, greedy, kept
from tests.vllm.test_families import METHODS, Case, reference, request, start
from tests.vllm.test_questions import features_of


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_two_ranks_choose_what_one_does(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    folder = checkpoints.save(family, tmp_path / "model")
    hf = reference(family, folder)
    # Not those that read with whole weights. The trained selector is whole on each rank.
    methods = [
        name for name in METHODS if "query_attention" not in tokenprune.registry.find(name).needs
    ]
    image = [checkpoints.image(0, (40, 40))]
    width = features_of(hf, checkpoints.hf_inputs(family, hf.processor, "it", image))
    options = saved(tmp_path / "lite", width, hf.model.config.get_text_config().vocab_size, family)
    settings = {"options": options, "request_methods": methods, "tensor_parallel_size": 2}
    with start(family, folder, "flexselect-lite", **settings) as llm:
        for number, method in enumerate(["flexselect-lite", *methods]):
            hf.options = options if method == "flexselect-lite" else {}
            case = Case("tit", (number,), {"method": method})
            tokens, indices = hf.ask(case)
            (answered,) = answer(llm, [request(family, case)], greedy(words=WORDS))
            # `kept` also checks that the ranks agree.
            assert [segment for item in kept(llm) for segment in item] == indices, method
            assert answered == tokens, method
