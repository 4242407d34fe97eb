#!/usr/bin/env python
"""Compare selectors on images and videos: published methods, our own, and what was tried.

    scripts/compare_selectors.py --split validation --scenes 150 --variants   # how ours were chosen
    scripts/compare_selectors.py --out OUT                                    # what they reach
    scripts/compare_selectors.py --weights WEIGHTS --out OUT                  # on another model
    scripts/compare_selectors.py --candidates --out OUT                       # what is to be read
    scripts/compare_selectors.py --tables RUN [RUN ...]                       # figures as Markdown

Each set is one run of the evaluation in a folder of its own, OUT/SET, that is continued where it
was killed and has the usual report. ``compare_selectors.yaml`` and, for videos,
``compare_selectors_videos.yaml`` say which methods and budgets; ``compare_sets.py`` renders what is
asked, and ``tried_selectors.py`` has what tokenprune does not. The model is the bundled one, or one
that ``train_demo_model.py --style`` has trained. Of a prompt with two images, tokens are selected
from each by itself. Tokens keep their original positions.

A line gives the share of right answers in % with Wilson's 95 % interval, and for our methods the
difference to the best published one of its kind at that budget and attention (blind, or reading the
question too) with its 95 % interval, paired question by question, and McNemar's p. ``oracle`` is no
method: it keeps the tokens where the answer is to be seen (see ``tried_selectors.py``), which is
what a method that reads the question could know at best. It is not an upper bound: the other tokens
may matter as well.

With ``--candidates``, `relevant-information` alone is run, with every token read and with fewer,
and the mean over sets, budgets and attention of the paired differences is printed.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from compare_sets import SETS, STYLED, VIDEOS, written
from rich.console import Console
from tried_selectors import (
    EVERY_READ,
    ORACLE,
    choosers,
    register_readings,
    register_tried,
)

from tokenprune.families.registry import reference_layer
from tokenprune_eval.bundled import scenes
from tokenprune_eval.bundled.model import WEIGHTS, bundled_model_path, default_cache_dir
from tokenprune_eval.evaluation.engines.transformers import TransformersEngine
from tokenprune_eval.evaluation.runner import Planned, answer_all, load_sets
from tokenprune_eval.evaluation.settings import read_settings
from tokenprune_eval.evaluation.store import Store
from tokenprune_eval.results.files import read_run
from tokenprune_eval.results.records import UNPRUNED
from tokenprune_eval.results.statistics import Accuracy, Paired, answer_of, paired
from tokenprune_eval.results.summary import summarise
from tokenprune_eval.results.write import write_results
from tokenprune_eval.shared.progress import RunProgress

BLIND = ("random", "uniform", "feature-norm", "cls-attention", "zeroth-order", "divprune")
VIDEO_BLIND = ("evs", "vidcom2")
READING = ("flexselect",)
OURS = {
    "information": (*BLIND, *VIDEO_BLIND),
    "relevant-information": (*BLIND, *VIDEO_BLIND, *READING),
}
"""Our methods, and what each is compared with."""

PLAIN, PROPORTIONAL = "plain", "proportional"

_HERE = Path(__file__).parent


def main() -> None:
    """Render, run the evaluation, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--work", type=Path, help="where model and data are put; default: cache")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--scenes", type=int, default=400, help="images of each set")
    parser.add_argument("--videos", type=int, default=100, help="of each set of videos")
    parser.add_argument("--keep", type=float, nargs="+", help="shares; default: the YAML file's")
    parser.add_argument("--variants", action="store_true", help="what was tried, on single images")
    parser.add_argument("--candidates", action="store_true", help="what fewer tokens read lose")
    parser.add_argument("--out", type=Path, default=Path("selectors-out"), help="folder of runs")
    parser.add_argument("--tables", type=Path, nargs="+", help="print these runs as Markdown")
    options = parser.parse_args()
    runs = options.tables or [folder for name in options.sets if (folder := run(name, options))]
    models: dict[str, list[Cell]] = {}
    for folder in runs:
        about, cells = cells_of(folder)
        models.setdefault(about, []).extend(cells)
    for about, cells in models.items():
        print_markdown(about, cells)
    if options.candidates:
        print_differences(runs)


