from __future__ import annotations

import json
from typing import Any

import pytest

from tokenprune import PruningConfig
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
