"""Coverage against a softmax over everything, labels by hand, and sinks that were planted."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from tests.core.test_masks import LAYOUT, brute
from tokenprune.errors import ConfigError, LayoutError, TokensError
from tokenprune.masks import Causal, ImageSpan, Mask, PromptLayout, Thresholds, Window, heads_mask
from tokenprune.masks import coverage as module
from tokenprune.masks.coverage import (
    PromptCoverage,
    categories_of,
    coverage,
    densities,
    expected_density,
    received,
    thresholds,
)
from tokenprune.masks.heads import layout_with_sinks
from tokenprune.masks.patterns import CATEGORIES, Category
from tokenprune.masks.sinks import Sinks, SinkSearch, massive_activations

SINK, INTRA, BOTH, DENSE = range(4)
"""Places in `CATEGORIES`."""


def queries_and_keys(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(4, LAYOUT.length, 16, generator=generator)
    return 2 * query, torch.randn(2, LAYOUT.length, 16, generator=generator)


def full_attention(query: Tensor, key: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """Float64 [H, L, L], in one piece."""
    wide = key.double().repeat_interleave(2, dim=0)
    logits = query.double() @ wide.transpose(1, 2) * scale
    return logits.masked_fill(~allowed, -torch.inf).softmax(dim=-1)


@pytest.mark.parametrize("at_once", [2**24, 4 * 300 * 7])
@pytest.mark.parametrize("window", [None, 120])
def test_coverage_is_that_of_the_whole_attention(
    window: int | None, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_NUMBERS_AT_ONCE", at_once)
    query, key = queries_and_keys()
    own: Mask | None = None if window is None else Causal(300) & Window(300, window)
    far = torch.arange(300)[:, None] - torch.arange(300)
    allowed = (far >= 0) & (far < (window or 300))
    attention = full_attention(query, key, allowed, 0.3)
    contested = [query for query in range(300) if 101 <= query < 197 or 197 <= query < 290]
    found = coverage(query, key, LAYOUT, scale=0.3, model=own)
    assert (found.shape, found.dtype) == ((4, 4), torch.float32)
    for number, category in enumerate(CATEGORIES):
        inside = (attention * brute(category)).sum(dim=-1)[:, contested].mean(dim=1)
        torch.testing.assert_close(found[:, number], inside.float())
    assert bool((found[:, DENSE] == 1).all())
    assert 0.1 < float(found[:, BOTH].min()) < float(found[:, BOTH].max()) < 0.95

    got = torch.zeros(300, dtype=torch.float64)
    for behind in range(101, 290):
        ends = 99 if behind < 197 else 197
        keys = [one for one in range(ends) if 3 <= one < 99 or 101 <= one < 197]
        got[keys] += attention[:, behind, keys].sum(dim=0)
    torch.testing.assert_close(
        received(query, key, LAYOUT, scale=0.3, model=own), got.float(), rtol=1e-4, atol=1e-5
    )


def test_half_precision_is_measured_in_float32() -> None:
    query, key = (one.bfloat16() for one in queries_and_keys())
    rounded = coverage(query.float(), key.float(), LAYOUT)
    torch.testing.assert_close(coverage(query, key, LAYOUT), rounded, rtol=1e-6, atol=1e-6)


def test_what_cannot_be_measured_is_refused() -> None:
    query, key = queries_and_keys()
    for layout in (PromptLayout(300, (ImageSpan(3, 99),)), PromptLayout(300)):
        for function in (coverage, received):
            with pytest.raises(LayoutError, match="two or more images"):
                function(query, key, layout)
    with pytest.raises(LayoutError, match="do not fit a prompt of 300 tokens"):
        coverage(query[:, :299], key, LAYOUT)
    with pytest.raises(LayoutError, match="do not fit"):
        coverage(query[:3], key, LAYOUT)
    key[0, 100] = torch.inf
    with pytest.raises(TokensError, match="NaN or infinite"):
        coverage(query, key, LAYOUT)


# Labels and categories --------------------------------------------------------------------------

RISING = torch.tensor([[0.2, 0.4, 0.6, 1.0]], dtype=torch.float64)


def prompt(*held: list[float], density: Tensor = RISING) -> PromptCoverage:
    """One layer, whose heads have these coverages of sink, intra and intra+sink."""
    rows = torch.tensor([[[*row, 1.0] for row in held]])
    return PromptCoverage(rows, density)


def test_the_label_is_the_sparsest_mask_that_holds_enough() -> None:
    one = prompt([0.95, 0.99, 0.99], [0.5, 0.9, 0.95], [0.5, 0.6, 0.91], [0.5, 0.6, 0.8])
    assert one.labels([0.875]).tolist() == [[SINK, INTRA, BOTH, DENSE]]
    assert one.labels([0.0]).tolist() == [[SINK] * 4]
    assert one.labels([1.0]).tolist() == [[DENSE] * 4]
    # With small images the window of `sink` may be the denser mask; equal ones keep their order.
    other = prompt([0.95, 0.99, 0.99], density=torch.tensor([[0.5, 0.4, 0.6, 1.0]]))
    assert other.labels([0.9]).tolist() == [[INTRA]]
    equal = prompt([0.95, 0.99, 0.99], [0.1, 0.99, 0.99], density=torch.ones(1, 4))
    assert equal.labels([0.9]).tolist() == [[SINK, INTRA]]


def test_each_layer_has_its_own_alpha_and_density() -> None:
    held = torch.tensor([[[0.85, 0.95, 1.0, 1.0]]] * 3)
    density = torch.cat([RISING, RISING, RISING[:, [1, 0, 2, 3]]])
    one = PromptCoverage(held, density)
    assert one.labels([0.8, 0.9, 0.8]).tolist() == [[SINK], [INTRA], [INTRA]]


PASSES = {
    "sink": [1.0, 1.0, 1.0],
    "intra": [0.0, 1.0, 1.0],
    "intra+sink": [0.0, 0.0, 1.0],
    "dense": [0.0, 0.0, 0.0],
}
"""Coverages that give these labels."""


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("s s s s", "sink"),
        ("s s s i", "sink"),  # exactly the share
        ("s s i i", "intra+sink"),
        ("i i i b", "intra"),
        ("s s s d", "sink"),  # as many dense ones as are allowed
        ("s s d d", "dense"),
        ("b b b d", "intra+sink"),
        ("i i b d", "intra+sink"),
    ],
)
def test_prompts_decide_together(labels: str, expected: Category) -> None:
    names = {name[0] if name != "intra+sink" else "b": name for name in PASSES}
    prompts = [prompt(PASSES[names[letter]]) for letter in labels.split()]
    limits = Thresholds(alpha=(0.5,), dense=0.25, sink=0.75, intra=0.75)
    assert categories_of(prompts, limits) == ((expected,),)
    # Sink comes before intra where both are frequent enough.
    low = Thresholds(alpha=(0.5,), dense=1.0, sink=0.5, intra=0.5)
    halves = [prompt(PASSES["sink"]), prompt(PASSES["intra"])]
    assert categories_of(halves, low) == (("sink",),)


def test_density_is_the_mean_of_the_masks() -> None:
    layouts = [
        LAYOUT,
        PromptLayout(420, (ImageSpan(0, 130), ImageSpan(131, 260), ImageSpan(260, 400))),
    ]
    categories: tuple[tuple[Category, ...], ...] = (
        ("sink", "intra", "dense"),
        ("intra+sink", "sink", "sink"),
    )
    measured, expected = [], 0.0
    for layout in layouts:
        owns = [Causal(layout.length), Causal(layout.length) & Window(layout.length, 100)]
        measured.append(
            PromptCoverage(
                torch.zeros(2, 3, 4), torch.stack([densities(layout, own, 32) for own in owns])
            )
        )
        for layer, own in zip(categories, owns, strict=True):
            expected += heads_mask(layout, layer, own).density(32) / 4
    assert expected_density(measured, categories) == pytest.approx(expected)
    assert 0.1 < expected < 0.9


def test_thresholds_are_checked() -> None:
    assert thresholds(3, (0.9, 0.7)).alpha == pytest.approx((0.9, 0.8, 0.7))
    assert thresholds(2).alpha == (0.9, 0.9)
    assert thresholds(1, [0.9, 0.7]).alpha == (0.9,)
    for wrong in ({"alpha": 0.0}, {"alpha": 1.01}, {"alpha": (0.9, float("nan"))}, {"dense": -0.1}):
        with pytest.raises(ConfigError, match="is no share"):
            thresholds(2, **cast(Any, wrong))
    with pytest.raises(ConfigError, match="has 3 numbers"):
        thresholds(3, (0.9, 0.8, 0.7))
    with pytest.raises(LayoutError, match="an alpha for every layer"):
        categories_of([prompt([1.0, 1.0, 1.0])], thresholds(2))
    with pytest.raises(LayoutError, match="at least one prompt"):
        categories_of([], thresholds(2))


# Sinks ------------------------------------------------------------------------------------------

IMAGES = (ImageSpan(2, 42), ImageSpan(43, 83), ImageSpan(84, 124))
PLAIN = PromptLayout(130, IMAGES)


def keys_with_sinks(places: list[int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(4, 130, 16, generator=generator) + 0.5
    key = torch.randn(2, 130, 16, generator=generator)
    key[:, places] = 4.0
    return query, key


def search(attended: list[int], states: list[Tensor], width: int = 900) -> Sinks:
    found = SinkSearch(width)
    query, key = keys_with_sinks(attended)
    massive = [massive_activations(one) for one in states]
    found.add(PLAIN, received(query, key, PLAIN), massive)
    return found.result()


def test_planted_sinks_are_found() -> None:
    # The first and the last token of both images that others follow, and one amid both of them.
    found = search([2, 43, 41, 82, 20, 61], [])
    assert found.places == (0, -1)
    assert found.attended == {0: 1.0, -1: 1.0}
    assert (found.attended_in, found.images) == (2, 3)
    half = search([2, 46], [])
    assert half.attended == {0: 0.5, 3: 0.5}
    assert search([], []).places == ()
    layout = layout_with_sinks(130, IMAGES, found.places)
    assert layout.sinks == (2, 41, 43, 82, 84, 123)


def test_coverage_of_planted_sinks() -> None:
    query, key = keys_with_sinks([2, 43])
    without = coverage(query, key, PLAIN)
    found = coverage(query, key, layout_with_sinks(130, IMAGES, (0,)))
    assert bool((found[:, BOTH] > without[:, BOTH] + 0.3).all())
    assert torch.equal(found[:, INTRA], without[:, INTRA])


def hidden(tokens: dict[int, int], seed: int = 0) -> Tensor:
    """Noise [130, 900], in which these tokens are huge in one dimension each."""
    states = torch.randn(130, 900, generator=torch.Generator().manual_seed(seed))
    for token, dimension in tokens.items():
        states[token, dimension] = -300.0
    return states


def test_planted_massive_activations_are_found() -> None:
    # The first token says 7, a delimiter (place 83) says 12. Of image tokens, 3 from the start is
    # huge in two images of three, the last in one, a middle one in one; the last image's first
    # token only where neither is.
    early = hidden({0: 7, 5: 7, 46: 12})
    late = hidden({83: 12, 123: 7, 60: 12, 84: 500, 5: 7}, seed=1)
    found = search([], [early, late])
    assert found.dimensions == (7, 12)
    assert found.massive == {3: pytest.approx(2 / 3)}
    assert found.places == (3,)
    assert (found.tokens, found.covered) == (4, 2)
    assert found.can_be_massive
    # Of tokens alone no dimension follows.
    alone = search([], [hidden({5: 7, 46: 7, 87: 7})])
    assert (alone.dimensions, alone.tokens, alone.places) == ((), 0, ())


def test_the_massive_test_is_the_formula() -> None:
    states = torch.tensor([[0.0] * 500, [1.0] * 500, [3.0] + [0.0] * 499, [21.5] + [1.0] * 499])
    # 3 / sqrt(9 / 500) is the root of 500; 21.5 / sqrt((21.5 ** 2 + 499) / 500) is below 16.
    assert massive_activations(states).tolist() == [[2, 0]]
    assert massive_activations(states, tau=15.0).tolist() == [[2, 0], [3, 0]]
    assert massive_activations(states, tau=500**0.5 + 0.01).tolist() == []


def test_where_nothing_can_be_found_it_is_said() -> None:
    narrow = SinkSearch(400).result()
    assert not narrow.can_be_massive
    assert SinkSearch(401).result().can_be_massive
    small = PromptLayout(30, (ImageSpan(1, 11), ImageSpan(12, 22)))
    tiny = SinkSearch(900)
    attention = torch.zeros(30)
    attention[1] = 1.0
    tiny.add(small, attention, [])
    assert tiny.result().attended_in == 0
    assert tiny.result().places == ()
