#!/usr/bin/env python
"""Tokens compared before or after the projector: a table of docs/methods.md.

    scripts/taken_table.py run OUT      # OUT/before and OUT/after, ten minutes on two cores
    scripts/taken_table.py write OUT    # docs/methods.md

Every method with the option ``taken`` is asked twice at each budget, about scenes as the bundled
model knows them, about scenes of many small items, and about rows of digits, which are nearest to
text. A cell is the share of right answers with ``taken="before"`` minus that with
``taken="after"``, in points, mean over the budgets. Its 95 % interval draws questions with
replacement, each with the answers at every budget.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from compare_sets import written
from rich.console import Console
from run_tables import answers_by_set, by_group, markdown
from update_docs import fill

from tokenprune.registry import listed
from tokenprune.tokens import FROM_CALLER
from tokenprune_eval.bundled import scenes
from tokenprune_eval.bundled.model import default_cache_dir
from tokenprune_eval.evaluation import runner
from tokenprune_eval.evaluation.settings import read_settings
from tokenprune_eval.results.files import read_run
from tokenprune_eval.results.records import UNPRUNED
from tokenprune_eval.results.statistics import Answer, mean_interval
from tokenprune_eval.shared.progress import RunProgress

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "methods.md"
PLACES = ("before", "after")
STYLES = ("digit-rows", "many-items")
SCENES, QUESTIONS = 400, 500
"""Pictures of each style, and how many questions of each set are asked."""
KEEPS = (0.25, 0.125, 0.0625)

Answers = dict[str, dict[str, Answer]]
"""Key of a condition -> question -> what was answered."""


def main() -> None:
    """Do what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    actions = parser.add_subparsers(dest="action", required=True)
    for name, meaning in (("run", "ask the bundled model"), ("write", "write docs/methods.md")):
        action = actions.add_parser(name, help=meaning)
        action.add_argument("out", type=Path, help="folder of the two runs")
    arguments = parser.parse_args()
    if arguments.action == "run":
        for place in PLACES:
            ask(place, arguments.out / place)
    else:
        fill(PAGE, {"taken": f"\n{table(arguments.out)}\n"})


def ask(place: str, out: Path) -> None:
    """Ask the bundled model with every method's tokens taken at one place."""
    own = scenes.STYLES["standard"]
    files = [
        str(written(default_cache_dir() / "taken", style, own, "test", SCENES)) for style in STYLES
    ]
    # Tokens of the question are no features before the projector: without pivots of text, `dart`
    # compares images alone.
    options = {name: {"taken": place} for name in methods()} | {
        "dart": {"taken": place, "text_pivots": 0}
    }
    settings = {
        "model": "bundled",
        "data": [*files, "scenes"],
        "limit": QUESTIONS,
        "method": methods(),
        "options": options,
        "keep": list(KEEPS),
        "max_new_tokens": 6,
        "batch": 64,
        "workers": 2,
        "memory": 0,
        "out": str(out),
    }
    with RunProgress(Console(stderr=True)) as progress:
        runner.run(read_settings(settings), progress)


def methods() -> list[str]:
    """Return the methods for pictures that have the option and need nothing from the caller."""
    return [
        name
        for name, one in listed().items()
        if "taken" in one.options and not one.for_videos and not FROM_CALLER & set(one.needs)
    ]


def table(out: Path) -> str:
    """Return the table of differences, and what is right unpruned."""
    before, after = (answers_by_set(read_run(out / place)) for place in PLACES)
    lines = []
    for _, group in by_group():
        for one in group:
            cells = [_cell(before[data], after[data], one.name) for data in before]
            if any(cell != "-" for cell in cells):
                lines.append([f"`{one.name}`", str(one.options["taken"]), *cells])
    whole = (
        f"{data} {100 * sum(answer.correct for answer in given[UNPRUNED].values()) / count:.1f}"
        for data, given in before.items()
        if (count := len(given[UNPRUNED]))
    )
    headings = ("method", "default", *before)
    return f"{markdown(headings, 2, lines)}\n\nUnpruned, % right: {', '.join(whole)}."


def _cell(before: Answers, after: Answers, method: str) -> str:
    """Return the mean difference of a method on a data set, and its interval."""
    keys = [f"{method}@{keep}" for keep in KEEPS if f"{method}@{keep}" in before]
    if not keys:
        return "-"
    both = set.intersection(*(set(before[key]) & set(after[key]) for key in keys))
    gaps = [
        sum(before[key][one].correct - after[key][one].correct for key in keys) / len(keys)
        for one in sorted(both)
    ]
    low, high = mean_interval(gaps)
    return f"{100 * sum(gaps) / len(gaps):+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


if __name__ == "__main__":
    main()
