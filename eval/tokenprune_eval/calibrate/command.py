"""`tokenprune calibrate`: the smallest budget of a method that costs no more than allowed."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenprune.arguments import (
    Parser,
    add_methods,
    add_model,
    add_options,
    add_positions,
    options_by_method,
    parse_keep,
    parse_options,
    parse_share,
)
from tokenprune.errors import ConfigError, did_you_mean
from tokenprune.packages import Package
from tokenprune_eval.evaluation.command import add_how
from tokenprune_eval.packages import needs_of_run

if TYPE_CHECKING:
    from tokenprune_eval.calibrate.search import Bounds
    from tokenprune_eval.data.question import DataSet, Question
    from tokenprune_eval.evaluation.settings import Settings
    from tokenprune_eval.evaluation.store import Store
    from tokenprune_eval.results.records import Record
    from tokenprune_eval.shared.progress import TerminalProgress

HELP = "find the smallest keep of a method that loses no more accuracy than allowed"
EXTRA = "eval"


def needs(arguments: argparse.Namespace) -> tuple[Package, ...]:
    """Return what it imports."""
    return (*needs_of_run(arguments.engine or "hf", arguments.model), Package("scipy"))


# fmt: off
GRID = (
    0.707, 0.5, 0.354, 0.25, 0.177, 0.125, 0.0884, 0.0625, 0.0442, 0.03125, 0.0221, 0.015625,
)
# fmt: on
"""From 1/sqrt(2) to 1/64 in steps of sqrt(2)."""

_SETTINGS = (
    "model",
    "data",
    "media",
    "split",
    "answers",
    "method",
    "positions",
    "frames",
    "fps",
    "max_side",
    "instruction",
    "box_unit",
    "max_new_tokens",
    "choose_by",
    "engine",
    "batch",
    "workers",
    "cache",
    "seed",
    "base_url",
    "api_key",
    "concurrency",
    "timeout",
    "retries",
    "retry_errors",
)
"""Arguments that are settings of `tokenprune eval` as they are."""


def configure(parser: Parser) -> None:
    """Add the arguments."""
    # A list of words swallows what comes after it, so the model is shown first.
    parser.usage = (
        "%(prog)s MODEL --data DATA [DATA ...] --method METHOD [METHOD ...] --max-drop SHARE "
        "[options]"
    )
    parser.epilog = (
        "Exit status: 0 where every method has a budget below 1.0, 1 where one abstained, 2 for "
        "wrong input. `tokenprune docs calibrate` says what is claimed, and how surely."
    )
    add_model(parser, "a checkpoint, bundled, or with --engine openai the served name")
    what = parser.add_argument_group("what is calibrated")
    what.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="DATA",
        help="questions like those to come: names or files, see `tokenprune eval ls`",
    )
    add_methods(what, "see `tokenprune methods`", required=True)
    what.add_argument(
        "--max-drop",
        required=True,
        metavar="SHARE",
        help="accuracy that may be lost, in points: 1%% or 0.01",
    )
    what.add_argument(
        "--per-type",
        action="store_true",
        help="the bound must hold for every type of question that the data have",
    )
    what.add_argument(
        "--type-drop",
        nargs="+",
        action="extend",
        default=[],
        metavar="TYPE=SHARE",
        help="a bound of its own for a type, with --per-type; `none`: the type is not asked about",
    )
    what.add_argument(
        "--confidence",
        default="0.95",
        metavar="SHARE",
        help="of each method's budget, 0.95 or 95%%",
    )
    what.add_argument(
        "--keep-grid",
        nargs="+",
        metavar="KEEP",
        help="budgets to choose from: all fractions, or all numbers of tokens (default: 1/sqrt(2) "
        "to 1/64 in steps of sqrt(2))",
    )
    add_options(what)
    add_positions(what)
    what.add_argument(
        "--per-media",
        default="1",
        metavar="N",
        help="questions of each image or video, or `all` (default: 1, the fewest calls; more help "
        "where images or videos are few); with --per-type, of each type",
    )
    what.add_argument("--limit", type=int, metavar="N", help="questions to draw at most")
    what.add_argument("--seed", type=int, help="of the order of the questions (default: 0)")
    what.add_argument("--media", type=Path, metavar="DIR", help="where the data's files lie")
    what.add_argument("--split", help="of a named data set (default: test)")
    what.add_argument("--answers", type=Path, metavar="FILE", help="answers of a test split")
    add_how(parser)
    parser.add_argument(
        "--retry-errors",
        action="store_true",
        default=None,
        help="ask again what ended in an error before the search was interrupted",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("calibrate-out"),
        metavar="PATH",
        help="FILE.json for one method, or a folder for METHOD.json of each and calibration.json; "
        "a search that was interrupted goes on in its own (default: calibrate-out)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Search, write the configurations and print the table."""
    bounds = bounds_of(arguments)
    per_media = _per_media(arguments.per_media)
    type_drops = type_drops_of(arguments)
    if arguments.limit is not None and arguments.limit < 1:
        raise ConfigError(f"--limit {arguments.limit} draws nothing. Leave it out for all.")
    settings = settings_of(arguments, bounds)

    from rich.console import Console

    from tokenprune_eval.calibrate.report import (
        ANSWERS,
        LOG,
        Report,
        check_not_there,
        clear_abstentions,
        files_of,
        print_report,
        said,
        search_values,
        types_said,
    )
    from tokenprune_eval.calibrate.search import Answers, Search, draw
    from tokenprune_eval.evaluation.checks import check_before_model
    from tokenprune_eval.evaluation.runner import build_engine, load_sets
    from tokenprune_eval.evaluation.store import Store
    from tokenprune_eval.shared.output import prepare_folder
    from tokenprune_eval.shared.progress import TerminalProgress

    files = files_of(arguments.out, list(dict.fromkeys(settings.method)))
    settings = settings.model_copy(update={"out": files[ANSWERS]})
    sets = load_sets(settings)
    check_before_model(settings, sets)
    left_out: list[str] = []
    if arguments.per_type:
        types, left_out = types_of(sets, bounds.max_drop, type_drops)
        bounds = replace(bounds, types=types)
    media = draw(sets, per_media, arguments.limit, settings.seed, bounds.types)
    check_not_there(files, settings.method, search_values(settings, bounds, media))
    _check_enough(bounds, media)
    prepare_folder(files[LOG].parent)

    console = Console()
    with (
        TerminalProgress(console) as bar,
        _Rounds(bar) as progress,
        Store(files[ANSWERS]) as store,
    ):
        bar.say(
            f"{sum(map(len, media)):,} questions about {len(media):,} images or videos, "
            f"{len(bounds.grid)} budgets"
        )
        if bounds.types:
            bar.say(types_said(bounds, media, left_out))
        earlier = _begin(store, settings, media)
        if earlier:
            bar.say(f"{len(earlier):,} answers are there from before")
        with bar.step("loading the model", 1):
            engine = build_engine(settings)
        try:
            clear_abstentions(files, settings.method)
            answers = Answers(store, earlier, settings)
            search = Search(settings, bounds, media, engine, answers, progress)
            report = Report(settings, bounds, search, engine, files)
            for decision in search.decisions():
                bar.say(said(decision))
                report.note(decision)
        finally:
            engine.close()
        report.write(complete=True)
    print_report(console, report)
    return 1 if any(map(report.abstention, report.methods)) else 0


