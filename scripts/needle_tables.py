#!/usr/bin/env python
"""Needles in long videos: what each method answers with few tokens, on the bundled model.

    python scripts/needle_tables.py --work WORK

Two sets of H.264 files of the test split are rendered in WORK (once) and read with `read_video`:
files of 128 frames, of which 32 are sampled, and files of 512 frames in which each card is shown
for 8, of which 16, 64 and 256 are sampled. Videos are encoded once for all methods and questions;
every question is a prompt of its own, answered through transformers' `generate`.

The model was trained on videos of this kind and is no public model. Intervals are 95 % Wilson
intervals over questions; questions about one video are taken to be independent.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table

import tokenprune_hf
from tokenprune import Selector
from tokenprune.budget import tokens_kept
from tokenprune.media.video import Video, read_video
from tokenprune.registry import build
from tokenprune_eval.bundled.model import bundled_model_path
from tokenprune_eval.bundled.needles import VideoQuestion, needle_set
from tokenprune_eval.results.statistics import wilson
from tokenprune_hf.loading import ask, load

METHODS = ("flexselect", "flexselect-lite", "cls-attention", "uniform", "random")
FRACTIONS = (1 / 16, 1 / 32)


@dataclass
class Cell:
    """The answers of one method under one budget.

    Attributes
    ----------
    right
        Whether each answer was right.
    on_card
        Share of the kept tokens that lie in frames which show the card asked about, where one
        card is.
    seconds
        For each question.
    """

    right: list[bool] = field(default_factory=list)
    on_card: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        low, high = wilson(sum(self.right), len(self.right))
        return f"{sum(self.right) / len(self.right):.3f} ({low:.3f} to {high:.3f})"

    @property
    def share(self) -> str:
        """The mean of `on_card`."""
        return f"{sum(self.on_card) / len(self.on_card):.2f}" if self.on_card else "-"


class Answerer:
    """The model, and how each method is asked."""

    def __init__(self, model: Any, processor: Any, options: argparse.Namespace) -> None:
        self.model = model
        self.processor = processor
        self.options = options
        self.cells: dict[tuple[Any, ...], Cell] = {}

    def selector(self, method: str, video: int) -> Selector:
        """Return a method; `random` draws anew for each video."""
        own: dict[str, Any] = {}
        if method == "flexselect" and self.options.layer is not None:
            own["layer"] = self.options.layer
        if method == "flexselect-lite":
            own["path"] = self.options.lite
        if method == "random":
            own["seed"] = video
        return build(method, own)

    def answer(self, inputs: Any, **more: Any) -> str:
        """Return what the model says."""
        output = self.model.generate(**inputs, **more, max_new_tokens=3, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]
        text: str = self.processor.batch_decode(new, skip_special_tokens=True)[0]
        return text.strip()

    def run(
        self,
        number: int,
        video: Video,
        questions: Sequence[VideoQuestion],
        asked: Sequence[tuple[str, Any, str]],
        unpruned: bool,
    ) -> None:
        """Put every question about one video to every (method, keep, positions)."""
        encoded = None
        frames = len(video.frames)
        for question in questions:
            inputs = ask(self.processor, question.question, video=video)
            if encoded is None:
                needs = ("features", "cls_attention")
                encoded = tokenprune_hf.encode(self.model, needs=needs, **inputs)
            text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            if unpruned:
                started = time.perf_counter()
                with tokenprune_hf.prune(self.model, "uniform", 1.0):
                    said = self.answer(text, encoded=encoded)
                self.note((frames, "unpruned", 1.0, "original"), question, said, started)
            for method, keep, positions in asked:
                selector = self.selector(method, number)
                started = time.perf_counter()
                with tokenprune_hf.prune(self.model, selector, keep, positions) as pruning:
                    said = self.answer(text, encoded=encoded)
                cell = self.note((frames, method, keep, positions), question, said, started)
                (selection,) = pruning.selections
                per_frame = selection.grid[1] * selection.grid[2]
                if len(question.cards) == 1:
                    card = question.cards[0]
                    indices = torch.from_numpy(video.indices)[selection.kept // per_frame]
                    inside = (indices >= card.first) & (indices <= card.last)
                    cell.on_card.append(float(inside.float().mean()))

    def note(
        self, key: tuple[Any, ...], question: VideoQuestion, said: str, started: float
    ) -> Cell:
        """Keep one answer."""
        cell = self.cells.setdefault(key, Cell())
        cell.right.append(said == question.answer)
        cell.seconds.append(time.perf_counter() - started)
        return cell


def by_video(questions: Sequence[VideoQuestion]) -> Iterator[tuple[Path, list[VideoQuestion]]]:
    """Yield each video with its questions."""
    found: dict[Path, list[VideoQuestion]] = {}
    for question in questions:
        found.setdefault(question.video, []).append(question)
    yield from found.items()


def followed(questions: Sequence[VideoQuestion]) -> Iterator[tuple[Path, list[VideoQuestion]]]:
    """Yield each video with its questions, and show how far it is where someone looks on."""
    videos = list(by_video(questions))
    yield from track(videos, "videos", console=Console(stderr=True))


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
    model, processor = load(str(options.model or bundled_model_path()))
    console = Console(width=110)
    console.print(
        f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}, transformers "
        f"{transformers.__version__}; the bundled model, float32, reference layer "
        f"{options.layer if options.layer is not None else 'by default'}; no public model"
    )

    if options.videos:
        sampled_videos(Answerer(model, processor, options), console)
    if options.long_videos:
        long_videos(Answerer(model, processor, options), console)


def sampled_videos(answerer: Answerer, console: Console) -> None:
    """Print what 1/16 and 1/32 of the tokens of 32 frames answer."""
    options = answerer.options
    asked = [
        (method, fraction, positions)
        for method in METHODS
        for fraction in FRACTIONS
        for positions in ("original", "compact")
    ]
    questions = needle_set(options.work, videos=options.videos)
    for number, (file, own) in enumerate(followed(questions)):
        answerer.run(number, read_video(file, 32), own, asked, unpruned=True)
    total = 32 * 64
    counts = [tokens_kept(fraction, total) for fraction in FRACTIONS]
    plain = answerer.cells[32, "unpruned", 1.0, "original"]
    table = Table(
        "method",
        "positions",
        *(f"{count} tokens (1/{total // count})" for count in counts),
        "on the card",
        title=f"{len(plain.right)} questions about {options.videos} videos, 32 of 128 frames, "
        f"{total:,} visual tokens; unpruned {plain}",
        title_justify="left",
    )
    for method in METHODS:
        for positions in ("original", "compact"):
            cells = [answerer.cells[32, method, fraction, positions] for fraction in FRACTIONS]
            table.add_row(method, positions, *map(str, cells), " / ".join(c.share for c in cells))
    console.print(table)
    table = Table("question", "unpruned", *METHODS, title=f"by type, {counts[0]} tokens, original")
    types = [question.type for question in questions]
    for kind in dict.fromkeys(types):
        rows = [plain, *(answerer.cells[32, one, FRACTIONS[0], "original"] for one in METHODS)]
        shares = []
        for cell in rows:
            hits = [hit for hit, own in zip(cell.right, types, strict=True) if own == kind]
            shares.append(f"{sum(hits) / len(hits):.3f}")
        table.add_row(kind, *shares)
    console.print(table)


def long_videos(answerer: Answerer, console: Console) -> None:
    """Print what one budget answers of 16, 64 and 256 frames."""
    options = answerer.options
    asked = [(method, options.budget, "original") for method in METHODS]
    questions = needle_set(options.work, videos=options.long_videos, frames=512)
    for number, (file, own) in enumerate(followed(questions)):
        for frames in options.frames:
            answerer.run(number, read_video(file, frames), own, asked, unpruned=frames <= 64)
    table = Table(
        "method",
        *(f"{frames} frames" for frames in options.frames),
        title=f"{len(questions)} questions about {options.long_videos} videos of 512 frames, "
        f"{options.budget} tokens kept whatever the frames, original positions",
        title_justify="left",
    )
    for method in ("unpruned", *METHODS):
        keep = 1.0 if method == "unpruned" else options.budget
        found = [answerer.cells.get((n, method, keep, "original")) for n in options.frames]
        table.add_row(method, *(str(cell or "-") for cell in found))
    console.print(table)


if __name__ == "__main__":
    main()
