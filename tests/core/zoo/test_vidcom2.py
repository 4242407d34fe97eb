"""vidcom2 against its formula in plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import tokenprune
from tests.core.zoo.videos import Array, array, video
from tokenprune import VisualTokens
from tokenprune.errors import BudgetError, OptionError
from tokenprune.selectors import vidcom2
from tokenprune.selectors.vidcom2 import vidcom2_count

GRIDS = ((4, 3, 5), (7, 4, 4), (2, 6, 6), (1, 4, 5), (16, 2, 3))


def gaussians(x: Array, c: Array) -> float:
    distance = float(sum((x - c) ** 2))
    return sum(math.exp(-distance / (2 * 2.0**p)) for p in range(-3, 2))


def most_distinct(
    tokens: VisualTokens, ratio: float, keep: int | None
) -> tuple[list[int], list[float]]:
    """Return what stays, `keep` tokens or what the frames' counts are; and how usual all are."""
    frames, rows, columns = tokens.grid
    count = rows * columns
    z = array(tokens.embeddings)
    variance = [float(((z[:, d] - z[:, d].mean()) ** 2).mean()) for d in range(z.shape[1])]
    quiet = sorted(range(z.shape[1]), key=lambda d: (variance[d], d))[: z.shape[1] // 2]
    x = np.array([row[quiet] / max(math.sqrt(sum(row[quiet] ** 2)), 1e-12) for row in z])
    x = x.reshape(frames, count, -1)
    of_all = x.reshape(frames * count, -1).mean(axis=0)
    to_all = [[gaussians(x[t, i], of_all) for i in range(count)] for t in range(frames)]
    usual = [
        to_all[t][i] + gaussians(x[t, i], x[t].mean(axis=0))
        for t in range(frames)
        for i in range(count)
    ]
    f = [-sum(to_all[t]) / count for t in range(frames)]
    powers = [math.exp((value - max(f)) / 0.01) for value in f]
    p = [value / sum(powers) for value in powers]
    kept: list[int] = []
    for t in range(frames):
        share = min(1.0, ratio * (1 + p[t] - sum(p) / frames))
        own = sorted(range(t * count, (t + 1) * count), key=lambda i: (usual[i], i))
        kept += own[: max(1, round(share * count))]
    while keep is not None and len(kept) > keep:
        kept.remove(max(kept, key=lambda i: (usual[i], i)))
    while keep is not None and len(kept) < keep:
        left = [i for i in range(frames * count) if i not in kept]
        kept.append(min(left, key=lambda i: (usual[i], i)))
    return sorted(kept), usual


@pytest.mark.parametrize("seed", range(24))
def test_it_is_its_formula(seed: int) -> None:
    tokens = video(GRIDS[seed % len(GRIDS)], seed)
    for keep in (1, tokens.total // 5, tokens.total // 2, tokens.total - 1):
        for ratio in (None, 0.25):
            share = keep / tokens.total if ratio is None else ratio
            expected, usual = most_distinct(tokens, share, keep)
            selection = tokenprune.select(tokens, "vidcom2", keep, ratio=ratio)
            assert selection.kept.tolist() == expected
            np.testing.assert_allclose(array(selection.scores), [-one for one in usual], rtol=1e-6)


@pytest.mark.parametrize("seed", range(24))
def test_the_counts_of_the_authors_are_met_where_keep_is_their_sum(seed: int) -> None:
    tokens = video(GRIDS[seed % len(GRIDS)], seed)
    published, _ = most_distinct(tokens, 0.25, None)
    selection = tokenprune.select(tokens, "vidcom2", len(published), ratio=0.25)
    assert selection.kept.tolist() == published


def test_a_distinct_frame_has_more() -> None:
    still = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)).repeat(4, 1, 1)
    still[2] = -still[2]
    tokens = VisualTokens((4, 3, 4), embeddings=still.flatten(0, 1) + 0.5)
    counts = tokenprune.select(tokens, "vidcom2", 0.25).mask.view(4, 12).sum(1).tolist()
    assert counts[2] == max(counts) > min(counts) > 0
    assert sum(counts) == 12


def test_blocks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = video((7, 3, 4), 1)
    expected = tokenprune.select(tokens, "vidcom2", 30)
    monkeypatch.setattr(vidcom2, "_ENTRIES", 2 * 12 * 24)  # two frames, some channels at a time
    found = tokenprune.select(tokens, "vidcom2", 30)
    assert found.scores is not None
    assert expected.scores is not None
    assert torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.1])
def test_a_ratio_that_is_none_is_refused(ratio: float) -> None:
    with pytest.raises(OptionError, match=r"ratio=.* must be above 0 and at most 1 .*0\.25"):
        tokenprune.select(video((2, 2, 2), 0), "vidcom2", 2, ratio=ratio)


def test_the_count_is_that_of_vllm() -> None:
    # At least a token of each frame, and rounded down.
    assert vidcom2_count((8, 3, 5), 0.75) == 30
    assert vidcom2_count((8, 3, 5), 0.99) == 8
    assert vidcom2_count((7, 3, 5), 0.5) == 52
    with pytest.raises(BudgetError, match="the share that is dropped, from 0 to below 1"):
        vidcom2_count((8, 3, 5), 1.0)
