"""Which values an option takes, by the annotation of its field."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest

from tokenprune.errors import OptionError
from tokenprune.selectors.options import check_option


@pytest.mark.parametrize(
    ("annotation", "takes", "refuses", "says"),
    [
        (int, [0, -3], [True, 1.0, "1", None], "must be a whole number, not"),
        (float, [1, 0.5], [False, "1", None], "must be a finite number, not"),
        (float, [], [math.nan, math.inf], r"must be a finite number\."),
        (bool, [True, False], [0, 1, "yes"], "must be True or False, not"),
        (str, ["", "a"], [1, None], "must be str, not"),
        (type(None), [None], [0, ""], "must be None, not"),
        (int | None, [3, None], [2.5, True, "x"], r"must be a int \| None\."),
        (Literal["sum", "max"], ["sum", "max"], ["mas", 1], "Did you mean|Allowed: max, sum"),
        (Literal["all"] | int, ["all", 4], ["none", 1.5], "must be a "),
        (Any, [1, "x", None, [1]], [], ""),
        (list[int], [[1], "not looked at"], [], ""),
    ],
)
def test_values_of_an_option(
    annotation: Any, takes: list[Any], refuses: list[Any], says: str
) -> None:
    for value in takes:
        check_option("method", "option", value, annotation)
    for value in refuses:
        with pytest.raises(OptionError, match=f"^option option=.* of method 'method' .*({says})"):
            check_option("method", "option", value, annotation)
