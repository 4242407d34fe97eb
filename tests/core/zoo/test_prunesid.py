"""prunesid against its three steps in plain loops."""

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
from tokenprune.selectors.prunesid import group_quotas


def grouped(x: Array, count: int) -> list[int]:
    """Return in which right singular vector each token is largest."""
    samples = (1 / (1 + np.exp(-x))).T  # channels by tokens
    centred = samples - samples.mean(axis=0, keepdims=True)
    vectors = np.linalg.svd(centred, full_matrices=False)[2][:count].T
    return [int(np.argmax(np.abs(row))) for row in vectors]


def suppressed(members: list[int], a: Array, similar: Array, most: float) -> list[int]:
    """Return the survivors of a group, in the order taken."""
    left, taken = list(members), []
    while left:
        best = left[0]
        for token in left:
            if a[token] > a[best]:
                best = token
        taken.append(best)
        left = [token for token in left if token != best and similar[best, token] <= most]
    return taken


def quotas(sizes: list[int], survivors: list[int], k: int, of_cls: int) -> list[int]:
    count = len(sizes)
    low = [min(1, size) for size in sizes]
    up = [min(5 * math.ceil(k / 64), sizes[g], survivors[g]) for g in range(count)]
    while sum(up) < k:
        up = [min(up[g] + 1, sizes[g]) for g in range(count)]
    rest, before, share = k - sum(low) - of_cls, 0, 0.0
    given = []
    for g in range(count):
        share += survivors[g] / sum(survivors)
        rounded = round(share * rest)  # halves to the even
        given.append(min(low[g] + rounded - before, up[g]))
        before = rounded
    missing = k - of_cls - sum(given)
    for g in sorted(range(count), key=lambda g: (-survivors[g], g)):
        more = min(missing, up[g] - given[g])
        given[g] += more
        missing -= more
    assert missing == 0
    return given


def chosen(x: Array, a: Array, keep: int, cls_counts: bool = False) -> list[int]:
    k, total = keep + cls_counts, len(x)
    count = max(1, k // 4)
    of_token, similar = grouped(x, count), cosines(x, x)
    pairs = [similar[i, j] for i in range(total) for j in range(i + 1, total)]
    most = k / 32 * float(sum(pairs)) / len(pairs)
    members = [[i for i in range(total) if of_token[i] == g] for g in range(count)]
    survivors = [suppressed(group, a, similar, most) for group in members]
    given = quotas(list(map(len, members)), list(map(len, survivors)), k, int(cls_counts))
    kept = []
    for group, alive, quota in zip(members, survivors, given, strict=True):
        others = sorted(set(group) - set(alive), key=lambda i: (-a[i], i))
        kept += (alive + others)[:quota]
    return sorted(kept)


def item(total: int, seed: int, width: int = 40) -> VisualTokens:
    return VisualTokens(
        (1, 1, total),
        features=clustered(total, seed, width=width) / 4 + 0.3 * drawn(total, width, seed=seed),
        cls_attention=drawn(3, total, seed=seed + 70).softmax(-1),
    )


@pytest.mark.parametrize("seed", range(24))
def test_prunesid_is_its_three_steps(seed: int) -> None:
    # Fewer tokens than channels, as in CLIP, and more.
    total, width = ((49, 64), (100, 40))[seed % 2]
    tokens = item(total, seed, width)
    a = array(tokens.cls_attention).sum(axis=0)
    for keep in (1, 5, 16, 33, total - 1):
        expected = chosen(array(tokens.features), a, keep)
        assert tokenprune.select(tokens, "prunesid", keep).kept.tolist() == expected
    for keep in (8, 31):
        expected = chosen(array(tokens.features), a, keep, cls_counts=True)
        found = tokenprune.select(tokens, "prunesid", keep, cls_counts=True)
        assert found.kept.tolist() == expected


@pytest.mark.parametrize("seed", range(20))
def test_quotas_add_up_and_hold_their_bounds(seed: int) -> None:
    generator = np.random.default_rng(seed)
    sizes = generator.integers(0, 12, 9)
    survivors = np.minimum(sizes, generator.integers(1, 12, 9))
    for k in range(9, int(sizes.sum())):
        expected = quotas(sizes.tolist(), survivors.tolist(), k, 0)
        found = group_quotas(sizes, survivors, k, k)
        assert found.tolist() == expected
        assert found.sum() == k
        assert (found <= sizes).all()
        less = group_quotas(sizes, survivors, k - 1, k) if k > 9 else None
        assert less is None or less.tolist() == quotas(sizes.tolist(), survivors.tolist(), k, 1)


def test_components_that_hold_nothing_group_no_tokens() -> None:
    """Rows of two kinds have two components, whatever the number that is asked for."""
    kinds = torch.tensor([[3.0, -3, 1, 0, 2, -1], [-2, 1, 4, -1, 0, 3]], dtype=torch.float64)
    features = kinds[torch.tensor([0, 1] * 10)]
    tokens = VisualTokens((1, 4, 5), features=features, cls_attention=torch.linspace(1, 2, 20))
    for keep in (2, 9, 19):
        found = tokenprune.select(tokens, "prunesid", keep).kept.tolist()
        assert len(found) == keep
    # Two groups, of which each has its share: by attention, and the threshold suppresses copies.
    assert tokenprune.select(tokens, "prunesid", 8).kept.tolist() == list(range(12, 20))


def test_a_single_token_and_all_of_them() -> None:
    tokens = item(1, 0)
    assert tokenprune.select(tokens, "prunesid", 1).kept.tolist() == [0]
    tokens = item(9, 0)
    for counts in (False, True):
        found = tokenprune.select(tokens, "prunesid", 9, cls_counts=counts)
        assert found.kept.tolist() == list(range(9))
        found = tokenprune.select(tokens, "prunesid", 8, cls_counts=counts)
        assert len(found) == 8
