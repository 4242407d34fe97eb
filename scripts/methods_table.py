#!/usr/bin/env python
"""What every method looks at, costs and reaches here: the tables of docs/methods.md.

    scripts/methods_table.py cost > docs/bench_methods.json    # on a quiet machine
    tokenprune eval --config scripts/methods.yaml
    scripts/methods_table.py write [methods-out]               # docs/methods.md, from both

Every method that is installed is in the tables, in the group that its own class tells: nothing here
names one. ``cost`` times each on one image of 576 tokens, of which 64 stay, in turn with a
CLIP-L/14-336 tower, and on one video of 16 frames of 144 tokens, of which 256 stay; and counts what
the image's selection would launch on a GPU. Rows are random. What methods read the question with is
handed to them: the language model's layers are not in it. Methods inside the language model are not
timed here. ``write`` replaces the text between the markers of docs/methods.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_common import Variant, in_turn, processor, releases
from bench_generate import CLIP_L
from count_launches import drawn_item, make_item, methods, twice
from run_tables import answers_by_set, by_group, markdown, right
from torch import nn
from update_docs import fill

import tokenprune
from tokenprune import MLPProjector, VisualTokens
from tokenprune.baselines import RESIZE
from tokenprune.registry import build, listed
from tokenprune.selecting import select_many
from tokenprune.tokens import FROM_CALLER
from tokenprune_eval.results.files import read_run
from tokenprune_eval.results.records import UNPRUNED
from tokenprune_eval.results.statistics import Accuracy, paired
from tokenprune_eval.results.summary import Row, summarise

ROOT = Path(__file__).parents[1]
PAGE, COSTS = ROOT / "docs" / "methods.md", ROOT / "docs" / "bench_methods.json"
IMAGE, VIDEO = ((1, 24, 24), 64), ((16, 12, 12), 256)
"""Grid, and how many tokens stay."""
TOWER = "tower"
OURS = {False: "information", True: "relevant-information"}
"""Whether it reads the question -> what is recommended of such."""


# Cost --------------------------------------------------------------------------------------------


def drawn(grid: tuple[int, int, int], projector: MLPProjector) -> VisualTokens:
    """Return a random item on the CPU with everything that methods look at."""
    item = drawn_item(grid, 0, projector)
    # What the language model reads is made of what the tower made.
    return replace(item, embeddings=projector(item.features))


def cost(runs: int) -> dict[str, Any]:
    """Time and count every method."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    width = 1024
    layers = nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)
    first, activation, second = (layer.eval() for layer in layers)
    projector = MLPProjector(first, activation, second)
    tower = CLIPVisionModel(CLIPVisionConfig(**CLIP_L)).eval()
    pixels = torch.randn(1, 3, 336, 336)
    names = list(methods())
    found: dict[str, dict[str, float | int]] = {name: {} for name in (*names, TOWER)}
    with torch.inference_mode():
        for label, (grid, keep) in (("image", IMAGE), ("video", VIDEO)):
            item = drawn(grid, projector)
            calls = {
                name: Variant(lambda name=name: tokenprune.select(item, name, keep))  # type: ignore[misc]  # noqa: B023
                for name in names
            }
            if label == "image":
                calls[TOWER] = Variant(lambda: tower(pixel_values=pixels))
            for name, one in in_turn(calls, runs).items():
                found[name][f"{label}_ms"] = round(one.median * 1e3, 2)
                print(f"{label}: {name} {one.median * 1e3:.2f} ms", file=sys.stderr)
    grid, keep = IMAGE
    there = make_item(grid, 0, projector)  # once: some of the work is done once for each projector
    for name in names:
        counted = twice(lambda: select_many([there], build(name, {}), keep))  # noqa: B023
        found[name] |= {"kernels": counted.kernels, "waits": counted.waits}
    return {
        "machine": f"{processor()}, {torch.get_num_threads()} threads",
        "releases": releases(),
        "runs": runs,
        "methods": found,
    }


# Tables ------------------------------------------------------------------------------------------


def about() -> str:
    """Return the table of what methods look at, where they run and what they cost."""
    known = json.loads(COSTS.read_text("utf-8"))
    tower = known["methods"][TOWER]["image_ms"]
    lines = []
    for group, found in by_group():
        lines.append([f"**{group}**", *[""] * 7])
        for one in found:
            spent = known["methods"].get(one.name)
            where = "transformers, vLLM"
            if one.kind == "inside":
                where = "transformers"
            elif FROM_CALLER & set(one.needs):
                where = "`tokenprune.select`"
            lines.append(
                [
                    f"`{one.name}`",
                    ", ".join(one.needs) or "-",
                    "yes" if one.reads_question else "no",
                    "yes" if one.merges else "no",
                    where,
                    *(
                        ["-"] * 3
                        if spent is None
                        else (
                            f"{spent['image_ms']:.1f} ({spent['image_ms'] / tower:.1%})",
                            f"{spent['video_ms']:.0f}",
                            f"{spent['kernels']} / {spent['waits']}",
                        )
                    ),
                ]
            )
    headings = (
        *("method", "looks at", "question", "merges", "runs in"),
        *("image, ms (of the tower)", "video, ms", "kernels / waits"),
    )
    return (
        markdown(headings, 5, lines) + f"\n\n{known['machine']}; "
        f"{', '.join(f'{name} {release}' for name, release in known['releases'].items())}; median "
        f"of {known['runs']} runs in turn. Image: 576 tokens of width 1,024, 64 stay; the tower, "
        f"CLIP-L/14-336, takes {tower:,.0f} ms. Video: 16 frames of 144 tokens, 256 stay. Random "
        "rows, float32; reading the question with the language model's layers is not counted. "
        "Kernels and waits are those of the image on a GPU, counted without one."
    )


