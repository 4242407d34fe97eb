"""Two ranks choose and answer as one does: tensors, images, layers or requests split in two."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import tokenprune_vllm
from tests.hf.lites import saved
from tests.hf.models import APART
from tests.vllm import checkpoints
from tests.vllm.checkpoints import VIDEOS, WORDS
from tests.vllm.engines import answer, greedy, kept
from tests.vllm.processes import forked_processes
from tests.vllm.test_families import (
    KEEP,
    METHODS,
    Case,
    methods_of,
    options_of,
    reference,
    request,
    start,
)
from tests.vllm.test_questions import features_of
from tokenprune.config import PruningConfig
from tokenprune.errors import UnsupportedModelError
from tokenprune_vllm.refusals import check_engine
from tokenprune_vllm.settings import ServerSettings

# As in tests/vllm/test_families.py.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

ONE_KEY_HEAD = {"text_config": {"num_key_value_heads": 1}}
"""Changes to a config: fewer heads of keys than ranks, so that both ranks have the same one."""


@pytest.fixture(autouse=True)
def a_core_for_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")


@pytest.mark.parametrize(
    ("family", "changes"), [("llava", {}), ("qwen2_5_vl", ONE_KEY_HEAD)], ids=["llava", "qwen2_5"]
)
def test_heads_of_two_ranks(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    folder = checkpoints.save(family, tmp_path / "model", **changes)
    hf = reference(family, folder)
    image = [checkpoints.image(0, (40, 40))]
    width = features_of(hf, checkpoints.hf_inputs(family, hf.processor, "it", image))
    options = saved(tmp_path / "lite", width, hf.model.config.get_text_config().vocab_size, family)
    # One of them weighs heads by their values, too.
    own = {name: options_of(family, name) for name in METHODS}
    own["flexselect"] = {"weigh_values": True, "reduction": "mean"}
    with start(
        family,
        folder,
        "flexselect-lite",
        options=options,
        request_methods=own,
        tensor_parallel_size=2,
    ) as llm:
        for number, method in enumerate(["flexselect-lite", *METHODS]):
            hf.options = options if method == "flexselect-lite" else own[method]
            case = Case("tit", (number,), {"method": method})
            tokens, indices = hf.ask(case)
            (answered,) = answer(llm, [request(family, case)], greedy(words=WORDS))
            # `kept` also checks that the ranks agree.
            assert [segment for item in kept(llm) for segment in item] == indices, method
            assert answered == tokens, method


MORE_SHARED = ("qwen3_vl", "glm4v", "kimi_k25", "llama4")
"""Further families of which vLLM can share images out."""


@pytest.mark.parametrize(
    "family",
    [
        "qwen2_5_vl",
        "internvl_chat",
        *(pytest.param(family, marks=pytest.mark.every_model) for family in MORE_SHARED),
    ],
)
def test_images_shared_out_among_two_ranks(family: str, tmp_path: Path) -> None:
    """One, of which a rank has none; three, encoded together; and videos."""
    folder = checkpoints.save(family, tmp_path / "model")
    hf = reference(family, folder)
    kinds = ["tit", "tititit"]
    if family in VIDEOS and family != "kimi_k25":  # whose chunks are as images
        kinds.append("tvt" if family in APART else "tvtvt")
    limits = {"image": 3, "video": kinds[-1].count("v")}
    with start(
        family,
        folder,
        tensor_parallel_size=2,
        mm_encoder_tp_mode="data",
        max_num_batched_tokens=512,
        max_model_len=512,
        num_gpu_blocks_override=80,
        limit_mm_per_prompt={"vision_chunk": 4} if family == "kimi_k25" else limits,
    ) as llm:
        if family == "kimi_k25":
            llm.collective_rpc("put_heads_together")
        mode = llm.llm_engine.vllm_config.model_config.multimodal_config.mm_encoder_tp_mode
        assert mode == "data", "vLLM fell back to the other mode"
        # No cache knows any; InternVL's processor takes two videos of one length only.
        numbers = itertools.count(step=2)
        for method in methods_of(family):
            for of_kind in kinds:
                pictures = [next(numbers) for kind in of_kind if kind != "t"]
                case = Case(of_kind, tuple(pictures), {"method": method})
                tokens, indices = hf.ask(case)
                (answered,) = answer(llm, [request(family, case)], greedy(words=WORDS))
                assert [segment for item in kept(llm) for segment in item] == indices, case
                assert answered == tokens, case


def test_images_that_are_shared_out_without_a_family(tmp_path: Path) -> None:
    from vllm import EngineArgs

    folder = checkpoints.save("qwen2_5_vl", tmp_path / "model")
    arguments = tokenprune_vllm.engine_args(
        folder, "uniform", 4, dtype="float32", mm_encoder_tp_mode="data"
    )
    both = ServerSettings.build(PruningConfig("uniform", 4), {"feature-norm": {}})
    check_engine(EngineArgs(**arguments).create_engine_config(), both, known=False)  # one rank
    config = EngineArgs(**arguments, tensor_parallel_size=2).create_engine_config()
    check_engine(config, both)
    check_engine(config, ServerSettings.build(PruningConfig("uniform", 4)), known=False)
    with pytest.raises(UnsupportedModelError, match="data together with feature-norm for a model"):
        check_engine(config, both, known=False)


def of_methods(names: Sequence[str], kinds: str, first: int = 0) -> list[Case]:
    """Return a case of each method, and one of a known image with nothing pruned."""
    cases = [Case(kinds, (first + n,), {"method": name}) for n, name in enumerate(names)]
    return [*cases, Case(kinds, (first,), {"off": True}), Case("ttt", ())]


@pytest.mark.parametrize(
    ("family", "positions"),
    [
        ("llava", "original"),
        ("qwen2_5_vl", "original"),
        pytest.param("llava", "compact", marks=pytest.mark.every_model),
    ],
)
def test_a_pipeline_of_two_stages(family: str, positions: str, tmp_path: Path) -> None:
    folder = checkpoints.save(family, tmp_path / "model")
    hf = reference(family, folder)
    hf.positions = positions
    # Each stage has one of the two layers, and the first one reads.
    own = {name: options_of(family, name) for name in METHODS}
    for name in ("flexselect", "relevant-information"):
        own[name] = {**own[name], "layer": 0}
    with start(
        family, folder, request_methods=own, positions=positions, pipeline_parallel_size=2
    ) as llm:
        llm.collective_rpc("warm_up")
        kept(llm)  # of that
        cases = of_methods(METHODS, "titt")
        for case in cases:
            hf.options = own.get(case.asked.get("method", ""), {})
            tokens, indices = hf.ask(case)
            (answered,) = answer(llm, [request(family, case)], greedy(words=WORDS))
            assert [segment for item in kept(llm) for segment in item] == indices, case
            assert answered == tokens, case
        llm.reset_prefix_cache()
        llm.llm_engine.reset_encoder_cache()
        alone = [answer(llm, [request(family, case)], greedy(words=WORDS))[0] for case in cases]
        requests = [request(family, case) for case in cases]
        assert answer(llm, requests, greedy(words=WORDS)) == alone, "in one batch"
        read, not_there = (llm.collective_rpc("why_not_read", args=(layer,)) for layer in (0, 1))
        assert read == ["0", None]
        assert "the pipeline's first stage, where images are encoded, has 1 of 2" in not_there[0]


def test_two_replicas(tmp_path: Path) -> None:
    """Each request is answered by both, and as transformers does."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    folder = checkpoints.save("qwen2_5_vl", tmp_path / "model")
    hf = reference("qwen2_5_vl", folder)
    cases = of_methods(METHODS, "titt")
    expected = [hf.ask(case)[0] for case in cases]
    arguments = tokenprune_vllm.engine_args(
        folder,
        METHODS[0],
        KEEP,
        request_methods={name: options_of("qwen2_5_vl", name) for name in METHODS[1:]},
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=8,
        data_parallel_size=2,
    )

    async def asked(llm: Any, number: int, replica: int) -> list[int]:
        found: list[int] = []
        async for output in llm.generate(
            request("qwen2_5_vl", cases[number]),
            greedy(words=WORDS),
            f"{number}-{replica}",
            data_parallel_rank=replica,
        ):
            found = list(output.outputs[0].token_ids)
        return found

    async def all_asked() -> list[list[list[int]]]:
        with forked_processes():
            llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        try:
            return [
                await asyncio.gather(*(asked(llm, n, replica) for n in range(len(cases))))
                for replica in range(2)
            ]
        finally:
            llm.shutdown()

    assert asyncio.run(all_asked()) == [expected, expected]