def _begin(store: Store, settings: Settings, media: Sequence[Sequence[Question]]) -> list[Record]:
    """Begin the folder of the answers, or go on with it; return those that are there.

    Raises
    ------
    ConfigError
        If they were given under other settings.
    """
    from tokenprune_eval.results.summary import QuestionInfo
    from tokenprune_eval.shared.machine import machine, versions

    infos = []
    for questions in media:
        for question in questions:
            data_set, _, own = question.id.partition("/")
            infos.append(QuestionInfo.of(data_set, replace(question, id=own)))
    about = {"versions": versions(), "machine": machine(), "complete": False, "seconds": None}
    known = store.begin(settings, about, infos, settings.conditions())
    return [one for one in known.records if (one.condition, one.item) in store.done]


# Arguments --------------------------------------------------------------------------------------


def bounds_of(arguments: argparse.Namespace) -> Bounds:
    """Return what is to be shown, and the budgets, from the largest to the smallest.

    Raises
    ------
    ConfigError, BudgetError
        For what cannot be used.
    """
    from tokenprune.budget import keeps_all
    from tokenprune_eval.calibrate.search import Bounds

    max_drop = parse_share("--max-drop", arguments.max_drop)
    confidence = parse_share("--confidence", arguments.confidence)
    if confidence < 0.5:
        raise ConfigError(
            f"--confidence {arguments.confidence} is too low. Give 0.95, and at least 0.5."
        )
    given = GRID if arguments.keep_grid is None else map(parse_keep, arguments.keep_grid)
    grid = sorted({keep for keep in given if not keeps_all(keep)}, reverse=True)
    if not grid:
        raise ConfigError(
            "--keep-grid has no budget below 1.0, the unpruned model. Give some, such as 0.5 0.25."
        )
    if len({type(keep) for keep in grid}) > 1:
        raise ConfigError(
            f"--keep-grid {' '.join(arguments.keep_grid)} mixes fractions and numbers of tokens, "
            "and which of them is the smaller depends on the image. Give either all with or all "
            "without a decimal point."
        )
    return Bounds(max_drop, confidence, tuple(grid))


