"""LoRA adapters of the language model: every request is read, and answered, with its own."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import tokenprune_vllm
from tests.vllm import checkpoints
from tests.vllm.checkpoints import WORDS
from tests.vllm.engines import greedy, kept
from tests.vllm.test_families import Case, Reference, methods_of, reference, request, start
from tests.vllm.test_limits import serve_command
from tokenprune.config import PruningConfig
from tokenprune.errors import UnsupportedModelError
from tokenprune_vllm.refusals import check_engine
from tokenprune_vllm.settings import ServerSettings

FAMILY = "qwen2_5_vl"
NAMES = (None, "one", "another")
READERS = ("flexselect", "relevant-information")
# PEFT asks the newest transformers by a name that it has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is dep:FutureWarning")


def adapt(hf: Reference, folder: Path, seed: int) -> Reference:
    """Write an adapter of the language model; return the model with it merged."""
    torch.manual_seed(seed)
    lora = peft.LoraConfig(
        r=8,
        lora_alpha=8,
        target_modules=r".*language_model.*(q|k|v|o|gate|up|down)_proj",
        init_lora_weights=False,
    )
    adapted: Any = peft.get_peft_model(copy.deepcopy(hf.model), lora)
    adapted.save_pretrained(folder)
    return Reference(hf.family, adapted.merge_and_unload().eval(), hf.processor)


@pytest.fixture(scope="module")
def engine_and_models(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Any, dict[str | None, Reference], dict[str | None, Any]]]:
    from vllm.lora.request import LoRARequest

    folder = tmp_path_factory.mktemp("adapters")
    hf = reference(FAMILY, checkpoints.save(FAMILY, folder / "model"))
    models: dict[str | None, Reference] = {None: hf}
    requests: dict[str | None, Any] = {None: None}
    for number, name in enumerate(NAMES[1:], start=1):
        models[name] = adapt(hf, folder / str(name), seed=number)
        requests[name] = LoRARequest(str(name), number, str(folder / str(name)))
    with start(FAMILY, folder / "model", enable_lora=True, max_loras=2, max_lora_rank=8) as llm:
        yield llm, models, requests


def test_every_method_reads_with_the_adapter_of_its_request(engine_and_models: Any) -> None:
    llm, models, adapters = engine_and_models
    asked = [
        (Case(kinds, (number,), {"method": method}), name)
        for number, method in enumerate(methods_of(FAMILY))
        for kinds in (("tit", "vt") if method == "flexselect" else ("tit",))
        # Methods that read no question choose alike with each of them: one is enough.
        for name in (NAMES if method in READERS else NAMES[number % 3 :][:1])
    ]
    expected = {}
    kept(llm)
    for case, name in asked:
        tokens, indices = models[name].ask(case)
        expected[case.kinds, case.pictures, name] = tokens, indices
        (output,) = llm.generate(
            [request(FAMILY, case)],
            greedy(words=WORDS),
            lora_request=adapters[name],
            use_tqdm=False,
        )
        # Each adapter has a selection of its own, by whatever method.
        assert [segment for item in kept(llm) for segment in item] == indices, (case, name)
        assert list(output.outputs[0].token_ids) == tokens, (case, name)
    read = [expected["tit", (methods_of(FAMILY).index("flexselect"),), name][1] for name in NAMES]
    assert len({str(indices) for indices in read}) == len(NAMES), "adapters do not matter here"
    # All in one batch, first encoded together and then known to the caches.
    order = list(range(len(asked)))
    random.Random(0).shuffle(order)
    llm.reset_prefix_cache()
    llm.llm_engine.reset_encoder_cache()
    llm.collective_rpc("encode_together")
    chosen = [segment for _, indices in expected.values() for segment in indices]
    for together in (chosen, []):
        outputs = llm.generate(
            [request(FAMILY, asked[index][0]) for index in order],
            greedy(words=WORDS),
            lora_request=[adapters[asked[index][1]] for index in order],
            use_tqdm=False,
        )
        assert sorted(segment for item in kept(llm) for segment in item) == sorted(together)
        for index, output in zip(order, outputs, strict=True):
            case, name = asked[index]
            tokens, _ = expected[case.kinds, case.pictures, name]
            # On a CPU vLLM runs requests without an adapter, beside others, with the last one's.
            if name is not None:
                assert list(output.outputs[0].token_ids) == tokens, (case, name)


def test_adapters_of_the_tower_are_refused_and_images_are_kept_apart(tmp_path: Path) -> None:
    folder = checkpoints.save(FAMILY, tmp_path / "model")
    flag = "enable_tower_connector_lora"
    tower: dict[str, Any] = {flag: True}
    for method, apart in (("flexselect", True), ("uniform", False)):
        arguments = tokenprune_vllm.engine_args(folder, method, 4, enable_lora=True)
        assert arguments.get(flag, False) is apart
        command = (str(folder), f"--method={method}", "--keep=4", "--enable-lora")
        assert ("--enable-tower-connector-lora" in serve_command(*command)) is apart
        assert flag not in tokenprune_vllm.engine_args(folder, method, 4)
        with pytest.raises(UnsupportedModelError, match="those of the language model"):
            tokenprune_vllm.engine_args(folder, method, 4, **tower)


@pytest.mark.parametrize(
    ("method", "tower", "message"),
    [
        ("flexselect", False, "without --enable-tower-connector-lora .* add it"),
        ("uniform", True, "those of the language model"),
        ("flexselect", True, None),
        ("uniform", False, None),
    ],
)
def test_what_an_exported_checkpoint_is_started_with(
    method: str, tower: bool, message: str | None, tmp_path: Path
) -> None:
    from vllm import EngineArgs

    folder = checkpoints.save(FAMILY, tmp_path / "model")
    given: dict[str, Any] = {"dtype": "float32", "enable_lora": True}
    arguments = {**tokenprune_vllm.engine_args(folder, method, 4, **given)}
    arguments["enable_tower_connector_lora"] = tower
    config = EngineArgs(**arguments).create_engine_config()
    settings = ServerSettings.build(PruningConfig(method, 4))
    refused: AbstractContextManager[Any] = nullcontext()
    if message is not None:
        refused = pytest.raises(UnsupportedModelError, match=message)
    with refused:
        check_engine(config, settings)
