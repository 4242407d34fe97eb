"""What `tokenprune calibrate` leaves: the log, a configuration for each method, and the table."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from tokenprune.baselines import resizes
from tokenprune.config import ABSTAINED, PruningConfig
from tokenprune.errors import ConfigError
from tokenprune.formats import KEY
from tokenprune.providers import BUNDLED_MODELS
from tokenprune_eval.calibrate.abstention import (
    Abstention,
    abstain,
    drop_of,
    percent_of,
    without_nan,
)
from tokenprune_eval.calibrate.search import Bounds, Decision, Search, of_part, steps
from tokenprune_eval.calibrate.sequential import needed
from tokenprune_eval.data.question import Question
from tokenprune_eval.evaluation.engines.base import Engine
from tokenprune_eval.evaluation.settings import FREE, Settings
from tokenprune_eval.results.records import UNPRUNED
from tokenprune_eval.shared.machine import versions
from tokenprune_eval.shared.output import OutputError, write_whole
from tokenprune_eval.shared.tables import plain_table

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
        if files[method].exists() and not _is_abstention(files[method]):
            raise OutputError(
                f"{files[method]} is there already. Remove it, or give another place with --out."
            )


def clear_abstentions(files: dict[str, Path], methods: Sequence[str]) -> None:
    """Remove what an earlier search said of methods for which it found no budget."""
    for method in methods:
        if files[method].exists() and _is_abstention(files[method]):
            files[method].unlink()


def _is_abstention(file: Path) -> bool:
    try:
        return bool(json.loads(file.read_text("utf-8"))[ABSTAINED] is True)
    except (OSError, ValueError, TypeError, KeyError):
        return False


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
        "types": dict(bounds.types) or None,
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
        """Write a decision, and if it was the method's last the configuration or why none."""
        self.decisions.append(decision)
        self.write(complete=False)
        method = decision.method
        config, abstention = self.config(method), self.abstention(method)
        if abstention is not None:
            write_whole(self.files[method], json.dumps(abstention.to_dict(), indent=2) + "\n")
        elif self.search.finished(method) and config is not None:
            write_whole(self.files[method], config.to_json() + "\n")

    def config(self, method: str) -> PruningConfig | None:
        """Return what was found so far; None where no budget was accepted, or a picture resized.

        How a picture is made smaller is no part of a configuration.
        """
        keep = self.search.best(method)
        if keep is None or resizes(method):
            return None
        options = self.settings.options.get(method, {})
        return PruningConfig(method, keep, self.settings.positions, options)

    def abstention(self, method: str) -> Abstention | None:
        """Return why a method has no budget; None where it has one or is not at its end."""
        if not self.search.finished(method) or self.search.best(method) is not None:
            return None
        return abstain(method, self.of(method), self.bounds, self.methods)

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
        types: dict[str, dict[str, int]] = {
            name: {"answered": 0, "right": 0} for name in self.bounds.types
        }
        for questions in self.search.media if types else ():
            for question in questions:
                is_right = right.get(question.id)
                if is_right is not None:
                    types[question.type]["answered"] += 1
                    types[question.type]["right"] += is_right
        return {
            "answered": len(answered),
            "right": sum(answered),
            "types": types,
            "errors": self.search.answers.errors.get(UNPRUNED, {}),
        }

    def write(self, complete: bool) -> None:
        """Write the log."""
        bounds, media = self.bounds, self.search.media
        values = {
            KEY: FORMAT,
            "complete": complete,
            **search_values(self.settings, bounds, media),
            "steps": steps(len(bounds.grid)),
            "accept_at": bounds.accept_at,
            "reject_at": bounds.reject_at,
            "media_needed_at_least": max(
                needed(bound, bounds.accept_at) for bound in bounds.parts.values()
            ),
            "found": {method: self.search.best(method) for method in self.methods},
            "abstained": {
                method: abstention.to_dict()
                for method in self.methods
                if (abstention := self.abstention(method)) is not None
            },
            "calls": self.calls(),
            "unpruned": self.unpruned(),
            "decisions": [_plain(one) for one in self.decisions],
            "model": self.about,
            "versions": versions(),
        }
        text = json.dumps(values, indent=1, allow_nan=False)
        write_whole(self.files[LOG], text + "\n")


def _plain(decision: Decision) -> Any:
    return without_nan(asdict(decision))


# What is printed --------------------------------------------------------------------------------


