"""Attaching and undoing: the model is exactly what it was, and nothing runs unpruned unnoticed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import tokenprune_hf
from tests.hf.models import TINY, UNATTENDING, prompt, tf
from tokenprune.config import PruningConfig
from tokenprune.errors import (
    BudgetError,
    ConfigError,
    OptionError,
    SelectorError,
    TokenPruneError,
    UnknownMethodError,
    UnsupportedModelError,
)
from tokenprune.selectors.base import Selector
from tokenprune.tokens import TokenBatch

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")


def state(model: nn.Module) -> list[tuple[Any, ...]]:
    """Return everything of every module that pruning could have touched."""
    result: list[tuple[Any, ...]] = []
    for name, module in model.named_modules():
        hooks = tuple(len(getattr(module, hook)) for hook in _HOOKS)
        plain = sorted(key for key in vars(module) if not key.startswith("_"))
        values = tuple((key, id(vars(module)[key])) for key in plain)
        result.append((name, hooks, values, type(module), module.training))
    result.append(("config", str(getattr(model, "config", None))))
    return result


def test_a_config_says_how_to_prune() -> None:
    tiny = TINY["internvl"]
    model, inputs = tiny.model(), prompt(tiny, ["it"])
    config = PruningConfig("random", 5, "compact", {"seed": 3})
    with tokenprune_hf.prune(model, config) as of_config:
        said = model.generate(**inputs, max_new_tokens=3)
    with tokenprune_hf.prune(model, "random", 5, "compact", seed=3) as plain:
        assert torch.equal(model.generate(**inputs, max_new_tokens=3), said)
    assert torch.equal(of_config.selections[0].kept, plain.selections[0].kept)
    with pytest.raises(TokenPruneError, match="which has them already"):
        tokenprune_hf.prune(model, config, keep=3)
    with pytest.raises(BudgetError, match="keep is missing"):
        tokenprune_hf.prune(model, "random")


@pytest.mark.parametrize("name", TINY)
def test_the_model_is_what_it_was(name: str) -> None:
    tiny = TINY[name]
    method = "feature-norm" if name in UNATTENDING else "cls-attention"
    model, inputs = tiny.model(), prompt(tiny, ["tit"])
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    model.generate(**inputs, max_new_tokens=1)
    before = state(model)
    with tokenprune_hf.prune(model, method, 3):
        assert state(model) != before
        model.generate(**inputs, max_new_tokens=1)
        model(**inputs)
    assert state(model) == before
    with (  # noqa: PT012 (the exception has to come after a pruned call)
        pytest.raises(ZeroDivisionError),
        tokenprune_hf.prune(model, method, 3),
    ):
        model.generate(**inputs, max_new_tokens=1)
        raise ZeroDivisionError
    assert state(model) == before
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())


def test_an_exception_inside_a_call_leaves_no_hook_behind() -> None:
    tiny = TINY["llava"]
    model, inputs = tiny.model(), prompt(tiny, ["tit"])
    model.generate(**inputs, max_new_tokens=1)  # transformers lays hooks of its own
    before = state(model)
    with tokenprune_hf.prune(model, "cls-attention", 3) as pruning:
        inside = state(model)
        with pytest.raises(ValueError, match="image size"):
            model.generate(**{**inputs, "pixel_values": torch.zeros(1, 3, 7, 7)})
        assert state(model) == inside
        model.generate(**inputs, max_new_tokens=1)  # still pruned
        assert len(pruning.selections[0]) == 3
    assert state(model) == before


def test_apply_and_remove() -> None:
    tiny = TINY["llava"]
    model, inputs = tiny.model(), prompt(tiny, ["tit"])
    model.generate(**inputs, max_new_tokens=1)
    before = state(model)
    pruning = tokenprune_hf.apply(model, "uniform", 4)
    model.generate(**inputs, max_new_tokens=1)
    assert len(pruning.selections[0]) == 4
    with pytest.raises(TokenPruneError, match="under Pruning already"):
        tokenprune_hf.apply(model, "uniform", 4)
    tokenprune_hf.remove(model)
    assert state(model) == before
    tokenprune_hf.remove(model)
    pruning.remove()
    assert state(model) == before


def test_a_selector_of_ones_own() -> None:
    @dataclass(frozen=True)
    class LastTokens(Selector):
        name: ClassVar[str] = "last"
        summary: ClassVar[str] = "the last tokens"
        needs: ClassVar[tuple[str, ...]] = ()

        def score(self, tokens: TokenBatch) -> Tensor:
            return torch.arange(tokens.total).float().expand(tokens.size, -1)

    tiny = TINY["llava"]
    model, inputs = tiny.model(), prompt(tiny, ["tit"])
    with tokenprune_hf.prune(model, LastTokens(), 3) as pruning:
        model.generate(**inputs, max_new_tokens=1)
    assert pruning.selections[0].kept.tolist() == [33, 34, 35]
    with pytest.raises(TokenPruneError, match="options"):
        tokenprune_hf.prune(model, LastTokens(), 3, seed=1)


def test_wrong_settings_are_refused_before_the_model_is_touched() -> None:
    model = TINY["llava"].model()
    before = state(model)
    with pytest.raises(UnknownMethodError, match="Did you mean 'cls-attention'"):
        tokenprune_hf.prune(model, "cls-atention", 3)
    with pytest.raises(OptionError, match="Did you mean 'directions'"):
        tokenprune_hf.prune(model, "zeroth-order", 3, direction=3)
    for keep in (0, -1, 0.0, float("nan"), 1.5, True):
        with pytest.raises(BudgetError):
            tokenprune_hf.prune(model, "uniform", keep)
    with pytest.raises(ConfigError, match="Did you mean 'original'"):
        tokenprune_hf.prune(model, "uniform", 3, positions="orignal")  # type: ignore[arg-type]
    assert state(model) == before


def test_models_that_cannot_be_pruned() -> None:
    small = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16}
    text = tf.LlamaForCausalLM(tf.LlamaConfig(**small, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(UnsupportedModelError, match="model_type 'llama'"):
        tokenprune_hf.prune(text, "uniform", 3)
    with pytest.raises(UnsupportedModelError, match="no vision-language model"):
        tokenprune_hf.prune(nn.Linear(2, 2), "uniform", 3)
    with pytest.raises(UnsupportedModelError, match="Pass the whole model"):
        tokenprune_hf.prune(TINY["llava"].model().model, "uniform", 3)


def test_a_method_whose_needs_cannot_be_met() -> None:
    """What no adapter gathers is refused when the class is made, or else the selector."""
    with pytest.raises(SelectorError, match="sound"):

        class AsksForSound(Selector):
            name: ClassVar[str] = "asks"
            summary: ClassVar[str] = "what a microphone heard"
            needs: ClassVar[tuple[str, ...]] = ("sound",)

    @dataclass(frozen=True)
    class AsksAtLast(Selector):
        name: ClassVar[str] = "asks"
        summary: ClassVar[str] = "what a microphone heard"
        needs: ClassVar[tuple[str, ...]] = ()

    AsksAtLast.needs = ("sound",)
    with pytest.raises(SelectorError, match="sound"):
        AsksAtLast()
