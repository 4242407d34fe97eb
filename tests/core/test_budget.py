from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest

from tokenprune.arguments import parse_keep
from tokenprune.budget import PUBLISHED, Budget, PublishedBudget, check_keep, tokens_kept
from tokenprune.errors import BudgetError


@pytest.mark.parametrize(
    ("keep", "total", "kept"),
    [
        (1, 576, 1),
        (64, 576, 64),
        (576, 576, 576),
        (1000, 576, 576),
        (1.0, 576, 576),
        (0.5, 5, 3),  # 2.5 rounds up, where Python's round gives 2
        (0.5, 7, 4),
        (0.1, 576, 58),
        (0.098, 576, 56),
        (0.25, 1, 1),
        (1e-9, 576, 1),
        (0.1, 14, 1),
        (0.1, 15, 2),
        (0.3334, 576, 192),
        (0.2223, 576, 128),
        (0.1112, 576, 64),
        (np.int64(3), 10, 3),
        (np.float32(0.5), 10, 5),
    ],
)
def test_rounding(keep: Any, total: int, kept: int) -> None:
    assert tokens_kept(keep, total) == kept


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        (0, "keep=0"),
        (-3, "at least 1"),
        (0.0, r"\(0, 1\]"),
        (-0.5, r"\(0, 1\]"),
        (64.0, "keep=64, without"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (True, "bool"),
        ("64", "no published budget"),
        (None, "NoneType"),
    ],
)
def test_refusals(keep: Any, says: str) -> None:
    with pytest.raises(BudgetError, match=says):
        tokens_kept(keep, 576)


@pytest.mark.parametrize("keep", [1, 64, 1.0, 0.1, np.int64(3), np.float32(0.5), "internvl2.5-8b"])
def test_a_checked_budget_is_what_was_given(keep: Any) -> None:
    budget = Budget.of(keep)
    assert Budget.of(budget) is budget
    assert budget.keep == check_keep(keep) == check_keep(budget)
    assert type(budget.keep) in (int, float, PublishedBudget)
    for total in (1, 7, 576, 9000):
        assert budget.count(total) == tokens_kept(keep, total) == tokens_kept(budget, total)


def test_one_token_is_not_all_of_them() -> None:
    assert Budget.of(1) != Budget.of(1.0)
    assert Budget.of(1) == Budget.of(cast(Any, np.int32(1)))
    published = Budget.of("llava-video-7b").published
    assert published is not None
    assert (published.name, int(published)) == ("llava-video-7b", PUBLISHED["llava-video-7b"])
    assert Budget.of(64).published is None


def test_an_empty_item_is_refused() -> None:
    with pytest.raises(BudgetError, match="0 visual tokens"):
        tokens_kept(1, 0)


@pytest.mark.parametrize(
    ("text", "keep"),
    [("64", 64), ("0.25", 0.25), ("25%", 0.25), (" 12.5 % ", 0.125), ("100%", 1.0), ("1", 1)],
)
def test_a_budget_written_as_text(text: str, keep: int | float) -> None:
    parsed = parse_keep(text)
    assert (parsed, type(parsed)) == (keep, type(keep))


@pytest.mark.parametrize("text", ["", "%", "25%%", "25% of it", "x%", "many", "0%", "101%", "-1%"])
def test_text_that_is_no_budget(text: str) -> None:
    with pytest.raises(BudgetError):
        parse_keep(text)
