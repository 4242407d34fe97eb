"""Accuracy against visual tokens, as an SVG."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MultipleLocator, NullLocator

from tokenprune_eval.demo.preset import ORACLE
from tokenprune_eval.demo.results import Row
from tokenprune_eval.results.drawing import FAINT, GRID, INK, Style, draw_line, style_of, svg_uri
from tokenprune_eval.results.records import UNPRUNED


def accuracy_plot(rows: Sequence[Row], narrow: bool = False) -> str:
    """Draw one set's accuracy against visual tokens, with 95 % intervals.

    Parameters
    ----------
    rows
        All rows of the set.
    narrow
        True for a telephone's screen.

    Returns
    -------
    str
        A ``data:image/svg+xml`` URI.
    """
    methods = list(
        dict.fromkeys(row.method for row in rows if row.method not in (UNPRUNED, ORACLE))
    )
    total = rows[0].of_visual_tokens
    size = 9.5 if narrow else 10.5
    with matplotlib.rc_context(
        {
            "font.family": "sans-serif",
            "font.sans-serif": ["Liberation Sans", "Arial", "Helvetica", "DejaVu Sans"],
            "font.size": size,
            "svg.hashsalt": "tokenprune",
            "svg.fonttype": "path",
            "text.color": INK,
            "axes.labelcolor": FAINT,
            "xtick.color": FAINT,
            "ytick.color": FAINT,
        }
    ):
        figure = Figure(figsize=(3.9, 4.6) if narrow else (5.6, 4.5), layout="constrained")
        axes = figure.subplots()
        _unpruned_line(axes, rows, total)
        for place, method in enumerate(methods):
            # A little to the left or right, so that intervals do not hide each other.
            shift = 2 ** (0.035 * (place - (len(methods) - 1) / 2))
            points = sorted(
                (row for row in rows if row.method == method and not row.unpruned),
                key=lambda row: row.visual_tokens,
            )
            style = style_of(method, methods)
            _line(axes, points, shift, style, method)
        for row in rows:
            if row.method == ORACLE:
                _line(axes, [row], 1.0, Style("#000000", "*", "", 2.0), "oracle")
        _decorate(axes, rows, total)
        axes.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, -0.14 if not narrow else -0.13),
            ncols=2 if narrow else 3,
            frameon=False,
            handlelength=2.4,
            columnspacing=1.4,
            fontsize=size - 0.5,
        )
        return svg_uri(figure)


def _line(axes: Axes, points: Sequence[Row], shift: float, style: Style, name: str) -> None:
    draw_line(
        axes,
        [row.visual_tokens * shift for row in points],
        [(row.accuracy, row.ci_low, row.ci_high) for row in points],
        style,
        name,
    )


def _unpruned_line(axes: Axes, rows: Sequence[Row], total: int) -> None:
    for row in rows:
        if row.method == UNPRUNED:
            axes.axhspan(100 * row.ci_low, 100 * row.ci_high, color="#f0e6c8", zorder=1, lw=0)
            axes.axhline(100 * row.accuracy, color="#8a6d1f", linewidth=1.2, zorder=2)
            axes.annotate(
                f"all {total} tokens: {100 * row.accuracy:.1f} %",
                (0.012, 100 * row.accuracy),
                xycoords=("axes fraction", "data"),
                xytext=(0, 4),
                textcoords="offset points",
                color="#6f5716",
                fontsize="small",
                va="bottom",
            )


def _decorate(axes: Axes, rows: Sequence[Row], total: int) -> None:
    tokens = sorted(
        {
            row.visual_tokens
            for row in rows
            if row.method not in (UNPRUNED, ORACLE) and not row.unpruned
        }
    )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(tokens))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlim(tokens[0] / 1.25, tokens[-1] * 1.25)
    lowest = min(100 * row.ci_low for row in rows)
    axes.set_ylim(max(0, 10 * (lowest // 10)), 101.5)
    axes.yaxis.set_major_locator(MultipleLocator(20 if lowest < 50 else 5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.set_xlabel(f"visual tokens kept of {total}")
    axes.set_title("right answers", loc="left", fontsize="medium", color=FAINT, pad=8)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#b8bec6")
