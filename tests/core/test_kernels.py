"""The kernels against the torch versions, index for index and bit for bit.

Triton's interpreter runs them on the CPU. It has to be chosen before Triton is imported, so they
run in a process of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.core.test_projectors import NORMS
from tests.core.test_projectors import features as projector_features
from tests.core.test_projectors import make as make_projector
from tokenprune import VisualTokens, numerics
from tokenprune.greedy import engine, objectives
from tokenprune.greedy.covering import Targets, cover
from tokenprune.greedy.engine import Some, fused_on_cpu, pick
from tokenprune.greedy.items import Items, TorchItems
from tokenprune.greedy.rows import IntegerRows
from tokenprune.numerics import first_equal_row
from tokenprune.registry import build
from tokenprune.representation import representatives
from tokenprune.selecting import select_many
from tokenprune.testing import make_item
from tokenprune.tower.projectors import LiftedProjector, _digest

Run = Callable[..., Any]
Shape = tuple[int, int, int]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Run a function in the process of the interpreter and return what it returns."""
    yield from _process("1", _patch_once)


def _process(interpret: str, begin: Callable[[], None] | None = None) -> Iterator[Run]:
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", interpret)
        spawn = get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn, initializer=begin) as executor:
            yield lambda function, *arguments: executor.submit(function, *arguments).result()


