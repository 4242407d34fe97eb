"""scope against its formula in plain loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import tokenprune
from tests.core.test_methods import Array, array
from tests.core.zoo.clusters import clustered, drawn
from tokenprune import VisualTokens
from tokenprune.errors import OptionError
from tokenprune.registry import build


def cosines(one: Array, other: Array) -> Array:
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (one, other)]
    result: Array = unit[0] @ unit[1].T
    return result


def scoped(x: Array, a: Array, keep: int, alpha: float, combine: str) -> list[int]:
    """Take tokens as the formula says, one gain after another."""
    similar, total = cosines(x, x), len(x)
    covered, kept = np.zeros(total), []
    for _ in range(keep):
        best, best_score = -1, -math.inf
        for j in range(total):
            if j in kept:
                continue
            gain = float(np.maximum(0.0, similar[:, j] - covered).sum())
            score = gain * a[j] ** alpha if combine == "multi" else gain + a[j] ** alpha
            if score > best_score:
                best, best_score = j, score
        kept.append(best)
        covered = np.maximum(covered, similar[:, best])
    return sorted(kept)


@pytest.mark.parametrize("combine", ["multi", "add"])
@pytest.mark.parametrize("seed", range(12))
def test_scope_is_its_formula(seed: int, combine: str) -> None:
    total = (49, 64, 90)[seed % 3]
    alpha = (1.0, 1.0, 0.5, 2.0)[seed % 4]
    features = clustered(total, seed)
    attention = drawn(4, total, seed=seed + 100).softmax(-1)
    tokens = VisualTokens((1, 1, total), features=features, cls_attention=attention)
    summed = array(attention).sum(axis=0)
    for keep in (1, 7, 23, total - 1):
        found = tokenprune.select(tokens, "scope", keep, alpha=alpha, combine=combine)
        assert found.kept.tolist() == scoped(array(features), summed, keep, alpha, combine)
        assert found.scores is None


def test_what_is_covered_adds_nothing_and_the_first_one_follows() -> None:
    features = drawn(3, 5, seed=1)[torch.tensor([2, 0, 0, 1, 2, 1, 0])]
    attention = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.4, 0.1, 0.1])
    tokens = VisualTokens((1, 1, 7), features=features, cls_attention=attention)
    # One of each kind first, then the lowest that is left.
    kept = {keep: tokenprune.select(tokens, "scope", keep).kept.tolist() for keep in (3, 4, 5)}
    assert kept == {3: [1, 3, 4], 4: [0, 1, 3, 4], 5: [0, 1, 2, 3, 4]}
    # With attention added the rest comes by attention.
    attention[6] = 0.3
    added = tokenprune.select(tokens, "scope", 4, combine="add").kept.tolist()
    assert added == scoped(array(features), array(attention), 4, 1.0, "add")


def test_a_token_without_attention_ties_with_what_is_covered() -> None:
    features = torch.eye(3)[torch.tensor([0, 0, 1, 2])]
    attention = torch.tensor([0.5, 0.5, 0.0, 0.2])
    tokens = VisualTokens((1, 1, 4), features=features, cls_attention=attention)
    # 0 and 3, then token 1 (covered) and token 2 (weight 0) have nothing to add.
    for keep, kept in ((2, [0, 3]), (3, [0, 1, 3])):
        assert tokenprune.select(tokens, "scope", keep).kept.tolist() == kept


@pytest.mark.parametrize("combine", ["multi", "add"])
def test_a_long_item_in_blocks_is_as_a_short_one(
    monkeypatch: pytest.MonkeyPatch, combine: str
) -> None:
    features, attention = clustered(90, 5).float(), drawn(3, 90, seed=8).softmax(-1).float()
    tokens = VisualTokens((1, 9, 10), features=features, cls_attention=attention)
    expected = [
        tokenprune.select(tokens, "scope", keep, combine=combine).kept.tolist()
        for keep in (1, 20, 89)
    ]
    monkeypatch.setattr("tokenprune.greedy.covering.ALL_PAIRS", 64)
    monkeypatch.setattr("tokenprune.greedy.covering._BLOCK_ENTRIES", 90 * 7)
    for keep, kept in zip((1, 20, 89), expected, strict=True):
        found = tokenprune.select(tokens, "scope", keep, combine=combine)
        assert found.kept.tolist() == kept


@pytest.mark.parametrize("options", [{"alpha": -0.5}, {"combine": "sum"}])
def test_options_that_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        build("scope", options)
