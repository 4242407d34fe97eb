#!/usr/bin/env python
"""Draw where `information` loses: what it kept beside what a published method kept.

    scripts/draw_failures.py --out docs/selectors_failures.png

Takes the first questions of a set that the model answers right from all tokens and from those of
the published method, and wrong from `information`'s. Dimmed tokens were dropped.
"""

from __future__ import annotations

import argparse
import textwrap
from itertools import islice
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from compare_methods import method
from compare_reading import Model
from compare_sets import STYLED, prompts_of
from torch import Tensor

from tokenprune.budget import tokens_kept
from tokenprune_eval.bundled.model import WEIGHTS, bundled_model_path

SCENES = 100


def main() -> None:
    """Select, read, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--work", type=Path, help="where the model is put together")
    parser.add_argument("--sets", nargs="+", choices=STYLED, default=["own", "digit-rows"])
    parser.add_argument("--keep", type=float, default=0.125)
    parser.add_argument("--against", default="divprune", help="a published method")
    parser.add_argument("--pictures", type=int, default=4, help="of each set")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    model = Model(bundled_model_path(options.work, weights=options.weights))
    keep = tokens_kept(options.keep, model.tokens)
    names = ("information", options.against)
    figure, axes = plt.subplots(
        2 * len(options.sets),
        options.pictures,
        figsize=(2.1 * options.pictures, 4.9 * len(options.sets)),
        squeeze=False,
        layout="constrained",
    )
    for place, name in enumerate(options.sets):
        prompts = list(islice(prompts_of(name, model.style, "test", SCENES, None), SCENES))
        data = model.read(prompts, 0, False)
        kept = [method(one)(model, data, keep) for one in names]
        ours, theirs = (model.right(data, one) for one in kept)
        lost = (data.unpruned & theirs & ~ours).nonzero()[:, 0]
        won = (data.unpruned & ours & ~theirs).nonzero()[:, 0]
        print(f"{name}: {len(lost)} lost to {options.against}, {len(won)} won, of {len(ours)}")
        questions = [one for prompt in prompts for one in prompt.asked]
        for column, number in enumerate(lost[: options.pictures].tolist()):
            asked = questions[number]
            for row, (own, selected) in enumerate(zip(names, kept, strict=True)):
                axis = axes[2 * place + row, column]
                pixels = prompts[int(data.prompt[number])].media[0]
                axis.imshow(dimmed(pixels, selected[number, 0], model.tokens))
                axis.set_title(own, fontsize=8)
                axis.set_axis_off()
            words = "\n".join(textwrap.wrap(f"{asked.question} ({asked.answer})", 30))
            axes[2 * place, column].set_title(f"{words}\n{names[0]}: wrong", fontsize=8)
            axes[2 * place + 1, column].set_title(f"{names[1]}: right", fontsize=8)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=110)


def dimmed(pixels: np.ndarray, kept: Tensor, tokens: int) -> np.ndarray:
    """Return an image uint8 [H, W, 3] in which the tokens that were dropped are nearly white."""
    side = round(tokens**0.5)
    mask = torch.zeros(tokens, dtype=torch.bool)
    mask[kept] = True
    cells = np.repeat(mask.view(side, side).numpy(), -(-len(pixels) // side), 0)
    cells = np.repeat(cells, -(-len(pixels) // side), 1)[: len(pixels), : len(pixels)]
    faint = 255 - (255 - pixels.astype(np.float32)) * 0.25
    return np.where(cells[..., None], pixels, faint).astype(np.uint8)


if __name__ == "__main__":
    main()
