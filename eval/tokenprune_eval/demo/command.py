"""`tokenprune demo`: the bundled model on two question sets, with all and few visual tokens."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from tokenprune.arguments import Parser, add_methods, add_positions
from tokenprune.errors import ConfigError
from tokenprune.packages import Package
from tokenprune_eval.packages import MODELS, REPORT, RUN_FOLDER, SETTINGS
from tokenprune_hf.packages import TRANSFORMERS

if TYPE_CHECKING:
    from tokenprune_eval.demo.preset import DemoSet, Preset
    from tokenprune_eval.demo.results import Results

HELP = "run the bundled model on two question sets, pruned by several methods, and write a report"
FULL_MINUTES = 9  # on two quiet cores
EXTRA = "demo"


def needs(arguments: argparse.Namespace) -> tuple[Package, ...]:
    """Return what it imports."""
    models = (package for one in MODELS.values() for package in one)
    return (*TRANSFORMERS, *SETTINGS, *RUN_FOLDER, *REPORT, Package("easy_vqa"), *models)


def configure(parser: Parser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "--full",
        action="store_true",
        help="every method at six budgets, 1,000 questions of each set, both ways to count "
        f"positions: what `tokenprune docs demo` comes from (about {FULL_MINUTES} minutes on two "
        "cores; without it, what one would choose between, at three budgets and on 500 questions)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for report.html and results.json (default: demo-out/quick, demo-out/full, or "
        "demo-out/custom where another flag changes what is run)",
    )
    parser.add_argument(
        "--questions",
        type=_amount,
        metavar="N",
        help="ask at least N questions of each set, whole images at a time, or `all`",
    )
    add_methods(
        parser, "what to compare (default: what one would choose between; see `tokenprune methods`)"
    )
    add_positions(parser)
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the choice of questions (default: 0)"
    )


def _amount(text: str) -> int | str:
    """Return a number of questions, or ``"all"``; argparse names what is neither."""
    return text if text == "all" else int(text)


_amount.__name__ = "number of questions"  # argparse puts it into its message


def _preset(arguments: argparse.Namespace) -> Preset:
    """Return what the arguments ask to run.

    Raises
    ------
    ConfigError, UnknownMethodError
        If a number of questions or a method is none.
    """
    from tokenprune.registry import find

    asked = arguments.questions
    if isinstance(asked, int) and asked < 1:
        raise ConfigError(f"--questions {asked} asks nothing. Give at least 1, or all.")
    for method in arguments.method or ():
        find(method)

    from tokenprune_eval.demo.preset import FULL, QUICK

    preset = FULL if arguments.full else QUICK
    if asked is not None:
        preset = dataclasses.replace(preset, questions=None if asked == "all" else asked)
    return dataclasses.replace(
        preset,
        methods=tuple(dict.fromkeys(arguments.method or preset.methods)),
        positions=arguments.positions,
        seed=arguments.seed,
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the demo, print its tables and write its files."""
    from tokenprune_eval.shared.output import prepare_folder, write_whole

    preset = _preset(arguments)
    out = arguments.out or Path("demo-out") / preset.name
    prepare_folder(out)

    from rich.console import Console

    from tokenprune_eval.demo import runner
    from tokenprune_eval.demo.report import render
    from tokenprune_eval.demo.terminal import print_accuracy, print_costs, print_details
    from tokenprune_eval.shared.progress import RunProgress, progress_console

    console = Console()

    def print_set(asked: DemoSet, results: Results) -> None:
        rows = [row for row in results.rows if row.dataset == asked.name]
        print_accuracy(console, preset.name, asked, rows)
        print_costs(console, results.about["timed"]["name"], rows)

    with RunProgress(progress_console(console)) as progress:
        results, examples = runner.run(preset, out, progress, print_set)
        progress.at("writing the report")
        report = out / runner.REPORT
        write_whole(report, render(results, examples))
    if preset.name != "quick":
        print_details(console, results.rows, results.other_positions)
    console.print(
        "\nThe bundled model is a test object and no public VLM: these accuracies say nothing "
        "about public models.",
        highlight=False,
    )
    console.print(
        f"The {preset.name} run took {results.about['seconds']:.0f} s; what each method kept and "
        f"what it costs: {report}; numbers: {results.file}",
        highlight=False,
        soft_wrap=True,
    )
    if preset.name == "quick":
        console.print(
            "--full runs every method at six budgets on 1,000 questions of each set, in about "
            f"{FULL_MINUTES} minutes on two cores.",
            highlight=False,
        )
    return 0
