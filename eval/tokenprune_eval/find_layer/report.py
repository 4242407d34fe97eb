"""What `tokenprune find-layer` shows and writes: the table, layer_recall.json and the plot."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenprune.providers import BUNDLED
from tokenprune_eval.shared.tables import percent, plain_table

if TYPE_CHECKING:
    from rich.table import Table

    from tokenprune.media.video import Video
    from tokenprune_eval.find_layer.measure import LayerRecall
    from tokenprune_eval.find_layer.needles import Needle
    from tokenprune_eval.shared.left_out import LeftOut

_LINE, _SOFT = "#20639b", "#5c6672"


def name_of(model: str) -> str:
    """Return what to call a model in a title."""
    return "bundled model" if model == BUNDLED else Path(model).name or model


def tokens_of(recall: LayerRecall) -> str:
    """Return K as text: a number, or from the lowest to the highest."""
    counts = sorted({run.tokens for run in recall.runs})
    return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


# Numbers ----------------------------------------------------------------------------------------


def about(
    arguments: argparse.Namespace, model: Any, needles: Sequence[Needle], videos: Sequence[Video]
) -> dict[str, Any]:
    """Return what was measured and with what, as JSON types."""
    import platform
    from importlib.metadata import version

    packages = ("tokenprune-vlm", "torch", "transformers", "numpy", "pillow", "av", "scipy")
    return {
        "model": arguments.model,
        "model_type": model.config.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
        "frames": arguments.frames,
        "max_side": arguments.max_side,
        "repeats": arguments.repeats,
        "needles": [{"name": needle.name, "question": needle.question} for needle in needles],
        "videos": [
            {
                "file": str(video.path),
                "frames": len(video.frames),
                "of_frames": video.total,
                "height": video.frames.shape[1],
                "width": video.frames.shape[2],
                "seconds": video.duration,
                "backend": video.backend,
            }
            for video in videos
        ],
    }


def as_json(measured_on: dict[str, Any], recall: LayerRecall, left_out: LeftOut) -> str:
    """Return layer_recall.json."""
    rows = zip(recall.layers, recall.recall, recall.intervals(), strict=True)
    values = {
        **measured_on,
        "reduction": recall.reduction,
        "seed": recall.seed,
        "runs_planned": recall.planned,
        "runs_done": len(recall.runs),
        "left_out": left_out.reasons,
        "interval": "t interval of the mean over runs, 95 %, within 0 and 1",
        "chance": recall.chance,
        "layer": recall.best,
        "layers": [
            {"layer": layer, "recall": mean, "interval": None if bounds is None else list(bounds)}
            for layer, mean, bounds in rows
        ],
        "runs": [
            {
                "video": run.video,
                "needle": run.needle,
                "replaced": list(run.frames),
                "grid": list(run.grid),
                "k": run.tokens,
                "ranked": run.ranked,
                "recall": list(run.recall),
            }
            for run in recall.runs
        ],
    }
    return json.dumps(values, indent=1, allow_nan=False) + "\n"


def layer_table(recall: LayerRecall) -> Table:
    """Return the recall of each layer, the best one marked."""
    table = plain_table()
    table.add_column("layer", justify="right", no_wrap=True)
    table.add_column("recall, %", justify="right", no_wrap=True)
    table.add_column("interval", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for layer, mean, bounds in zip(recall.layers, recall.recall, recall.intervals(), strict=True):
        interval = "" if bounds is None else f"{percent(bounds[0])}-{percent(bounds[1])}"
        is_best = layer == recall.best
        style = "bold green" if is_best else ""
        table.add_row(str(layer), percent(mean), interval, "best" if is_best else "", style=style)
    return table


# The plot ---------------------------------------------------------------------------------------


def draw(title: str, recall: LayerRecall) -> bytes:
    """Return layer_recall.png: recall against layer, with its interval and chance."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, MultipleLocator, PercentFormatter

    layers, means, best = list(recall.layers), recall.recall, recall.best
    with matplotlib.rc_context({"font.family": "sans-serif", "font.size": 9.5}):
        figure = Figure(figsize=(6.4, 3.6), facecolor="white", layout="constrained")
        axes = figure.subplots()
        bounds = [one for one in recall.intervals() if one is not None]
        highs = [high for _, high in bounds]
        if bounds:
            lows = [low for low, _ in bounds]
            axes.fill_between(layers, lows, highs, color=_LINE, alpha=0.16, linewidth=0)
        axes.axhline(recall.chance, color=_SOFT, linewidth=1, linestyle=":")
        axes.plot(
            layers, means, color=_LINE, marker="o", markersize=3.5, linewidth=1.6, clip_on=False
        )
        place = layers.index(best)
        top = means[place]
        axes.plot([best], [top], color=_LINE, marker="o", markersize=8, clip_on=False)
        # Inside the axes, also where the best layer is the first or the last.
        along = place / max(1, len(layers) - 1)
        axes.annotate(
            f"layer {best}: {percent(top)} %",
            (best, highs[place] if highs else top),
            textcoords="offset points",
            xytext=(0, 8),
            ha="left" if along < 0.15 else "right" if along > 0.85 else "center",
            fontweight="bold",
        )
        axes.text(
            1.01,
            recall.chance,
            "chance",
            color=_SOFT,
            va="center",
            transform=axes.get_yaxis_transform(),
        )
        # Room for the best layer's number above it.
        axes.set_ylim(0.0, 1.12 * max([0.2, top, *highs]))
        axes.yaxis.set_major_locator(MultipleLocator(0.2 if axes.get_ylim()[1] > 0.5 else 0.05))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.06)
        axes.set_xlabel("decoder layer, from 0")
        axes.set_ylabel("recall")
        axes.set_title(title, fontsize=10.5, fontweight="bold", loc="left", parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=150)
    return stream.getvalue()