def run(name: str, options: argparse.Namespace, **more: Any) -> Path | None:
    """Run the evaluation on one set; return its folder, or None where the model has no use for it.

    Parameters
    ----------
    name
        Of the set.
    options
        Of the command line.
    more
        Settings besides those of the YAML file.
    """
    video = name in VIDEOS
    model = bundled_model_path(options.work, weights=options.weights)
    config = transformers.AutoConfig.from_pretrained(model)
    text = config.get_text_config()
    layers, width = int(text.num_hidden_layers), int(text.hidden_size)
    layer = reference_layer(config.model_type, layers, width)
    size = int(config.vision_config.image_size[0])
    style = next(one for one in scenes.STYLES.values() if one.image_size == size)
    if video and style != scenes.STYLES["standard"]:
        print(f"{name}: left out, this model was not trained on videos\n", flush=True)
        return None
    file = written(
        (options.work or default_cache_dir()) / "selectors",
        name,
        style,
        options.split,
        options.videos if video else options.scenes,
    )
    given: dict[str, Any] = {"model": str(model), "data": [str(file)], "out": options.out / name}
    ending = "_videos" if video else ""
    if options.keep:
        given["keep"] = options.keep
    settings = read_settings({**given, **more}, _HERE / f"compare_selectors{ending}.yaml")
    methods = [one for one in settings.method if one != ORACLE or name in STYLED]
    if options.variants and name in (*STYLED, "easy-vqa"):
        methods += register_tried(layers, layer)
    if options.candidates:
        methods = ["relevant-information", *register_readings()]
    settings = settings.model_copy(update={"method": methods})
    plan = [Planned(one, settings.conditions()) for one in load_sets(settings)]
    about = (
        f"{platform.machine()}, torch {torch.__version__}, transformers {transformers.__version__},"
        f" float32; language model of {layers} layers and width {width}; reference layer {layer}; "
        f"{options.split} split; no public model"
    )
    with RunProgress(Console(stderr=True)) as progress, Store(settings.out) as store:
        known = answer_all(
            store,
            settings,
            plan,
            progress,
            partial(TransformersEngine, settings, choose=choosers(plan)),
            about={"about": about},
        )
        store.write_about({**known.about, "complete": True})
    stored = read_run(settings.out)
    write_results(
        settings.out, summarise(stored.about, stored.questions, stored.conditions, stored.records)
    )
    return settings.out


