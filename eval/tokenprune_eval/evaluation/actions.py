"""What `tokenprune eval` does: run, list, check, put shards together, compare."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tokenprune.errors import ConfigError
from tokenprune_eval.evaluation.settings import Settings
from tokenprune_eval.results.summary import Results
from tokenprune_eval.shared.progress import RunProgress


def evaluate(console: Console, settings: Settings) -> int:
    """Run, print the tables, and say where the report is."""
    from tokenprune_eval.evaluation.runner import run
    from tokenprune_eval.results.table import print_tables

    with RunProgress(console) as progress:
        results = run(settings, progress)
    print_tables(console, results)
    _say_where(console, settings.out, results)
    return 0


def _say_where(console: Console, out: Path, results: Results) -> None:
    from tokenprune_eval.results.write import REPORT, TABLE

    errors = sum(row.errors for row in results.rows)
    if errors:
        console.print(f"{errors:,} answers are missing because of errors; the report lists them.")
    console.print(f"report: {out / REPORT}, table: {out / TABLE}", highlight=False, soft_wrap=True)


_ENGINES = {
    "hf": "transformers, in this process",
    "vllm": "vLLM, in this process",
    "openai": "a server with OpenAI's protocol, at --base-url",
}


def ls(console: Console, as_json: bool = False) -> int:
    """List what can be named, as tables or as one object: argument -> name -> description."""
    from tokenprune.registry import listed
    from tokenprune_eval.data.load import data_sets

    names = {
        "data": data_sets(),
        "method": {
            name: method.summary
            for name, method in listed().items()
            if method.kind != "cross-attention"  # no name that `method` takes
        },
        "engine": _ENGINES,
    }
    if as_json:
        print(json.dumps(names, indent=2))
        return 0
    for argument, rows in names.items():
        table = Table(
            box=None,
            show_header=False,
            title=f"--{argument}",
            title_justify="left",
            pad_edge=False,
        )
        table.add_column(no_wrap=True)
        table.add_column()
        for name, text in rows.items():
            table.add_row(name, text)
        console.print(table)
        console.print()
    return 0


def validate(console: Console, settings: Settings) -> int:
    """Check settings, data and model; nothing is run and nothing is written.

    Raises
    ------
    ConfigError
        Listing all that would stop a run.
    """
    from tokenprune_eval.evaluation.checks import problems_of
    from tokenprune_eval.evaluation.read_ahead import by_media
    from tokenprune_eval.evaluation.runner import load_sets

    settings.check_methods()
    conditions = settings.conditions()
    sets = load_sets(settings)
    for data_set in sets:
        kinds = sorted({question.type for question in data_set.questions if question.type})
        console.print(
            f"{data_set.name}: {len(data_set.questions):,} questions about "
            f"{len(by_media(data_set.questions)):,} images or videos"
            + (f"; types: {', '.join(kinds)}" if kinds else ""),
            highlight=False,
        )
    asked = sum(len(data_set.questions) for data_set in sets)
    console.print(
        f"{settings.engine}, {settings.model}: {asked:,} questions under {len(conditions)} "
        f"conditions: {', '.join(one.key for one in conditions)}",
        highlight=False,
    )
    problems = problems_of(settings, sets)
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        listed = "".join(f"\n  {text}" for text in problems)
        raise ConfigError(f"{len(problems)} things are in the way of this run:{listed}")
    console.print("everything is there")
    return 0


def merge(console: Console, out: Path, shards: Sequence[Path]) -> int:
    """Put the folders of shards together into one, and write its results."""
    from tokenprune_eval.evaluation.runner import results_of
    from tokenprune_eval.evaluation.store import Store
    from tokenprune_eval.results.files import RUN, read_run
    from tokenprune_eval.results.table import print_tables
    from tokenprune_eval.results.write import write_results

    runs = [read_run(shard) for shard in shards]
    settings = [Settings.model_validate(run.about["settings"]) for run in runs]
    first = settings[0].model_copy(update={"shard": None, "out": out})
    for shard, other in zip(shards, settings, strict=True):
        if differing := [name for name in first.differences(other) if name != "shard"]:
            raise ConfigError(
                f"{shard} was run with another {', '.join(differing)} than {shards[0]}: they are "
                "no parts of one run. Leave it out."
            )
    seen: dict[tuple[str, str], Path] = {}
    for shard, run in zip(shards, runs, strict=True):
        for key in {(record.condition, record.item) for record in run.records}:
            if key in seen:
                raise ConfigError(
                    f"{key[1]} under {key[0]} is in {seen[key]} and in {shard}. Give each part "
                    "once."
                )
            seen[key] = shard
    if (out / RUN).exists():
        raise ConfigError(f"{out} holds a run already. Give a new folder.")
    conditions = list({one.key: one for run in runs for one in run.conditions}.values())
    questions = list({one.id: one for run in runs for one in run.questions}.values())
    about = {
        **runs[0].about,
        "data": list(
            {one["name"]: one for run in runs for one in run.about.get("data", ())}.values()
        ),
        "complete": all(run.about.get("complete") for run in runs),
        "seconds": sum(run.about.get("seconds") or 0.0 for run in runs),
        "shards": [run.about["settings"]["shard"] for run in runs],
    }
    for name in ("settings", "conditions"):
        del about[name]
    with Store(out) as store:
        store.begin(first, about, questions, conditions)
        for run in runs:
            store.append(run.records)
    results = results_of(out)
    write_results(out, results)
    print_tables(console, results)
    _say_where(console, out, results)
    return 0


def compare(console: Console, a: Path, b: Path, as_markdown: bool) -> int:
    """Print what two runs have in common and where they differ."""
    from tokenprune_eval.results.compare import compare as compare_runs
    from tokenprune_eval.results.compare import comparison_markdown, print_comparison

    comparison = compare_runs(a, b)
    if as_markdown:
        print(comparison_markdown(comparison))
    else:
        print_comparison(console, comparison)
    return 0
