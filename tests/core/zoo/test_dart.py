"""dart against its sentence in plain loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import tokenprune
from tests.core.test_methods import Array, array
from tests.core.zoo.clusters import clustered, drawn
from tests.core.zoo.test_scope import cosines
from tokenprune import VisualTokens
from tokenprune.errors import OptionError
from tokenprune.registry import build


def largest(rows: Array, count: int) -> list[int]:
    norms = [float(sum(abs(value) for value in row)) for row in rows]
    return sorted(range(len(rows)), key=lambda place: (-norms[place], place))[:count]


def least_alike(
    z: Array,
    t: Array,
    keep: int,
    counts: tuple[int, int] = (4, 4),
    per_pivot: int | None = None,
    order: list[tuple[str, int]] | None = None,
) -> list[int]:
    """Take tokens pivot by pivot; `order` is the pivots' where it is not by kind and norm."""
    kept = largest(z, min(counts[0], keep))
    pivots = [("image", place) for place in kept] + [
        ("text", place) for place in largest(t, counts[1])
    ]
    if order is not None:
        assert sorted(order) == sorted(pivots)
        pivots = order
    for step, (kind, pivot) in enumerate(pivots):
        left, last = keep - len(kept), step == len(pivots) - 1
        share = math.ceil(left / (len(pivots) - step))
        if per_pivot is not None:
            share = left if last else min(left, per_pivot)
        row = (z if kind == "image" else t)[pivot]
        others = [place for place in range(len(z)) if place not in kept]
        similar = {place: float(cosines(row[None], z[[place]])[0, 0]) for place in others}
        kept += sorted(others, key=lambda place: (similar[place], place))[:share]
    return sorted(kept)


def item(total: int, asked: int, seed: int) -> VisualTokens:
    question = clustered(asked, seed + 30) if asked else drawn(0, 24, seed=0)
    return VisualTokens(
        (1, 1, total), embeddings=clustered(total, seed), question_embeddings=question
    )


@pytest.mark.parametrize("seed", range(24))
def test_dart_is_its_sentence(seed: int) -> None:
    total, asked = (49, 60, 81)[seed % 3], (9, 2, 30, 0)[seed % 4]
    tokens = item(total, asked, seed)
    z, t = array(tokens.embeddings), array(tokens.question_embeddings)
    for keep in (1, 3, 4, 5, 20, 37, total - 1):
        assert tokenprune.select(tokens, "dart", keep).kept.tolist() == least_alike(z, t, keep)
    options: dict[str, Any] = {"image_pivots": 1 + seed % 5, "text_pivots": seed % 4}
    counts = options["image_pivots"], options["text_pivots"]
    for per_pivot in (None, 2):
        found = tokenprune.select(tokens, "dart", 22, per_pivot=per_pivot, **options)
        assert found.kept.tolist() == least_alike(z, t, 22, counts, per_pivot)


@pytest.mark.parametrize("seed", range(20))
def test_the_authors_order_is_that_of_a_set_of_places(seed: int) -> None:
    total, start = (49, 64)[seed % 2], (35, 7)[seed % 2]
    tokens = item(total, 12, seed)
    z, t = array(tokens.embeddings), array(tokens.question_embeddings)
    image = {start + place: ("image", place) for place in largest(z, 4)}
    text = {start + total + place: ("text", place) for place in largest(t, 4)}
    order = [{**image, **text}[place] for place in set([*image, *text])]
    # 36 = 4 + 8 * ceil(28 // 8): what the authors' code keeps for 28 and for 32.
    found = tokenprune.select(tokens, "dart", 36, order="set", start=start)
    assert found.kept.tolist() == least_alike(z, t, 36, per_pivot=4, order=order)


def test_what_is_kept_when_pivots_are_all() -> None:
    norms = torch.tensor([3.0, 9.0, 1.0, 9.0, 4.0, 7.0])
    tokens = VisualTokens(
        (1, 2, 3),
        embeddings=norms[:, None] * torch.eye(6),
        question_embeddings=torch.ones(2, 6),
    )
    kept = {keep: tokenprune.select(tokens, "dart", keep).kept.tolist() for keep in range(1, 7)}
    assert kept == {
        1: [1],
        2: [1, 3],
        3: [1, 3, 5],
        4: [1, 3, 4, 5],
        5: [0, 1, 3, 4, 5],
        6: [0, 1, 2, 3, 4, 5],
    }


@pytest.mark.parametrize("seed", [1, 2])
def test_cosines_are_compared_and_not_products(seed: int) -> None:
    tokens = item(40, 5, seed)
    assert tokens.embeddings is not None
    shorter = tokens.embeddings * torch.linspace(0.1, 1, 40)[:, None]
    pivots = largest(array(tokens.embeddings), 4)
    shorter[pivots] = tokens.embeddings[pivots]
    given = VisualTokens(
        (1, 1, 40), embeddings=shorter, question_embeddings=tokens.question_embeddings
    )
    found = tokenprune.select(given, "dart", 20)
    assert found.kept.tolist() == tokenprune.select(tokens, "dart", 20).kept.tolist()


@pytest.mark.parametrize(
    ("option", "value"),
    [("image_pivots", 0), ("text_pivots", -1), ("start", -1), ("per_pivot", 0)],
)
def test_options_that_are_refused(option: str, value: int) -> None:
    with pytest.raises(OptionError, match=rf"{option}={value} .* must be at least {value + 1}"):
        build("dart", {option: value})


def test_numpy_sees_the_same_norms() -> None:
    rows = array(clustered(30, 9))
    assert largest(rows, 3) == np.argsort(-np.abs(rows).sum(axis=1), kind="stable")[:3].tolist()
