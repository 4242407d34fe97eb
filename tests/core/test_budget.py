from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tokenprune.arguments import parse_keep
from tokenprune.budget import tokens_kept
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
