"""`tokenprune demo`: the bundled model on two question sets, with all and few visual tokens."""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenprune.arguments import Parser, add_methods, add_positions
from tokenprune.errors import ConfigError
from tokenprune.packages import Package
from tokenprune_eval.packages import BUNDLED_MODEL, REPORT
from tokenprune_hf.packages import TRANSFORMERS

HELP = "run the bundled model on two question sets, pruned by several methods, and write a report"
EXTRA = "demo"


def needs(arguments: argparse.Namespace) -> tuple[Package, ...]:
    """Return what it imports."""
    return (*TRANSFORMERS, *REPORT, Package("easy_vqa"), *BUNDLED_MODEL)


def configure(parser: Parser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo-out"),
        metavar="DIR",
        help="folder for report.html and results.json (default: demo-out)",
    )
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--full", action="store_true", help="ask every question of both sets")
    amount.add_argument(
        "--questions",
        type=int,
        default=1000,
        metavar="N",
        help="ask at least N questions of each set, whole images at a time (default: 1000)",
    )
    add_methods(
        parser, "what to compare (default: all of tokenprune's own; see `tokenprune methods`)"
    )
    add_positions(parser)
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the choice of questions (default: 0)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the demo, print its tables and write its files."""
    if arguments.questions < 1:
        raise ConfigError(f"--questions {arguments.questions} asks nothing. Give at least 1.")

    from tokenprune.registry import find
    from tokenprune_eval.demo.output import prepare_folder, write_whole

    for method in arguments.method or ():
        find(method)
    prepare_folder(arguments.out)

    from rich.console import Console

    from tokenprune_eval.demo import runner
    from tokenprune_eval.demo.report import render
    from tokenprune_eval.demo.terminal import TerminalProgress, print_tables

    settings = runner.Settings(
        out=arguments.out,
        methods=tuple(dict.fromkeys(arguments.method or runner.METHODS)),
        questions=None if arguments.full else arguments.questions,
        positions=arguments.positions,
        seed=arguments.seed,
    )
    console = Console()
    with TerminalProgress(console) as progress:
        results, examples = runner.run(settings, progress)
        with progress.step("writing the report", 1):
            report = arguments.out / "report.html"
            write_whole(report, render(results, examples))
    print_tables(console, results.rows, results.other_positions)
    console.print(
        "The bundled model is a test object and no public VLM: these accuracies say nothing "
        "about public models.",
        highlight=False,
    )
    console.print(
        f"{results.about['seconds']:.0f} s; report: {report}, numbers: {results.file}",
        highlight=False,
        soft_wrap=True,
    )
    return 0
