"""`tokenprune eval`: data sets through a model, for several methods and budgets, and a report."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenprune.arguments import (
    Parser,
    add_methods,
    add_model,
    add_options,
    add_positions,
    add_scope,
    options_by_method,
    parse_keep,
    parse_options,
)
from tokenprune.cli import Action
from tokenprune.errors import ConfigError
from tokenprune.packages import Package, check_packages
from tokenprune_eval.packages import SETTINGS, STATISTICS, TABLES, needs_of_run

if TYPE_CHECKING:
    from tokenprune_eval.evaluation.settings import Settings

HELP = "run question answering over data sets, for several methods and budgets, and write a report"
EXTRA = "eval"

_WIDTH = 120
"""Columns of what goes into a file or a pipe, which the tables fit into."""


def needs(arguments: argparse.Namespace) -> tuple[Package, ...]:
    """Return what it imports, as far as the command line says; a YAML file may ask for more."""
    if arguments.action == "ls":
        return (*SETTINGS, *TABLES)
    if arguments.action == "compare":
        return (*SETTINGS, *TABLES, *STATISTICS)
    if arguments.action == "merge":
        return needs_of_run("hf", None)
    return needs_of_run(arguments.engine or "hf", arguments.model)


def configure(parser: Parser) -> None:
    """Add the arguments of a run; `ACTIONS` has the rest."""
    described = [f"{name}: {action.help}" for name, action in ACTIONS.items()]
    # A list of words swallows what comes after it, so the model is shown first.
    parser.usage = "%(prog)s [MODEL] --data DATA [DATA ...] [options], or %(prog)s ACTION"
    parser.epilog = (
        f"Actions: {'; '.join(described)}. `{parser.prog} ACTION --help` describes each."
    )
    _add_settings(parser)


def _add_listing(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_merge(parser: Parser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the whole")
    parser.add_argument("shards", type=Path, nargs="+", metavar="SHARD", help="folders of runs")


def _add_compare(parser: Parser) -> None:
    parser.add_argument("a", type=Path, metavar="A", help="folder of a run")
    parser.add_argument("b", type=Path, metavar="B", help="folder of another")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")


def _add_settings(parser: Parser) -> None:
    """Add what `Settings` holds; nothing has a default here, so that a YAML file can give it."""
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML with these settings; arguments win"
    )
    add_model(
        parser,
        "a checkpoint, bundled, or with --engine openai the served name; comes first",
        required=False,
    )
    what = parser.add_argument_group("what is run")
    what.add_argument(
        "--data", nargs="+", metavar="DATA", help="names or files, see `tokenprune eval ls`"
    )
    what.add_argument("--media", type=Path, metavar="DIR", help="where the data's files lie")
    what.add_argument("--split", help="of a named data set (default: test)")
    what.add_argument("--answers", type=Path, metavar="FILE", help="answers of a test split")
    add_methods(
        what,
        "see `tokenprune methods`; besides resize, the picture made smaller, and resize+METHOD",
    )
    what.add_argument(
        "--keep",
        nargs="+",
        metavar="KEEP",
        help="numbers of tokens, or fractions such as 0.25 or 25%% (default: 1.0 0.5 0.25 0.125 "
        "0.0625); the unpruned model is run in any case",
    )
    add_options(what)
    add_positions(what)
    add_scope(what)
    what.set_defaults(positions=None, scope=None)
    what.add_argument(
        "--proportional-attention",
        nargs="?",
        const=True,
        choices=("both",),
        help="hf: a kept token counts as often as there are tokens it stands for; both: with and "
        "without",
    )
    what.add_argument("--limit", type=int, metavar="N", help="questions of each data set")
    what.add_argument("--seed", type=int, help="of the draw of these questions (default: 0)")
    what.add_argument("--shard", metavar="I/N", help="take the I-th of N parts of the data")
    engine = add_how(parser)
    engine.add_argument("--memory", type=int, metavar="N", help="hf: questions with peak memory")
    engine.add_argument("--dominance", type=int, metavar="N", help="hf: questions with MDI and AEI")
    running = parser.add_argument_group("the run")
    running.add_argument("--out", type=Path, metavar="DIR", help="folder; a run goes on in its own")
    running.add_argument("--strict", action="store_true", default=None, help="end at an error")
    running.add_argument(
        "--retry-errors", action="store_true", default=None, help="ask again what ended in one"
    )


def add_how(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add how questions are asked and by which engine; return the engine's group."""
    asking = parser.add_argument_group("how it is asked")
    asking.add_argument("--frames", type=int, help="of each video (default: 32)")
    asking.add_argument("--fps", type=float, help="frames a second, --frames at most")
    asking.add_argument("--max-side", type=int, metavar="PIXELS", help="of a video's frames")
    asking.add_argument(
        "--allow-truncated",
        action="store_true",
        default=None,
        help="use what can be decoded of videos that are cut off or damaged",
    )
    asking.add_argument("--instruction", metavar="TEXT", help="put behind every open question")
    asking.add_argument(
        "--box-unit",
        choices=("fraction", "thousandth", "pixel"),
        help="what the numbers of boxes count that are asked for: 0 to 1 (default), 0 to 1000, or "
        "pixels",
    )
    asking.add_argument("--max-new-tokens", type=int, metavar="N", help="default: 16")
    asking.add_argument(
        "--choose-by",
        choices=("likelihood", "text"),
        help="what counts for questions with choices (default: likelihood; text with openai)",
    )
    engine = parser.add_argument_group("the engine")
    engine.add_argument("--engine", choices=("hf", "vllm", "openai"), help="default: hf")
    engine.add_argument("--batch", type=int, metavar="N", help="questions at a time (default: 1)")
    engine.add_argument("--workers", type=int, metavar="N", help="hf: copies of a small model")
    engine.add_argument("--cache", type=Path, metavar="DIR", help="hf: keep what was encoded")
    engine.add_argument("--base-url", metavar="URL", help="openai: http://HOST:PORT/v1")
    engine.add_argument("--api-key", metavar="NAME", help="openai: environment variable of the key")
    engine.add_argument("--concurrency", type=int, metavar="N", help="openai: requests at a time")
    engine.add_argument("--timeout", type=float, metavar="SECONDS", help="openai: of a request")
    engine.add_argument("--retries", type=int, metavar="N", help="openai: of a request")
    engine.add_argument(
        "--engine-arg", action="append", metavar="NAME=VALUE", help="vllm: of vllm.LLM"
    )
    return engine


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Return the settings that the command line and its YAML file give.

    Raises
    ------
    TokenPruneError
        If they are not usable.
    """
    from tokenprune_eval.evaluation.settings import Settings, read_settings
    from tokenprune_eval.results.records import pruned_by

    values: dict[str, Any] = {
        name: getattr(arguments, name)
        for name in Settings.model_fields
        if getattr(arguments, name, None) is not None
    }
    if arguments.keep:
        values["keep"] = [parse_keep(text) for text in arguments.keep]
    if arguments.shard:
        values["shard"] = _shard(arguments.shard)
    if arguments.engine_arg:
        values["engine_args"] = parse_options(arguments.engine_arg, "--engine-arg")
    if arguments.option:
        # The methods may stand in the file.
        methods = read_settings({**values, "options": {}}, arguments.config).method
        named = [one for one in map(pruned_by, methods) if one is not None]
        values["options"] = options_by_method(arguments.option, named)
    return read_settings(values, arguments.config)


def _shard(text: str) -> tuple[int, int]:
    part, slash, parts = text.partition("/")
    if not (slash and part.isdigit() and parts.isdigit()):
        raise ConfigError(f"--shard {text} is not I/N, for example 1/4.")
    return int(part), int(parts)


ACTIONS = {
    "ls": Action("list data sets, methods and engines", _add_listing),
    "validate": Action("check settings, data and model without running anything", _add_settings),
    "merge": Action("put the folders of shards together", _add_merge),
    "compare": Action("compare two runs, question by question", _add_compare),
}
"""What `tokenprune eval` does besides running, see `tokenprune.cli`."""


def run(arguments: argparse.Namespace) -> int:
    """Do what is asked for."""
    from rich.console import Console

    from tokenprune_eval.evaluation import actions

    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    if arguments.action == "ls":
        return actions.ls(console, as_json=arguments.json)
    if arguments.action == "merge":
        return actions.merge(console, arguments.out, arguments.shards)
    if arguments.action == "compare":
        return actions.compare(console, arguments.a, arguments.b, arguments.markdown)
    settings = settings_of(arguments)
    check_packages(needs_of_run(settings.engine, settings.model), EXTRA, "this subcommand")
    if arguments.action == "validate":
        return actions.validate(console, settings)
    return actions.evaluate(console, settings)
