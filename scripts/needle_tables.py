#!/usr/bin/env python
"""Needles in long videos: what each method answers with few tokens, on the bundled model.

    python scripts/needle_tables.py --work WORK

Two sets of H.264 files of the test split are rendered in WORK (once): files of 128 frames, of which
32 are sampled, and files of 512 frames in which each card is shown for 8, of which 16, 64 and 256
are sampled. `tokenprune_eval.evaluation` asks the questions; its folders in WORK/runs have every
answer, and the same command continues what was interrupted.

The model was trained on videos of this kind and is no public model. Intervals are 95 % Wilson
intervals over questions; questions about one video are taken to be independent.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from tokenprune.budget import tokens_kept
from tokenprune.media.video import read_video
from tokenprune_eval.bundled.needles import VideoQuestion, needle_set
from tokenprune_eval.data.bundled import about_video
from tokenprune_eval.data.question import DataSet
from tokenprune_eval.evaluation.choosing import random_draws
from tokenprune_eval.evaluation.engines.transformers import TransformersEngine
from tokenprune_eval.evaluation.runner import Planned, answer_all
from tokenprune_eval.evaluation.settings import Settings
from tokenprune_eval.evaluation.store import Store
from tokenprune_eval.results.files import read_run
from tokenprune_eval.results.records import UNPRUNED, Condition, Record
from tokenprune_eval.results.statistics import accuracy_of
from tokenprune_eval.shared.progress import RunProgress

METHODS = ("flexselect", "flexselect-lite", "cls-attention", "uniform", "random")
FRACTIONS = (1 / 16, 1 / 32)
ALL_TOKENS = Condition(method=UNPRUNED, keep=1.0)

Answers = dict[str, list[Record]]
"""Key of a condition -> a record for each question."""


def answers(
    options: argparse.Namespace,
    questions: Sequence[VideoQuestion],
    frames: int,
    conditions: Sequence[Condition],
) -> Answers:
    """Put the questions to the model under each condition, sampling `frames` of each video."""
    own: dict[str, dict[str, Any]] = {"flexselect-lite": {"path": options.lite}}
    if options.layer is not None:
        own["flexselect"] = {"layer": options.layer}
    data = DataSet("needles", [about_video(one) for one in questions])
    settings = Settings(
        model=str(options.model or "bundled"),
        data=[data.name],
        method=list(METHODS),
        options=own,
        frames=frames,
        max_new_tokens=3,
        memory=0,
        note_kept=True,
        out=options.work / "runs" / f"{len(questions)}x{questions[0].frames}-{frames}",
    )
    plan = [Planned(data, conditions)]
    with RunProgress(Console(stderr=True)) as progress, Store(settings.out) as store:
        engine = partial(TransformersEngine, settings, conditions, random_draws(plan))
        answer_all(store, settings, plan, progress, engine)
    found = {(one.condition, one.item): one for one in read_run(settings.out).records}
    return {
        condition.key: [found[condition.key, f"{data.name}/{one.id}"] for one in questions]
        for condition in conditions
    }


def share(records: Sequence[Record]) -> str:
    """Write the share of right answers with its interval; an answer that was cut is not right."""
    found = accuracy_of([bool(record.correct) for record in records])
    return "-" if found is None else f"{found.share:.3f} ({found.low:.3f} to {found.high:.3f})"


def on_card(questions: Sequence[VideoQuestion], records: Sequence[Record], frames: int) -> str:
    """Write which share of the kept tokens lies in frames of the card asked about, if it is one."""
    # All files have as many frames, at one rate.
    sampled = read_video(questions[0].video, frames).indices
    shares = []
    for question, record in zip(questions, records, strict=True):
        if len(question.cards) == 1 and record.kept and record.grid:
            (card,) = question.cards
            _, rows, columns = record.grid
            shown = [sampled[token // (rows * columns)] for token in record.kept]
            shares.append(sum(card.first <= index <= card.last for index in shown) / len(shown))
    return f"{sum(shares) / len(shares):.2f}" if shares else "-"


def main() -> None:
    """Render, answer, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of rendered videos")
    parser.add_argument(
        "--lite", default="bundled", help="a selector's folder (default: the bundled one)"
    )
    parser.add_argument("--model", type=Path, help="a checkpoint (default: the bundled model)")
    parser.add_argument("--layer", type=int, help="flexselect's reference layer")
    parser.add_argument("--videos", type=int, default=100, help="of 128 frames")
    parser.add_argument("--long-videos", type=int, default=50, help="of 512 frames")
    parser.add_argument("--frames", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--budget", type=int, default=64, help="tokens of a long video")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=110)
    console.print(
        f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}, transformers "
        f"{transformers.__version__}; the bundled model, float32, reference layer "
        f"{options.layer if options.layer is not None else 'by default'}; no public model"
    )

    if options.videos:
        sampled_videos(options, console)
    if options.long_videos:
        long_videos(options, console)


def sampled_videos(options: argparse.Namespace, console: Console) -> None:
    """Print what 1/16 and 1/32 of the tokens of 32 frames answer."""
    questions = needle_set(options.work, videos=options.videos)
    conditions = {
        (method, positions): [
            Condition(method=method, keep=keep, positions=positions) for keep in FRACTIONS
        ]
        for method in METHODS
        for positions in ("original", "compact")
    }
    asked = [ALL_TOKENS, *(each for of in conditions.values() for each in of)]
    found = answers(options, questions, 32, asked)
    total = 32 * 64
    counts = [tokens_kept(fraction, total) for fraction in FRACTIONS]
    table = Table(
        "method",
        "positions",
        *(f"{count} tokens (1/{total // count})" for count in counts),
        "on the card",
        title=f"{len(questions)} questions about {options.videos} videos, 32 of 128 frames, "
        f"{total:,} visual tokens; unpruned {share(found[UNPRUNED])}",
        title_justify="left",
    )
    for (method, positions), of in conditions.items():
        cards = " / ".join(on_card(questions, found[each.key], 32) for each in of)
        table.add_row(method, positions, *(share(found[each.key]) for each in of), cards)
    console.print(table)
    table = Table("question", "unpruned", *METHODS, title=f"by type, {counts[0]} tokens, original")
    keys = [UNPRUNED, *(conditions[method, "original"][0].key for method in METHODS)]
    types = [question.type for question in questions]
    for kind in dict.fromkeys(types):
        shares = []
        for key in keys:
            of_kind = zip(found[key], types, strict=True)
            right = [bool(record.correct) for record, own in of_kind if own == kind]
            shares.append(f"{sum(right) / len(right):.3f}")
        table.add_row(kind, *shares)
    console.print(table)


def long_videos(options: argparse.Namespace, console: Console) -> None:
    """Print what one budget answers of 16, 64 and 256 frames."""
    questions = needle_set(options.work, videos=options.long_videos, frames=512)
    pruned = [Condition(method=method, keep=options.budget) for method in METHODS]
    found = {
        # All tokens of more frames take too long.
        frames: answers(options, questions, frames, [ALL_TOKENS] * (frames <= 64) + pruned)
        for frames in options.frames
    }
    table = Table(
        "method",
        *(f"{frames} frames" for frames in options.frames),
        title=f"{len(questions)} questions about {options.long_videos} videos of 512 frames, "
        f"{options.budget} tokens kept whatever the frames, original positions",
        title_justify="left",
    )
    for condition in (ALL_TOKENS, *pruned):
        cells = [share(of.get(condition.key, [])) for of in found.values()]
        table.add_row(condition.method, *cells)
    console.print(table)


if __name__ == "__main__":
    main()
