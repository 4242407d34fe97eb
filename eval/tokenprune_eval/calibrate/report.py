"""What `tokenprune calibrate` leaves: the log, a configuration for each method, and the table."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from tokenprune.config import PruningConfig
from tokenprune.errors import ConfigError
from tokenprune.formats import KEY
from tokenprune.providers import BUNDLED
from tokenprune_eval.calibrate.search import Bounds, Decision, Search, steps
from tokenprune_eval.calibrate.sequential import needed
from tokenprune_eval.data.question import Question
from tokenprune_eval.evaluation.engines.base import Engine
from tokenprune_eval.evaluation.settings import FREE, Settings
from tokenprune_eval.results.records import UNPRUNED
from tokenprune_eval.shared.baselines import resizes
from tokenprune_eval.shared.machine import versions
from tokenprune_eval.shared.output import OutputError, write_whole
from tokenprune_eval.shared.tables import percent, plain_table

FORMAT = 1
"""Of the log; rises when its meaning changes."""

LOG, ANSWERS = "calibration.json", "answers"


def files_of(out: Path, methods: Sequence[str]) -> dict[str, Path]:
    """Return method -> its file, `LOG` -> that of the log, `ANSWERS` -> the answers' folder.

    Raises
    ------
    ConfigError
        If one file was given for several methods.
    """
    if out.suffix != ".json":
        files = {method: out / f"{method}.json" for method in methods}
        return files | {name: out / name for name in (LOG, ANSWERS)}
    if len(methods) > 1:
        raise ConfigError(
            f"--out {out} is one file, and there are {len(methods)} methods. Give a folder; it "
            "gets METHOD.json of each."
        )
    beside = {name: out.with_name(f"{out.stem}.{name}") for name in (LOG, ANSWERS)}
    return {methods[0]: out} | beside


def check_not_there(files: dict[str, Path], methods: list[str], search: dict[str, Any]) -> None:
    """Raise for a configuration that would be taken for what is found now.

    One of this very search, which was interrupted and goes on, is what is found now.

    Raises
    ------
    OutputError
        Naming it.
    """
    if _is_unfinished(files[LOG], search):
        return
    for method in methods:
        if files[method].exists():
            raise OutputError(
                f"{files[method]} is there already. Remove it, or give another place with --out."
            )


def _is_unfinished(log: Path, search: dict[str, Any]) -> bool:
    """Say whether a log is that of this very search, and not at its end."""
    try:
        values = json.loads(log.read_text("utf-8"))
        known = values.get(KEY, 1) == FORMAT
        return known and values["complete"] is False and values.items() >= search.items()
    except (OSError, ValueError, AttributeError, KeyError):
        return False


def search_values(
    settings: Settings, bounds: Bounds, media: Sequence[Sequence[Question]]
) -> dict[str, Any]:
    """Return all on which the result of a search depends, as JSON types; the log holds it."""
    return {
        "max_drop": bounds.max_drop,
        "confidence": bounds.confidence,
        "grid": list(bounds.grid),
        "order": [[question.id for question in questions] for questions in media],
        "settings": settings.model_dump(mode="json", exclude={*FREE, "limit", "shard"}),
    }


# What is written --------------------------------------------------------------------------------


class Report:
    """The log of all decisions, and the configurations; each file is whole whenever it is there."""

    def __init__(
        self,
        settings: Settings,
        bounds: Bounds,
        search: Search,
        engine: Engine,
        files: dict[str, Path],
    ) -> None:
        self.settings = settings
        self.bounds = bounds
        self.search = search
        self.about = engine.about()
        self.files = files
        self.methods = list(dict.fromkeys(settings.method))
        self.decisions: list[Decision] = []

    def note(self, decision: Decision) -> None:
        """Write a decision, and the configuration if it was the method's last."""
        self.decisions.append(decision)
        self.write(complete=False)
        config = self.config(decision.method)
        if self.search.finished(decision.method) and config is not None:
            write_whole(self.files[decision.method], config.to_json() + "\n")

    def config(self, method: str) -> PruningConfig | None:
        """Return what was found so far; None where no budget was accepted, or a picture resized.

        How a picture is made smaller is no part of a configuration.
        """
        keep = self.search.best(method)
        if keep is None or resizes(method):
            return None
        options = self.settings.options.get(method, {})
        return PruningConfig(method, keep, self.settings.positions, options)

    def of(self, method: str) -> list[Decision]:
        """Return one method's decisions, in order."""
        return [one for one in self.decisions if one.method == method]

    def accepted(self, method: str) -> Decision | None:
        """Return the decision for the smallest budget accepted."""
        found = [one for one in self.of(method) if one.outcome == "accepted"]
        return found[-1] if found else None

    def calls(self) -> dict[str, int]:
        """Return questions put to the model, and how many all budgets on all would have been."""
        calls = self.search.answers.calls
        questions = sum(map(len, self.search.media))
        return {
            "unpruned": calls[UNPRUNED],
            "pruned": calls.total() - calls[UNPRUNED],
            "total": calls.total(),
            "exhaustive": questions * (1 + len(self.methods) * len(self.bounds.grid)),
        }

    def unpruned(self) -> dict[str, Any]:
        """Return how the unpruned model fared."""
        right = self.search.answers.right.get(UNPRUNED, {})
        answered = [one for one in right.values() if one is not None]
        return {
            "answered": len(answered),
            "right": sum(answered),
            "errors": self.search.answers.errors.get(UNPRUNED, {}),
        }

    def write(self, complete: bool) -> None:
        """Write the log."""
        from tokenprune_eval.shared.output import write_whole

        bounds, media = self.bounds, self.search.media
        values = {
            KEY: FORMAT,
            "complete": complete,
            **search_values(self.settings, bounds, media),
            "steps": steps(len(bounds.grid)),
            "accept_at": bounds.accept_at,
            "reject_at": bounds.reject_at,
            "media_needed_at_least": needed(bounds.max_drop, bounds.accept_at),
            "found": {method: self.search.best(method) for method in self.methods},
            "calls": self.calls(),
            "unpruned": self.unpruned(),
            "decisions": [_plain(one) for one in self.decisions],
            "model": self.about,
            "versions": versions(),
        }
        text = json.dumps(values, indent=1, allow_nan=False)
        write_whole(self.files[LOG], text + "\n")


