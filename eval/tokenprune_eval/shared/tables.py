"""The one look of tables in the terminal, and how shares are written in them."""

from __future__ import annotations

import math

from rich import box
from rich.table import Table


def percent(share: float, digits: int = 1) -> str:
    """Return a share in per cent, without the sign: ``"95.2"``."""
    return f"{100 * share:.{digits}f}"


def three_digits(value: float) -> str:
    """Return a number with three digits at least where there are any: ``"0.0123"``, ``"1,234"``."""
    if value <= 0:
        return "0"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}"


def plain_table(title: str = "") -> Table:
    """Return a table without columns; only its head has a line under it.

    Parameters
    ----------
    title
        Stands above, on the left.
    """
    return Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        collapse_padding=True,
        pad_edge=False,
        show_edge=False,
    )
