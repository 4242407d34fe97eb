"""`tokenprune find-layer`: which decoder layer of a model finds needles, as a table and a plot."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenprune.arguments import Parser, add_keep, add_model, parse_keep
from tokenprune.errors import ConfigError
from tokenprune.media.packages import VIDEO
from tokenprune.packages import Package
from tokenprune.providers import BUNDLED
from tokenprune_eval.packages import PLOTS, TABLES, needs_of_model
from tokenprune_hf.packages import TRANSFORMERS

if TYPE_CHECKING:
    from rich.table import Table

    from tokenprune.media.video import Video
    from tokenprune_hf.failures import LeftOut
    from tokenprune_hf.find_layer import LayerRecall, Needle

HELP = "measure which decoder layer of a model finds needles in videos: flexselect's layer"
EXTRA = "train"


def needs(arguments: argparse.Namespace) -> tuple[Package, ...]:
    """Return what it imports."""
    return (
        *TRANSFORMERS,
        *VIDEO,
        *TABLES,
        *PLOTS,
        Package("scipy"),
        *needs_of_model(arguments.model),
    )


_LINE, _SOFT = "#20639b", "#5c6672"


def configure(parser: Parser) -> None:
    """Add the arguments."""
    # A list of files swallows what comes after it, so the model is shown first.
    parser.usage = f"{parser.prog} MODEL --video FILE [FILE ...] [options]"
    add_model(parser, "a checkpoint of transformers, a folder or a name, or bundled")
    parser.add_argument(
        "--video",
        nargs="+",
        action="extend",
        type=Path,
        required=True,
        metavar="FILE",
        help="the videos to hide needles in; all are read before anything is run, and one that "
        "cannot be used is left out",
    )
    parser.add_argument(
        "--needles",
        type=Path,
        metavar="FILE",
        help='lines of {"image": path relative to the file, "question": text} (default: six drawn '
        "shapes, asked for their color)",
    )
    parser.add_argument(
        "--frames",
        type=int,
        default=32,
        metavar="N",
        help="frames read of each video, spread evenly (default: 32, as published)",
    )
    parser.add_argument(
        "--max-side",
        type=int,
        metavar="PIXELS",
        help="shrink frames to this; they are all held in memory (default: their own size)",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=1,
        metavar="N",
        help="at how many depths each needle is hidden in each video (default: 1)",
    )
    parser.add_argument(
        "--reduction",
        choices=("max", "mean"),
        default="max",
        help="over heads and question tokens; max is what flexselect does (default). The published "
        "needle scripts used mean for LLaVA and InternVL, max for Qwen",
    )
    add_keep(parser, default="0.0625")
    parser.add_argument("--seed", type=int, default=0, help="seed of the depths (default: 0)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("find-layer-out"),
        metavar="DIR",
        help="folder for layer_recall.json, layer_recall.png and pruning.json, the configuration "
        "with the layer and --keep (default: find-layer-out)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the table and write the files."""
    for name, least in (("frames", 3), ("max_side", 1), ("repeats", 1), ("seed", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            option = name.replace("_", "-")
            raise ConfigError(f"--{option} {value} is too small. Give at least {least}.")
    keep = parse_keep(arguments.keep)

    import rich.console

    from tokenprune.config import PruningConfig
    from tokenprune.media.video import read_video
    from tokenprune_eval.shared.output import prepare_folder, write_whole
    from tokenprune_eval.shared.progress import TerminalProgress
    from tokenprune_hf.failures import LeftOut
    from tokenprune_hf.find_layer import drawn_needles, find_layer, read_needles
    from tokenprune_hf.loading import load

    prepare_folder(arguments.out)
    needles = drawn_needles() if arguments.needles is None else read_needles(arguments.needles)
    console = rich.console.Console()
    with TerminalProgress(console) as progress:
        left_out = LeftOut(progress.say)
        with progress.step("reading the videos", len(arguments.video)) as advance:
            videos = []
            for file in arguments.video:
                with left_out.around(str(file)):
                    videos.append(read_video(file, arguments.frames, max_side=arguments.max_side))
                advance(1)
            left_out.check("video", len(videos))
        with progress.step("loading the model", 1):
            model, processor = load(arguments.model)
        about = _about(arguments, model, needles, videos)
        numbers = arguments.out / "layer_recall.json"
        planned = len(videos) * len(needles) * arguments.repeats
        done = 0
        try:
            with progress.step(f"hiding needles, {planned} runs", planned) as advance:

                def keep_run(recall: LayerRecall) -> None:
                    nonlocal done
                    write_whole(numbers, _report(about, recall, left_out))
                    done = len(recall.runs)
                    advance(1)

                recall = find_layer(
                    model,
                    processor,
                    videos,
                    needles,
                    reduction=arguments.reduction,
                    repeats=arguments.repeats,
                    seed=arguments.seed,
                    on_run=keep_run,
                    left_out=left_out,
                )
        except KeyboardInterrupt:
            if done:
                print(f"\n{done} of {planned} runs are kept in {numbers}", file=sys.stderr)
            raise
    write_whole(numbers, _report(about, recall, left_out))
    options = {"layer": recall.best, "reduction": recall.reduction}
    config = PruningConfig("flexselect", keep, options=options)
    title = f"{_name(arguments.model)}: Recall@K of needles, K = {_tokens(recall)}"
    console.print(f"\n{title}\n", style="bold", highlight=False)
    console.print(_table(recall))
    console.print(
        f"\nmean of {len(recall.runs)} runs and its 95 % t interval; chance is "
        f"{_percent(recall.chance)} %; {recall.reduction} over heads and question tokens",
        highlight=False,
    )
    write_whole(arguments.out / "layer_recall.png", _draw(title, recall))
    write_whole(arguments.out / "pruning.json", config.to_json() + "\n")
    if not recall.found:
        console.print(
            f"layer {recall.best} is not surely better than chance, so this choice means little. "
            "Try more --repeats and videos, or needles and questions that the model knows.",
            highlight=False,
        )
    console.print(
        f"layer {recall.best} is in {arguments.out / 'pruning.json'}; plot: "
        f"{arguments.out / 'layer_recall.png'}, numbers: {numbers}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _name(model: str) -> str:
    """Return what to call a model in a title."""
    return "bundled model" if model == BUNDLED else Path(model).name or model


def _tokens(recall: LayerRecall) -> str:
    """Return K as text: a number, or from the lowest to the highest."""
    counts = sorted({run.tokens for run in recall.runs})
    return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


# Numbers ----------------------------------------------------------------------------------------


def _about(
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


def _report(about: dict[str, Any], recall: LayerRecall, left_out: LeftOut) -> str:
    """Return layer_recall.json."""
    rows = zip(recall.layers, recall.recall, recall.intervals(), strict=True)
    values = {
        **about,
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


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _table(recall: LayerRecall) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        collapse_padding=True,
        pad_edge=False,
        show_edge=False,
    )
    table.add_column("layer", justify="right", no_wrap=True)
    table.add_column("recall, %", justify="right", no_wrap=True)
    table.add_column("interval", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for layer, mean, bounds in zip(recall.layers, recall.recall, recall.intervals(), strict=True):
        interval = "" if bounds is None else f"{_percent(bounds[0])}-{_percent(bounds[1])}"
        is_best = layer == recall.best
        style = "bold green" if is_best else ""
        table.add_row(str(layer), _percent(mean), interval, "best" if is_best else "", style=style)
    return table


# The plot ---------------------------------------------------------------------------------------


def _draw(title: str, recall: LayerRecall) -> bytes:
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
            f"layer {best}: {_percent(top)} %",
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
