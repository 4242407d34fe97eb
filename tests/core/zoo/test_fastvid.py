"""fastvid against its formula in plain loops: which tokens stay, and what their rows become."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import tokenprune
from tests.core.zoo.videos import Array, array, cosine, video
from tokenprune import Selection, VisualTokens
from tokenprune.errors import OptionError, TokensError
from tokenprune.registry import build
from tokenprune.selecting import select_many
from tokenprune.selectors import fastvid
from tokenprune.selectors.fastvid import density_peaks, dynamic_segments
from tokenprune.testing import CHECKS, make_item

GRIDS = ((4, 3, 5), (11, 4, 4), (2, 6, 6), (1, 5, 6), (20, 2, 5))
HEAD = {"segment_by": "frame_features", "salient_by": "pooling_attention"}


@dataclass
class Reference:
    """The published algorithm, of `each` tokens a frame."""

    tokens: VisualTokens
    each: int
    vectors: Array
    attention: Array
    cuts: int = 8
    threshold: float = 0.9
    every: int = 4

    def __post_init__(self) -> None:
        self.frames, rows, columns = self.tokens.grid
        self.count = rows * columns
        self.z = array(self.tokens.embeddings)
        self.context = int(self.each * 0.4)
        self.salient = [
            i
            for t in range(self.frames)
            for i in self.most(self.of_frame(t), self.each - self.context)
        ]
        self.centres: dict[int, list[int]] = {}
        if self.context:
            for segment in self.segments():
                self.find_centres(segment)

    def of_frame(self, t: int) -> list[int]:
        return list(range(t * self.count, (t + 1) * self.count))

    def most(self, places: list[int], number: int) -> list[int]:
        return sorted(places, key=lambda i: (-self.attention[i], i))[:number]

    def segments(self) -> list[list[int]]:
        g = self.vectors
        likeness = [cosine(g[t], g[t + 1]) for t in range(self.frames - 1)]
        lowest = sorted(range(len(likeness)), key=lambda t: (likeness[t], t))[: self.cuts - 1]
        segments: list[list[int]] = [[0]]
        for t, value in enumerate(likeness):
            if t in lowest or value < self.threshold:
                segments.append([])
            segments[-1].append(t + 1)
        return segments

    def find_centres(self, segment: list[int]) -> None:
        anchors = [t for t in segment if (segment[-1] - t) % self.every == 0]
        share = self.context * len(segment) // len(anchors)
        others = {t: [i for i in self.of_frame(t) if i not in self.salient] for t in segment}
        found: dict[int, list[int]] = {}
        for t in anchors:
            scores = dict(zip(others[t], self.peaks(others[t]), strict=True))
            found[t] = sorted(others[t], key=lambda i: (-scores[i], i))[:share]
        frame_alone = len(anchors) == len(segment)
        for group in [[t] for t in segment] if frame_alone else [segment]:
            centres = sorted(i for t in group for i in found.get(t, []))
            for centre in centres:
                self.centres[centre] = []
            self.groups = getattr(self, "groups", [])
            self.groups.append((group, centres))

    def peaks(self, places: list[int]) -> list[float]:
        rows = self.z[places]
        d = np.array([[math.dist(a, b) / math.sqrt(len(a)) for b in rows] for a in rows])
        density = [math.exp(-float(np.mean(np.sort(row)[:4] ** 2))) for row in d]
        delta = [
            min(
                (d[i, j] for j in range(len(rows)) if density[j] > density[i]),
                default=float(d.max()),
            )
            for i in range(len(rows))
        ]
        return [a * b for a, b in zip(delta, density, strict=True)]

    def published(self) -> list[int]:
        return sorted([*self.salient, *self.centres])

    def exact(self, keep: int) -> list[int]:
        """Return `keep` tokens: fewer or more of those with attention than published."""
        left = [i for i in range(len(self.z)) if i not in self.centres]
        ordinary = [i for i in left if i not in self.salient]
        order = [*self.most(self.salient, len(self.z)), *self.most(ordinary, len(self.z))]
        return sorted([*self.centres, *order[: keep - len(self.centres)]])

    def rows(self, kept: list[int]) -> Array:
        """Merge what is not kept, and the centres, into centres."""
        stays = {*kept} - {*self.centres}
        for group, centres in getattr(self, "groups", []):
            for i in (i for t in group for i in self.of_frame(t) if i not in stays):
                likeness = [cosine(self.z[i], self.z[c]) for c in centres]
                best = i if i in centres else centres[int(np.argmax(likeness))]
                self.centres[best].append(i)
        rows = []
        for i in kept:
            row = self.z[i]
            if i in self.centres:
                members = self.centres[i]
                own = max(1 / (len(members) + 1), 0.6)
                row = own * row + (1 - own) * self.z[members].mean(axis=0)
            rows.append(row)
        return np.array(rows)


def reference(tokens: VisualTokens, each: int, head: bool) -> Reference:
    if head:
        vectors = array(tokens.frame_features)
        return Reference(tokens, each, vectors, array(tokens.pooling_attention))
    frames = tokens.grid[0]
    vectors = array(tokens.features).reshape(frames, tokens.total // frames, -1).mean(axis=1)
    return Reference(tokens, each, vectors, array(tokens.cls_attention).mean(axis=0))


def check_rows(selection: Selection, tokens: VisualTokens, expected: Array) -> None:
    assert tokens.embeddings is not None
    rows = array(selection.rows(tokens.embeddings))
    np.testing.assert_allclose(rows, expected, atol=2e-6)


@pytest.mark.parametrize("head", [True, False], ids=["head", "stand-ins"])
@pytest.mark.parametrize("seed", range(20))
def test_it_is_its_formula(seed: int, head: bool) -> None:
    tokens = video(GRIDS[seed % len(GRIDS)], seed)
    frames, options = tokens.grid[0], HEAD if head else {}
    for keep in (1, tokens.total // 7, tokens.total // 4, tokens.total // 2, tokens.total - 1):
        for counts, each in (("top-up", keep // frames), ("cut", -(-keep // frames))):
            one = reference(tokens, each, head)
            selection = tokenprune.select(tokens, "fastvid", keep, counts=counts, **options)
            expected = one.exact(keep)
            assert selection.kept.tolist() == expected
            assert (selection.merge is not None) == bool(one.context)
            check_rows(selection, tokens, one.rows(expected))


@pytest.mark.parametrize("seed", range(20))
def test_where_keep_is_the_published_count_it_is_what_is_published(seed: int) -> None:
    tokens = video(GRIDS[seed % len(GRIDS)], seed)
    for each in (3, 5):
        one = reference(tokens, each, True)
        published = one.published()
        assert tokens.grid[0] * (each - 1) < len(published) <= tokens.grid[0] * each
        selection = tokenprune.select(tokens, "fastvid", len(published), counts="cut", **HEAD)
        assert selection.kept.tolist() == published
        check_rows(selection, tokens, one.rows(published))


@pytest.mark.parametrize("every", [1, 2, 7])
def test_anchors_are_counted_from_the_end_of_a_segment(every: int) -> None:
    tokens = video((9, 3, 4), 5)
    vectors, attention = np.ones((9, 2)), array(tokens.pooling_attention)
    tokens = dataclasses.replace(tokens, frame_features=torch.ones(9, 2))
    one = Reference(tokens, 3, vectors, attention, cuts=2, every=every)
    expected = one.exact(27)
    options = {"anchor_every": every, "segments": 2, **HEAD}
    selection = tokenprune.select(tokens, "fastvid", 27, **options)
    assert selection.kept.tolist() == expected
    check_rows(selection, tokens, one.rows(expected))


def test_segments() -> None:
    cosines = [0.99, 0.95, 0.2, 0.95, 0.97, 0.85]
    assert dynamic_segments(cosines, 1, 0.9) == [range(3), range(3, 6), range(6, 7)]
    assert dynamic_segments(cosines, 1, 0.0) == [range(7)]
    # The first of equal ones.
    assert dynamic_segments(cosines, 4, 0.0) == [range(2), range(2, 3), range(3, 6), range(6, 7)]
    assert dynamic_segments(cosines, 80, 0.0) == [range(t, t + 1) for t in range(7)]
    assert dynamic_segments([], 8, 0.9) == [range(1)]


def test_distances_in_blocks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(5, 13, 6, generator=torch.Generator().manual_seed(0))
    expected = density_peaks(rows, 4)
    for entries in (2 * 13 * 13, 13 * 5, 1):  # two items; five rows of an item; one row
        monkeypatch.setattr(fastvid, "_ENTRIES", entries)
        assert torch.equal(density_peaks(rows, 4), expected)


def test_in_bfloat16_and_in_a_batch_rows_are_what_they_are_alone() -> None:
    items = [video((6, 4, 5), seed) for seed in range(3)]
    for item in items:
        assert item.embeddings is not None
        object.__setattr__(item, "embeddings", item.embeddings.bfloat16())
    for item, selection in zip(items, select_many(items, build("fastvid", {}), 30), strict=True):
        alone = tokenprune.select(item, "fastvid", 30)
        assert item.embeddings is not None
        rows = selection.rows(item.embeddings)
        assert rows.dtype == torch.bfloat16
        assert torch.equal(rows, alone.rows(item.embeddings))


@pytest.mark.parametrize(
    "name", ["same_in_any_batch", "first_of_equal_tokens", "not_finite_is_named"]
)
def test_as_published_it_keeps_what_selectors_promise(name: str) -> None:
    CHECKS[name](build("fastvid", {**HEAD, "counts": "cut"}), make_item)


def test_what_is_looked_at_is_an_option_and_no_fallback() -> None:
    tokens = video((6, 4, 5), 0)
    of_encoder = dataclasses.replace(tokens, frame_features=None, pooling_attention=None)
    of_head = dataclasses.replace(tokens, features=None, cls_attention=None)
    assert build("fastvid", HEAD).needs == ("embeddings", "frame_features", "pooling_attention")
    assert build("fastvid", {"segment_by": "embeddings"}).needs == ("embeddings", "cls_attention")
    for options, enough, missing in (
        ({}, of_encoder, "features"),
        (HEAD, of_head, "frame_features"),
    ):
        lacking = of_head if enough is of_encoder else of_encoder
        expected = tokenprune.select(tokens, "fastvid", 40, **options).kept
        assert torch.equal(tokenprune.select(enough, "fastvid", 40, **options).kept, expected)
        with pytest.raises(TokensError, match=f"this method needs {missing}"):
            tokenprune.select(lacking, "fastvid", 40, **options)


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("segments", 0, "at least 1 .*8"),
        ("context_share", 1.0, r"from 0 to below 1 .*0\.4"),
        ("anchor_every", 0, "at least 1 .*4"),
        ("neighbours", 0, "at least 1 .*4"),
        ("anchor_weight", 1.5, r"from 0 to 1 .*0\.6"),
        ("segment_by", "pixels", "not one of its values"),
    ],
)
def test_options_that_cannot_be_used_are_refused(option: str, value: object, says: str) -> None:
    with pytest.raises(OptionError, match=rf"option {option}=.* of method 'fastvid' .*{says}"):
        build("fastvid", {option: value})
