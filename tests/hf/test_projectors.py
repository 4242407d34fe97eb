"""The projector of every family: read where its weights are plain, called where they are not."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenprune_hf
from tests.core.stand_ins import Adapter, Packed, coded, offloaded
from tests.hf.models import APART, TINY, prompt
from tokenprune import Selection
from tokenprune.errors import OptionError, UnreadableProjectorError
from tokenprune_hf.vision import vision_model
from tokenprune_hf.watching import watch_input, watch_output

BLIND = ("uniform", "random", "cls-attention", "divprune", "information", "feature-norm")


def selections(model: Any, inputs: dict[str, Any], method: str, **options: Any) -> list[Selection]:
    with torch.no_grad(), tokenprune_hf.prune(model, method, 5, **options) as pruning:
        model(**inputs)
    return pruning.selections


CALLED = ("aya_vision", "cohere2_vision", "mistral3", "molmo2", "ovis2", "gemma3n")
READABLE = [name for name in TINY if not name.startswith("glm") and name not in CALLED]
"""GLM's, Cohere's and Molmo 2's projectors have a gate, and others more layers: they are called."""


def samples(name: str) -> list[str]:
    alone = TINY[name].video is None or name in APART
    return ["tit", "it"] if alone else ["tit", "tv"]


def linears(model: Any) -> dict[str, nn.Linear]:
    """Return the linear layers of a model's projector by name."""
    module = vision_model(model).projector("image").module
    return {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}


def replace(model: Any, name: str, layer: nn.Module) -> None:
    vision_model(model).projector("image").module.set_submodule(name, layer)


@pytest.mark.parametrize("name", READABLE)
def test_auto_is_the_closed_form_where_weights_are_plain(name: str) -> None:
    model, inputs = TINY[name].model(), prompt(TINY[name], samples(name))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="method 'zeroth-order'")
        auto = selections(model, inputs, "zeroth-order")
    closed = selections(model, inputs, "zeroth-order", estimator="frobenius")
    for one, other in zip(auto, closed, strict=True):
        assert torch.equal(one.kept, other.kept)
        assert one.scores is not None
        assert other.scores is not None
        assert torch.equal(one.scores, other.scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", READABLE)
def test_the_models_own_module_is_what_is_called(name: str, dtype: torch.dtype) -> None:
    model = TINY[name].model().to(dtype)
    vision = vision_model(model)
    projector = vision.projector("image")
    mlp = projector.structure()
    width = mlp.first.weight.shape[1]
    rows = torch.randn(7, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    calls: list[Tensor] = []
    handle = vision.projector("image").module.register_forward_hook(
        lambda _module, _args, output: calls.append(output)
    )
    with torch.no_grad():
        got = projector(rows.view(1, 7, width))
    handle.remove()
    assert len(calls) == 1
    assert got.shape == (1, 7, calls[0].shape[-1])
    # PerceptionLM's own takes the mean of patches that are rounded.
    atol = 5e-3 if name == "perception_lm" and dtype == torch.bfloat16 else 1e-5
    rtol = 1.3e-6 if dtype == torch.float32 else 0.016
    torch.testing.assert_close(got[0], mlp(rows), atol=atol, rtol=rtol)


@pytest.mark.parametrize("name", ["glm4v", "cohere2_vision", "ovis2"])
def test_projectors_that_are_no_plain_mlp_are_called(name: str) -> None:
    model, inputs = TINY[name].model(), prompt(TINY[name], ["tit"])
    with pytest.warns(UserWarning, match="calls the projector instead"):
        (called,) = selections(model, inputs, "zeroth-order")
    (expected,) = selections(model, inputs, "zeroth-order", estimator="jvp")
    torch.testing.assert_close(called.scores, expected.scores, rtol=1e-4, atol=0.0)
    with pytest.raises(OptionError, match="estimator='frobenius'"):
        tokenprune_hf.prune(model, "zeroth-order", 5, estimator="frobenius")


@pytest.mark.parametrize("name", [name for name in READABLE if name != "gemma3"])
def test_adapters_on_the_projector_count(name: str) -> None:
    model, inputs = TINY[name].model(), prompt(TINY[name], samples(name))
    merged = copy.deepcopy(model)
    for layer in linears(model):
        adapter = Adapter(linears(model)[layer])
        replace(model, layer, adapter)
        replace(merged, layer, adapter.merged())
    options = {"directions": 100}  # more than there are dimensions, but for the mergers
    with pytest.warns(UserWarning, match="Adapter, which is no plain linear layer"):
        got = selections(model, inputs, "zeroth-order", **options)
    width = vision_model(merged).projector("image").structure().first.weight.shape[1]
    how = "frobenius" if width <= 100 else "jvp"
    expected = selections(merged, inputs, "zeroth-order", estimator=how, **options)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.scores, other.scores, rtol=1e-4, atol=0.0)
        assert torch.equal(one.kept, other.kept)
    with pytest.raises(OptionError, match=r"needs the projector's weights.*Adapter"):
        tokenprune_hf.prune(model, "zeroth-order", 5, estimator="frobenius")
    for method in BLIND:
        for one, other in zip(
            selections(model, inputs, method), selections(merged, inputs, method), strict=True
        ):
            assert torch.equal(one.kept, other.kept)


@pytest.mark.parametrize("change", [lambda layer: (Packed(layer), None), coded, offloaded])
@pytest.mark.parametrize("name", ["llava", "internvl", "qwen2_5_vl", "idefics3"])
def test_methods_that_do_not_look_at_the_projector_run_on_any(name: str, change: Any) -> None:
    model, inputs = TINY[name].model(), prompt(TINY[name], samples(name))
    for layer, old in linears(model).items():
        if old.bias is None:
            old.bias = nn.Parameter(torch.zeros(old.out_features))
        replace(model, layer, change(old)[0])
    for method in BLIND:
        assert all(len(one) == 5 for one in selections(model, inputs, method))
    with pytest.warns(UserWarning, match="calls the projector instead"):
        assert all(len(one) == 5 for one in selections(model, inputs, "zeroth-order"))
    with pytest.raises(OptionError, match="estimator='frobenius'"):
        tokenprune_hf.prune(model, "zeroth-order", 5, estimator="frobenius")
    with torch.no_grad(), tokenprune_hf.prune(model, "divprune", 5):
        model.generate(**inputs, max_new_tokens=2, do_sample=False)


def test_another_thread_that_watches_the_projector_changes_nothing() -> None:
    model, inputs = TINY["llava"].model(), prompt(TINY["llava"], ["tit"])
    (expected,) = selections(model, inputs, "zeroth-order")
    projector = model.model.multi_modal_projector
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="method 'zeroth-order'")
        with watch_input(projector, lambda *_: None), watch_output(projector, lambda _: None):
            (watched,) = selections(model, inputs, "zeroth-order")
    assert watched.scores is not None
    assert expected.scores is not None
    assert torch.equal(watched.scores, expected.scores)