# --- figures ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """What a method reaches on a set with a budget.

    Attributes
    ----------
    set, method
        Names.
    keep, tokens
        How many tokens of an image or video are kept, and how many there are.
    reading
        `PLAIN` or `PROPORTIONAL`: how the model attends to them.
    right
        Share of right answers.
    types
        The same of each type of question.
    other, against
        For our methods: the best published one of its kind, and the difference to it.
    """

    set: str
    method: str
    keep: int
    tokens: int
    reading: str
    right: Accuracy
    types: Mapping[str, Accuracy | None]
    other: str = ""
    against: Paired | None = None


def cells_of(folder: Path) -> tuple[str, list[Cell]]:
    """Return what a run says of itself, and its cells; those of no answer are left out."""
    known = read_run(folder)
    results = summarise(known.about, known.questions, known.conditions, known.records)
    items = 1 + len(known.questions[0].further)
    answers: dict[str, dict[str, Any]] = {one.key: {} for one in known.conditions}
    for record in known.records:
        if (answer := answer_of(record)) is not None:
            answers[record.condition][record.item] = answer
    rows = {
        (one.method, one.keep, one.proportional_attention): one
        for one in results.rows
        if one.accuracy is not None
    }

    def share(method: str, keep: float, proportional: bool) -> float:
        accuracy = rows[method, keep, proportional].accuracy
        return accuracy.share if accuracy else 0.0

    cells = []
    for (method, keep, proportional), row in rows.items():
        other, against = "", None
        published = [one for one in OURS.get(method, ()) if (one, keep, proportional) in rows]
        if published:
            other = max(published, key=lambda one: share(one, keep, proportional))
            reference = rows[other, keep, proportional].condition
            against = paired(answers[row.condition], answers[reference])
        cells.append(
            Cell(
                row.data_set,
                method,
                round((row.visual_tokens or 0) / items),
                round((row.of_visual_tokens or 0) / items),
                PROPORTIONAL if proportional else PLAIN,
                row.accuracy,
                row.by_type,
                other,
                against,
            )
        )
    # Budgets one after the other, as tables have them.
    cells.sort(key=lambda cell: -cell.keep)
    return f"{known.about['about']}; {cells[0].tokens} tokens", cells


# --- Markdown -----------------------------------------------------------------------------------


def print_markdown(about: str, cells: Sequence[Cell]) -> None:
    """Print the figures of one model: a summary, then all there is of each set."""
    print(f"{about}\n")
    print_summary(cells)
    print_counts(cells)
    print_means(cells)
    for name in distinct(cell.set for cell in cells):
        own = [cell for cell in cells if cell.set == name and cell.method != UNPRUNED]
        whole = unpruned(cells, name)
        for reading in distinct(cell.reading for cell in own):
            questions = f"{whole.right.questions:,} questions"
            print(f"`{name}`, {questions}, read {reading}; unpruned {interval_of(whole)}:\n")
            print_set([cell for cell in own if cell.reading == reading])
        for keep in distinct(cell.keep for cell in own):
            print_types(whole, [cell for cell in own if cell.keep == keep])


def print_summary(cells: Sequence[Cell]) -> None:
    """Print our methods by sets and budgets, with the difference to the best published one."""
    compared = [cell for cell in cells if cell.against]
    budgets_of = {
        name: tuple(distinct(cell.keep for cell in compared if cell.set == name))
        for name in distinct(cell.set for cell in compared)
    }
    for budgets in distinct(budgets_of.values()):
        lines: dict[tuple[str, str, str], list[str]] = {}
        for cell in compared:
            if budgets_of[cell.set] == budgets:
                text = f"{percent(cell.right)} ({difference(cell.against)} to {cell.other})"
                lines.setdefault((cell.set, cell.method, cell.reading), []).append(text)
        print_table(
            ("set", "method", "read"),
            ("all", *map(str, budgets)),
            (
                (name, label(method), reading, percent(unpruned(cells, name).right), *texts)
                for (name, method, reading), texts in sorted(lines.items(), key=lambda x: x[0][1])
            ),
        )


def print_counts(cells: Sequence[Cell]) -> None:
    """Print in how many cells ours differ from the best published method, by their intervals."""
    found: dict[tuple[str, str], list[Paired]] = {}
    for cell in cells:
        if cell.against:
            found.setdefault((cell.method, cell.reading), []).append(cell.against)
    lines = []
    for (method, reading), own in sorted(found.items()):
        ahead, behind = sum(one.low > 0 for one in own), sum(one.high < 0 for one in own)
        counts = (len(own), ahead, len(own) - ahead - behind, behind)
        lines.append((label(method), reading, *map(str, counts)))
    print_table(("method", "read"), ("sets x budgets", "ahead", "no difference", "behind"), lines)


def print_means(cells: Sequence[Cell]) -> None:
    """Print the mean over sets of the share of right answers in %."""
    shares: dict[tuple[str, str], dict[int, list[float]]] = {}
    for cell in cells:
        if cell.method not in (UNPRUNED, ORACLE):
            own = shares.setdefault((cell.reading, cell.method), {})
            own.setdefault(cell.keep, []).append(100 * cell.right.share)
    budgets = distinct(keep for own in shares.values() for keep in own)
    print_table(
        ("mean over sets", "read"),
        map(str, budgets),
        (
            (
                label(method),
                reading,
                *(f"{sum(own[n]) / len(own[n]):.1f}" if n in own else "-" for n in budgets),
            )
            for (reading, method), own in sorted(shares.items(), key=lambda one: one[0][0])
        ),
    )


def print_set(cells: Sequence[Cell]) -> None:
    """Print methods by budgets, and the differences of ours."""
    budgets = distinct(cell.keep for cell in cells)
    by_key = {(cell.method, cell.keep): cell for cell in cells}
    print_table(
        ("method",),
        (f"{keep} of {cells[0].tokens:,}" for keep in budgets),
        (
            (label(method), *(interval_of(by_key[method, keep]) for keep in budgets))
            for method in distinct(cell.method for cell in cells)
        ),
    )
    compared = [cell for cell in cells if cell.against]
    for cell in compared:
        if cell.against:
            p = cell.against.p_value
            known = "p < 0.001" if p < 0.001 else f"p {p:.3f}"
            gap = f"{difference(cell.against)} {known} to {cell.other}"
            print(f"- {label(cell.method)}, {cell.keep} tokens: {gap}")
    print(end="\n" if compared else "")


def print_types(whole: Cell, cells: Sequence[Cell]) -> None:
    """Print methods and readings by types of question."""
    best = {cell.reading: cell.other for cell in cells if cell.method == "information"}
    shown = [
        cell
        for cell in (whole, *cells)
        if cell.method in (UNPRUNED, best.get(cell.reading), *OURS, "flexselect", ORACLE)
    ]
    print_table(
        (f"{cells[0].keep} of {whole.tokens:,}", "read"),
        whole.types,
        (
            (label(cell.method), cell.reading, *(percent(cell.types[one]) for one in whole.types))
            for cell in shown
        ),
    )


def print_differences(runs: Sequence[Path]) -> None:
    """Print how far methods are from `EVERY_READ`, in points, on average over the cells of runs."""
    found: dict[str, list[float]] = {}
    for folder in runs:
        known = read_run(folder)
        answers: dict[str, dict[str, Any]] = {one.key: {} for one in known.conditions}
        for record in known.records:
            if (answer := answer_of(record)) is not None:
                answers[record.condition][record.item] = answer
        by_cell = {
            (one.method, one.keep, one.proportional_attention): answers[one.key]
            for one in known.conditions
        }
        for (method, *cell), own in by_cell.items():
            reference = by_cell.get((EVERY_READ, *cell))
            if reference and method != EVERY_READ and (gap := paired(own, reference)):
                found.setdefault(method, []).append(100 * gap.difference)
    print_table(
        ("method",),
        ("cells", "mean difference", "lowest", "highest"),
        (
            (label(method), str(len(gaps)), *(f"{one:+.2f}" for one in _summary(gaps)))
            for method, gaps in found.items()
        ),
    )


def _summary(values: Sequence[float]) -> tuple[float, float, float]:
    """Return mean, lowest and highest."""
    return sum(values) / len(values), min(values), max(values)


def print_table(
    texts: Sequence[str], numbers: Iterable[str], lines: Iterable[Sequence[str]]
) -> None:
    """Print a table whose first columns are texts, and the others numbers."""
    numbers = list(numbers)
    print(f"| {' | '.join([*texts, *numbers])} |")
    print(f"|{'|'.join(['---'] * len(texts) + ['---:'] * len(numbers))}|")
    for line in lines:
        print(f"| {' | '.join(line)} |")
    print()


def distinct(values: Iterable[Any]) -> list[Any]:
    """Return values in the order they first come."""
    return list(dict.fromkeys(values))


def unpruned(cells: Sequence[Cell], name: str) -> Cell:
    """Return the unpruned cell of a set."""
    return next(cell for cell in cells if cell.set == name and cell.method == UNPRUNED)


def label(method: str) -> str:
    """Write a method's name; ours are code."""
    return f"`{method}`" if method in OURS else method


def percent(accuracy: Accuracy | None) -> str:
    """Write a share of right answers."""
    return f"{100 * accuracy.share:.1f}" if accuracy else "-"


def interval_of(cell: Cell) -> str:
    """Write a share of right answers with its interval."""
    return f"{percent(cell.right)} [{100 * cell.right.low:.1f}, {100 * cell.right.high:.1f}]"


def difference(found: Paired | None) -> str:
    """Write a paired difference with its interval."""
    if found is None:
        return "-"
    change, low, high = (100 * one for one in (found.difference, found.low, found.high))
    return f"{change:+.1f} [{low:+.1f}, {high:+.1f}]"


if __name__ == "__main__":
    main()
