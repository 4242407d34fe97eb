"""HoloV against its formula, in plain loops, as published and exact."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import tokenprune
from tests.core.zoo.images import Case, array, by_score, image, on_all_cases
from tokenprune import VisualTokens
from tokenprune.errors import OptionError
from tokenprune.greedy.rows import IntegerRows
from tokenprune.selectors import holov


def runs_of(total: int, count: int) -> list[list[int]]:
    """Return the tokens of each run; the first ones are longer."""
    short, longer = divmod(total, count)
    runs, start = [], 0
    for run in range(count):
        stop = start + short + (run < longer)
        runs.append(list(range(start, stop)))
        start = stop
    return runs


def straight(
    tokens: VisualTokens, keep: int, chunks: int | None, beta: float, exact: bool
) -> list[int]:
    """Return the tokens that stay, which as published may be fewer than `keep`."""
    total = tokens.total
    count = min(total, chunks or max(1, int((1024 / 576) * total / keep)))
    embeddings, attention = array(tokens.embeddings), array(tokens.cls_attention).mean(0)
    runs, scores = runs_of(total, count), []
    for run in runs:
        if len(run) == 1:
            scores.append(float(attention[run[0]]))
            continue
        unit = [embeddings[i] / (math.sqrt(embeddings[i] @ embeddings[i]) + 1e-6) for i in run]
        n, variances = len(run), []
        for i in range(n):
            row = [0.0 if i == j else float(unit[i] @ unit[j]) for j in range(n)]
            mean = sum(row) / (n - 1)
            variances.append(sum((value - mean) ** 2 for value in row) / (n - 1))
        looked = [1000.0 * float(attention[i]) for i in run]
        scale = (sum(looked) / n) / (sum(variances) / n + 1e-6)
        scores.append(sum(a + beta * v * scale for a, v in zip(looked, variances, strict=True)) / n)
    weights = [score / (sum(scores) + 1e-6) for score in scores]
    shares = [math.floor(keep * weight) for weight in weights]
    ranked = by_score(weights)
    for place in ranked[: keep - sum(shares)]:
        shares[place] += 1
    shares = [min(share, len(run)) for share, run in zip(shares, runs, strict=True)]
    for place in ranked if exact else ():
        while shares[place] < len(runs[place]) and sum(shares) < keep:
            shares[place] += 1
    kept: list[int] = []
    for share, run in zip(shares, runs, strict=True):
        kept += sorted(run, key=lambda i: (-attention[i], i))[:share]
    return sorted(kept)


@on_all_cases
@pytest.mark.parametrize("chunks", [None, 16, 5])
def test_exactly_as_many(case: Case, chunks: int | None) -> None:
    kept = tokenprune.select(case.tokens, "holov", case.keep, chunks=chunks).kept.tolist()
    assert kept == straight(case.tokens, case.keep, chunks, 0.09, exact=True)
    assert len(kept) == case.keep


@on_all_cases
@pytest.mark.parametrize("beta", [0.09, 5.0])
def test_as_published(case: Case, beta: float) -> None:
    tokens = case.tokens
    expected = straight(tokens, case.keep, 16, beta, exact=False)
    selection = tokenprune.select(tokens, "holov", case.keep, chunks=16, beta=beta, exact=False)
    assert len(selection) == case.keep
    assert tokens.embeddings is not None
    rows = selection.rows(tokens.embeddings)
    for token, row in zip(selection.kept.tolist(), rows, strict=True):
        own = tokens.embeddings[token] if token in expected else torch.zeros_like(row)
        torch.testing.assert_close(row, own)
    free = [token for token in range(tokens.total) if token not in expected]
    zeros = free[: case.keep - len(expected)]
    assert selection.kept.tolist() == sorted(expected + zeros)


def test_what_is_over_goes_to_the_next_run() -> None:
    # All of the attention is in the first run, of 4 tokens.
    attention = torch.tensor([5, 8, 7, 6, 0.3, 0.2, 0.1, 0, 0.01, 0.02, 0, 0.03])
    embeddings = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    tokens = VisualTokens((1, 3, 4), embeddings=embeddings, cls_attention=attention[None])
    exact = tokenprune.select(tokens, "holov", 7, chunks=3)
    assert exact.kept.tolist() == [0, 1, 2, 3, 4, 5, 6]
    published = tokenprune.select(tokens, "holov", 7, chunks=3, exact=False)
    lost = int((published.rows(embeddings) == 0).all(-1).sum())
    assert lost == 7 - len(straight(tokens, 7, 3, 0.09, exact=False)) > 0


def test_the_variance_cancels() -> None:
    for seed in range(10):
        tokens = image((1, 12, 12), seed)
        some = [tokenprune.select(tokens, "holov", 30, beta=beta).kept for beta in (0.0, 0.09, 0.2)]
        assert torch.equal(some[0], some[1])
        assert torch.equal(some[0], some[2])


def test_long_runs_are_looked_at_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = image((1, 12, 12), 2)
    expected = [tokenprune.select(tokens, "holov", 30, chunks=chunks).kept for chunks in (1, 4)]
    monkeypatch.setattr("tokenprune.selectors.holov._ENTRIES", 1000)
    monkeypatch.setattr("tokenprune.greedy.engine._ENTRIES", 1000)
    for chunks, kept in zip((1, 4), expected, strict=True):
        again = tokenprune.select(tokens, "holov", 30, chunks=chunks).kept
        assert torch.equal(again, kept)


def test_blocks_have_the_same_variance() -> None:
    embeddings = torch.randn(2, 50, 6, generator=torch.Generator().manual_seed(1))
    rows = IntegerRows.from_embeddings(embeddings)
    runs = holov._Runs.of(50, 3, torch.device("cpu"))
    whole = runs.variance(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holov, "_ENTRIES", 500)
        np.testing.assert_array_equal(array(runs.variance(rows)), array(whole))


def test_options() -> None:
    with pytest.raises(OptionError, match="at least 1, or None; the authors have 16"):
        tokenprune.select(image((1, 7, 7), 0), "holov", 5, chunks=0)
    with pytest.raises(OptionError, match=r"at least 0; the authors have 0\.09"):
        tokenprune.select(image((1, 7, 7), 0), "holov", 5, beta=-1.0)