def test_nothing_is_read_for_methods_that_do_not_look(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = TINY["llava"].model(), prompt(TINY["llava"], ["tit"])

    def build(*_args: Any) -> Any:
        raise AssertionError("read")

    monkeypatch.setattr("tokenprune_hf.vision.layers_of", build)
    for method in BLIND:
        selections(model, inputs, method)


def test_gemmas_projector_is_read_anew() -> None:
    model, inputs = TINY["gemma3"].model(), prompt(TINY["gemma3"], ["tit"])
    with torch.no_grad(), tokenprune_hf.prune(model, "zeroth-order", 5) as pruning:
        model(**inputs)
        projector = model.model.multi_modal_projector
        projector.mm_soft_emb_norm.weight.add_(torch.linspace(-0.9, 3.0, 24))
        projector.mm_input_projection_weight.data = projector.mm_input_projection_weight.data * 2
        model(**inputs)
        (after,) = pruning.selections
    (fresh,) = selections(copy.deepcopy(model), inputs, "zeroth-order")
    assert after.scores is not None
    assert fresh.scores is not None
    assert torch.equal(after.scores, fresh.scores)
    assert torch.equal(after.kept, fresh.kept)


def test_a_projector_of_other_layers_is_called() -> None:
    model, inputs = TINY["llava"].model(), prompt(TINY["llava"], ["tit"])
    own = model.model.multi_modal_projector
    (expected,) = selections(model, inputs, "zeroth-order")
    model.model.multi_modal_projector = nn.Sequential(own.linear_1, own.act, own.linear_2)
    with pytest.raises(UnreadableProjectorError, match="Sequential is not made of the layers"):
        vision_model(model).projector("image").structure()
    with pytest.warns(UserWarning, match="exact derivatives along 24 directions"):
        (got,) = selections(model, inputs, "zeroth-order")
    torch.testing.assert_close(got.scores, expected.scores, rtol=1e-4, atol=0.0)
