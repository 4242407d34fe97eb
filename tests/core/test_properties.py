"""What holds for every registered method, whoever wrote it."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenprune
from tests.hf.lites import saved
from tokenprune import MLPProjector, Selection, VisualTokens
from tokenprune.errors import TokensError
from tokenprune.registry import build, find
from tokenprune.selecting import select_many
from tokenprune.selectors.base import Selector
from tokenprune.testing import (
    CHECKS,
    C,
    D,
    Largest,
    make_item,
    make_projector,
)
from tokenprune.tokens import INPUTS, TokenBatch

METHODS = list(tokenprune.methods())
LOOKING = [name for name, method in tokenprune.methods().items() if method.needs]


@functools.cache
def lite_folder() -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory()
    saved(Path(folder.name), C, 10, "llava")
    return folder


def options_of(method: str) -> dict[str, Any]:
    """Return the options without which a method cannot be had."""
    return {"path": lite_folder().name} if method == "flexselect-lite" else {}


def choose(tokens: VisualTokens, method: str, keep: Any, **options: Any) -> Selection:
    return tokenprune.select(tokens, method, keep, **options_of(method), **options)


def promises(method: str) -> list[str]:
    """Return the checks that a method keeps to."""
    by_place = find(method).by_place
    broken = {"first_of_equal_tokens_in_time"} if by_place else set()
    if by_place == "place":
        broken |= {"first_of_equal_tokens"}
    return [name for name in CHECKS if name not in broken]


@pytest.mark.parametrize(
    ("method", "check"), [(method, check) for method in METHODS for check in promises(method)]
)
def test_every_method_keeps_what_selectors_promise(method: str, check: str) -> None:
    CHECKS[check](build(method, options_of(method)), make_item)


def same(one: Selection, other: Selection) -> bool:
    return torch.equal(one.kept, other.kept) and (
        (one.scores is None and other.scores is None)
        or (
            one.scores is not None
            and other.scores is not None
            and torch.equal(one.scores, other.scores)
        )
    )


def test_what_comes_twice_or_is_known_is_not_scored_again() -> None:
    seen: list[int] = []

    class Counting(Selector):
        name, needs = "counting", ("embeddings",)

        def score(self, tokens: TokenBatch) -> Tensor:
            seen.append(tokens.size)
            return tokens.require("embeddings").sum(dim=-1)

    one, other = make_item((1, 3, 5), seed=1), make_item((1, 3, 5), seed=2)
    selections = select_many([one, other, one, one], Counting(), 4)
    assert seen == [2]
    assert same(selections[2], selections[0])
    assert not same(selections[1], selections[0])
    select_many([one, other], Counting(), 6, known=selections[:2])
    assert select_many([one], Counting(), 4, known=selections[:1])[0] is selections[0]
    assert seen == [2]


@pytest.mark.parametrize("method", [name for name in LOOKING if find(name).by_place != "place"])
def test_tokens_of_zeros(method: str) -> None:
    item = make_item((1, 2, 3))
    zero: dict[str, Any] = {
        name: torch.zeros_like(getattr(item, name))
        for name in INPUTS
        if name not in ("projector", "question")
    }
    zeros = replace(item, **zero)
    assert choose(zeros, method, 4).kept.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("method", LOOKING)
def test_what_is_missing_is_named(method: str) -> None:
    needs = tokenprune.methods()[method].needs
    with pytest.raises(TokensError, match=rf"image 7: this method needs {needs[0]}"):
        choose(VisualTokens((1, 1, 2), label="image 7"), method, 1)


@pytest.mark.parametrize("method", ["divprune", "information", "zeroth-order"])
def test_memory_is_linear_in_tokens(method: str) -> None:
    total = 3000
    tokens = make_item((1, 50, 60))
    with Largest() as largest:
        choose(tokens, method, 12)
    assert total * D <= largest.elements <= total * 64 < total * total // 40


if torch.cuda.is_available():  # collected only where it can run

    @pytest.mark.parametrize("method", METHODS)
    def test_cuda_selects_what_the_cpu_selects(method: str) -> None:
        projector = make_projector()
        on_cuda = MLPProjector(
            nn.Linear(C, 29).cuda(), nn.GELU(), nn.Linear(29, D).cuda(), nn.LayerNorm(C).cuda()
        )
        for layer, source in ((on_cuda.first, projector.first), (on_cuda.second, projector.second)):
            assert isinstance(layer, nn.Linear)
            assert isinstance(source, nn.Linear)
            layer.load_state_dict(source.state_dict())
        cpu = make_item((1, 23, 25))
        moved: dict[str, Any] = {
            name: tensor.cuda()
            for name in INPUTS
            if isinstance(tensor := getattr(cpu, name), Tensor)
        }
        selection = choose(VisualTokens(cpu.grid, projector=on_cuda, **moved), method, 40)
        assert selection.kept.is_cuda
        assert selection.kept.tolist() == choose(cpu, method, 40).kept.tolist()
