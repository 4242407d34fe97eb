"""evs against its formula in plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tokenprune
from tests.core.zoo.videos import array, cosine, video
from tokenprune import VisualTokens
from tokenprune.errors import BudgetError, TokensError
from tokenprune.selectors import in_time
from tokenprune.selectors.evs import evs_count

GRIDS = ((4, 3, 5), (7, 4, 4), (2, 6, 6), (1, 4, 5), (16, 2, 3))


def changed(tokens: VisualTokens) -> list[float]:
    frames, rows, columns = tokens.grid
    z = array(tokens.embeddings).reshape(frames, rows * columns, -1)
    scores = [255.0] * (rows * columns)
    for t in range(1, frames):
        scores += [1.0 - cosine(z[t, p], z[t - 1, p]) for p in range(rows * columns)]
    return scores


@pytest.mark.parametrize("seed", range(24))
def test_it_is_its_formula(seed: int) -> None:
    tokens = video(GRIDS[seed % len(GRIDS)], seed)
    scores = changed(tokens)
    order = sorted(range(tokens.total), key=lambda i: (-scores[i], i))
    for keep in (1, tokens.total // 5, tokens.total // 2, tokens.total - 1):
        selection = tokenprune.select(tokens, "evs", keep)
        assert selection.kept.tolist() == sorted(order[:keep])
        np.testing.assert_allclose(array(selection.scores), scores, atol=1e-6)


def test_still_tokens_tie_and_lengths_do_not_matter() -> None:
    picture = torch.randn(6, 11, generator=torch.Generator().manual_seed(0))
    frames = torch.stack([picture, 2 * picture, picture])
    frames[2, 4] = -frames[2, 4]
    tokens = VisualTokens((3, 2, 3), embeddings=frames.flatten(0, 1))
    selection = tokenprune.select(tokens, "evs", 9)
    assert selection.kept.tolist() == [*range(8), 16]
    assert selection.scores is not None
    assert selection.scores[6:].tolist() == [0.0] * 10 + [2.0, 0.0]


def test_frames_in_blocks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = video((7, 3, 4), 1)
    expected = tokenprune.select(tokens, "evs", 30)
    monkeypatch.setattr(in_time, "_ENTRIES", 3 * 12 * 24)  # three frames: two changes at a time
    found = tokenprune.select(tokens, "evs", 30)
    assert found.scores is not None
    assert expected.scores is not None
    assert torch.equal(found.scores, expected.scores)


def test_tokens_without_a_place_are_refused() -> None:
    with pytest.raises(TokensError, match="'evs' uses neighbours in a picture"):
        tokenprune.select(
            VisualTokens((1, 1, 4), embeddings=torch.ones(4, 3), is_picture=False), "evs", 2
        )


def test_the_count_is_that_of_vllm() -> None:
    # At least the first frame, and rounded down.
    assert evs_count((8, 3, 5), 0.75) == 30
    assert evs_count((8, 3, 5), 0.99) == 15
    assert evs_count((7, 3, 5), 0.5) == 52
    assert evs_count((7, 3, 5), 0.0) == 105
    for rate in (1.0, -0.1, float("nan")):
        with pytest.raises(BudgetError, match="the share that is dropped, from 0 to below 1"):
            evs_count((8, 3, 5), rate)
