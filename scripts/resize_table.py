#!/usr/bin/env python
"""Does pruning beat a smaller picture? Every method against `resize`: the tables of docs/resize.md.

    scripts/resize_table.py run bundled --out OUT     # an hour on two cores; goes on where it ended
    scripts/resize_table.py run fine --out OUT
    scripts/resize_table.py write OUT [OUT ...]       # docs/resize.md

``bundled`` asks the bundled model, of 224 pixels, about the data of ``methods.yaml``; given the
folder of that run, it goes on with it. ``fine`` asks the model of scripts/models/fine, of 448
pixels, about scenes whose smallest items are lost in a smaller picture. A run is one of the
evaluation, in a folder with the usual report. It has every method that needs nothing besides the
model, `resize`, and ``resize+METHOD``, each at the budgets of ``methods.yaml``.

For each budget a table gives the share of right answers in %; the difference to `resize` in points
with its 95 % interval, paired question by question; and the share of right answers in group A of
VTC-Bench (ACL 2026), with how many questions it has: those that are right unpruned and wrong where
the picture was made smaller. Only there can a method show that it beats a smaller picture.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compare_sets import written
from methods_table import accuracy
from rich.console import Console
from run_tables import answers_by_set, by_group, markdown, right
from update_docs import fill

from tokenprune.baselines import RESIZE
from tokenprune.registry import Method, listed
from tokenprune.tokens import FROM_CALLER
from tokenprune_eval.bundled import scenes
from tokenprune_eval.bundled.model import bundled_model_path, default_cache_dir
from tokenprune_eval.evaluation import runner
from tokenprune_eval.evaluation.settings import read_settings
from tokenprune_eval.results.files import read_run
from tokenprune_eval.results.records import UNPRUNED
from tokenprune_eval.results.statistics import Accuracy, Paired, paired
from tokenprune_eval.results.summary import summarise
from tokenprune_eval.shared.progress import RunProgress

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "resize.md"
SCENES, QUESTIONS = 200, 1000
"""Pictures of the fine scenes, and how many of their questions are asked."""


def main() -> None:
    """Do what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    actions = parser.add_subparsers(dest="action", required=True)
    running = actions.add_parser("run", help="ask a model under every condition")
    running.add_argument("model", choices=("bundled", "fine"))
    running.add_argument("--out", type=Path, required=True, help="folder of the run")
    running.add_argument("--work", type=Path, help="where model and data are put; default: cache")
    writing = actions.add_parser("write", help="write docs/resize.md")
    writing.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    arguments = parser.parse_args()
    if arguments.action == "write":
        tables = "\n\n".join(table for run in arguments.runs for table in tables_of(run))
        fill(PAGE, {"tables": f"\n{tables}\n"})
    else:
        ask(arguments.model, arguments.out, arguments.work or default_cache_dir())


# Asking ------------------------------------------------------------------------------------------


def ask(model: str, out: Path, work: Path) -> None:
    """Ask a model under every condition."""
    given: dict[str, Any] = {"method": conditions(), "out": str(out)}
    if model == "fine":
        style = scenes.STYLES[model]
        file = written(work / "resize", "own", style, "test", SCENES)
        path = bundled_model_path(work, weights=HERE / "models" / model)
        # The layer that ranks best is another one in each model.
        given |= {"model": str(path), "data": [str(file)], "limit": QUESTIONS, "options": {}}
    with RunProgress(Console(stderr=True)) as progress:
        runner.run(read_settings(given, HERE / "methods.yaml"), progress)


def conditions() -> list[str]:
    """Return `resize`, every method that can be run alone, and those before the model behind it."""
    found = [one for _, group in by_group() for one in group if _runs_alone(one)]
    before = [one.name for one in found if one.kind == "before"]
    return [RESIZE, *(one.name for one in found), *(f"{RESIZE}+{name}" for name in before)]


def _runs_alone(method: Method) -> bool:
    """Say whether a method is for pictures and needs nothing besides the model."""
    if method.for_videos or FROM_CALLER & set(method.needs):
        return False
    return method.name != "flexselect-lite"  # needs a selector that was trained for the model


# Tables ------------------------------------------------------------------------------------------


def tables_of(run: Path) -> list[str]:
    """Return a table for each data set of a run."""
    stored = read_run(run)
    results = summarise(stored.about, stored.questions, stored.conditions, stored.records)
    answers = answers_by_set(stored)
    videos = {question.data_set for question in stored.questions if question.kind == "video"}
    of_videos = {name for name, one in listed().items() if one.for_videos}
    tables = []
    for info in results.data:
        rows = {(r.method, r.keep): r for r in results.rows if r.data_set == info.name}
        whole = next(row for (method, _), row in rows.items() if method == UNPRUNED)
        budgets = list(dict.fromkeys(keep for method, keep in rows if method != UNPRUNED))
        given = answers[info.name]
        lines = []
        for method in dict.fromkeys(method for method, _ in rows):
            if method == UNPRUNED or (method in of_videos and info.name not in videos):
                continue
            line = [f"`{method}`"]
            for keep in budgets:
                row = rows[method, keep]
                own, other = given.get(row.condition, {}), given.get(f"{RESIZE}@{keep}", {})
                gap = None if method == RESIZE else paired(own, other)
                line += [_share(accuracy(row)), _points(gap), _share(row.group_a)]
            lines.append(line)
        tokens = [f"{rows['random', keep].visual_tokens:,.0f}" for keep in budgets]
        resized = [f"{rows[RESIZE, keep].visual_tokens:,.0f}" for keep in budgets]
        headings = ["method"]
        for keep, number in zip(budgets, tokens, strict=True):
            hard = rows["random", keep].group_a
            headings += [
                f"{number} tokens, % right",
                "against `resize`",
                f"group A ({'none' if hard is None else f'{hard.questions:,}'}), %",
            ]
        tables.append(
            f"### {_title(stored.about, info.name)}\n\n{info.questions:,} questions, "
            f"{whole.visual_tokens:,.0f} tokens unpruned: {right(whole.accuracy)} % right. "
            f"`resize` has {_listed(resized)} tokens where a method keeps {_listed(tokens)}.\n\n"
            + markdown(headings, 1, lines)
        )
    return tables


def _title(about: Any, data: str) -> str:
    bundled = about.get("bundled")
    model = "the bundled model, 224 pixels" if bundled else "the model of 448 pixels"
    return f"{'scenes' if data == 'own' else data}, {model}"


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]


def _points(gap: Paired | None) -> str:
    if gap is None:
        return "-"
    return f"{100 * gap.difference:+.1f} ({100 * gap.low:+.1f} to {100 * gap.high:+.1f})"


def _share(found: Accuracy | None) -> str:
    return "-" if found is None else f"{100 * found.share:.1f}"


if __name__ == "__main__":
    main()