def _plain(decision: Decision) -> dict[str, Any]:
    values = {**vars(decision)}
    if math.isnan(decision.drop):
        values["drop"] = None
    return values


# What is printed --------------------------------------------------------------------------------


def _percent(share: float) -> str:

    return "" if math.isnan(share) else percent(share, digits=2)


def said(one: Decision) -> str:
    """Return a decision as one line."""
    return (
        f"{one.method}@{one.keep}: {one.outcome} after {one.questions:,} questions, "
        f"drop {_percent(one.drop)} % ({_percent(one.at_least)} to {_percent(one.at_most)})"
    )


def serve_command(model: str, config: PruningConfig) -> str:
    """Return the command line of `tokenprune serve` that serves a model pruned like this.

    Parameters
    ----------
    model
        A folder or a name on the model hub.
    config
        How to prune.
    """
    words = ["tokenprune", "serve", model, "--method", config.method, "--keep", str(config.keep)]
    if config.positions != "original":
        words += ["--positions", config.positions]
    for name, value in config.options.items():
        words += ["--option", f"{name}={json.dumps(value)}"]
    return shlex.join(words)


def print_report(console: Console, report: Report) -> None:
    """Print what was found, at what cost, what is missing, and how to serve it."""
    bounds, unpruned, calls = report.bounds, report.unpruned(), report.calls()
    table = plain_table(
        f"\nSmallest keep with a drop below {100 * bounds.max_drop:.4g} % at "
        f"{100 * bounds.confidence:.4g} %"
    )
    table.add_column("method", no_wrap=True)
    for name in ("keep", "drop, %", "at least", "at most", "questions", "tests", "calls"):
        table.add_column(name, justify="right", no_wrap=True)
    for method in report.methods:
        tried = report.of(method)
        ends = [str(len(tried)), f"{sum(one.calls for one in tried):,}"]
        found = report.accepted(method)
        if found is None:
            table.add_row(method, "none", "", "", "", "", *ends)
            continue
        numbers = [_percent(one) for one in (found.drop, found.at_least, found.at_most)]
        table.add_row(method, str(found.keep), *numbers, f"{found.questions:,}", *ends)
    console.print(table)

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    say(f"unpruned, {unpruned['right']:,} of {unpruned['answered']:,} answers are right")
    say(
        f"{calls['total']:,} calls of the model, {calls['unpruned']:,} of them unpruned; every "
        f"budget on every question would have been {calls['exhaustive']:,}."
    )
    if errors := unpruned["errors"]:
        question, error = next(iter(errors.items()))
        say(
            f"{len(errors):,} questions were left out because the unpruned model has no answer, "
            f"for example {question}: {error}"
        )
    if failed := {key: error for one in report.decisions for key, error in one.errors.items()}:
        count = sum(len(one.errors) for one in report.decisions)
        question, error = next(iter(failed.items()))
        say(
            f"{count:,} answers of pruned models are missing and count as wrong, for example to "
            f"{question}: {error}"
        )
    model = report.settings.model
    for method in report.methods:
        config = report.config(method)
        if config is None and report.accepted(method) is not None:
            say(
                f"{method}: no configuration is written, for it is about pruning alone. "
                "tokenprune_hf.resize makes pictures as small; before vLLM, make them smaller "
                "yourself."
            )
            continue
        if config is None:
            tried = report.of(method)
            reasons = ", ".join(f"{one.keep} {one.outcome}" for one in tried)
            say(
                f"{method}: no budget below 1.0 can be accepted ({reasons}), and no configuration "
                "was written. Allow a larger --max-drop, or where it is undecided give more "
                "images or videos, or more questions of each with --per-media; where it is "
                "unanswered, the errors say why."
            )
            continue
        say(f"{report.files[method]}: {serve_command(model, config)}")
    if model == BUNDLED:
        say(
            "The bundled model is a test object and no public VLM: its budgets say nothing about "
            "public models."
        )
    say(f"every decision: {report.files[LOG]}")
