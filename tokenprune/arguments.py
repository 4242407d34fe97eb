"""Command-line arguments that several subcommands share, and how their text is read."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tokenprune.errors import BudgetError, ConfigError, OptionError

if TYPE_CHECKING:
    from tokenprune.budget import Keep


def add_keep(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add ``--keep KEEP``; read it with `parse_keep`."""
    ending = "" if default is None else f" (default: {default})"
    parser.add_argument(
        "--keep",
        default=default,
        metavar="KEEP",
        help=f"a number of tokens such as 16, or a fraction such as 0.25 or 25%%{ending}",
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


def parse_keep(text: str, name: str = "--keep ") -> Keep:
    """Return a budget written as text: with a decimal point or ``%`` a fraction, else a count.

    The name of a published budget becomes its number.

    Parameters
    ----------
    text
        What was given.
    name
        Put in front of it in the message.

    Raises
    ------
    BudgetError
        If it is no budget.
    """
    from tokenprune.budget import PUBLISHED, check_keep

    if text in PUBLISHED:
        return check_keep(text)
    value = _number(text)
    if value is None:
        raise BudgetError(
            f"{name}{text} is no number. Give a number of tokens (64) or a fraction (0.1 or 10%)."
        )
    return check_keep(value)


def parse_share(name: str, text: str) -> float:
    """Return ``"1%"`` or ``"0.01"`` as 0.01.

    Parameters
    ----------
    name
        The argument, for the message.
    text
        What was given.

    Raises
    ------
    ConfigError
        If it is no share above 0 and below 1.
    """
    share = _number(text)
    if share is None or math.isnan(share):
        raise ConfigError(f"{name} {text} is no share. Write 1% or 0.01.")
    if not 0 < share < 1:
        hint = "" if "%" in text or share < 1 else f" For {text} percent write {text}%."
        raise ConfigError(f"{name} {text} must lie above 0 and below 1, which is 100%.{hint}")
    return share


def _number(text: str) -> int | float | None:
    """Return a number as it is written, ``25%`` as 0.25; None where it is none."""
    number, percent, rest = text.strip().partition("%")
    try:
        if not percent:
            return int(number)
    except ValueError:
        pass
    try:
        value = float(number)
    except ValueError:
        return None
    if rest:
        return None
    return value / 100 if percent else value


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
