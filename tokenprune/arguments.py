"""Command-line arguments that several subcommands share, and how their text is read."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tokenprune.errors import BudgetError, OptionError

if TYPE_CHECKING:
    from tokenprune.budget import Keep


def add_keep(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add ``--keep KEEP``; read it with `parse_keep`."""
    ending = "" if default is None else f" (default: {default})"
    parser.add_argument(
        "--keep",
        default=default,
        metavar="KEEP",
        help=f"a number of tokens such as 16, or a fraction such as 0.25{ending}",
    )


def add_positions(parser: argparse.ArgumentParser) -> None:
    """Add ``--positions``."""
    parser.add_argument(
        "--positions",
        default="original",
        choices=("original", "compact"),
        help="positions of the kept tokens: as in the full image (default), or renumbered",
    )


def add_options(parser: argparse.ArgumentParser, help_text: str) -> None:
    """Add ``--option NAME=VALUE``; read them with `parse_options`."""
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=f"{help_text}, for example estimator=jvp; may be repeated",
    )


def parse_keep(text: str) -> Keep:
    """Return ``--keep`` as a number: with a decimal point a fraction, without one a count.

    The name of a published budget becomes its number.

    Raises
    ------
    BudgetError
        If it is no budget.
    """
    from tokenprune.budget import PUBLISHED, check_keep

    if text in PUBLISHED:
        return check_keep(text)

    try:
        return check_keep(int(text))
    except ValueError as error:
        if isinstance(error, BudgetError):
            raise
    try:
        return check_keep(float(text))
    except ValueError as error:
        if isinstance(error, BudgetError):
            raise
        raise BudgetError(
            f"--keep {text} is no number. Give a number of tokens (64) or a fraction (0.1)."
        ) from None


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """Return ``NAME=VALUE`` arguments as a dict; values are read as JSON, or stay text.

    Raises
    ------
    OptionError
        If there is no ``=``.
    """
    values: dict[str, Any] = {}
    for option in options:
        name, equals, text = option.partition("=")
        if not equals or not name:
            raise OptionError(f"--option {option} is not NAME=VALUE, for example seed=1.")
        try:
            values[name.replace("-", "_")] = json.loads(text)
        except json.JSONDecodeError:
            values[name.replace("-", "_")] = text
    return values
