"""How many tokens each kept one stands for, against a loop over all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tokenprune
from tests.core.test_methods import draw


def counted(rows: torch.Tensor, kept: list[int]) -> list[int]:
    """Give every dropped token to the kept one most like it, the first where two are equal."""
    unit = rows.double().numpy()
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    counts = [1] * len(kept)
    for token in set(range(len(rows))) - set(kept):
        counts[int(np.argmax([float(unit[token] @ unit[one]) for one in kept]))] += 1
    return counts


@pytest.mark.parametrize("keep", [1, 2, 7, 29, 30])
def test_each_token_is_stood_for_once(keep: int) -> None:
    rows = draw(3, 30, 14, seed=2)
    kept = torch.stack([torch.randperm(30)[:keep].sort().values for _ in range(3)])
    found = tokenprune.tokens_represented(rows, kept)
    assert found.sum(dim=1).tolist() == [30] * 3
    expected = [counted(one, own.tolist()) for one, own in zip(rows, kept, strict=True)]
    assert found.tolist() == expected
    alone = [tokenprune.tokens_represented(rows[[i]], kept[[i]])[0].tolist() for i in range(3)]
    assert alone == expected


def test_copies_go_to_the_first_and_zeros_count() -> None:
    rows = draw(4, 14, seed=3)[torch.tensor([0, 1, 0, 2, 0, 1, 3, 0])]
    rows[6] = 0  # no cosine to anything: the first takes it
    kept = torch.tensor([[2, 3, 4, 5]])
    assert tokenprune.tokens_represented(rows[None], kept).tolist() == [[4, 1, 1, 2]]
