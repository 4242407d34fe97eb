#!/usr/bin/env python
"""Draw where `information` loses: what it kept beside what a published method kept.

    scripts/draw_failures.py --out docs/selectors_failures.png

Takes the first questions of a set that the model answers right from all tokens and from those of
the published method, and wrong from `information`'s. Dimmed tokens were dropped.
"""

from __future__ import annotations

import argparse
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from compare_selectors import run
from compare_sets import STYLED

from tokenprune.media.images import load_image
from tokenprune_eval.bundled.model import WEIGHTS
from tokenprune_eval.results.files import read_run
from tokenprune_eval.results.records import UNPRUNED

SCENES = 100


def main() -> None:
    """Run the evaluation, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--work", type=Path, help="where model and data are put; default: cache")
    parser.add_argument("--sets", nargs="+", choices=STYLED, default=["own", "digit-rows"])
    parser.add_argument("--keep", type=float, default=0.125)
    parser.add_argument("--against", default="divprune", help="a published method")
    parser.add_argument("--pictures", type=int, default=4, help="of each set")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    names = ("information", options.against)
    figure, axes = plt.subplots(
        2 * len(options.sets),
        options.pictures,
        figsize=(2.1 * options.pictures, 4.9 * len(options.sets)),
        squeeze=False,
        layout="constrained",
    )
    with tempfile.TemporaryDirectory() as runs:
        asked = argparse.Namespace(
            weights=options.weights,
            work=options.work,
            split="test",
            scenes=SCENES,
            keep=[options.keep],
            variants=False,
            out=Path(runs),
        )
        for place, name in enumerate(options.sets):
            folder = run(
                name, asked, method=list(names), proportional_attention=False, note_kept=True
            )
            if folder is not None:
                draw(name, folder, names, axes[2 * place : 2 * place + 2])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=110)


def draw(name: str, folder: Path, names: tuple[str, str], axes: np.ndarray) -> None:
    """Draw the first losses of a run on two rows of axes, and say how many there are."""
    known = read_run(folder)
    method_of = {one.key: one.method for one in known.conditions}
    said = {(method_of[one.condition], one.item): one for one in known.records}

    def right(method: str, item: str) -> bool:
        return said[method, item].correct is True

    ours, theirs = names
    able = [one for one in known.questions if right(UNPRUNED, one.id)]
    lost = [one for one in able if right(theirs, one.id) and not right(ours, one.id)]
    won = [one for one in able if right(ours, one.id) and not right(theirs, one.id)]
    print(f"{name}: {len(lost)} lost to {theirs}, {len(won)} won, of {len(known.questions)}")
    for question, column in zip(lost, axes.T, strict=False):
        pixels = np.asarray(load_image(question.path))
        words = "\n".join(textwrap.wrap(f"{question.question} ({question.answer})", 30))
        titles = (f"{words}\n{ours}: wrong", f"{theirs}: right")
        for axis, title, method in zip(column, titles, names, strict=True):
            record = said[method, question.id]
            axis.imshow(dimmed(pixels, record.kept or (), record.of_visual_tokens or 0))
            axis.set_title(title, fontsize=8)
            axis.set_axis_off()


def dimmed(pixels: np.ndarray, kept: Sequence[int], tokens: int) -> np.ndarray:
    """Return an image uint8 [H, W, 3] in which the tokens that were dropped are nearly white."""
    side = round(tokens**0.5)
    mask = np.zeros(tokens, dtype=bool)
    mask[list(kept)] = True
    cells = np.repeat(mask.reshape(side, side), -(-len(pixels) // side), 0)
    cells = np.repeat(cells, -(-len(pixels) // side), 1)[: len(pixels), : len(pixels)]
    faint = 255 - (255 - pixels.astype(np.float32)) * 0.25
    return np.where(cells[..., None], pixels, faint).astype(np.uint8)


if __name__ == "__main__":
    main()