def said(one: Decision) -> str:
    """Return a decision as one line."""
    return (
        f"{one.method}@{one.keep}: {one.outcome}{_of_types(one)} after {one.questions:,} "
        f"questions, {drop_of(one)}"
    )


def _of_types(one: Decision) -> str:
    """Return which types a decision is about, as it stands behind its outcome."""
    if not one.types or one.outcome == "unanswered":
        return ""
    if one.outcome == "accepted":
        return f" for every type ({len(one.types)})"
    return f" for {', '.join(one.stopped_by)}"


def types_said(bounds: Bounds, media: Sequence[Sequence[Question]], left_out: Sequence[str]) -> str:
    """Return what is asked of each type, and how many images or videos it has, in a line each."""
    lines = []
    for name, bound in bounds.types.items():
        of_type = of_part(media, name)
        lines.append(
            f"type {name}: {sum(map(len, of_type)):,} questions about {len(of_type):,} images or "
            f"videos, needs at least {needed(bound, bounds.accept_at):,} for a drop below "
            f"{100 * bound:.4g} %"
        )
    if left_out:
        lines.append(f"not asked about and not bounded: {', '.join(left_out)}")
    return "\n".join(lines)


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
    per_type = bool(bounds.types)

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    _print_found(console, report)
    if per_type:
        _print_types(console, report)
        for method in report.methods:
            if stopped := [one for one in report.of(method) if one.outcome != "accepted"]:
                reasons = "; ".join(
                    f"{one.keep} {one.outcome}{_of_types(one)}, {drop_of(one)}" for one in stopped
                )
                say(f"{method}, not accepted: {reasons}")
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
        config, abstention = report.config(method), report.abstention(method)
        if abstention is not None:
            say(" ".join([abstention.message, *abstention.next]))
            say(f"{report.files[method]}: holds no budget, and is refused where one is loaded.")
        elif config is None:
            say(
                f"{method}: no configuration is written, for it is about pruning alone. "
                "tokenprune_hf.resize makes pictures as small, and so does `tokenprune serve` with "
                "--request-method resize for requests that ask for it."
            )
        else:
            say(f"{report.files[method]}: {serve_command(model, config)}")
    if model in BUNDLED_MODELS:
        say(
            "The bundled model is a test object and no public VLM: its budgets say nothing about "
            "public models."
        )
    say(f"every decision: {report.files[LOG]}")


def _print_found(console: Console, report: Report) -> None:
    """Print the smallest budget of each method."""
    bounds = report.bounds
    everywhere = " in every type of question" if bounds.types else ""
    own = {bound for bound in bounds.types.values() if bound != bounds.max_drop}
    below = "its bound" if own else f"{100 * bounds.max_drop:.4g} %"
    table = plain_table(
        f"\nSmallest keep with a drop below {below}{everywhere} at {100 * bounds.confidence:.4g} %"
    )
    table.add_column("method", no_wrap=True)
    names = ["keep", "drop, %", "at least", "at most", "questions", "tests", "calls"]
    if bounds.types:
        names.insert(1, "most in")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for method in report.methods:
        tried = report.of(method)
        ends = [str(len(tried)), f"{sum(one.calls for one in tried):,}"]
        found = report.accepted(method)
        if found is None:
            table.add_row(method, ABSTAINED, *[""] * (len(names) - 3), *ends)
            continue
        numbers = [percent_of(one) for one in (found.drop, found.at_least, found.at_most)]
        kind = [found.type or ""] if bounds.types else []
        table.add_row(method, str(found.keep), *kind, *numbers, f"{found.questions:,}", *ends)
    console.print(table)


def _print_types(console: Console, report: Report) -> None:
    """Print what every type lost at the smallest budget of each method."""
    unpruned = report.unpruned()["types"]
    table = plain_table("\nEvery type at that keep")
    for name in ("method", "keep", "type"):
        table.add_column(name, no_wrap=True)
    columns = ("bound, %", "drop, %", "at least", "at most", "questions", "unpruned right")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for method in report.methods:
        found = report.accepted(method)
        if found is None:
            continue
        for name, part in found.types.items():
            share = unpruned[name]
            table.add_row(
                method,
                str(found.keep),
                name,
                f"{100 * part.bound:.4g}",
                *(percent_of(one) for one in (part.drop, part.at_least, part.at_most)),
                f"{part.questions:,}",
                f"{share['right']:,} of {share['answered']:,}",
            )
    if table.row_count:
        console.print(table)
