"""VisPruner against its formula, in plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokenprune
from tests.core.zoo.images import Case, array, by_score, cosines, image, on_all_cases
from tokenprune import VisualTokens
from tokenprune.errors import OptionError
from tokenprune.greedy.engine import thin_out
from tokenprune.greedy.neighbours import AllCosines, FineRows, ListedCosines


def straight(tokens: VisualTokens, keep: int, ratio: float, per_round: int) -> list[int]:
    """Compare even with odd places of the list, one token at a time."""
    similar = cosines(array(tokens.features))
    order = by_score(array(tokens.cls_attention).mean(0))
    important = int(keep * ratio)
    rest, wanted = order[important:], keep - important
    while len(rest) > wanted:
        evens, odds = rest[0::2], rest[1::2]
        goes = min(per_round, len(rest) - wanted, len(evens))
        most = [max((similar[i, j] for j in odds), default=0.0) for i in evens]
        rest = [evens[place] for place in by_score(most)][goes:] + odds
        if wanted == 0:
            rest = []
    return sorted(order[:important] + rest)


@on_all_cases
@pytest.mark.parametrize("options", [{}, {"important_ratio": 0.75}, {"important_ratio": 0.0}])
def test_the_formula(case: Case, options: dict[str, Any]) -> None:
    kept = tokenprune.select(case.tokens, "vispruner", case.keep, **options).kept.tolist()
    ratio = options.get("important_ratio", 0.5)
    assert kept == straight(case.tokens, case.keep, ratio, 8)


@pytest.mark.parametrize("per_round", [1, 3, 40])
@pytest.mark.parametrize("keep", [3, 21, 48])
def test_any_number_goes_in_a_round(keep: int, per_round: int) -> None:
    tokens = image((1, 7, 7), 5)
    kept = tokenprune.select(tokens, "vispruner", keep, per_round=per_round).kept.tolist()
    assert kept == straight(tokens, keep, 0.5, per_round)


def test_all_by_attention_is_cls_attention() -> None:
    tokens = image((1, 9, 9), 3)
    for keep in (1, 20, 80):
        important = tokenprune.select(tokens, "vispruner", keep, important_ratio=1.0)
        highest = tokenprune.select(tokens, "cls-attention", keep)
        assert important.kept.tolist() == highest.kept.tolist()
        assert important.scores is not None
        assert important.scores.sum() > 0


def test_an_image_of_a_model() -> None:
    # Of so many comparisons some are of cosines that float32 cannot tell apart.
    for seed in (4, 5, 10):
        tokens = image((1, 24, 24), seed)
        kept = tokenprune.select(tokens, "vispruner", 64).kept.tolist()
        assert kept == straight(tokens, 64, 0.5, 8)


def test_fine_rows_have_the_cosines_of_float64() -> None:
    embeddings = torch.randn(2, 40, 300, generator=torch.Generator().manual_seed(3))
    embeddings[0, 5], embeddings[1, 7] = embeddings[0, 9], 0
    found = FineRows.from_embeddings(embeddings).cosines(slice(None), slice(None))
    expected = torch.nn.functional.normalize(embeddings.double(), dim=-1)
    torch.testing.assert_close(found, expected @ expected.mT, rtol=0, atol=1e-12)
    assert torch.equal(found, found.mT)
    assert torch.equal(found[0, 5], found[0, 9])


def test_lists_of_neighbours_say_what_all_cosines_say() -> None:
    embeddings = torch.randn(1, 400, 6, generator=torch.Generator().manual_seed(0))
    embeddings[:, 7] = embeddings[:, 300]
    embeddings[:, 9] = 0
    rows = FineRows.from_embeddings(embeddings)
    everything, listed = AllCosines(rows), ListedCosines(rows)
    generator = torch.Generator().manual_seed(1)
    # Some halves are of neighbours alone, so that lists do not have what is asked for.
    for count in (400, 399, 250, 201, 200, 90, 30, 3, 2):
        left = torch.randperm(400, generator=generator)[:count]
        near = array(embeddings[0])[left] @ array(embeddings[0])[0]
        for order in (left, left[torch.tensor(near.argsort().copy())]):
            tokens, others = order[None, : count // 2], order[None, count // 2 :]
            assert torch.equal(listed(tokens, others), everything(tokens, others))


@pytest.mark.parametrize("keep", [3, 60, 299])
def test_long_items_are_thinned_out_like_others(keep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = torch.randn(2, 300, 5, generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(3)
    order = torch.stack([torch.randperm(300, generator=generator) for _ in range(2)])
    expected = thin_out(embeddings, order, keep // 2, keep, 8)
    monkeypatch.setattr("tokenprune.greedy.engine.ALL_PAIRS", 299)
    assert torch.equal(thin_out(embeddings, order, keep // 2, keep, 8), expected)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"important_ratio": 1.5}, "must be between 0 and 1; the authors have 0.5"),
        ({"per_round": 0}, "must be at least 1; the authors have 8"),
    ],
)
def test_options(option: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        tokenprune.select(image((1, 2, 2), 0), "vispruner", 2, **option)
