"""`tokenprune find-layer`: which decoder layer of a model finds needles, as a table and a plot."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tokenprune.arguments import Parser, add_keep, add_model, check_at_least, parse_keep
from tokenprune.media.packages import VIDEO
from tokenprune.packages import Package
from tokenprune_eval.packages import PLOTS, TABLES, needs_of_model
from tokenprune_hf.packages import TRANSFORMERS

if TYPE_CHECKING:
    from tokenprune_eval.find_layer.measure import LayerRecall

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
    check_at_least(arguments, frames=3, max_side=1, repeats=1, seed=0)
    keep = parse_keep(arguments.keep)

    import rich.console

    from tokenprune.config import PruningConfig
    from tokenprune.media.video import read_video
    from tokenprune_eval.find_layer.measure import find_layer
    from tokenprune_eval.find_layer.needles import drawn_needles, read_needles
    from tokenprune_eval.find_layer.report import (
        about,
        as_json,
        draw,
        layer_table,
        name_of,
        tokens_of,
    )
    from tokenprune_eval.shared.left_out import LeftOut
    from tokenprune_eval.shared.output import prepare_folder, write_whole
    from tokenprune_eval.shared.progress import TerminalProgress
    from tokenprune_eval.shared.tables import percent
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
        measured_on = about(arguments, model, needles, videos)
        numbers = arguments.out / "layer_recall.json"
        planned = len(videos) * len(needles) * arguments.repeats
        done = 0
        try:
            with progress.step(f"hiding needles, {planned} runs", planned) as advance:

                def keep_run(recall: LayerRecall) -> None:
                    nonlocal done
                    write_whole(numbers, as_json(measured_on, recall, left_out))
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
    write_whole(numbers, as_json(measured_on, recall, left_out))
    options = {"layer": recall.best, "reduction": recall.reduction}
    config = PruningConfig("flexselect", keep, options=options)
    title = f"{name_of(arguments.model)}: Recall@K of needles, K = {tokens_of(recall)}"
    console.print(f"\n{title}\n", style="bold", highlight=False)
    console.print(layer_table(recall))
    console.print(
        f"\nmean of {len(recall.runs)} runs and its 95 % t interval; chance is "
        f"{percent(recall.chance)} %; {recall.reduction} over heads and question tokens",
        highlight=False,
    )
    write_whole(arguments.out / "layer_recall.png", draw(title, recall))
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
