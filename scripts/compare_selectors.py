#!/usr/bin/env python
"""Compare selectors on images and videos: published methods, our own, and what was tried.

    scripts/compare_selectors.py --split validation --scenes 150 --variants   # how ours were chosen
    scripts/compare_selectors.py --work WORK --out FILE                       # what they reach
    scripts/compare_selectors.py --weights WEIGHTS --out FILE                 # on another model
    scripts/compare_selectors.py --tables FILE [FILE ...]                     # figures as Markdown

The model is the bundled one, or one that ``train_demo_model.py --style`` has trained.
``compare_sets.py`` says what is asked, ``compare_reading.py`` how, ``compare_methods.py`` what
selects. Each image is encoded once, each question read once in full, and then every method selects
tokens for every question; of a prompt with two images, from each by itself. An answer is the word
the model finds most likely first. Tokens keep their original positions.

Every selection is read twice: plainly, and with proportional attention, where a kept token counts
as often as there are tokens that it stands for (``tokenprune.representation``).

A line gives the share of right answers in % with Wilson's 95 % interval, and for our methods the
difference to the best published one of its kind at that budget and reading (blind, or reading the
question too) with its 95 % interval, paired question by question, and McNemar's p. ``oracle`` is no
method: it keeps the tokens where the answer is to be seen (see ``compare_methods.py``), which is
what a method that reads the question could know at best. It is not an upper bound: the other tokens
may matter as well.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from compare_methods import OURS, Entry, entries
from compare_reading import PLAIN, PROPORTIONAL, Data, Model
from compare_sets import SETS, STYLED, VIDEOS, Prompt, prompts_of
from torch import Tensor

from tokenprune.budget import tokens_kept
from tokenprune_eval.bundled import scenes
from tokenprune_eval.bundled.model import WEIGHTS, bundled_model_path
from tokenprune_eval.results.statistics import accuracy_of, difference_interval, mcnemar_p

KEEP = (0.25, 0.125, 0.0625)
KEEP_OF_VIDEOS = (1 / 4, 1 / 16, 1 / 32)
UNPRUNED = "unpruned"
CHUNK = {"image": 50, "video": 5}
"""Prompts whose embeddings and attention are held at one time."""

Key = tuple[str, int, str]
"""Method, tokens kept, reading."""


def main() -> None:
    """Encode, read, select, answer, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--work", type=Path, help="where the model is put together, and videos are")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--scenes", type=int, default=400, help="images of each set")
    parser.add_argument("--videos", type=int, default=100, help="of each set of videos")
    parser.add_argument("--keep", type=float, nargs="+", help="shares; default: three of each kind")
    parser.add_argument("--variants", action="store_true", help="what was tried, on single images")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bfloat16", action="store_true", help="faster; changes a few answers")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    parser.add_argument("--tables", type=Path, nargs="+", help="print these files as Markdown")
    options = parser.parse_args()
    if options.tables:
        models: dict[str, list[dict[str, Any]]] = {}
        for file in options.tables:
            written = json.loads(file.read_text("utf-8"))
            models.setdefault(written["about"], []).extend(written["figures"])
        for about, figures_of_model in models.items():
            print_markdown(about, figures_of_model)
        return
    torch.set_num_threads(options.threads)
    model = Model(bundled_model_path(options.work, weights=options.weights), options.bfloat16)
    about = (
        f"{platform.machine()}, torch {torch.__version__}, transformers {transformers.__version__},"
        f" {'bfloat16' if options.bfloat16 else 'float32'}; {model.tokens} tokens an image, "
        f"language model of {model.layers} layers and width {model.width}; reference layer "
        f"{model.layer}; {options.split} split; no public model"
    )
    print(about, flush=True)
    found: list[dict[str, Any]] = []
    for name in options.sets:
        if name in VIDEOS and model.style != scenes.STYLES["standard"]:
            print(f"\n{name}: left out, this model was not trained on videos", flush=True)
            continue
        found += compare(model, name, options)
        if options.out:
            written = json.dumps({"about": about, "figures": found}, indent=1)
            options.out.write_text(written + "\n", "utf-8")


# --- the comparison -----------------------------------------------------------------------------


