"""Methods inside the language model without one: where tokens leave, how many, and by what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.hf.insides import peak_clusters
from tokenprune.errors import OptionError
from tokenprune.inside.base import reads_text
from tokenprune.inside.fastv import FastV
from tokenprune.inside.pyramid_drop import PyramidDrop
from tokenprune.inside.sparsevlm import (
    PUBLISHED,
    SparseVLM,
    clusters_of,
    density_clusters,
    rater_scores,
)
from tokenprune.question.attention import QueryKeys, question_scores
from tokenprune.registry import build_any, inside_methods


def noise(*shape: int, seed: int) -> Tensor:
    """Return reproducible noise."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layers(method: Any, depth: int) -> list[tuple[int, int]]:
    return [(stage.layer, stage.ranked_at) for stage in method.stages(depth)]


def test_tokens_leave_where_the_papers_have_it() -> None:
    assert layers(FastV(), 32) == [(2, 1)]
    assert layers(FastV(layer=3), 28) == [(3, 2)]
    assert layers(PyramidDrop(), 32) == [(8, 8), (16, 16), (24, 24)]
    assert layers(PyramidDrop(), 28) == [(7, 7), (14, 14), (21, 21)]
    assert layers(PyramidDrop(layers="3,0.5"), 32) == [(3, 3), (16, 16)]
    assert layers(SparseVLM(), 32) == [(3, 2), (7, 6), (16, 15)]
    assert layers(SparseVLM(), 28) == [(3, 2), (6, 5), (14, 13)]
    assert layers(SparseVLM(layers="2,6,15"), 28) == [(3, 2), (7, 6), (16, 15)]


def test_each_layer_reads_what_is_left() -> None:
    assert FastV().tokens_by_layer(4, 100, 10) == [100, 100, 10, 10]
    assert PyramidDrop().tokens_by_layer(8, 64, 8) == [64, 64, 32, 32, 16, 16, 8, 8]


