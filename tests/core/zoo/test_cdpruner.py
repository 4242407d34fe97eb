"""cdpruner and cdpruner-llm against their formula in plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import tokenprune
from tests.core.test_methods import Array, array
from tests.core.zoo.clusters import clustered, drawn
from tests.core.zoo.test_scope import cosines
from tokenprune import VisualTokens


def scaled(relevance: Array) -> Array:
    lowest, highest = relevance.min(), relevance.max()
    if lowest == highest:
        return np.ones_like(relevance)
    result: Array = (relevance - lowest + 1e-6) / (highest - lowest)
    return result


def determinant(z: Array, relevance: Array, keep: int) -> list[int]:
    """Take tokens as the recursion says: of most variance left, then each one's part is taken."""
    similar = cosines(z, z)
    np.fill_diagonal(similar, 1.0)  # without rounding, which would decide among equal ones
    kernel = relevance[:, None] * similar * relevance[None]
    left, factors, kept = np.diag(kernel).copy(), np.zeros((0, len(z))), []
    for _ in range(keep):
        best = -1
        for i in range(len(z)):
            if i not in kept and (best < 0 or left[i] > left[best]):
                best = i
        kept.append(best)
        if left[best] > 1e-12:
            row = (kernel[best] - factors[:, best] @ factors) / math.sqrt(left[best])
            factors = np.concatenate([factors, row[None]])
            left = left - row**2
    return sorted(kept)


def mean_cosine(rows: Array, text: Array) -> Array:
    similar = cosines(text, rows)
    return np.array([sum(column) / len(text) for column in similar.T])


def item(total: int, seed: int) -> VisualTokens:
    return VisualTokens(
        (1, 1, total),
        # As wide as there are tokens: no token is a combination of others.
        embeddings=clustered(total, seed, width=total + 3)
        + 0.2 * drawn(total, total + 3, seed=seed),
        image_embeddings=clustered(total, seed + 20, width=16),
        text_embeddings=clustered(1 + seed % 3, seed + 40, width=16),
        question_embeddings=clustered(1 + seed % 9, seed + 60, width=total + 3),
    )


@pytest.mark.parametrize("seed", range(20))
def test_cdpruner_is_its_formula(seed: int) -> None:
    total = (49, 64, 80)[seed % 3]
    tokens = item(total, seed)
    relevance = scaled(-mean_cosine(array(tokens.image_embeddings), array(tokens.text_embeddings)))
    for keep in (1, 8, 30, total - 1):
        found = tokenprune.select(tokens, "cdpruner", keep)
        assert found.kept.tolist() == determinant(array(tokens.embeddings), relevance, keep)
        np.testing.assert_allclose(array(found.scores), relevance, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "max"])
@pytest.mark.parametrize("sign", ["plus", "minus"])
@pytest.mark.parametrize("seed", range(6))
def test_cdpruner_llm_is_its_formula(seed: int, sign: str, reduction: str) -> None:
    total = (49, 64)[seed % 2]
    tokens = item(total, seed)
    z, t = array(tokens.embeddings), array(tokens.question_embeddings)
    similar = mean_cosine(z, t) if reduction == "mean" else cosines(t, z).max(axis=0)
    relevance = scaled(similar if sign == "plus" else -similar)
    for keep in (1, 8, 30, total - 1):
        found = tokenprune.select(tokens, "cdpruner-llm", keep, sign=sign, reduction=reduction)
        assert found.kept.tolist() == determinant(z, relevance, keep)
    plus = tokenprune.select(tokens, "cdpruner-llm", 8).kept.tolist()
    assert plus == determinant(z, scaled(mean_cosine(z, t)), 8)


def test_above_the_rank_exactly_keep_tokens_stay() -> None:
    rows = torch.eye(3, dtype=torch.float64)[torch.tensor([0, 1, 1, 2, 0, 2])]
    tokens = VisualTokens(
        (1, 2, 3),
        embeddings=rows,
        image_embeddings=torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1], [0, 1], [0, 1]]),
        text_embeddings=torch.tensor([[1.0, 0.0], [0.0, 0.0]]),  # a segment that is padding
    )
    # Tokens 3 to 5 are unlike the text: of weight 1. All that is left then is 0.
    kept = {keep: tokenprune.select(tokens, "cdpruner", keep).kept.tolist() for keep in range(1, 6)}
    assert kept[2] == [3, 4]
    assert kept[3] == [1, 3, 4]
    assert kept[4] == [0, 1, 3, 4]
    assert kept[5] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("asked", [0, 1])
def test_where_all_are_equally_relevant_only_diversity_counts(asked: int) -> None:
    z = clustered(40, 3, width=44) + 0.1 * drawn(40, 44, seed=3)
    tokens = VisualTokens(
        (1, 5, 8), embeddings=z, question_embeddings=torch.zeros(asked, 44, dtype=torch.float64)
    )
    for reduction in ("mean", "max"):
        found = tokenprune.select(tokens, "cdpruner-llm", 12, reduction=reduction)
        assert found.kept.tolist() == determinant(array(z), np.ones(40), 12)
        assert found.scores is not None
        assert found.scores.unique().tolist() == [1.0]
