"""Quantised models of transformers are pruned by what their layers compute.

``scripts/test`` runs this file with torchao and bitsandbytes, which are installed apart.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenprune_hf
from tests.hf.models import TINY, prompt, tf
from tests.vllm.quantised import rounded

torchao = pytest.importorskip("torchao.quantization")

METHODS: dict[str, dict[str, Any]] = {
    "cls-attention": {},
    "divprune": {},
    "information": {},
    "feature-norm": {},
    # As many directions as there are: what is measured by calls is the closed form then.
    "zeroth-order": {"directions": 4096},
    "flexselect": {"layer": 1},
    "relevant-information": {"layer": 1},
}
FEW: dict[str, Any] = {"directions": 16}
KEEP = 8
MODELS = ["llava", "qwen2_5_vl"]
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}

# transformers asks torchao by names that it has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:torchao")


def tiny(name: str) -> Any:
    """Return a tiny model whose layers are of sizes that kernels of 4 bits take."""
    mrope = {"mrope_section": [2, 3, 3]} if name == "qwen2_5_vl" else {}

    def build() -> Any:
        config = TINY[name].build()
        text, vision = config.text_config, config.vision_config
        text.hidden_size, text.intermediate_size, text.head_dim = 64, 128, 16
        text.rope_parameters = {**text.rope_parameters, **mrope}
        vision.hidden_size, vision.intermediate_size = 64, 128
        vision.out_hidden_size = 64
        return config

    return replace(TINY[name], build=build).model()


def answers(
    model: Any, method: str, inputs: Any, less: dict[str, Any] | None = None
) -> tuple[list[list[int]], list[int]]:
    """Return kept indices and generated tokens, perhaps with fewer directions."""
    options = METHODS[method]
    if options.keys() & (less or {}).keys():
        options = {**options, **(less or {})}
    with torch.no_grad(), tokenprune_hf.prune(model, method, KEEP, **options) as pruning:
        said = model.generate(**inputs, **GREEDY)[0, -4:].tolist()
    return [one.kept.tolist() for one in pruning.selections], said


def whole(model: Any, weight_of: Callable[[Any], Tensor | None], rounds: bool = False) -> Any:
    """Return a copy with plain layers, of what a model's weights stand for.

    Parameters
    ----------
    model
        With quantised layers.
    weight_of
        Returns what the weight of a layer stands for; None where it is no quantised layer.
    rounds
        Whether the layers round their inputs, too.
    """
    plain = copy.deepcopy(model)
    for name, module in model.named_modules():
        weight = weight_of(module)
        if weight is None:
            continue
        outputs, inputs = weight.shape
        layer = nn.Linear(inputs, outputs, bias=module.bias is not None)
        layer.weight.data = weight.float()
        if module.bias is not None:
            layer.bias.data = module.bias.data.float()
        if rounds:
            layer.register_forward_pre_hook(rounded)
        plain.set_submodule(name, layer)
    return plain


def of_torchao(module: Any) -> Tensor | None:
    weight: Any = getattr(module, "weight", None)
    found: Tensor | None = None
    if type(weight).__module__.startswith("torchao"):
        found = weight.dequantize()
    return found


def of_bitsandbytes(module: Any) -> Tensor | None:
    from bitsandbytes import functional

    weight: Any = getattr(module, "weight", None)
    found: Tensor | None = None
    if type(weight).__name__ == "Params4bit":
        found = functional.dequantize_4bit(weight.data, weight.quant_state)
    elif type(weight).__name__ == "Int8Params":
        scales = module.state.SCB if weight.SCB is None else weight.SCB
        found = weight.data.float() * scales[:, None] / 127
    return found


@pytest.mark.filterwarnings("ignore:method 'zeroth-order' cannot use the weights:UserWarning")
@pytest.mark.parametrize("name", MODELS)
def test_weights_in_8_bits_choose_what_they_stand_for(name: str) -> None:
    model, inputs = tiny(name), prompt(TINY[name], ["titt"])
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    plain = whole(model, of_torchao)
    for method in METHODS:
        assert answers(model, method, inputs) == answers(plain, method, inputs), method
    with torch.no_grad(), tokenprune_hf.prune(model, "divprune", 1.0):
        kept_all = model(**inputs).logits
    assert torch.equal(kept_all, model(**inputs).logits)


@pytest.mark.parametrize("name", MODELS)
def test_inputs_rounded_to_8_bits(name: str) -> None:
    model, inputs = tiny(name), prompt(TINY[name], ["titt"])
    torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig())
    check_near(model, whole(model, of_torchao, rounds=True), inputs)


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="scripts/test installs it for this"
)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", MODELS)
def test_bitsandbytes(name: str, bits: int, tmp_path: Path) -> None:
    model, inputs = tiny(name), prompt(TINY[name], ["titt"])
    model.save_pretrained(tmp_path)
    config = (
        tf.BitsAndBytesConfig(load_in_8bit=True)
        if bits == 8
        else tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    )
    loaded = type(model).from_pretrained(
        tmp_path, device_map={"": "cpu"}, quantization_config=config
    )
    loaded.generation_config = model.generation_config
    plain = whole(loaded.eval(), of_bitsandbytes, rounds=bits == 8)
    check_near(loaded, plain, inputs)


def check_near(model: Any, plain: Any, inputs: Any) -> None:
    """Check that a model keeps the same twice, and nearly what one that rounds alike keeps.

    The projector is measured by calls, which is said once.
    """
    others = 0
    for method in METHODS:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            first = answers(model, method, inputs, FEW)
            assert answers(model, method, inputs, FEW) == first, method
        about = [one for one in said if "cannot use the weights" in str(one.message)]
        assert len(about) == (method == "zeroth-order"), method
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ((kept,), _), ((expected,), _) = first, answers(plain, method, inputs, FEW)
        others += len(set(kept) - set(expected))
    # By chance it would be three quarters of them.
    assert others <= 0.25 * KEEP * len(METHODS)