@pytest.mark.parametrize("total", [1, 2, 17, 196, 576, 2880])
@pytest.mark.parametrize("name", ["fastv", "pyramid-drop", "sparsevlm"])
def test_counts_fall_and_end_in_keep(name: str, total: int) -> None:
    method: Any = inside_methods()[name]()
    for keep in {1, 2, total // 9, total // 3, total - 1, total} - {0}:
        if keep > total:
            continue
        counts = method.counts(total, keep)
        assert len(counts) == len(method.stages(32))
        assert counts[-1] == keep
        assert list(counts) == sorted(counts, reverse=True)
        assert counts[0] <= total
        if keep == total:
            assert set(counts) == {total}


def test_counts_are_those_of_the_papers() -> None:
    assert PyramidDrop().counts(576, 72) == (288, 144, 72)
    assert PyramidDrop().counts(2880, 360) == (1440, 720, 360)
    assert PyramidDrop(layers="0.5").counts(576, 72) == (72,)
    for counts in PUBLISHED.values():
        assert SparseVLM().counts(576, counts[-1]) == counts
    # Between two published ones: halfway between 26 and 36 of 576 lies 31.
    assert SparseVLM().counts(576, 31) == (271, 79, 31)
    # The same shares of twice as many tokens, and below the smallest published budget.
    assert SparseVLM().counts(1152, 52) == (476, 96, 52)
    assert SparseVLM().counts(576, 1) == (4, 2, 1)


def test_published_budgets_are_averages_over_layers() -> None:
    for average, counts in PUBLISHED.items():
        read = SparseVLM().tokens_by_layer(32, 576, counts[-1])
        assert abs(sum(read) / 32 - average) < 0.12 * average + 12


@pytest.mark.parametrize("keep", range(1, 37))
def test_best_tokens_and_clusters_are_keep_together(keep: int) -> None:
    clusters = clusters_of(36, keep)
    best = keep - clusters
    assert best >= 1
    dropped = 36 - best
    published = int((int(0.3 * dropped) + 1) / 10) + 1 if dropped else 0
    assert clusters == published or (best == 1 and clusters < published)
    # One best token more would be too many.
    more = int((int(0.3 * (dropped - 1)) + 1) / 10) + 1 if dropped > 1 else 0
    assert best == 1 or best == keep or best + 1 + more > keep


# Scores -------------------------------------------------------------------------------------------


def attention_by_hand(seen: QueryKeys, asked: list[int]) -> list[float]:
    """Return each visual token's attention, averaged over heads and queries, in plain loops."""
    heads, groups = len(seen.query), len(seen.key)
    total = torch.zeros(len(seen.visual), dtype=torch.float64)
    for head in range(heads):
        keys = seen.key[head * groups // heads].double()
        for place, column in enumerate(asked):
            logits = keys[: column + 1] @ seen.query[head, place].double() * seen.scale
            shares = logits.softmax(dim=0)
            for number, visual in enumerate(seen.visual.tolist()):
                if visual <= column:
                    total[number] += shares[visual]
    return (total / heads / len(asked)).tolist()


def seen_of(asked: list[int], weights: Tensor | None = None) -> QueryKeys:
    return QueryKeys(
        query=noise(4, len(asked), 8, seed=3),
        key=noise(2, 12, 8, seed=4),
        visual=torch.arange(2, 8),
        scale=0.5,
        columns=torch.tensor(asked),
        weights=weights,
    )


@pytest.mark.parametrize("name", ["fastv", "pyramid-drop", "sparsevlm"])
def test_scores_are_the_mean_attention(name: str) -> None:
    method: Any = build_any(name, {})
    assert reads_text(method)
    seen = seen_of([11])
    torch.testing.assert_close(method.score(seen).tolist(), attention_by_hand(seen, [11]))


def test_queries_that_count_and_queries_that_do_not() -> None:
    asked = [8, 9, 11]
    seen = seen_of(asked, torch.tensor([1.0, 0.0, 1.0]))
    some = QueryKeys(seen.query[:, [0, 2]], seen.key, seen.visual, seen.scale)
    found = SparseVLM().score(seen).tolist()
    torch.testing.assert_close(found, attention_by_hand(some, [8, 11]))
    every = seen_of(asked)
    torch.testing.assert_close(
        question_scores(every, "mean").tolist(), attention_by_hand(every, asked)
    )
    with_ones = question_scores(seen_of(asked, torch.ones(3)), "mean")
    torch.testing.assert_close(with_ones, question_scores(every, "mean"))


def test_raters_are_the_text_that_fits_the_image() -> None:
    visual, text = noise(6, 4, seed=1), noise(5, 4, seed=2)
    by_hand = [0.0] * 5
    for row in visual.double():
        shares = [float((row @ word).exp()) for word in text.double()]
        by_hand = [r + s / sum(shares) / 6 for r, s in zip(by_hand, shares, strict=True)]
    torch.testing.assert_close(rater_scores(visual, text).tolist(), by_hand)
    weights = SparseVLM().text_weights(visual, text)
    assert weights.tolist() == [float(r > 0.2) for r in by_hand]
    assert 0 < weights.sum() < 5
    # Where none is above the mean, all rate.
    assert SparseVLM().text_weights(visual, text[:1].expand(4, -1)).tolist() == [1.0] * 4


# Recycling ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "amount"), [(1, 1), (9, 2), (40, 5), (40, 40)])
def test_clusters_equal_density_peaks_row_by_row(total: int, amount: int) -> None:
    rows = noise(total, 6, seed=total)
    centres, members = peak_clusters(rows, amount)
    found, cluster = density_clusters(rows, amount)
    assert found.tolist() == centres
    assert [(cluster == number).nonzero()[:, 0].tolist() for number in range(amount)] == members


def test_equal_states_are_told_apart_by_their_places() -> None:
    rows = torch.ones(6, 4)
    centres, cluster = density_clusters(rows, 2)
    assert centres.tolist() == [0, 1]
    assert cluster.tolist() == [0, 1, 0, 0, 0, 0]


def test_dropped_tokens_are_recycled_into_the_means_of_clusters() -> None:
    scores = noise(60, seed=5).abs()
    states = noise(60, 8, seed=6)
    picks = SparseVLM().pick(scores, 12, lambda: states)
    order = sorted(range(60), key=lambda token: -float(scores[token]))
    clusters = clusters_of(60, 12)
    best, rest = order[: 12 - clusters], order[12 - clusters :]
    recycled = sorted(rest[: int(0.3 * len(rest)) + 1])
    assert clusters == 2
    centres, cluster = density_clusters(states[recycled], clusters)
    kept = sorted([*best, *(recycled[centre] for centre in centres.tolist())])
    assert picks.kept.tolist() == kept
    assert picks.merge is not None
    rows = picks.merge.sums(states, picks.kept)
    expected = states[kept].clone()
    for number, centre in enumerate(centres.tolist()):
        members = [recycled[i] for i in (cluster == number).nonzero()[:, 0].tolist()]
        expected[kept.index(recycled[centre])] = states[members].mean(dim=0)
    torch.testing.assert_close(rows, expected)

    def unread() -> Tensor:
        raise AssertionError("nothing is recycled")

    plain = SparseVLM(recycle=False).pick(scores, 12, unread)
    assert plain.kept.tolist() == sorted(order[:12])
    assert plain.merge is None


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("fastv", {"layer": "2"}, "option layer='2' of method 'fastv' must be a whole number"),
        ("pyramid-drop", {"layers": "a,b"}, "must be layers from 0, such as '8,16,24', or"),
        ("pyramid-drop", {"layers": "0.5,1.5"}, "or fractions of the depth"),
        ("pyramid-drop", {"layers": ""}, "must be layers from 0"),
        ("sparsevlm", {"layers": "2,6"}, "must name three layers"),
        ("sparsevlm", {"layers": "2,x,3"}, "must be layers from 0"),
        ("sparsevlm", {"later": 2}, "has no option 'later'. Did you mean 'layers'"),
    ],
)
def test_options_that_are_refused(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        build_any(name, options)


@pytest.mark.parametrize(
    ("method", "depth", "says"),
    [
        (FastV(layer=0), 32, "leave in front of the layers 0, .* Give layer so that they rise"),
        (FastV(layer=32), 32, "has 32, from 0 to 31"),
        (PyramidDrop(layers="8,8"), 32, "in front of the layers 8, 8"),
        (PyramidDrop(), 3, "in front of the layers 1, 2, 2"),
        (SparseVLM(layers="2,6,31"), 32, "in front of the layers 3, 7, 32"),
    ],
)
def test_layers_that_a_model_does_not_have(method: Any, depth: int, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        method.stages(depth)
