"""Accuracy against what it costs, one curve a method, as an SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from tokenprune.baselines import RESIZE
from tokenprune_eval.results import words
from tokenprune_eval.results.drawing import FAINT, GRID, INK, Style, draw_line, style_of, svg_uri
from tokenprune_eval.results.records import UNPRUNED, Seconds
from tokenprune_eval.results.statistics import Accuracy

Cost = Literal["visual_tokens", "first_token"]

_CLOSE = 1.25
"""Token numbers nearer than this factor share one tick, which would otherwise overlap."""

_DASHES = {"compact": (0, (5, 2)), "proportional": (0, (2, 1))}
_DOTS = (0, (1, 1))

_LONGEST_NAME = 24
"""Signs of a name in the legend."""


class Plotted(Protocol):
    """What is drawn of one condition, see `tokenprune_eval.results.summary.Row`."""

    @property
    def method(self) -> str:
        """Its name."""

    @property
    def variant(self) -> str:
        """How it was run, see `tokenprune_eval.results.records.variant`."""

    @property
    def visual_tokens(self) -> float | None:
        """Mean."""

    @property
    def of_visual_tokens(self) -> float | None:
        """Mean."""

    @property
    def accuracy(self) -> Accuracy | None:
        """With its interval."""

    @property
    def seconds(self) -> Seconds:
        """Medians."""


_AnyPlotted = TypeVar("_AnyPlotted", bound=Plotted)


@dataclass(frozen=True)
class _Point:
    """One condition: what it costs and how accurate it is."""

    cost: float
    accuracy: Accuracy


def curves(rows: Sequence[_AnyPlotted]) -> dict[tuple[str, str], list[_AnyPlotted]]:
    """Return method and variant -> the rows of its curve, the unpruned condition left out."""
    found: dict[tuple[str, str], list[_AnyPlotted]] = {}
    for row in rows:
        if row.method != UNPRUNED:
            found.setdefault((row.method, row.variant), []).append(row)
    return found


def styles(rows: Sequence[Plotted]) -> dict[tuple[str, str], Style]:
    """Return how each curve of `curves` is drawn; variants are dashed and thinner."""
    keys = list(curves(rows))
    methods = list(dict.fromkeys(method for method, _ in keys))
    return {
        (method, variant): (
            style
            if not variant or (method, "") not in keys
            else replace(style, line=_DASHES.get(variant, _DOTS), width=1.2)  # type: ignore[arg-type]
        )
        for method, variant in keys
        for style in [style_of(method, methods)]
    }


def cost_plot(rows: Sequence[Plotted], cost: Cost, narrow: bool = False) -> str | None:
    """Draw one data set's accuracy against a cost, with 95 % intervals.

    Parameters
    ----------
    rows
        All rows of the data set.
    cost
        Visual tokens kept (mean), or seconds to the first token, encoding and selecting included
        (median); drawn on a logarithmic axis.
    narrow
        True for a telephone's screen.

    Returns
    -------
    str or None
        A ``data:image/svg+xml`` URI; None where no pruned condition has both.
    """
    drawn = {
        key: points
        for key, of_key in curves(rows).items()
        if (points := [point for row in of_key if (point := _point(row, cost))])
    }
    if not drawn:
        return None
    unpruned = next((row for row in rows if row.method == UNPRUNED), None)
    size = 9.5 if narrow else 10.5
    with matplotlib.rc_context(
        {
            "font.family": "sans-serif",
            "font.sans-serif": ["Liberation Sans", "Arial", "Helvetica", "DejaVu Sans"],
            "font.size": size,
            "svg.hashsalt": "tokenprune",
            # Outlines would be most of the file, and the report's own text is in these fonts too.
            "svg.fonttype": "none",
            "text.parse_math": False,
            "text.color": INK,
            "axes.labelcolor": FAINT,
            "xtick.color": FAINT,
            "ytick.color": FAINT,
        }
    ):
        figure = Figure(figsize=(3.9, 4.6) if narrow else (5.6, 4.5), layout="constrained")
        axes = figure.subplots()
        looks = styles(rows)
        for place, (key, points) in enumerate(drawn.items()):
            # A little to the left or right, so that intervals do not hide each other.
            middle = place - (len(drawn) - 1) / 2
            shift = 2 ** (0.035 * middle) if cost == "visual_tokens" else 1.0
            _line(axes, points, shift, looks[key], _short(words.plain(words.label(*key))))
        everything = [point for points in drawn.values() for point in points]
        if unpruned is not None:
            everything += _unpruned(axes, unpruned, cost)
        if cost == "first_token":
            _mark_resized(axes, drawn)
        _decorate(axes, everything, cost, unpruned)
        figure.legend(
            loc="outside lower center",
            ncols=2 if narrow else 3,
            frameon=False,
            handlelength=2.4,
            columnspacing=1.4,
            fontsize=size - 0.5,
        )
        return svg_uri(figure)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"


def _point(row: Plotted, cost: Cost) -> _Point | None:
    value = row.visual_tokens if cost == "visual_tokens" else row.seconds.first_token
    # A logarithmic axis has no place for zero.
    return _Point(value, row.accuracy) if value and row.accuracy else None


def _line(axes: Axes, points: Sequence[_Point], shift: float, style: Style, name: str) -> None:
    ordered = sorted(points, key=lambda point: point.cost)
    draw_line(
        axes,
        [point.cost * shift for point in ordered],
        [(one.accuracy.share, one.accuracy.low, one.accuracy.high) for one in ordered],
        style,
        # matplotlib leaves a name that begins with an underscore out of the legend.
        f" {name}" if name.startswith("_") else name,
    )


def _unpruned(axes: Axes, row: Plotted, cost: Cost) -> list[_Point]:
    """Draw the unpruned condition's band and, at its cost, a diamond; return its point."""
    if row.accuracy is None:
        return []
    share = 100 * row.accuracy.share
    axes.axhspan(100 * row.accuracy.low, 100 * row.accuracy.high, color="#f0e6c8", zorder=1, lw=0)
    axes.axhline(share, color="#8a6d1f", linewidth=1.2, zorder=2)
    axes.annotate(
        f"unpruned: {share:.1f} %",
        (0.012, share),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        color="#6f5716",
        fontsize="small",
        va="bottom",
        zorder=6,
    )
    point = _point(row, cost)
    if point is None:
        return [_Point(float("nan"), row.accuracy)]
    axes.plot(
        [point.cost],
        [share],
        color="#8a6d1f",
        marker="d",
        markersize=8,
        markeredgecolor="white",
        linestyle="none",
        zorder=5,
        label="unpruned" if cost == "first_token" else None,
    )
    if cost == "first_token":
        # What lies to the right of it costs time rather than saves it.
        axes.axvline(point.cost, color="#8a6d1f", linewidth=1.2, linestyle=(0, (3, 2)), zorder=2)
        axes.annotate(
            "faster \N{LEFTWARDS ARROW} unpruned \N{RIGHTWARDS ARROW} slower",
            (point.cost, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            color="#6f5716",
            fontsize="small",
            ha="center",
            va="bottom",
            zorder=6,
        )
    return [point]


def _mark_resized(axes: Axes, drawn: Mapping[tuple[str, str], Sequence[_Point]]) -> None:
    """Write the name of the resized pictures beside their fastest point."""
    for (method, variant), points in drawn.items():
        if method == RESIZE and not variant:
            first = min(points, key=lambda point: point.cost)
            axes.annotate(
                RESIZE,
                (first.cost, 100 * first.accuracy.share),
                xytext=(0, -8),
                textcoords="offset points",
                color=style_of(RESIZE, [RESIZE]).color,
                fontsize="small",
                fontweight="bold",
                ha="center",
                va="top",
                zorder=6,
            )


def _decorate(axes: Axes, points: Sequence[_Point], cost: Cost, unpruned: Plotted | None) -> None:
    costs = sorted(point.cost for point in points if point.cost == point.cost)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(_ticks(costs, cost)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.3g}"))
    axes.set_xlim(costs[0] / 1.25, costs[-1] * 1.25)
    lowest = min(100 * point.accuracy.low for point in points)
    highest = max(100 * point.accuracy.high for point in points)
    room = max(4.0, highest - lowest)
    axes.set_ylim(max(0.0, lowest - 0.04 * room), min(101.5, highest + 0.08 * room))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    if cost == "visual_tokens":
        total = None if unpruned is None else unpruned.of_visual_tokens
        ending = "" if total is None else f" of {words.number(total)}"
        axes.set_xlabel(f"visual tokens kept{ending} (mean)")
    else:
        axes.set_xlabel("seconds to the first token (median)")
    axes.set_title("right answers", loc="left", fontsize="medium", color=FAINT, pad=8)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#b8bec6")


def _ticks(costs: Sequence[float], cost: Cost) -> list[float]:
    """Return where the axis is labelled: at the budgets, or at round times."""
    if cost == "visual_tokens":
        ticks: list[float] = []
        for value in costs:
            if not ticks or value > _CLOSE * ticks[-1]:
                ticks.append(value)
        return ticks
    low, high = costs[0] / 1.25, costs[-1] * 1.25
    for steps in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5, 7), (1, 2, 5), (1,)):
        ticks = [
            step * 10.0**power
            for power in range(-4, 8)
            for step in steps
            if low <= step * 10.0**power <= high
        ]
        if len(ticks) <= 7:
            return ticks
    return ticks