@dataclass
class Results:
    """What is right of a set, chunk by chunk.

    Attributes
    ----------
    types
        Of each question.
    right
        BoolTensors.
    """

    types: list[str] = field(default_factory=list)
    right: dict[Key, list[Tensor]] = field(default_factory=dict)

    def add(self, method: str, keep: int, reading: str, right: Tensor) -> None:
        """Add a chunk's."""
        self.right.setdefault((method, keep, reading), []).append(right)

    def of(self, method: str, keep: int, reading: str) -> Tensor:
        """Return BoolTensor [Q]."""
        return torch.cat(self.right[method, keep, reading])

    def by_type(self, right: Tensor) -> dict[str, list[bool]]:
        """Return what is right of each type of question."""
        found: dict[str, list[bool]] = {}
        for type_, one in zip(self.types, right.tolist(), strict=True):
            found.setdefault(type_, []).append(one)
        return found


def compare(model: Model, name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Print one set's tables and return their figures."""
    video = name in VIDEOS
    single = name in (*STYLED, "easy-vqa")
    budgets = options.keep or (KEEP_OF_VIDEOS if video else KEEP)
    variants = options.variants and single
    lines = entries(model, video=video, boxes=name in STYLED, variants=variants)
    results = Results()
    count = options.videos if video else options.scenes
    prompts = prompts_of(name, model.style, options.split, count, options.work)
    started, media = time.monotonic(), 0
    for first, part in chunks(prompts, CHUNK["video" if video else "image"]):
        data = model.read(part, first, variants)
        total = data.tokens
        kept = [tokens_kept(budget, total) for budget in budgets]
        answer(model, data, lines, kept, results)
        media += len(data.items)
        seconds = time.monotonic() - started
        print(f"{name}: {media} of {count}, {seconds:.0f} s", file=sys.stderr, flush=True)
    what = "videos" if video else "images"
    print(f"\n{name}: {len(results.types)} questions about {media} {what}", flush=True)
    whole = results.of(UNPRUNED, total, PLAIN.name)
    print(f"  {UNPRUNED:56} {percent(whole)}  {by_type(results, whole)}", flush=True)
    found = [figures(results, name, UNPRUNED, total, total, PLAIN.name, whole)]
    for keep in kept:
        found += table(results, name, keep, total, lines)
    return found


def chunks(prompts: Iterator[Prompt], size: int) -> Iterator[tuple[int, list[Prompt]]]:
    """Yield some prompts at a time, and the number of the first of them."""
    first = 0
    while part := list(islice(prompts, size)):
        yield first, part
        first += len(part)


def answer(
    model: Model, data: Data, lines: dict[str, Entry], budgets: Sequence[int], results: Results
) -> None:
    """Let everything select, and read what it has selected."""
    results.types += data.types
    results.add(UNPRUNED, data.tokens, PLAIN.name, data.unpruned)
    for keep in budgets:
        for name, entry in lines.items():
            kept = entry.choose(model, data, keep)
            for reading in entry.readings:
                results.add(name, keep, reading.name, model.right(data, kept, reading))


def table(
    results: Results, name: str, keep: int, total: int, lines: dict[str, Entry]
) -> list[dict[str, Any]]:
    """Print the lines of one budget and return their figures."""
    print(f"  {keep} of {total} tokens; read plainly, with proportional attention", flush=True)
    found: list[dict[str, Any]] = []
    best: dict[tuple[str, str], str] = {}
    for method, entry in lines.items():
        shares: list[str] = []
        compared: list[str] = []
        for reading in (one.name for one in entry.readings):
            right = results.of(method, keep, reading)
            row = figures(results, name, method, keep, total, reading, right)
            extra = "" if reading in (PLAIN.name, PROPORTIONAL.name) else f" {reading}"
            shares.append(f"{percent(right)}{extra}")
            if method in OURS and reading in (PLAIN.name, PROPORTIONAL.name):
                published = [other for other in OURS[method] if other in lines]
                other = max(
                    published, key=lambda one: float(results.of(one, keep, reading).float().mean())
                )
                best[method, reading] = other
                row["against"] = against(other, right, results.of(other, keep, reading))
                compared.append(f"      {reading}: {difference(row['against'])}")
            found.append(row)
        print("\n".join([f"  {method:56} " + "  ".join(shares), *compared]), flush=True)
    for reading in (PLAIN.name, PROPORTIONAL.name):
        print(f"    by type, {reading}")
        whole = results.of(UNPRUNED, total, PLAIN.name)
        print(f"      {UNPRUNED:28} {by_type(results, whole)}")
        for method in (best["information", reading], *OURS, "flexselect", "oracle"):
            if method in lines:
                right = results.of(method, keep, reading)
                print(f"      {method:28} {by_type(results, right)}", flush=True)
    return found


def by_type(results: Results, right: Tensor) -> str:
    """Write the share of right answers of each type."""
    found = results.by_type(right)
    return "  ".join(f"{type_} {100 * sum(own) / len(own):.1f}" for type_, own in found.items())


def percent(right: Tensor) -> str:
    """Write a share of right answers with its interval."""
    share = accuracy_of(right.tolist())
    if share is None:
        return "-"
    return f"{100 * share.share:5.1f} [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def against(method: str, own: Tensor, other: Tensor) -> dict[str, Any]:
    """Return the paired difference of two methods as data."""
    gained, lost = int((own & ~other).sum()), int((other & ~own).sum())
    low, high = difference_interval(gained, lost, len(own))
    return {
        "method": method,
        "gained": gained,
        "lost": lost,
        "difference": (gained - lost) / len(own),
        "low": low,
        "high": high,
        "p": mcnemar_p(gained, lost),
    }


def difference(found: dict[str, Any]) -> str:
    """Write a paired difference with its interval and p."""
    p = "p < 0.001" if found["p"] < 0.001 else f"p {found['p']:.3f}"
    return f"{interval(found)} {p} to {found['method']}"


def interval(found: dict[str, Any]) -> str:
    """Write a paired difference with its interval."""
    change, low, high = (100 * found[key] for key in ("difference", "low", "high"))
    return f"{change:+.1f} [{low:+.1f}, {high:+.1f}]"


def figures(
    results: Results, name: str, method: str, keep: int, total: int, reading: str, right: Tensor
) -> dict[str, Any]:
    """Return one line as data."""
    share = accuracy_of(right.tolist())
    return {
        "set": name,
        "method": method,
        "keep": keep,
        "tokens": total,
        "reading": reading,
        "right": int(right.sum()),
        "questions": len(right),
        "low": share.low if share else None,
        "high": share.high if share else None,
        "types": {
            type_: {"right": sum(own), "questions": len(own)}
            for type_, own in results.by_type(right).items()
        },
    }


# --- Markdown -----------------------------------------------------------------------------------


def print_markdown(about: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print the figures of one model: a summary, then all there is of each set."""
    print(f"{about}\n")
    print_summary(rows)
    print_counts([row for row in rows if "against" in row])
    print_means(rows)
    for name in dict.fromkeys(row["set"] for row in rows):
        own = [row for row in rows if row["set"] == name]
        (whole,) = [row for row in own if row["method"] == UNPRUNED]
        for reading in dict.fromkeys(row["reading"] for row in own):
            read = [row for row in own if row["reading"] == reading and row is not whole]
            print(
                f"`{name}`, {whole['questions']:,} questions, read {reading}; unpruned "
                f"{cell(whole)}:\n"
            )
            print_table(read)
        for keep in dict.fromkeys(row["keep"] for row in own if row is not whole):
            print_types(whole, [row for row in own if row["keep"] == keep and row is not whole])


def print_summary(rows: Sequence[dict[str, Any]]) -> None:
    """Print our methods by sets and budgets, with the difference to the best published one."""
    compared = [row for row in rows if "against" in row]
    budgets_of = {
        row["set"]: tuple(
            dict.fromkeys(one["keep"] for one in compared if one["set"] == row["set"])
        )
        for row in compared
    }
    for budgets in dict.fromkeys(budgets_of.values()):
        print_row("set", "method", "read", "all", *(str(keep) for keep in budgets))
        print_row("---", "---", "---", *("---:" for _ in range(len(budgets) + 1)))
        lines: dict[tuple[str, str, str], list[str]] = {}
        for row in compared:
            if budgets_of[row["set"]] == budgets:
                name, found = row["against"]["method"], interval(row["against"])
                text = f"{100 * row['right'] / row['questions']:.1f} ({found} to {name})"
                lines.setdefault((row["set"], row["method"], row["reading"]), []).append(text)
        for (name, method, reading), cells in sorted(lines.items(), key=lambda one: one[0][1]):
            (whole,) = (row for row in rows if row["set"] == name and row["method"] == UNPRUNED)
            unpruned = f"{100 * whole['right'] / whole['questions']:.1f}"
            print_row(name, label(method), reading, unpruned, *cells)
        print()


def print_counts(rows: Sequence[dict[str, Any]]) -> None:
    """Print in how many cells ours differ from the best published method, by their intervals."""
    print_row("method", "read", "sets x budgets", "ahead", "no difference", "behind")
    print_row("---", "---", *["---:"] * 4)
    for method, reading in dict.fromkeys((row["method"], row["reading"]) for row in rows):
        own = [
            row["against"] for row in rows if (row["method"], row["reading"]) == (method, reading)
        ]
        ahead, behind = sum(one["low"] > 0 for one in own), sum(one["high"] < 0 for one in own)
        counts = (len(own), ahead, len(own) - ahead - behind, behind)
        print_row(label(method), reading, *map(str, counts))
    print()


def print_means(rows: Sequence[dict[str, Any]]) -> None:
    """Print the mean over sets of the share of right answers in %."""
    shares: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in rows:
        if row["method"] not in (UNPRUNED, "oracle"):
            own = shares.setdefault((row["reading"], row["method"]), {})
            own.setdefault(row["keep"], []).append(100 * row["right"] / row["questions"])
    budgets = list(dict.fromkeys(keep for own in shares.values() for keep in own))
    print_row("mean over sets", "read", *(str(keep) for keep in budgets))
    print_row("---", "---", *["---:"] * len(budgets))
    for (reading, method), own in sorted(shares.items(), key=lambda one: one[0][0]):
        means = (f"{sum(own[keep]) / len(own[keep]):.1f}" for keep in budgets)
        print_row(label(method), reading, *means)
    print()


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print methods by budgets, and the differences of ours."""
    budgets = list(dict.fromkeys(row["keep"] for row in rows))
    by_key = {(row["method"], row["keep"]): row for row in rows}
    print_row("method", *(f"{keep} of {rows[0]['tokens']:,}" for keep in budgets))
    print_row("---", *("---:" for _ in budgets))
    for method in dict.fromkeys(row["method"] for row in rows):
        print_row(label(method), *(cell(by_key[method, keep]) for keep in budgets))
    compared = [
        f"- {label(row['method'])}, {row['keep']} tokens: {difference(row['against'])}"
        for row in rows
        if "against" in row
    ]
    print("\n".join(["", *compared, *[""] * bool(compared)]))


def print_types(whole: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Print methods and readings by types of question."""
    types = list(whole["types"])
    best = {
        row["reading"]: row["against"]["method"]
        for row in rows
        if row["method"] == "information" and "against" in row
    }
    print_row(f"{rows[0]['keep']} of {whole['tokens']:,}", "read", *types)
    print_row("---", "---", *("---:" for _ in types))
    for row in (whole, *rows):
        shown = (UNPRUNED, best.get(row["reading"]), *OURS, "flexselect", "oracle")
        if row["method"] in shown and row["reading"] in (PLAIN.name, PROPORTIONAL.name):
            counts = [row["types"][type_] for type_ in types]
            shares = [f"{100 * one['right'] / one['questions']:.1f}" for one in counts]
            print_row(label(row["method"]), row["reading"], *shares)
    print()


def print_row(*cells: str) -> None:
    """Print a line of a table."""
    inner = "|".join(cells) if set("".join(cells)) <= set("-:") else " | ".join(cells)
    print(f"|{inner}|" if inner.startswith("-") else f"| {inner} |")


def label(method: str) -> str:
    """Write a method's name; ours are code."""
    return f"`{method}`" if method in OURS else method


def cell(row: dict[str, Any]) -> str:
    """Write a share of right answers with its interval."""
    share = 100 * row["right"] / row["questions"]
    return f"{share:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


if __name__ == "__main__":
    main()