def accuracies(run: Path) -> str:
    """Return the tables of right answers, one for each data set."""
    stored = read_run(run)
    results = summarise(stored.about, stored.questions, stored.conditions, stored.records)
    videos = {question.data_set for question in stored.questions if question.kind == "video"}
    parts = []
    for info in results.data:
        rows = [row for row in results.rows if row.data_set == info.name]
        whole = next(row for row in rows if row.method == UNPRUNED)
        budgets = list(dict.fromkeys(row.keep for row in rows if row.method != UNPRUNED))
        cells = {(row.method, row.keep): row for row in rows}
        video = info.name in videos
        lines = []
        for group, found in by_group():
            names = [one.name for one in found if video or not one.for_videos]
            if group == "baselines":
                names = [RESIZE, *names]
            names = [name for name in names if any((name, keep) in cells for keep in budgets)]
            if names:
                lines.append([f"**{group}**", *[""] * len(budgets)])
            lines += [
                [f"`{name}`", *(right(accuracy(cells.get((name, keep)))) for keep in budgets)]
                for name in names
            ]
        # `resize` and methods inside the language model read other numbers.
        tokens = [cells["random", keep].visual_tokens for keep in budgets]
        parts.append(
            f"### {info.name}\n\n{info.questions:,} questions, "
            f"{whole.of_visual_tokens or whole.visual_tokens:,.0f} tokens unpruned: "
            f"{right(whole.accuracy)} % right.\n\n"
            + markdown(
                ("tokens kept", *(f"{one:,.0f}" for one in tokens if one is not None)), 1, lines
            )
        )
    return "\n\n".join(parts)


def against_ours(run: Path) -> str:
    """Return how many cells each published method is ahead of, or behind, the recommended one."""
    stored = read_run(run)
    answers = answers_by_set(stored)
    videos = {question.data_set for question in stored.questions if question.kind == "video"}
    keys = {(one.method, one.keep): one.key for one in stored.conditions}
    every = listed()
    lines = []
    for method in dict.fromkeys(method for method, _ in keys):
        if method not in every:
            continue  # the unpruned model and `resize` are no methods
        chosen = every[method]
        reference = OURS[chosen.reads_question]
        if method in OURS.values() or not chosen.paper:
            continue
        counts, gaps = [0, 0, 0], []
        for name, given in answers.items():
            for (other, keep), key in keys.items():
                if other != method or (reference, keep) not in keys:
                    continue
                if chosen.for_videos and name not in videos:
                    continue
                own, ours = (given.get(one, {}) for one in (key, keys[reference, keep]))
                if (gap := paired(own, ours)) is not None:
                    counts[0 if gap.low > 0 else 2 if gap.high < 0 else 1] += 1
                    gaps.append(100 * gap.difference)
        if gaps:
            mean = f"{sum(gaps) / len(gaps):+.1f} ({min(gaps):+.1f} to {max(gaps):+.1f})"
            lines.append([f"`{method}`", f"`{reference}`", *map(str, counts), mean])
    headings = ("method", "against", "ahead", "no difference", "behind", "points, mean (range)")
    return markdown(headings, 2, lines)


def accuracy(row: Row | None) -> Accuracy | None:
    """Return a row's accuracy, where there is a row."""
    return None if row is None else row.accuracy


def write(run: Path | None) -> None:
    """Put the tables into docs/methods.md; without a run, what was answered stays as it is."""
    tables = {"about": about()}
    if run is not None:
        tables |= {"accuracy": accuracies(run), "against": against_ours(run)}
    fill(PAGE, {name: f"\n{table}\n" for name, table in tables.items()})


def main() -> None:
    """Do what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    actions = parser.add_subparsers(dest="action", required=True)
    timed = actions.add_parser("cost", help="time and count every method; prints JSON")
    timed.add_argument("--runs", type=int, default=5, help="timed runs of each (default 5)")
    writing = actions.add_parser("write", help="write docs/methods.md")
    writing.add_argument("run", type=Path, nargs="?", help="folder of the run, if it was run anew")
    arguments = parser.parse_args()
    if arguments.action == "cost":
        print(json.dumps(cost(arguments.runs), indent=1))
    else:
        write(arguments.run)


if __name__ == "__main__":
    main()
