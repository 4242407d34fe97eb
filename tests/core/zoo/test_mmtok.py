"""mmtok against its formula in plain loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import tokenprune
from tests.core.test_methods import Array, array
from tests.core.zoo.clusters import clustered, drawn
from tests.core.zoo.test_scope import cosines
from tokenprune import VisualTokens
from tokenprune.errors import OptionError, TokensError
from tokenprune.greedy.covering import Targets, cover
from tokenprune.registry import build


def softmax(values: Array) -> Array:
    result = np.zeros_like(values)
    for i, row in enumerate(values):
        raised = np.exp(row - row.max())
        result[i] = raised / raised.sum()
    return result


def coverage(t: Array, z: Array, x: Array, alpha: float, text: float, image: float) -> Array:
    """Return C, [M + N, N]."""
    of_image = softmax(cosines(x, x) / image) / len(x)
    if not len(t):
        return alpha * of_image
    return np.concatenate([softmax(cosines(t, z) / text) / len(t), alpha * of_image])


def covering(coverage: Array, keep: int) -> list[int]:
    """Take the token that adds most, one gain after another."""
    best, kept = np.zeros(len(coverage)), []
    for _ in range(keep):
        first, highest = -1, -math.inf
        for j in range(coverage.shape[1]):
            gain = float(np.maximum(0.0, coverage[:, j] - best).sum())
            if j not in kept and gain > highest:
                first, highest = j, gain
        kept.append(first)
        best = np.maximum(best, coverage[:, first])
    return sorted(kept)


def item(total: int, seed: int, asked: int = 6) -> VisualTokens:
    return VisualTokens(
        (1, 1, total),
        features=clustered(total, seed),
        embeddings=clustered(total, seed + 50, width=20),
        question_embeddings=clustered(asked, seed + 90, width=20)
        if asked
        else drawn(0, 20, seed=0),
    )


def expected(tokens: VisualTokens, keep: int, **options: float) -> list[int]:
    named = {"alpha": 0.5, "text_temperature": 0.02, "image_temperature": 0.2, **options}
    return covering(
        coverage(
            array(tokens.question_embeddings),
            array(tokens.embeddings),
            array(tokens.features),
            named["alpha"],
            named["text_temperature"],
            named["image_temperature"],
        ),
        keep,
    )


@pytest.mark.parametrize("seed", range(24))
def test_mmtok_is_its_formula(seed: int) -> None:
    total, asked = (49, 60, 81)[seed % 3], (1, 5, 13, 0)[seed % 4]
    tokens = item(total, seed, asked)
    options: dict[str, Any] = {}
    if seed % 2:
        options = {"text_temperature": 0.01, "alpha": 0.5 + seed / 10, "image_temperature": 0.1}
    for keep in (1, 9, 30, total - 1):
        found = tokenprune.select(tokens, "mmtok", keep, **options)
        assert found.kept.tolist() == expected(tokens, keep, **options)


def test_the_question_decides_what_the_image_does_not() -> None:
    """Tokens that all look alike, of which the question means two."""
    embeddings = torch.eye(12, dtype=torch.float64)
    tokens = VisualTokens(
        (1, 3, 4),
        features=torch.ones(12, 5),
        embeddings=embeddings,
        question_embeddings=embeddings[[7, 10]],
    )
    assert tokenprune.select(tokens, "mmtok", 2).kept.tolist() == [7, 10]
    assert tokenprune.select(tokens, "mmtok", 3).kept.tolist() == [0, 7, 10]


def test_a_long_item_in_blocks_is_as_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, keeps = item(90, 3), (1, 20, 89)
    short = [tokenprune.select(tokens, "mmtok", keep).kept.tolist() for keep in keeps]
    monkeypatch.setattr("tokenprune.greedy.covering.ALL_PAIRS", 64)
    monkeypatch.setattr("tokenprune.greedy.covering._BLOCK_ENTRIES", 90 * 7)
    assert [tokenprune.select(tokens, "mmtok", keep).kept.tolist() for keep in keeps] == short


@pytest.mark.parametrize("long", [False, True])
def test_excluded_tokens_come_last(monkeypatch: pytest.MonkeyPatch, long: bool) -> None:
    if long:
        monkeypatch.setattr("tokenprune.greedy.covering.ALL_PAIRS", 8)
    tokens = item(20, 4)
    assert tokens.features is not None
    rows = tokens.features[None]
    out = [1, 4, 5, 11]
    weights = torch.ones(1, 20).index_fill_(1, torch.tensor(out), -1.0)
    similar = coverage(np.zeros((0, 1)), np.zeros((0, 1)), array(rows[0]), 1.0, 1.0, 0.2)
    left = [place for place in range(20) if place not in out]
    for keep in (1, 9, 16):
        found = cover([Targets(rows, rows, 0.2)], keep, weights=weights)[0].tolist()
        assert found == sorted(left[place] for place in covering(similar[:, left], keep))
    found = cover([Targets(rows, rows, 0.2)], 18, weights=weights)[0].tolist()
    assert found == sorted([*left, 1, 4])


@pytest.mark.parametrize("option", ["text_temperature", "image_temperature", "alpha"])
def test_options_that_are_refused(option: str) -> None:
    with pytest.raises(OptionError, match=rf"{option}=0\.0 .* must be above 0; the authors have"):
        build("mmtok", {option: 0.0})


def test_embeddings_of_another_width_are_refused() -> None:
    with pytest.raises(TokensError, match=r"question_embeddings has shape .* of one width"):
        VisualTokens((1, 2, 2), embeddings=torch.ones(4, 5), question_embeddings=torch.ones(2, 7))