def _per_media(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--per-media {text} is neither a number of at least 1 nor `all`.")
    return int(text)


def settings_of(arguments: argparse.Namespace, bounds: Bounds) -> Settings:
    """Return the settings under which questions are asked; every budget is among them.

    Raises
    ------
    TokenPruneError
        If they cannot be used.
    """
    from tokenprune_eval.evaluation.settings import read_settings
    from tokenprune_eval.results.records import pruned_by

    values: dict[str, Any] = {
        name: getattr(arguments, name) for name in _SETTINGS if getattr(arguments, name) is not None
    }
    values |= {
        "keep": list(bounds.grid),
        "options": options_by_method(
            arguments.option,
            [one for one in map(pruned_by, arguments.method) if one is not None],
        ),
        "engine_args": parse_options(arguments.engine_arg or [], "--engine-arg"),
        "out": arguments.out,
    }
    settings = read_settings(values)
    settings.check_methods()
    return settings


def type_drops_of(arguments: argparse.Namespace) -> dict[str, float | None]:
    """Return the type -> its own bound; None: the type is not asked about.

    Raises
    ------
    ConfigError
        If one is no TYPE=SHARE, or types are not told apart.
    """
    drops: dict[str, float | None] = {}
    for given in arguments.type_drop:
        # A type's name may have a sign of equality in it, a share cannot.
        name, equals, text = given.rpartition("=")
        if not equals or not name:
            raise ConfigError(f"--type-drop {given} is not TYPE=SHARE, for example counting=2%.")
        if name in drops:
            raise ConfigError(f"--type-drop gives {name} two bounds. Give it one.")
        drops[name] = None if text == "none" else parse_share(f"--type-drop {name}=", text)
    if drops and not arguments.per_type:
        raise ConfigError(
            f"--type-drop {arguments.type_drop[0]} is a bound of one type, and without --per-type "
            "the bound is one of all questions together. Add --per-type."
        )
    return drops


def types_of(
    sets: Sequence[DataSet], max_drop: float, drops: Mapping[str, float | None]
) -> tuple[dict[str, float], list[str]]:
    """Return the bound of every type of question, and the types that have none.

    Parameters
    ----------
    sets
        The data; types of one name are one type.
    max_drop
        For types without a bound of their own.
    drops
        See `type_drops_of`.

    Raises
    ------
    ConfigError
        If a question has no type, there is no such type, or none is left.
    """
    names: dict[str, None] = {}
    untyped = []
    for data_set in sets:
        for question in data_set.questions:
            names.setdefault(question.type)
            if not question.type:
                untyped.append(f"{data_set.name}/{question.id}")
    if untyped:
        raise ConfigError(
            f"--per-type needs a type for every question, and {len(untyped):,} have none, for "
            f"example {untyped[0]}. Give them one (the key `type` in JSON lines), or leave "
            "--per-type out."
        )
    for name in drops:
        if name not in names:
            raise ConfigError(
                f"--type-drop {name}: the data have no such type. {did_you_mean(name, names)}"
            )
    bounds = {name: drops.get(name, max_drop) for name in sorted(names)}
    types = {name: bound for name, bound in bounds.items() if bound is not None}
    if not types:
        raise ConfigError("--type-drop leaves no type with a bound. Give at least one a share.")
    return types, [name for name, bound in bounds.items() if bound is None]


def _check_enough(bounds: Bounds, media: Sequence[Sequence[Question]]) -> None:
    """Raise if there are fewer images or videos than any answers could decide with."""
    from tokenprune_eval.calibrate.search import of_part
    from tokenprune_eval.calibrate.sequential import needed

    problems = []
    for name, bound in bounds.parts.items():
        there, least = len(of_part(media, name)), needed(bound, bounds.accept_at)
        if there >= least:
            continue
        if name is None:
            raise ConfigError(
                f"{there:,} images or videos cannot show that a drop stays below {bound:.4g}: even "
                f"if no answer changed, {least:,} would be needed for a confidence of "
                f"{bounds.confidence:g} and {len(bounds.grid)} budgets. Give more data or a larger "
                "--max-drop; a lower --confidence or a shorter --keep-grid saves a few."
            )
        problems.append(_too_few(name, bound, there, least, bounds))
    if problems:
        raise ConfigError(
            "--per-type has types with too few images or videos: even if no answer changed, "
            f"{'; '.join(problems)}. Give more questions of these types, a larger bound, or none, "
            "with --type-drop 'TYPE=none': then nothing is asked or claimed about the type."
        )


def _too_few(name: str, bound: float, there: int, least: int, bounds: Bounds) -> str:
    """Return what a type lacks, and the bound that is within its reach."""
    from tokenprune_eval.calibrate.sequential import least_bound

    within = least_bound(there, bounds.accept_at)
    rounded = math.ceil(1000 * within) / 1000  # at a thousandth more, fewer are enough
    reach = f" ({there:,} can show {100 * rounded:.1f} %)" if rounded < 1 else ""
    return f"{name} has {there:,} and needs {least:,} for a drop below {100 * bound:.4g} %{reach}"


# Progress ---------------------------------------------------------------------------------------


class _Rounds:
    """One bar for each round of tests."""

    def __init__(self, bar: TerminalProgress) -> None:
        self._bar = bar
        self._step: Any = None
        self._advance: Any = None

    def __enter__(self) -> _Rounds:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None

    def round(self, text: str, media: int) -> None:
        """Say what is tested now, and on how many images or videos at most."""
        self._end()
        self._step = self._bar.step(text, media)
        self._advance = self._step.__enter__()

    def advance(self, media: int) -> None:
        """Count images or videos."""
        self._advance(media)
