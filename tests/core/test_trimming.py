"""Per-head scores and their union against loops over whole softmax maps."""

from __future__ import annotations

import functools
import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from tokenprune import trimming
from tokenprune.errors import BudgetError, TokensError
from tokenprune.trimming import head_scores, union_of_heads


def _noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _loops(query: Tensor, key: Tensor, scale: float, seen: Tensor, reduction: str) -> Tensor:
    """[H, N], one number of q kᵀ after the other."""
    heads, queries, _ = query.shape
    groups, total, _ = key.shape
    result = torch.zeros(heads, total, dtype=torch.float64)
    for head in range(heads):
        group = head // (heads // groups)
        for row in range(queries):
            weights = [
                math.exp(float(query[head, row].double() @ key[group, token].double()) * scale)
                if bool(seen[row, token])
                else 0.0
                for token in range(total)
            ]
            whole = sum(weights)
            for token in range(total):
                share = weights[token] / whole if whole else 0.0
                before = float(result[head, token])
                result[head, token] = before + share if reduction == "sum" else max(before, share)
    return result


@pytest.mark.parametrize("reduction", ["sum", "max"])
@pytest.mark.parametrize("at_once", [1, 2**24])
def test_scores_equal_the_loops(
    reduction: Literal["sum", "max"], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trimming, "_LOGITS_AT_ONCE", at_once)
    query, key = _noise(6, 5, 4, seed=0), _noise(2, 9, 4, seed=1)
    seen = _noise(5, 9, seed=2) > -0.5
    seen[3] = False  # this one sees nothing
    seen[:, 4] = False  # and this token is seen by none
    scores = head_scores(query, key, 0.7, seen, reduction)
    assert scores.dtype == torch.float32
    # float32, summed over five queries
    close = functools.partial(torch.testing.assert_close, atol=3e-7, rtol=1e-6)
    wanted = _loops(query, key, 0.7, seen, reduction)
    close(scores.double(), wanted)
    assert not scores[:, 4].any()
    everywhere = torch.ones(5, 9, dtype=torch.bool)
    close(
        head_scores(query, key, 0.7, None, reduction).double(),
        _loops(query, key, 0.7, everywhere, reduction),
    )


def test_half_precision_is_scored_in_float32() -> None:
    query, key = _noise(4, 5, 8, seed=3).bfloat16(), _noise(4, 7, 8, seed=4).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = head_scores(query, key, 0.3)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, head_scores(query.float(), key.float(), 0.3))


@pytest.mark.parametrize("keep", [1, 3, 100, 0.25, 0.5, 1.0])
def test_the_union_equals_ranking_in_python(keep: float) -> None:
    scores = (_noise(4, 20, seed=5).softmax(dim=-1) * 20).round() / 20  # many ties
    counted = torch.ones(20, dtype=torch.bool)
    counted[[0, 7, 19]] = False
    numbers = [token for token in range(20) if bool(counted[token])]
    count = min(keep, 17) if isinstance(keep, int) else max(1, math.floor(keep * 17 + 0.5))
    wanted = set()
    for head in scores.tolist():
        ranked = sorted((-head[token], token) for token in numbers)
        wanted |= {token for _, token in ranked[:count]}
    kept, best = union_of_heads(scores, keep, counted)
    assert kept.tolist() == sorted(wanted)
    for token in range(20):
        top = max(float(head[token]) for head in scores)
        assert float(best[token]) == (top if bool(counted[token]) else 0.0)


def test_heads_that_differ_keep_more_than_k() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.0, 0.0], [0.0, 0.1, 0.9, 0.0]])
    assert union_of_heads(scores, 1)[0].tolist() == [0, 2]
    assert union_of_heads(scores, 0.5)[0].tolist() == [0, 1, 2]
    equal = torch.full((3, 5), 0.2)
    assert union_of_heads(equal, 2)[0].tolist() == [0, 1]


def test_what_cannot_be_ranked_is_refused() -> None:
    with pytest.raises(TokensError, match="not finite"):
        union_of_heads(torch.tensor([[0.1, float("nan")]]), 1)
    with pytest.raises(BudgetError):
        union_of_heads(torch.ones(1, 3), 0)
    with pytest.raises(BudgetError):
        union_of_heads(torch.ones(1, 3), 1, torch.zeros(3, dtype=torch.bool))
