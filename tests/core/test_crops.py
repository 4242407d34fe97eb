"""One set over all crops of an image, against straight-line choices from all their rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from tests.core.test_methods import array, highest, spread_out
from tokenprune import PruningConfig, Selection, VisualTokens, tokens_kept
from tokenprune.errors import BudgetError, ConfigError, TokensError
from tokenprune.registry import build
from tokenprune.scope import Joined, count_together, select_together
from tokenprune.selecting import select_unchecked
from tokenprune.testing import make_item

GRIDS = ((1, 4, 4), (1, 2, 3), (1, 1, 5), (1, 4, 4))


def crops_of(seed: int = 0) -> list[VisualTokens]:
    return [
        make_item(grid, seed=10 * seed + number, label=f"image 2, crop {number}")
        for number, grid in enumerate(GRIDS)
    ]


def together(selections: list[Selection]) -> list[int]:
    """Return what is kept, counted in all crops laid end to end."""
    starts = np.cumsum([0, *(one.total for one in selections[:-1])])
    return [
        int(start) + index
        for start, one in zip(starts, selections, strict=True)
        for index in one.kept.tolist()
    ]


@pytest.mark.parametrize("keep", [1, 3, 0.1, 0.5, 1.0])
def test_divprune_spreads_over_all_rows(keep: Any) -> None:
    crops = crops_of()
    found = select_together(crops, build("divprune", {}), keep)
    rows = np.concatenate([array(crop.embeddings) for crop in crops])
    count = tokens_kept(keep, 43) if isinstance(keep, float) else keep * 4
    assert together(found) == spread_out(rows, count)
    assert [one.grid for one in found] == list(GRIDS)
    assert all(one.is_picture for one in found)
    if keep == 3:  # not as many of each
        assert {len(one) for one in found} != {3}


def test_scores_rank_all_rows() -> None:
    crops = crops_of(1)
    found = select_together(crops, build("feature-norm", {"taken": "after"}), 2)
    norms = [np.sqrt((array(crop.embeddings) ** 2).sum(axis=1)) for crop in crops]
    assert together(found) == highest(np.concatenate(norms), 8)
    for selection, own in zip(found, norms, strict=True):
        np.testing.assert_allclose(array(selection.scores), own, rtol=1e-6)


def test_the_budget_is_that_of_all_crops() -> None:
    assert count_together(5, [16, 6, 5, 3]) == 5 + 5 + 5 + 3
    assert count_together(0.25, [3, 3, 3]) == 2  # of each alone it would be 1
    assert count_together(1.0, [3, 4]) == 7
    with pytest.raises(BudgetError):
        count_together(0, [3, 4])


def test_places_say_in_which_order_rows_are_read() -> None:
    first, second = crops_of()[1:3]
    places = (torch.tensor([0, 2, 3, 5, 8, 9]), torch.tensor([1, 4, 6, 7, 10]))
    joined = Joined.of([first, second], places, "image 2")
    rows = torch.empty(11, first.embeddings.shape[1])  # type: ignore[union-attr]
    attention = torch.empty(first.cls_attention.shape[0], 11)  # type: ignore[union-attr]
    taps = torch.empty(2, 11, first.deepstack.shape[2])  # type: ignore[union-attr]
    for crop, at in zip((first, second), places, strict=True):
        for index, place in enumerate(at.tolist()):
            rows[place] = crop.embeddings[index]  # type: ignore[index]
            attention[:, place] = crop.cls_attention[:, index]  # type: ignore[index]
            taps[:, place] = crop.deepstack[:, index]  # type: ignore[index]
    tokens = joined.tokens
    assert torch.equal(tokens.embeddings, rows)  # type: ignore[arg-type]
    assert torch.equal(tokens.cls_attention, attention)  # type: ignore[arg-type]
    assert torch.equal(tokens.deepstack, taps)  # type: ignore[arg-type]
    assert (tokens.grid, tokens.is_picture, tokens.label) == ((1, 1, 11), False, "image 2")
    # The text about an image stands behind its last crop.
    assert tokens.question_embeddings is second.question_embeddings
    kept, scores = torch.tensor([0, 1, 3, 6, 9]), torch.arange(11.0)
    whole = Selection(kept, 11, (1, 1, 11), scores, torch.tensor([1, 2, 3, 4, 1]), False)
    apart = joined.split(whole)
    assert [one.kept.tolist() for one in apart] == [[0, 2, 5], [0, 2]]
    assert [one.scores.tolist() for one in apart] == [  # type: ignore[union-attr]
        [0, 2, 3, 5, 8, 9],
        [1, 4, 6, 7, 10],
    ]
    assert [one.represented.tolist() for one in apart] == [[1, 3, 1], [2, 4]]  # type: ignore[union-attr]
    again = joined.whole(apart)
    assert again is not None
    for name in ("kept", "scores", "represented"):
        assert torch.equal(getattr(again, name), getattr(whole, name))
    assert joined.whole([apart[0], None]) is None
    with pytest.raises(TokensError, match="selections of"):
        joined.whole([apart[1], apart[0]])


def test_a_batch_of_images_is_chosen_from_as_each_alone() -> None:
    images = [Joined.of(crops_of(seed)[: 2 + seed % 2]) for seed in range(6)]
    for method in ("divprune", "information", "feature-norm", "random", "vispruner"):
        selector = build(method, {})
        counts = [one.count(2) + number for number, one in enumerate(images)]
        items = [one.tokens for one in images]
        all_at_once = select_unchecked(items, selector, 2, counts=counts).checked()
        assert [len(one) for one in all_at_once] == counts
        for item, count, selection in zip(items, counts, all_at_once, strict=True):
            (alone,) = select_unchecked([item], selector, 2, counts=[count]).checked()
            assert torch.equal(alone.kept, selection.kept)


@pytest.mark.parametrize("method", ["evs", "vidcom2", "fastvid", "visionzip", "prumerge-plus"])
def test_methods_that_cannot(method: str) -> None:
    with pytest.raises(ConfigError, match=f"{method}.*Use scope='item'"):
        PruningConfig(method, 4, scope="image")
    with pytest.raises(ConfigError, match=method):
        select_together(crops_of(), build(method, {}), 4)


def test_a_scope_that_there_is_not() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'image'"):
        PruningConfig("divprune", 4, scope="images")  # type: ignore[arg-type]


def test_a_config_with_a_scope_goes_to_json_and_back() -> None:
    config = PruningConfig("divprune", 0.1, scope="image", options={"taken": "before"})
    assert PruningConfig.from_json(config.to_json()) == config
    assert config.to_dict()["scope"] == "image"
    # Where it is the usual one, what is written is what earlier releases read.
    assert "scope" not in PruningConfig("divprune", 0.1).to_dict()


def test_crops_that_do_not_have_the_same() -> None:
    first, second, *_ = crops_of()
    bare = dataclasses.replace(second, features=None)
    with pytest.raises(TokensError, match=r"image 2, crop 0: some of its 2 crops have features"):
        Joined.of([first, bare])
    reader: Any = object()
    read = [dataclasses.replace(crop, query_attention=reader) for crop in (first, second)]
    with pytest.raises(TokensError, match="query_attention of its crops is read"):
        Joined.of(read)
