"""VisionZip against its formula, in plain loops: tokens, and rows."""

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
    twice,
)
from tokenprune import VisualTokens
from tokenprune.errors import OptionError
from tokenprune.registry import build
from tokenprune.selectors.visionzip import VisionZip


def straight(tokens: VisualTokens, dominant: int, contextual: int) -> tuple[list[int], Array]:
    """Return the tokens that stay, and the rows that the projector gets."""
    features = array(tokens.features)
    order = by_score(array(tokens.cls_attention).sum(0))
    similar = cosines(array(tokens.keys).mean(0))
    rest = sorted(order[dominant:])
    step = max(1, len(rest) // contextual) if contextual else 1
    targets = rest[::step][:contextual]
    rows = {token: features[token] for token in order[:dominant]}
    joined: dict[int, list[int]] = {target: [] for target in targets}
    for token in rest:
        if token not in targets and targets:
            joined[max(targets, key=lambda target: (similar[token, target], -target))].append(token)
    for target, others in joined.items():
        rows[target] = features[target]
        if others:
            rows[target] = features[target] + np.mean([features[other] for other in others], 0)
    kept = sorted(rows)
    return kept, np.array([rows[token] for token in kept])


@on_all_cases
@pytest.mark.parametrize("ratio", [54 / 64, 0.5, 1.0])
def test_tokens_and_rows(case: Case, ratio: float) -> None:
    tokens = case.tokens
    dominant = max(1, int(case.keep * ratio))
    kept, rows = straight(tokens, dominant, case.keep - dominant)
    selection = tokenprune.select(tokens, "visionzip", case.keep, dominant_ratio=ratio)
    assert selection.kept.tolist() == kept
    np.testing.assert_allclose(rows_of(tokens, selection), 2 * rows, rtol=1e-5, atol=1e-6)


def test_the_default_splits_as_the_paper_does() -> None:
    selector = build("visionzip", {})
    assert isinstance(selector, VisionZip)
    for keep, split in {
        **{64: (54, 10), 128: (108, 20), 192: (162, 30), 32: (27, 5)},
        **{1: (1, 0), 2: (1, 1), 7: (5, 2), 100: (84, 16)},
    }.items():
        assert selector.split(keep) == split


def test_dominant_rows_stay_as_they_are() -> None:
    tokens = image((1, 9, 9), 2)
    selection = tokenprune.select(tokens, "visionzip", 20)
    attention = array(tokens.cls_attention).mean(0)
    dominant = set(by_score(attention)[:16])
    assert selection.merge is not None
    assert selection.merge.space == "features"
    merged = selection.merge.is_merged(20).tolist()
    assert [int(token) not in dominant for token in selection.kept] == merged
    # Each token that is not dominant counts once, a target with 1, others as one of its mean.
    assert sorted(selection.merge.of.tolist()) == sorted(set(range(81)) - dominant)
    sums = torch.zeros(20).index_add(0, selection.merge.into, selection.merge.weight)
    torch.testing.assert_close(sums[torch.tensor(merged)], torch.full((4,), 2.0))


def test_a_target_that_no_token_goes_to_stays_and_ties_go_to_the_first() -> None:
    attention = torch.tensor([9.0, 1, 1, 1, 1, 1])
    keys = torch.tensor([[1.0, 0], [1, 0], [1, 1], [1, 0], [2, 0], [0, 1]])[None]
    features = torch.eye(6)
    tokens = VisualTokens((1, 2, 3), features=features, cls_attention=attention, keys=keys)
    selection = tokenprune.select(tokens, "visionzip", 3, dominant_ratio=0.4)
    # Of the rest, 1 to 5, the targets are 1 and 3, whose keys are equal: all go to 1.
    assert selection.kept.tolist() == [0, 1, 3]
    expected = torch.eye(6)[[0, 1, 3]]
    expected[1] += torch.tensor([0, 0, 1, 0, 1, 1]) / 3
    rows = selection.rows(2 * features, features, twice)
    torch.testing.assert_close(rows, 2 * expected)


def test_the_ratio_is_checked() -> None:
    for ratio in (0.0, 1.2):
        with pytest.raises(OptionError, match="above 0 and at most 1; the paper has 54 of 64"):
            tokenprune.select(image((1, 7, 7), 0), "visionzip", 5, dominant_ratio=ratio)