def _patch_once() -> None:
    """Have the interpreter patch Triton's language once, and not at each call of a function.

    It takes three quarters of the time otherwise. The process runs nothing but kernels.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    from tokenprune.greedy.fused import kernels

    if hasattr(interpreter, "_patch_lang"):
        scope = interpreter._patch_lang(kernels.launch)  # `tl`, which that file sees
        interpreter._patch_lang(tl.sum.fn)  # `tl.core`
        scope = type(scope)()
        interpreter._patch_lang = lambda _: scope


def draw(shape: Shape, dtype: torch.dtype) -> Tensor:
    """Return rows [B, N, D], among them equal ones, opposite ones and one of zeros."""
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)
    rows[:, 1] = rows[:, -1]
    rows[:, 2] = 0
    rows[:, 3] = -rows[:, 4]
    return rows


def drawn_weights(rows: Tensor, kind: str) -> Tensor | None:
    """Return float32 [B, N]: with zeros among them or not, or none."""
    if kind == "none":
        return None
    weights = torch.rand(rows.shape[:2], generator=torch.Generator().manual_seed(0))
    return {"some": weights, "zeros": weights.round()}[kind]


SHAPES = [
    ((2, 7, 5), torch.float64),
    ((1, 66, 24), torch.bfloat16),
    ((2, 32, 40), torch.float32),
    ((1, 20, 72), torch.float16),
]
SHAPED = pytest.mark.parametrize(("shape", "dtype"), SHAPES)


# Rows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype"), [*SHAPES, ((1, 6, 1100), torch.float32), ((1, 5, 4096), torch.float16)]
)
def test_rows_products_and_means(run: Run, shape: Shape, dtype: torch.dtype) -> None:
    embeddings = draw(shape, dtype)
    rows = IntegerRows.from_embeddings(embeddings)
    near = rows.nearest_distances()
    expected = {
        "rows": rows.rows,
        "scales": rows.scales,
        "squares": rows.squares,
        "inverse": rows.inverse_norms,
        "products": rows.rows @ rows.rows.mT,
        "distances": near,
        "distances in blocks": near,
        "mean": rows.mean(),
        "deviating": 1.0 + rows.deviations(),
    }
    found = run(_rows, embeddings)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name].to(value.dtype).view(value.shape), value), name


def _rows(embeddings: Tensor) -> dict[str, Tensor]:
    from tokenprune.greedy.fused import kernels

    size, total, _ = embeddings.shape
    layout = kernels.Layout.of(total, [total] * size, [1] * size, embeddings.device)
    rows, scales, squares, inverse = kernels.whole_rows(embeddings.flatten(0, 1))
    products = kernels.all_products(layout, rows)
    return {
        "rows": rows,
        "scales": scales,
        "squares": squares,
        "inverse": inverse,
        "products": products,
        "distances": kernels.nearest_distances(layout, products, inverse, 32),
        # Two blocks where there are more than 64 rows.
        "distances in blocks": kernels.nearest_distances_in_blocks(layout, rows, inverse, 1, 64),
        "mean": kernels.mean_rows(layout, rows, scales),
        "deviating": kernels.deviations(layout, rows, scales, squares),
    }


@pytest.mark.parametrize(("frames", "per_frame"), [(2, 7), (5, 3), (3, 1)])
@pytest.mark.parametrize("still", [False, True])
def test_changes(run: Run, frames: int, per_frame: int, still: bool) -> None:
    embeddings = torch.randn(
        2, frames, per_frame, 16, generator=torch.Generator().manual_seed(frames)
    )
    if still:
        embeddings[1] = embeddings[1, :1]
    embeddings = embeddings.flatten(1, 2)
    expected = IntegerRows.from_embeddings(embeddings).changes(per_frame)
    for long in (False, True):
        assert torch.equal(run(_changes, embeddings, per_frame, long), expected)


def _changes(embeddings: Tensor, per_frame: int, long: bool) -> Tensor:
    return _items(embeddings, 1, long).changes(per_frame)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_first_equal_rows(run: Run, dtype: torch.dtype) -> None:
    source = torch.randint(0, 9, (2, 30), generator=torch.Generator().manual_seed(8))
    rows = torch.randn(9, 5, generator=torch.Generator().manual_seed(9)).to(dtype)
    rows[3] = 0.0
    rows[4] = -0.0  # equals 0.0
    given = rows[source]
    expected = torch.stack([first_equal_row(item) for item in given])
    assert len(expected.unique()) > 5
    assert torch.equal(run(_first_equal_rows, given), expected)


def _first_equal_rows(rows: Tensor) -> Tensor:
    with fused_on_cpu():
        return engine.first_equal_rows(rows)


def test_scaled(run: Run) -> None:
    scores = torch.randn(4, 700, generator=torch.Generator().manual_seed(10))
    scores[1] = 3.25
    scores[2, ::7] = scores[2].max()
    scores[3] = 1.0 + scores[3] * 1e-7
    expected = engine.scaled(scores)
    for one, other in zip(run(_scaled, scores), expected, strict=True):
        assert torch.equal(one, other)


def _scaled(scores: Tensor) -> tuple[Tensor, Tensor]:
    with fused_on_cpu():
        return engine.scaled(scores)


# Choices ------------------------------------------------------------------------------------------


def _items(embeddings: Tensor, keep: int, long: bool) -> Items:
    from tokenprune.greedy.fused.items import FusedItems, LongItems

    # Two chunks and more: what a program holds is too large for small cases otherwise.
    size, total, _ = embeddings.shape
    if long:
        return LongItems(embeddings, keep)
    return FusedItems(embeddings, [keep] * size, [total] * size, chunk=32)


@pytest.mark.parametrize("long", [False, True], ids=["fused", "long"])
@SHAPED
def test_most_variance(run: Run, shape: Shape, dtype: torch.dtype, long: bool) -> None:
    embeddings = draw(shape, dtype)
    multiple = 1.0 + torch.rand(
        shape[:2], dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    for keep in sorted({1, 2, min(35, shape[1])}):
        expected = TorchItems(embeddings, keep).most_variance(multiple, 0.2)
        assert torch.equal(run(_most_variance, embeddings, multiple, keep, long), expected), keep


def _most_variance(embeddings: Tensor, multiple: Tensor, keep: int, long: bool) -> Tensor:
    return _items(embeddings, keep, long).most_variance(multiple, 0.2)


@pytest.mark.parametrize("long", [False, True], ids=["fused", "long"])
@pytest.mark.parametrize("weights", ["none", "some", "zeros"])
@SHAPED
def test_farthest(run: Run, shape: Shape, dtype: torch.dtype, weights: str, long: bool) -> None:
    embeddings = draw(shape, dtype)
    weight = drawn_weights(embeddings, weights)
    given = None if weight is None else weight.argmax(dim=-1)
    for keep in sorted({1, min(23, shape[1])}):
        expected = TorchItems(embeddings, keep).farthest(weight, given)
        assert torch.equal(run(_farthest, embeddings, keep, weight, given, long), expected), keep


def _farthest(
    embeddings: Tensor, keep: int, weights: Tensor | None, first: Tensor | None, long: bool
) -> Tensor:
    return _items(embeddings, keep, long).farthest(weights, first)


def test_the_determinant_alone(run: Run) -> None:
    """Rows of rank 6, so that nothing is left after some picks."""
    generator = torch.Generator().manual_seed(5)
    embeddings = torch.randn(2, 20, 6, generator=generator) @ torch.randn(
        6, 30, generator=generator
    )
    embeddings[0, 3] = embeddings[0, 11]
    multiple = 1.0 + torch.rand(2, 20, dtype=torch.float64, generator=generator)
    for long in (False, True):
        expected = TorchItems(embeddings, 12).most_variance(multiple, 0.0)
        assert torch.equal(run(_determinant, embeddings, multiple, 12, long), expected)


def _determinant(embeddings: Tensor, multiple: Tensor, keep: int, long: bool) -> Tensor:
    return _items(embeddings, keep, long).most_variance(multiple, 0.0)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("shape", "dtype"), [SHAPES[0], SHAPES[1]])
def test_suppress(run: Run, shape: Shape, dtype: torch.dtype, grouped: bool) -> None:
    embeddings = draw(shape, dtype)
    generator = torch.Generator().manual_seed(6)
    scores = torch.rand(shape[:2], generator=generator).round(decimals=1)
    groups = torch.randint(0, 3, shape[:2], generator=generator) if grouped else None
    threshold = torch.tensor([0.1, 0.3])[: shape[0]]
    keep = min(30, shape[1])
    kept, count = TorchItems(embeddings, keep).suppress(scores, threshold, groups)
    expected = [
        suppressed(*each) for each in zip(
            embeddings, scores, threshold, [None] * shape[0] if groups is None else groups,
            strict=True,
        )
    ]  # fmt: skip
    assert kept.tolist() == [order[:keep] for order, _ in expected]
    assert count.tolist() == [min(keep, free) for _, free in expected]
    for long in (False, True):
        found = run(_suppress, embeddings, keep, scores, threshold, groups, long)
        assert torch.equal(found[0], kept)
        assert torch.equal(found[1], count)


def suppressed(
    rows: Tensor, scores: Tensor, threshold: Tensor, groups: Tensor | None
) -> tuple[list[int], int]:
    """Suppression, straight from its sentence: all tokens in order, and how many are free."""
    free: list[int] = []
    by_score = sorted(range(len(rows)), key=lambda token: (-float(scores[token]), token))
    for token in by_score:
        others = [other for other in free if groups is None or bool(groups[other] == groups[token])]
        cosines = [
            torch.cosine_similarity(rows[token].double(), rows[other].double(), dim=0)
            for other in others
        ]
        if all(float(cosine) <= float(threshold) for cosine in cosines):
            free.append(token)
    return free + [token for token in by_score if token not in free], len(free)


def _suppress(
    embeddings: Tensor,
    keep: int,
    scores: Tensor,
    threshold: Tensor,
    groups: Tensor | None,
    long: bool,
) -> tuple[Tensor, Tensor]:
    return _items(embeddings, keep, long).suppress(scores, threshold, groups)


@pytest.mark.parametrize("sharpness", [20.0, 0.3])
@pytest.mark.parametrize(("shape", "dtype"), [SHAPES[0], SHAPES[1]])
def test_soft_suppress(run: Run, shape: Shape, dtype: torch.dtype, sharpness: float) -> None:
    embeddings = draw(shape, dtype)
    scores = torch.rand(shape[:2], generator=torch.Generator().manual_seed(8)).round(decimals=1)
    for keep in (1, min(30, shape[1])):
        expected = [
            sorted(softly_suppressed(*each, sharpness, keep))
            for each in zip(embeddings, scores, strict=True)
        ]
        kept = TorchItems(embeddings, keep).soft_suppress(scores, sharpness)
        assert kept.tolist() == expected
        for long in (False, True):
            assert torch.equal(run(_soften, embeddings, keep, scores, sharpness, long), kept)


def softly_suppressed(rows: Tensor, scores: Tensor, sharpness: float, keep: int) -> list[int]:
    """Soft suppression, straight from the formula."""
    left: list[float] = scores.double().tolist()
    kept: list[int] = []
    for _ in range(keep):
        pick = max(set(range(len(left))) - set(kept), key=lambda token: (left[token], -token))
        kept.append(pick)
        cosines = torch.cosine_similarity(rows.double(), rows[pick].double()[None]).tolist()
        own = left[pick]
        left = [
            max(0.0, of_token - math.exp(-sharpness * (1 - cosine) ** 2) * own)
            for of_token, cosine in zip(left, cosines, strict=True)
        ]
    return kept


def _soften(embeddings: Tensor, keep: int, scores: Tensor, sharpness: float, long: bool) -> Tensor:
    return _items(embeddings, keep, long).soft_suppress(scores, sharpness)


@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("weights", ["none", "some", "zeros", "excluded"])
@pytest.mark.parametrize("shape", [(2, 7, 5), (1, 45, 150)])
def test_most_cover(run: Run, shape: Shape, weights: str, bonus: bool) -> None:
    generator = torch.Generator().manual_seed(7)
    # Few values, so that gains tie; some below 0, and some above 1.
    similarity = torch.randint(-3, 11, shape, generator=generator) / 8
    similarity[:, :, 2] = similarity[:, :, 4]
    weight = drawn_weights(similarity.mT, "some" if weights == "excluded" else weights)
    if weights == "excluded" and weight is not None:
        weight[:, [0, 3]] = -1.0
    more = torch.randint(0, 9, similarity[:, 0].shape, generator=generator) / 8 if bonus else None
    for keep in (1, 5):
        expected = [
            sorted(covering(each, keep, weight_of_it, more_of_it))
            for each, weight_of_it, more_of_it in zip(
                similarity,
                [None] * shape[0] if weight is None else weight,
                [None] * shape[0] if more is None else more,
                strict=True,
            )
        ]
        # What looks at all tokens, what looks at few, and the kernel.
        whole = objectives.whole_similarity(similarity)
        plain = objectives.most_cover(whole, keep, weight, more).sort().values
        assert plain.tolist() == expected
        assert engine.most_cover(similarity, keep, weight, more).tolist() == expected
        assert run(_most_cover, similarity, keep, weight, more).tolist() == expected


def covering(
    similarity: Tensor, keep: int, weights: Tensor | None, bonus: Tensor | None
) -> list[int]:
    """Facility location, straight from the formula, in whole eighths."""
    values = (similarity * 8).long().clamp(0, 8)
    kept: list[int] = []
    covered = torch.zeros_like(values[:, 0])
    for _ in range(keep):
        gains = (values - covered[:, None]).clamp(min=0).sum(0).tolist()
        if weights is not None:
            gains = [gain * float(weight) for gain, weight in zip(gains, weights, strict=True)]
        if bonus is not None:
            gains = [gain + 8 * float(more) for gain, more in zip(gains, bonus, strict=True)]
        if weights is not None:
            gains = [
                -1.0 if weight < 0 else gain for gain, weight in zip(gains, weights, strict=True)
            ]
        left = [token for token in range(len(gains)) if token not in kept]
        kept.append(max(left, key=lambda token: (gains[token], -token)))
        covered = torch.maximum(covered, values[:, kept[-1]])
    return kept


def _most_cover(
    similarity: Tensor, keep: int, weights: Tensor | None, bonus: Tensor | None
) -> Tensor:
    with fused_on_cpu():
        return engine.most_cover(similarity, keep, weights, bonus)


@pytest.mark.parametrize("long", [False, True], ids=["fused", "long"])
def test_most_volume(run: Run, long: bool) -> None:
    """Variances that are given, equal ones and 0 among them, and a row of zeros."""
    embeddings = draw((2, 40, 33), torch.float32)
    embeddings[1, 4] = 0
    generator = torch.Generator().manual_seed(8)
    variances = torch.rand(2, 40, dtype=torch.float64, generator=generator).round(decimals=1)
    for keep in (1, 20):
        expected = TorchItems(embeddings, keep).most_volume(variances)
        assert torch.equal(run(_most_volume, embeddings, variances, keep, long), expected)


def _most_volume(embeddings: Tensor, variances: Tensor, keep: int, long: bool) -> Tensor:
    return _items(embeddings, keep, long).most_volume(variances)


def test_covering_targets_of_their_own(run: Run) -> None:
    """Similarities of two kinds, made of cosines by kernels and by torch."""
    rows, others = draw((2, 30, 24), torch.float32), draw((2, 5, 24), torch.float32)
    for keep in (1, 12):
        expected = _covered(rows, others, keep)
        assert torch.equal(run(_fused_cover, rows, others, keep), expected)


def _covered(rows: Tensor, others: Tensor, keep: int) -> Tensor:
    return cover([Targets(others, rows, 0.05, 0.2), Targets(rows, rows, 0.2, 0.02)], keep)


def _fused_cover(rows: Tensor, others: Tensor, keep: int) -> Tensor:
    with fused_on_cpu():
        return _covered(rows, others, keep)


def test_suppression_to_the_end(run: Run) -> None:
    embeddings = draw((2, 20, 16), torch.float32)
    scores = torch.rand(2, 20, generator=torch.Generator().manual_seed(9))
    threshold = torch.tensor([0.1, 0.3])
    expected = engine.suppress(embeddings, scores, threshold, 20)
    assert expected[0].sort().values.tolist() == [list(range(20))] * 2
    assert int(expected[1].max()) < 20
    for one, other in zip(
        run(_fused_suppress, embeddings, scores, threshold), expected, strict=True
    ):
        assert torch.equal(one, other)


def _fused_suppress(embeddings: Tensor, scores: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    with fused_on_cpu():
        return engine.suppress(embeddings, scores, threshold, 20)


def test_relevance(run: Run) -> None:
    similar = torch.randn(3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    similar[1] = 0.25
    for divisor in (1, -3):
        expected = engine.relevance(similar, divisor, 1e-6)
        for one, other in zip(run(_relevance, similar, divisor), expected, strict=True):
            assert torch.equal(one, other)


def _relevance(similar: Tensor, divisor: float) -> tuple[Tensor, Tensor]:
    from tokenprune.greedy.fused.relevance import relevance

    return relevance(similar, divisor, 1e-6, chunk=16)


@pytest.mark.parametrize(("of_image", "of_text"), [(1, 0), (4, 4), (5, 2)])
def test_pivots_and_their_turns(run: Run, of_image: int, of_text: int) -> None:
    generator = torch.Generator().manual_seed(2)
    norms = torch.randint(0, 9, (2, 47), generator=generator).double()
    places, free = engine.pivots(norms, 40, of_image, of_text)
    found = run(_pivots, norms, of_image, of_text)
    assert torch.equal(found[0], places)
    assert torch.equal(found[1], free)
    ranked = torch.rand(2, of_image + of_text, 40, generator=generator).argsort(dim=-1)
    for left, each in ((0, None), (17, None), (20, 3), (40 - of_image, 2)):
        keep = of_image + left
        expected = engine.take_in_turns(ranked, free.clone(), keep, left, each)
        assert torch.equal(run(_take_in_turns, ranked, free, keep, left, each), expected)


def _pivots(norms: Tensor, of_image: int, of_text: int, total: int = 40) -> tuple[Tensor, Tensor]:
    from tokenprune.greedy.fused.relevance import pivots

    return pivots(norms, total, of_image, of_text, chunk=16)


def _take_in_turns(ranked: Tensor, free: Tensor, keep: int, left: int, each: int | None) -> Tensor:
    from tokenprune.greedy.fused.relevance import take_in_turns

    return take_in_turns(ranked, free, keep, left, each, chunk=16)


SIZES, KEEPS = (7, 40, 1, 33, 17), (3, 20, 1, 32, 7)


@pytest.mark.parametrize("objective", ["information", "divprune", "weighted", "video"])
def test_what_lies_behind_an_item_changes_nothing(run: Run, objective: str) -> None:
    """Items of different sizes, in one batch: each is as it is alone."""
    items = [draw((1, max(size, 5), 24), torch.float32)[0, :size] for size in SIZES]
    keeps: Sequence[int] = KEEPS
    if objective == "video":
        items = [draw((1, 7 * frames, 8), torch.float32)[0] for frames in (2, 3, 5)]
        keeps = KEEPS[:3]
    sizes = list(map(len, items))
    alone = [
        _choose(rows[None], [keep], [size], objective)[0].tolist()
        for rows, keep, size in zip(items, keeps, sizes, strict=True)
    ]
    padded = torch.full((len(items), max(sizes), items[0].shape[1]), 1e3)
    for rows, row in zip(items, padded, strict=True):
        row[: len(rows)] = rows
    expected = [kept + [0] * (max(keeps) - len(kept)) for kept in alone]
    # The torch version takes one after the other.
    assert _choose(padded, keeps, sizes, objective).tolist() == expected
    assert run(_chosen_together, padded, keeps, sizes, objective).tolist() == expected


def _chosen_together(
    embeddings: Tensor, keeps: Sequence[int], sizes: Sequence[int], objective: str
) -> Tensor:
    with fused_on_cpu():
        return _choose(embeddings, keeps, sizes, objective)


def _choose(
    embeddings: Tensor, keeps: Sequence[int], sizes: Sequence[int], objective: str
) -> Tensor:
    weights = embeddings[..., 0].abs().round(decimals=1)

    def choose(items: Items, some: Some) -> Tensor:
        if objective == "information":
            return items.most_variance(items.deviating(), 0.2)
        if objective == "video":
            return items.most_variance(1.0 + items.changes(7), 0.2)
        if objective == "divprune":
            return items.farthest(None, None)
        return items.farthest(
            weights[some], torch.zeros_like(weights[:, 0], dtype=torch.int64)[some[0]]
        )

    return pick(embeddings, keeps, choose, sizes)


@pytest.mark.parametrize(
    ("fused", "entries", "expected"),
    [
        (False, 10**6, [(0, 1), (1, 3), (3, 4), (4, 5), (5, 6)]),
        (True, 10**6, [(0, 3), (3, 4), (4, 5), (5, 6)]),
        # 9 * (2 * 8 + 3 + 9) entries of the largest, twice.
        (True, 504, [(0, 2), (2, 3), (3, 4), (4, 5), (5, 6)]),
    ],
)
def test_which_items_go_together(
    monkeypatch: pytest.MonkeyPatch, fused: bool, entries: int, expected: list[tuple[int, int]]
) -> None:
    totals, keeps = (5, 9, 9, 6, 5000, 20), (2, 3, 3, 6, 2, 4)
    monkeypatch.setattr(engine, "_ENTRIES", entries)
    assert list(engine._together(totals, keeps, 8, fused)) == expected


@pytest.mark.parametrize("long", [False, True], ids=["fused", "long"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_indices_stay_inside_where_numbers_are_none(run: Run, bad: float, long: bool) -> None:
    """They are used before anybody looks at the numbers."""
    embeddings = draw((2, 40, 8), torch.float32)
    embeddings[0, 7, 2] = bad
    embeddings[1] = bad
    for kept in run(_of_bad_numbers, embeddings, long):
        assert kept.shape == (2, 9)
        assert ((kept >= 0) & (kept < 40)).all()


def _of_bad_numbers(embeddings: Tensor, long: bool) -> list[Tensor]:
    bad = embeddings[..., 2].contiguous()
    with np.errstate(all="ignore"):
        items = _items(embeddings, 9, long)
        with fused_on_cpu():
            weights, first = engine.scaled(bad)
        return [
            items.most_variance(items.deviating(), 0.2),
            items.farthest(None, None),
            items.farthest(weights, first),
            items.suppress(bad, bad[:, 0].contiguous(), None)[0],
            items.most_volume(bad.double()),
            _fused_cover(embeddings, embeddings[:, :5], 9),
            _pivots(bad.double(), 5, 4, 30)[0],
            items.soft_suppress(bad, 20.0),
        ]


# Whole selectors ----------------------------------------------------------------------------------

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("information", {}),
    ("information", {"noise": 0.01, "frames_per_set": 2}),
    ("relevant-information", {"candidates": 0.5}),
    ("divprune", {}),
    ("zeroth-order", {}),
    ("mmtok", {}),
    ("scope", {}),
    ("scope", {"combine": "add", "alpha": 0.5}),
    ("dart", {}),
    ("dart", {"per_pivot": 2, "order": "set"}),
    ("cdpruner", {}),
    ("cdpruner-llm", {"sign": "minus", "reduction": "max"}),
    ("prunesid", {}),
    ("score-k-center", {"alpha": 0.6}),
    ("id-selection", {}),
    ("visionzip", {}),
    ("prumerge-plus", {}),
    ("holov", {}),
]


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_whole_selectors(run: Run, method: str, options: dict[str, Any]) -> None:
    items = batch_of_items()
    expected = select_many(items, build(method, options), 0.3)
    found = run(_selected, method, options, 0.3)
    for tokens, one, other in zip(items, found, expected, strict=True):
        assert one == other.kept.tolist(), (tokens.grid, tokens.embeddings)


def batch_of_items() -> list[VisualTokens]:
    """Return images and videos of several sizes and dtypes, some of many copies."""
    copies = torch.randint(0, 12, (42,), generator=torch.Generator().manual_seed(3))
    equal = torch.zeros(42, dtype=torch.int64)
    return [
        make_item((1, 6, 7), 1),
        make_item((1, 6, 7), 2, source=copies),
        make_item((1, 6, 7), 3, source=equal),
        make_item((1, 3, 9), 4, dtype=torch.bfloat16),
        make_item((1, 3, 9), 5, dtype=torch.float16),
        make_item((3, 2, 7), 6),
        make_item((3, 2, 7), 7, source=equal),
        make_item((1, 1, 1), 8),
    ]


def _selected(method: str, options: dict[str, Any], keep: int | float) -> list[list[int]]:
    with fused_on_cpu(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "TorchItems", None)  # nothing goes there
        picked = select_many(batch_of_items(), build(method, options), keep)
    return [selection.kept.tolist() for selection in picked]


@pytest.mark.parametrize("method", ["information", "divprune", "zeroth-order"])
def test_long_items(run: Run, method: str) -> None:
    items = batch_of_items()
    expected = [each.kept.tolist() for each in select_many(items, build(method, {}), 20)]
    assert run(_selected_as_long, method) == expected


def _selected_as_long(method: str) -> list[list[int]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "ALL_PAIRS", 0)
        return _selected(method, {}, 20)


# Sums and representatives -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((3, 12, 77), 1), ((2, 1, 5), 1), ((4, 575), -1), ((7,), 0), ((2, 33, 2, 3), 1)],
)
def test_folded_sums(run: Run, shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(8), dtype=dtype)
    assert torch.equal(run(_folded_sum, values, dim), numerics.folded_sum(values, dim))


def _folded_sum(values: Tensor, dim: int) -> Tensor:
    with fused_on_cpu(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(numerics, "folded_sum", None)  # nothing goes there
        return engine.folded_sum(values, dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", [1, 5, 33])
def test_representatives(run: Run, keep: int, dtype: torch.dtype) -> None:
    rows = draw((3, 33, 19), dtype)
    drawn = torch.rand(3, 33, generator=torch.Generator().manual_seed(keep)).argsort(dim=1)
    kept = drawn[:, :keep].sort(dim=1).values
    expected = representatives(rows, kept)
    assert torch.equal(run(_representatives, rows, kept), expected)
    assert torch.equal(run(_representatives, rows, kept, 2 * 33**2), expected)  # two at once


def _representatives(rows: Tensor, kept: Tensor, products: int | None = None) -> Tensor:
    from tokenprune.greedy.fused import kernels

    with fused_on_cpu(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(IntegerRows, "from_embeddings", None)  # nothing goes there
        if products is not None:
            patch.setattr(kernels, "_PRODUCTS", products)
        return representatives(rows, kept)


# The projector's Jacobian -------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_jacobian_norm_of_kernels(run: Run, norm: str, dtype: torch.dtype) -> None:
    expected = lifted(norm, dtype).jacobian_norm(projector_features(), 3.0)
    found = run(_jacobian_norm, norm, dtype)
    torch.testing.assert_close(found, expected)


def lifted(norm: str, dtype: torch.dtype) -> LiftedProjector:
    projector = make_projector(norm, F.gelu)
    for part in (projector.first, projector.second, projector.norm):
        if isinstance(part, nn.Module):
            part.to(dtype)
    return projector.lifted(dtype)


def _jacobian_norm(norm: str, dtype: torch.dtype) -> Tensor:
    with fused_on_cpu(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiftedProjector, "_squared_jacobian_norm", None)  # nothing goes there
        return lifted(norm, dtype).jacobian_norm(projector_features(), 3.0)


def test_digest_of_kernels(run: Run) -> None:
    expected, found = _digest_of_weights(), run(_digest_of_weights, True)
    assert torch.equal(found, expected)
    changed = run(_digest_of_weights, True, 1)
    assert (changed != expected).sum() == 1


def _digest_of_weights(fused: bool = False, changed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    shapes = [(5, 7), (3, 1028), (9,), (2, 4)]
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    weights[1] = weights[1].bfloat16()
    weights[1][2, 1027] += changed
    with fused_on_cpu() if fused else nullcontext():
        return _digest(weights)


# What the interpreter does not show ---------------------------------------------------------------


@pytest.fixture(scope="module")
def compile_there() -> Iterator[Run]:
    """Run a function in a process where Triton compiles."""
    yield from _process("0")


@pytest.mark.parametrize(("capability", "names"), [(80, None), (90, ["_products"])])
def test_kernels_compile_and_fuse_nothing(
    compile_there: Run, capability: int, names: list[str] | None, tmp_path: Path
) -> None:
    """A multiplication fused with an addition rounds once, and so gives other bits than torch."""
    compiled = compile_there(_compiled, capability, names, str(tmp_path))
    assert len(compiled) >= (20 if names is None else 2), sorted(compiled)
    for name, code in compiled.items():
        for word in ("fma.rn.f64", "fma.rn.f32", "sqrt.approx", "div.full", "div.approx"):
            assert word not in code, name


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_of_projectors_compile(compile_there: Run, capability: int, tmp_path: Path) -> None:
    compiled = compile_there(_compiled, capability, list(OF_PROJECTORS), str(tmp_path))
    assert {name.split()[0] for name in compiled} == OF_PROJECTORS


OF_PROJECTORS = {"_normalise", "_take", "_sums"}
"""Kernels that round as they like: products of matrices beside them do, too."""

EXPONENTIALS = {"_similarities", "_soft_suppress"}
"""Kernels whose exponential is made of fused operations."""

LEFT_OUT = OF_PROJECTORS | EXPONENTIALS


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_with_an_exponential_compile(
    compile_there: Run, capability: int, tmp_path: Path
) -> None:
    compiled = compile_there(_compiled, capability, list(EXPONENTIALS), str(tmp_path))
    assert {name.split()[0] for name in compiled} == EXPONENTIALS


def _compiled(capability: int, names: list[str] | None, folder: str) -> dict[str, str]:
    """Compile the kernels as they are launched; return the PTX of each that is different."""
    import os

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tokenprune.greedy.fused import kernels

    os.environ["TRITON_CACHE_DIR"] = folder
    sources: dict[str, tuple[Any, dict[str, int]]] = {}

    def note(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        options = {"num_warps": constants.pop("num_warps", 4)}
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        signature, fixed = {}, {}
        for parameter in kernel.params:
            value = values[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name] = "constexpr"
                fixed[parameter.name] = value
            else:
                signature[parameter.name] = _type_of(value)
        name = f"{kernel.__name__} {signature} {fixed}"
        if kernel.__name__ in names if names else kernel.__name__ not in LEFT_OUT:
            sources[name] = (ASTSource(fn=kernel, signature=signature, constexprs=fixed), options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "launch", note)
        for width in (1024, 4096):
            _launch_all(torch.zeros(1, 576, width, dtype=torch.bfloat16))
            if names is None:
                break
    target = GPUTarget("cuda", capability, 32)
    return {
        name: triton.compile(
            source, target=target, options={"enable_fp_fusion": False, **options}
        ).asm["ptx"]
        for name, (source, options) in sources.items()
    }


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + str(value.dtype).removeprefix("torch.").replace("float", "fp").replace(
            "bfp", "bf"
        ).replace("int", "i")
    return "fp32" if isinstance(value, float) else "i64" if abs(value) >= 2**31 else "i32"


def _launch_all(embeddings: Tensor) -> None:
    """Launch every kernel; nothing is computed, and nothing depends on what would be."""
    from tokenprune.greedy.fused import kernels, relevance
    from tokenprune.greedy.fused.items import FusedItems, LongItems

    size, total, _ = embeddings.shape
    weights, first = torch.zeros(size, total), torch.zeros(size, dtype=torch.int64)
    groups = torch.zeros(size, total, dtype=torch.int64)
    items: Items
    for items in (FusedItems(embeddings, [3], [total]), LongItems(embeddings, 3)):
        items.most_variance(items.deviating() + items.changes(total // 2), 0.2)
        items.farthest(weights, first)
    items = FusedItems(embeddings, [3], [total])
    items.farthest(None, None)
    items.suppress(weights, weights[:, 0], groups)
    items.soft_suppress(weights, 20.0)
    similarity = torch.zeros(size, total, total, dtype=torch.float64)
    kernels.most_cover(similarity, 3, weights.double(), weights.double())
    items.most_volume(weights.double())
    relevance.relevance(weights.double(), -2, 1e-6)
    relevance.write_similarities(
        similarity, weights.double(), weights.double(), 0.02, 0.1, 42, similarity, 0
    )
    _, free = relevance.pivots(weights.double(), total - 20, 4, 4)
    relevance.take_in_turns(groups[:, None].expand(-1, 8, -1), free, 64, 60, None)
    kernels.scaled(weights)
    kernels.first_equal_rows(embeddings)
    kernels.folded_sum(weights, 1)
    kernels.representatives(embeddings, groups[:, :3])
    kernels.try_out(embeddings.device)
    with fused_on_cpu():
        for norm in ("no norm", "layer norm of 4 parts", "rms norm"):
            lifted(norm, torch.float32).jacobian_norm(projector_features())


# Where kernels do not run -------------------------------------------------------------------------

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("found", [None, "3.5.1"])
def test_without_triton_torch_chooses(monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    def version(_: str) -> str:
        if found is None:
            raise PackageNotFoundError("triton")
        return found

    monkeypatch.setattr(engine, "version", version)
    assert not engine._kernels_run.__wrapped__(GPU)
    assert not engine.fuses(torch.zeros(1, 2, 3))


def test_triton_that_runs_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from tokenprune.greedy.fused import kernels

    def fail(_: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler.\nMore.")

    monkeypatch.setattr(kernels, "try_out", fail)
    with pytest.warns(UserWarning, match=r"on cuda:0: Failed to find C compiler\. Tokens are"):
        assert not engine._kernels_run.__wrapped__(GPU)
    monkeypatch.setattr(kernels, "try_out", lambda _: None)
    assert engine._kernels_run.__wrapped__(GPU)


def test_kernels_that_choose_other_tokens_are_not_used(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(_alike, False)
    assert not run(_alike, True)
    from tokenprune.greedy.fused import items, kernels

    monkeypatch.setattr(kernels, "try_out", lambda _: None)
    monkeypatch.setattr(items, "chooses_alike", lambda _: False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.warns(UserWarning, match=r"chose other tokens than torch there\. Tokens are"):
        assert not engine._kernels_run.__wrapped__(GPU)


def _alike(wrong: bool) -> bool:
    """Say whether kernels choose alike, or would if it always were the next token."""
    from tokenprune.greedy.fused import items, kernels

    with pytest.MonkeyPatch.context() as patch:
        if wrong:
            found = kernels.max_min
            patch.setattr(kernels, "max_min", lambda *given: (found(*given) + 1) % 70)
        return items.chooses_alike(torch.device("cpu"))
