"""PruningConfig: method, keep and options as one value that goes to JSON and back.

It is stored in a checkpoint's config.json. What is read from there is checked as strictly as what a
caller passes: unknown keys are refused.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from tokenprune.budget import Budget, Keep
from tokenprune.errors import AbstainedError, ConfigError, did_you_mean, reason_of
from tokenprune.formats import KEY, check_format
from tokenprune.inside.base import InsideMethod
from tokenprune.registry import build_any, no_selector
from tokenprune.scope import Scope, check_scope
from tokenprune.selectors.base import Selector

FORMAT = 1
"""Rises when the meaning of a written configuration changes."""

ABSTAINED = "abstained"
"""The key of what `tokenprune calibrate` writes for a method without a budget."""

Positions = Literal["original", "compact"]
"""The positions of kept tokens in the language model: those of the full prompt, or renumbered."""

Application = Literal["drop", "mask"]
"""What happens to tokens that were not selected: taken out of the prompt, or hidden in it."""


def check_positions(positions: Positions) -> Positions:
    """Return `positions` if it is a way to count them.

    Raises
    ------
    ConfigError
        If it is not.
    """
    if positions not in get_args(Positions):
        raise ConfigError(
            f"positions={positions!r} is not a way to count positions. "
            f"{did_you_mean(str(positions), get_args(Positions))}"
        )
    return positions


@dataclass(frozen=True)
class PruningConfig:
    """How to prune: a method, its options, a budget and how positions are counted.

    Parameters
    ----------
    method
        A name out of `tokenprune.methods()`, or of a method inside the language model
        (`tokenprune.registry.inside_methods`), which models of transformers take.
    keep
        A number of tokens (int) or a fraction (float) of each image or video.
    positions
        ``"original"``: each kept token keeps the position it has in the full image, and the text
        after it its own. ``"compact"``: the shorter prompt is numbered without gaps.
    options
        The method's own options; what is left out takes the paper's default. They are copied.
    scope
        ``"item"``: each image, crop of an image or video has a budget and a set of its own.
        ``"image"``: the crops of an image have them together, `keep` tokens for each of them, or a
        share of all, wherever they lie; see `tokenprune.scope`.

    Raises
    ------
    ConfigError, UnknownMethodError, OptionError, BudgetError
        On construction, for any value that cannot be used.
    """

    method: str
    keep: Keep
    positions: Positions = "original"
    options: dict[str, Any] = field(default_factory=dict)
    scope: Scope = "item"

    def __post_init__(self) -> None:
        # `cached_property` writes to the instance's __dict__, past the frozen class's refusal.
        object.__setattr__(self, "keep", self.budget.keep)
        check_positions(self.positions)
        # A caller that changes its dict later must not change what the selector was built from.
        object.__setattr__(self, "options", dict(self.options))
        check_scope(self.scope, self.built())

    @functools.cached_property
    def budget(self) -> Budget:
        """`keep`, checked: what is handed on to `tokenprune.select_many`."""
        return Budget.of(self.keep)

    @functools.cached_property
    def _built(self) -> Selector | InsideMethod:
        return build_any(self.method, self.options)

    def built(self) -> Selector | InsideMethod:
        """Return the method with its options, of whatever kind, the same object each time."""
        return self._built

    def selector(self) -> Selector:
        """Return the method with its options, the same object each time.

        Raises
        ------
        UnknownMethodError
            If it is a method inside the language model, which is no selector.
        """
        if isinstance(self._built, InsideMethod):
            raise no_selector(type(self._built))
        return self._built

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what was built: a copy or a pickle has the fields, and builds its own.

        A selector may hold on to what cannot be copied, and a plugin's class may be missing where
        the pickle is read.
        """
        return {known.name: getattr(self, known.name) for known in fields(self)}

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types: ``{"method", "keep", "positions", "options"}``, and the scope.

        A published budget is written as its name, which says where the number is from. A scope of
        ``"item"`` is left out, as it was before there was another one.
        """
        values = {
            "method": self.method,
            "keep": self.keep if self.budget.published is None else self.budget.published.name,
            "positions": self.positions,
            "options": dict(self.options),
        }
        return values if self.scope == "item" else {**values, "scope": self.scope}

    def to_json(self) -> str:
        """Return `to_dict` and the format as JSON text."""
        return json.dumps({KEY: FORMAT, **self.to_dict()}, indent=2)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PruningConfig:
        """Build the config from what `to_dict` returned, or what stood in `to_json`.

        Raises
        ------
        AbstainedError
            If it is what `tokenprune calibrate` wrote for a method that has no budget.
        ConfigError
            For a missing or an unknown key, or a newer format; everything else as on construction.
        """
        if not isinstance(values, dict):
            raise ConfigError(
                f"a pruning configuration is an object with method and keep, not {values!r}."
            )
        advice = "Write the configuration again with this version."
        what = "a pruning configuration"
        values = check_format(values, FORMAT, what, advice, kind=ConfigError)
        _check_is_none_of_calibrate(values)
        known = ("method", "keep", "positions", "options", "scope")
        for key in values:
            if key not in known:
                raise ConfigError(
                    f"a pruning configuration has no key {key!r}. {did_you_mean(str(key), known)}"
                )
        for key in ("method", "keep"):
            if key not in values:
                raise ConfigError(f"a pruning configuration needs the key {key!r}; got {values}.")
        if not isinstance(values.get("options", {}), dict):
            raise ConfigError(
                f"options={values['options']!r} is not an object of names and values."
            )
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> PruningConfig:
        """Build the config from JSON text.

        Raises
        ------
        ConfigError
            If the text is not JSON; everything else as `from_dict`.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"a pruning configuration must be JSON: {reason_of(error)}."
            ) from error
        return cls.from_dict(values)


def _check_is_none_of_calibrate(values: dict[str, Any]) -> None:
    """Raise for what `tokenprune calibrate` writes beside configurations."""
    if values.get(ABSTAINED) is True:
        given = values.get("next")
        advice = [str(one) for one in given] if isinstance(given, list) else []
        said = " ".join([str(values.get("message", "")), *advice]).strip()
        raise AbstainedError(
            f"this is no budget: `tokenprune calibrate` abstained. {said} To run the model "
            "unpruned, leave the configuration out."
        )
    if {"found", "decisions"} <= values.keys():
        raise ConfigError(
            "this is the log of `tokenprune calibrate`, and no pruning configuration. Give the "
            "file of a method beside it, METHOD.json."
        )
