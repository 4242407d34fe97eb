"""PruMerge+ against its formula, in plain loops: tokens and rows; and as published."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tokenprune
from tests.core.zoo.images import (
    Array,
    Case,
    array,
    by_score,
    cosines,
    image,
    on_all_cases,
    rows_of,
)
from tokenprune import VisualTokens
from tokenprune.errors import OptionError, TokensError
from tokenprune.selectors.prumerge_plus import adaptive_count, adaptive_tokens


def straight(tokens: VisualTokens, keep: int, neighbours: int) -> tuple[list[int], Array]:
    """Return the tokens that stay, and the rows that the projector gets."""
    features, attention = array(tokens.features), array(tokens.wide_attention)
    keys = array(tokens.keys)
    similar = cosines(np.concatenate(list(keys), axis=1))
    order = by_score(attention)
    count = max(1, keep - 1)
    important = order[: max(1, count // 4)]
    others = sorted(set(order) - set(important))
    missing = count - len(important)
    chosen = important + [others[i * len(others) // missing] for i in range(missing)]
    rows = {}
    for token in chosen:
        near = [other for other in by_score(similar[token]) if other != token][:neighbours]
        rows[token] = features[token] + sum(attention[other] * features[other] for other in near)
    dropped = [token for token in order if token not in chosen]
    if keep > 1:
        rows[dropped[0]] = sum(attention[other] * features[other] for other in dropped)
    kept = sorted(rows)
    return kept, np.array([rows[token] for token in kept])


@on_all_cases
@pytest.mark.parametrize("neighbours", [32, 3])
def test_tokens_and_rows(case: Case, neighbours: int) -> None:
    tokens = case.tokens
    kept, rows = straight(tokens, case.keep, neighbours)
    selection = tokenprune.select(tokens, "prumerge-plus", case.keep, neighbours=neighbours)
    assert selection.kept.tolist() == kept
    assert selection.merge is not None
    assert selection.merge.space == "features"
    np.testing.assert_allclose(rows_of(tokens, selection), 2 * rows, rtol=1e-5, atol=1e-6)


def test_all_but_a_few_tokens() -> None:
    tokens = image((1, 7, 7), 1)
    for keep in (47, 48):
        kept, rows = straight(tokens, keep, 32)
        selection = tokenprune.select(tokens, "prumerge-plus", keep)
        assert selection.kept.tolist() == kept
        np.testing.assert_allclose(rows_of(tokens, selection), 2 * rows, rtol=1e-5, atol=1e-6)
    assert tokenprune.select(tokens, "prumerge-plus", 49).merge is None


def published(attention: Array) -> list[int]:
    """Return the tokens of the released code, with quartiles by hand."""
    ranked: list[float] = sorted(attention.tolist())

    def quartile(share: float) -> float:
        place = share * (len(ranked) - 1)
        below = int(place)
        return ranked[below] + (place - below) * (ranked[below + 1] - ranked[below])

    low, high = quartile(0.25), quartile(0.75)
    outliers = [a for a in attention if a > high + 1.5 * (high - low)]
    ratio = len(outliers) / len(attention)
    kept = by_score(attention)[: int(len(attention) * ratio)]
    for place in range(0, len(attention) - 1, int(int(1 / ratio) / 3)):
        if place not in kept:
            kept.append(place)
    return kept


@pytest.mark.parametrize("seed", range(25))
def test_the_adaptive_count(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    attention = torch.randn(576 if seed % 2 else 150, generator=generator).mul(1.3).softmax(0)
    kept = published(array(attention))
    assert adaptive_tokens(attention).tolist() == kept
    assert adaptive_count(attention) == len(kept) + 1
    tokens = image((1, 12, 12), seed)
    assert tokens.wide_attention is not None
    count = adaptive_count(tokens.wide_attention)
    assert len(tokenprune.select(tokens, "prumerge-plus", count)) == count


def test_where_the_published_count_is_not_defined() -> None:
    with pytest.raises(TokensError, match=r"0 of 9 tokens are outliers .* Give a number of tokens"):
        adaptive_tokens(torch.arange(9.0))
    # One of four is above the third quartile, and no more than a third.
    assert adaptive_tokens(torch.tensor([0.0, 0, 0, 9])).tolist() == [3, 0, 1, 2]


def test_neighbours_are_checked() -> None:
    with pytest.raises(OptionError, match="at least 0; the authors have 32"):
        tokenprune.select(image((1, 7, 7), 0), "prumerge-plus", 5, neighbours=-1)
    tokens = image((1, 7, 7), 0)
    kept, rows = straight(tokens, 5, 0)
    selection = tokenprune.select(tokens, "prumerge-plus", 5, neighbours=0)
    assert selection.kept.tolist() == kept
    np.testing.assert_allclose(rows_of(tokens, selection), 2 * rows, rtol=1e-5, atol=1e-6)
