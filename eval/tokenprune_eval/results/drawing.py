"""How a method is drawn, in every report: its colour, its marker, its line."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BASELINES = ("random", "uniform", "feature-norm", "resize")
"""Methods that no headline names as the best."""

INK, FAINT, GRID = "#1b2430", "#5c6672", "#e3e6ea"
LIGHT_VEIL, DARK_VEIL = "#f3f4f6", "#39424e"
"""What covers the tokens that were dropped: it has to differ from the picture."""


@dataclass(frozen=True)
class Style:
    """How a method is drawn: never by colour alone."""

    color: str
    marker: str
    line: str = "-"
    width: float = 2.0


# Okabe and Ito's colours, which people with any kind of colour vision can tell apart; the
# baselines are greys.
STYLES = {
    "zeroth-order": Style("#0072B2", "o"),
    "cls-attention": Style("#D55E00", "s"),
    "flexselect": Style("#E69F00", "D"),
    "divprune": Style("#009E73", "^"),
    "information": Style("#56B4E9", "h"),
    "relevant-information": Style("#000000", "d"),
    "random": Style("#6b7280", "X", "--", 1.5),
    "uniform": Style("#6b7280", "P", ":", 1.5),
    "feature-norm": Style("#A4708F", "v", "-.", 1.5),
    "resize": Style("#374151", "<", "-", 1.5),
    "oracle": Style("#000000", "*", ""),
}
_OTHERS = (Style("#7A4FBF", "p"), Style("#8C564B", "*"))


def style_of(method: str, methods: Sequence[str]) -> Style:
    """Return how to draw a method, also one that tokenprune does not bring."""
    if method in STYLES:
        return STYLES[method]
    strangers = [name for name in methods if name not in STYLES]
    return _OTHERS[strangers.index(method) % len(_OTHERS)]


def svg_uri(figure: Figure) -> str:
    """Return a figure as a data URI that a page can hold."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def draw_line(
    axes: Axes,
    costs: Sequence[float],
    accuracies: Sequence[tuple[float, float, float]],
    style: Style,
    name: str,
) -> None:
    """Draw a method's accuracy against its cost, with whiskers.

    Parameters
    ----------
    axes
        Where.
    costs
        Of each point, rising.
    accuracies
        Share of right answers and both ends of its interval, between 0 and 1, of each point.
    style, name
        The method's.
    """
    axes.errorbar(
        costs,
        [100 * share for share, _, _ in accuracies],
        yerr=[
            [100 * (share - low) for share, low, _ in accuracies],
            [100 * (high - share) for share, _, high in accuracies],
        ],
        color=style.color,
        marker=style.marker,
        markersize=11 if style.marker == "*" else 6,
        markeredgecolor="white",
        markeredgewidth=0.8,
        linestyle=style.line or "none",
        linewidth=style.width,
        elinewidth=1.1,
        capsize=2.2,
        label=name,
        zorder=4 if style.width > 1.5 else 3,
    )
