from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import tokenprune
from tokenprune import Selector, TokenBatch
from tokenprune.errors import OptionError, RegistryError, UnknownMethodError
from tokenprune.registry import (
    KINDS,
    Method,
    build,
    build_any,
    find,
    inside_methods,
    listed,
    register,
)
from tokenprune.tokens import INPUTS

PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar
import torch
from tokenprune import Selector, TokenBatch

@dataclass(frozen=True)
class Last(Selector):
    gain: float = 1.0
    name: ClassVar[str] = "last"
    summary: ClassVar[str] = "the last tokens"
    needs: ClassVar[tuple[str, ...]] = ()

    def score(self, tokens: TokenBatch) -> torch.Tensor:
        return torch.arange(tokens.total).float().mul(self.gain).expand(tokens.size, -1)

class NotASelector:
    name = "odd"

from tokenprune.inside.base import InsideMethod, Stage

@dataclass(frozen=True)
class Halfway(InsideMethod):
    layer: int = 3
    name: ClassVar[str] = "halfway"
    summary: ClassVar[str] = "tokens of one layer"

    def stages(self, depth: int) -> tuple[Stage, ...]:
        return (Stage(self.layer, self.layer),)

from tokenprune.registry import Method
INSIDE = Method("late", "inside", "tokens of late layers", "", "plugin_of_a_test.late(model)")
NOWHERE = Method("late", "nowhere", "tokens of late layers", "", "plugin_of_a_test.late(model)")
"""


def install(
    folder: Path,
    entries: str,
    monkeypatch: pytest.MonkeyPatch,
    group: str = "tokenprune.selectors",
) -> None:
    """Lay out what installing a package with these entry points would."""
    (folder / "plugin_of_a_test.py").write_text(PLUGIN)
    info = folder / "plugin_of_a_test-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin-of-a-test\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{entries}\n")
    monkeypatch.syspath_prepend(str(folder))


def test_own_methods() -> None:
    methods = tokenprune.methods()
    assert {"cls-attention", "divprune", "feature-norm", "random", "uniform", "zeroth-order"} <= {
        *methods
    }
    assert list(methods) == sorted(methods)
    for name, selector in methods.items():
        assert selector.name == name
        assert selector.summary
        assert selector.__doc__
        assert set(selector.needs) <= set(INPUTS)
        if name != "flexselect-lite":  # which has no default: somebody has to train one
            assert selector.from_options({}) == selector()


def test_unknown_method() -> None:
    with pytest.raises(UnknownMethodError, match=r"Did you mean 'divprune'\? Allowed: .*cls-att"):
        tokenprune.select(tokenprune.VisualTokens(grid=(1, 2, 2)), "div-prune", 1)


def test_a_method_that_is_no_selector_says_how_it_is_called() -> None:
    with pytest.raises(
        UnknownMethodError,
        match=r"prunes in cross-attention.*Call tokenprune_hf\.trim_cross_attention\(model, keep\)",
    ):
        find("trimmed-attention")


@pytest.mark.parametrize("name", ["fastv", "pyramid-drop", "sparsevlm"])
def test_methods_inside_the_language_model_are_no_selectors(name: str) -> None:
    says = rf"prunes inside the language model.*Call tokenprune_hf\.prune\(model, '{name}', keep\)"
    tokens = tokenprune.VisualTokens(grid=(1, 2, 2))
    with pytest.raises(UnknownMethodError, match=says):
        tokenprune.select(tokens, name, 1)
    config = tokenprune.PruningConfig(name, 1)
    with pytest.raises(UnknownMethodError, match=says):
        config.selector()
    assert config.built() == build_any(name, {}) == inside_methods()[name]()
    assert config.built() is config.built()
    assert tokenprune.PruningConfig.from_json(config.to_json()) == config


def test_a_package_brings_a_method_inside_the_language_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "halfway = plugin_of_a_test:Halfway", monkeypatch, "tokenprune.inside")
    assert listed()["halfway"].kind == "inside"
    assert listed()["halfway"].options == {"layer": 3}
    method: Any = build_any("halfway", {"layer": 5})
    assert [stage.layer for stage in method.stages(8)] == [5]
    with pytest.raises(OptionError, match=r"no option 'later'\. Did you mean 'layer'"):
        build_any("halfway", {"later": 5})


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ("divprune = plugin_of_a_test:Halfway", "two methods are called 'divprune'"),
        ("other = plugin_of_a_test:Halfway", "calls itself 'halfway'"),
        ("odd = plugin_of_a_test:NotASelector", "no subclass of tokenprune.inside.base.Inside"),
    ],
)
def test_a_method_inside_the_language_model_that_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: str, says: str
) -> None:
    install(tmp_path, entries, monkeypatch, "tokenprune.inside")
    with pytest.raises(RegistryError, match=says):
        listed()


def test_methods_of_all_kinds_are_listed() -> None:
    every = listed()
    assert list(every) == sorted(every)
    assert {name for name, method in every.items() if method.kind == "before"} == {
        *tokenprune.methods()
    }
    inside = {name for name, method in every.items() if method.kind == "inside"}
    assert inside == set(inside_methods()) == {"fastv", "pyramid-drop", "sparsevlm"}
    assert set(every) - set(tokenprune.methods()) - inside == {"trimmed-attention"}
    for name, method in every.items():
        assert method.name == name
        assert method.kind in KINDS
        assert method.summary
        assert method.call


def test_the_options_listed_are_those_of_the_function() -> None:
    import tokenprune_hf

    listed_options = dict(listed()["trimmed-attention"].options)
    parameters = inspect.signature(tokenprune_hf.trim_cross_attention).parameters.values()
    assert listed_options == {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def test_a_package_brings_a_method_of_another_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "late = plugin_of_a_test:INSIDE", monkeypatch, "tokenprune.methods")
    assert listed()["late"] == Method(
        "late", "inside", "tokens of late layers", "", "plugin_of_a_test.late(model)"
    )
    assert "late" not in tokenprune.methods()
    with pytest.raises(UnknownMethodError, match=r"inside the .* Call plugin_of_a_test\.late\("):
        find("late")


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ("late = plugin_of_a_test:NOWHERE", "of a kind out of before, inside, cross-attention"),
        ("last = plugin_of_a_test:INSIDE", "which must be a tokenprune.registry.Method of that"),
        ("odd = plugin_of_a_test:NotASelector", "which must be a tokenprune.registry.Method"),
        ("gone = plugin_of_a_test:Gone", "the method 'gone' cannot be loaded"),
        ("random = plugin_of_a_test:INSIDE", "two methods are called 'random'"),
    ],
)
def test_a_method_of_another_kind_that_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: str, says: str
) -> None:
    install(tmp_path, entries, monkeypatch, "tokenprune.methods")
    with pytest.raises(RegistryError, match=says):
        listed()


def test_a_package_brings_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "last = plugin_of_a_test:Last", monkeypatch)
    tokens = tokenprune.VisualTokens(grid=(1, 2, 3))
    assert tokenprune.select(tokens, "last", 2).kept.tolist() == [4, 5]
    assert tokenprune.select(tokens, "last", 2, gain=-1).kept.tolist() == [0, 1]
    assert tokenprune.methods()["last"].summary == "the last tokens"
    assert tokenprune.PruningConfig("last", 2, options={"gain": 2.0}).to_dict()["method"] == "last"


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ("random = plugin_of_a_test:Last", "two selectors are called 'random'"),
        ("first = plugin_of_a_test:Last", "calls itself 'last'"),
        ("odd = plugin_of_a_test:NotASelector", "no subclass of"),
        ("gone = plugin_of_a_test:Gone", "cannot be loaded"),
        ("gone = no_such_module_of_a_test:Gone", "cannot be loaded"),
    ],
)
def test_a_package_that_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: str, says: str
) -> None:
    install(tmp_path, entries, monkeypatch)
    with pytest.raises(RegistryError, match=says):
        tokenprune.methods()


def test_a_broken_package_leaves_the_other_methods_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "gone = plugin_of_a_test:Gone", monkeypatch)
    kept = tokenprune.select(tokenprune.VisualTokens(grid=(1, 1, 3)), "uniform", 1).kept
    assert torch.equal(kept, torch.tensor([1]))


def test_a_selector_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenprune.registry._here", {})

    @dataclass(frozen=True)
    class First(Selector):
        name: ClassVar[str] = "first"
        summary: ClassVar[str] = "the first tokens"
        needs: ClassVar[tuple[str, ...]] = ()

        def score(self, tokens: TokenBatch) -> torch.Tensor:
            return -torch.arange(tokens.total).float().expand(tokens.size, -1)

    with pytest.raises(UnknownMethodError):
        build("first", {})
    register(First)
    register(First)
    assert tokenprune.methods()["first"] is First
    assert list(tokenprune.methods()) == sorted(tokenprune.methods())
    tokens = tokenprune.VisualTokens(embeddings=torch.rand(9, 4), grid=(1, 3, 3))
    assert tokenprune.select(tokens, "first", keep=4).kept.tolist() == [0, 1, 2, 3]

    other = type("Other", (First,), {"name": "first"})
    for taken in (other, type("Taken", (First,), {"name": "divprune"})):
        with pytest.raises(RegistryError, match=r"already: .*:.*another `name`"):
            register(taken)
    assert tokenprune.methods()["first"] is First
