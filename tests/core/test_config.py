from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from typing import Any

import pytest

from tokenprune import PruningConfig, VisualTokens, select_many
from tokenprune.budget import Budget
from tokenprune.errors import ConfigError, TokenPruneError
from tokenprune.selectors.zeroth_order import ZerothOrder


@pytest.mark.parametrize(
    "config",
    [
        PruningConfig("cls-attention", 64),
        PruningConfig("random", 1, options={"seed": 3}),
        PruningConfig("divprune", 1.0, positions="compact"),
        PruningConfig(
            "zeroth-order", 0.1, options={"estimator": "jvp", "directions": 8, "diversity": False}
        ),
    ],
)
def test_json_and_back(config: PruningConfig) -> None:
    again = PruningConfig.from_json(config.to_json())
    assert again == config
    assert type(again.keep) is type(config.keep)  # 1 is one token, 1.0 is all of them
    assert again.selector() == config.selector()


def test_options_reach_the_selector() -> None:
    config = PruningConfig("zeroth-order", 4, options={"directions": 8, "step": 1})
    assert config.selector() == ZerothOrder(directions=8, step=1)


def pickled(config: PruningConfig) -> PruningConfig:
    again: PruningConfig = pickle.loads(pickle.dumps(config))  # noqa: S301
    return again


def test_the_selector_is_built_once_and_by_each_copy_anew() -> None:
    config = PruningConfig("random", 4, options={"seed": 3})
    assert config.selector() is config.selector()
    for again in (copy.copy(config), copy.deepcopy(config), pickled(config)):
        assert again == config
        assert vars(again).keys() == {"method", "keep", "positions", "options", "scope"}
        assert again.selector() == config.selector()
        assert again.selector() is not config.selector()
    changed = dataclasses.replace(config, keep=8, options={"seed": 5})
    assert changed.selector() != config.selector()
    assert (changed.budget.keep, config.budget.keep) == (8, 4)


def test_options_that_a_caller_changes_later() -> None:
    options = {"seed": 3}
    config = PruningConfig("random", 4, options=options)
    options["seed"] = 5
    assert config.to_dict()["options"] == {"seed": 3}
    assert copy.deepcopy(config).selector() == config.selector()


@pytest.mark.parametrize("keep", [4, 1, 1.0, 0.25, "qwen2.5-vl-7b"])
def test_a_published_name_and_a_number_survive_copies(keep: int | float | str) -> None:
    config = PruningConfig("uniform", keep)
    for again in (copy.deepcopy(config), pickled(config)):
        assert again.to_dict() == config.to_dict()
        assert again.to_dict()["keep"] == keep
        assert again.budget == config.budget == Budget.of(keep)


def test_a_budget_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Any] = []
    of = Budget.of

    def counting(keep: Any) -> Budget:
        if not isinstance(keep, Budget):
            checked.append(keep)
        return of(keep)

    monkeypatch.setattr(Budget, "of", counting)
    config = PruningConfig("uniform", 0.5)
    items = [VisualTokens((1, 2, 3)), VisualTokens((1, 3, 4))]
    kept = [len(one) for one in select_many(items, config.selector(), config.budget)]
    assert kept == [3, 6]
    assert checked == [0.5]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"method": "random", "keep": 4, "kepe": 3}, "Did you mean 'keep'"),
        ({"method": "random"}, "needs the key 'keep'"),
        ({"keep": 4}, "needs the key 'method'"),
        ({"method": "cls-atention", "keep": 4}, "Did you mean 'cls-attention'"),
        ({"method": "random", "keep": 0}, "keep=0"),
        ({"method": "random", "keep": 4, "positions": "orginal"}, "Did you mean 'original'"),
        ({"method": "random", "keep": 4, "options": [1]}, "not an object"),
        ({"method": "random", "keep": 4, "options": {"sed": 1}}, "Did you mean 'seed'"),
        ({"method": "random", "keep": 4, "options": {"seed": 0.5}}, "whole number"),
        ({"method": "random", "keep": 4, "options": {"seed": True}}, "whole number"),
        ({"method": "random", "keep": 4, "options": {"seed": -1}}, "between 0"),
        ({"method": "zeroth-order", "keep": 4, "options": {"seed": 2**63}}, "between 0"),
        ({"method": "zeroth-order", "keep": 4, "options": {"estimator": "jpv"}}, "mean 'jvp'"),
        ({"method": "zeroth-order", "keep": 4, "options": {"directions": 0}}, "at least 1"),
        ({"method": "zeroth-order", "keep": 4, "options": {"step": 0.0}}, "above 0"),
        ({"method": "zeroth-order", "keep": 4, "options": {"step": float("nan")}}, "finite"),
        ({"method": "zeroth-order", "keep": 4, "options": {"diversity": 1}}, "True or False"),
    ],
)
def test_refusals(values: dict[str, Any], says: str) -> None:
    with pytest.raises(TokenPruneError, match=says):
        PruningConfig.from_dict(values)


def test_json_has_a_format_and_need_not_have_one() -> None:
    config = PruningConfig("random", 1, options={"seed": 3})
    values = json.loads(config.to_json())
    assert values == {"format": 1, **config.to_dict()}
    assert PruningConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match=r"format 2 .*newer version.*Write the configuration"):
        PruningConfig.from_dict({**values, "format": 2})


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_not_an_object(text: str) -> None:
    with pytest.raises(ConfigError):
        PruningConfig.from_json(text)
