#!/usr/bin/env python
"""Python against the selectors: a method on tokens of your own, and a method of your own.

    examples/own_selector.py

The first part needs torch and numpy alone. The second runs the bundled model in transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import tokenprune
import tokenprune_hf
from tokenprune import Selector, TokenBatch
from tokenprune.numerics import folded_sum
from tokenprune_eval.bundled.scenes import load_scenes

SCENES = load_scenes()  # questions about pictures, with their answers
PATCH = 14


def encode(image: Image.Image) -> tuple[Tensor, tuple[int, int, int]]:
    """Stand for an encoder: one token a patch, which is its pixels; and the grid they lie in."""
    pixels = torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255)
    rows, columns = pixels.shape[0] // PATCH, pixels.shape[1] // PATCH
    patches = pixels.unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH)
    return patches.reshape(rows * columns, -1), (1, rows, columns)


def select_from_own_tokens() -> None:
    """Let a method choose among the tokens of any encoder, and drop the others."""
    embeddings, grid = encode(Image.open(SCENES[0].image))
    tokens = tokenprune.VisualTokens(grid=grid, embeddings=embeddings)
    selection = tokenprune.select(tokens, method="divprune", keep=40)
    kept = embeddings[selection.kept]  # what the language model would read
    print(f"divprune keeps {len(kept)} of {selection.total} patches:")
    for row in selection.grid_mask[0].tolist():
        print(" ", "".join("#" if is_kept else "." for is_kept in row))


@dataclass(frozen=True)
class Contrast(Selector):
    """Keep the tokens that differ most from their picture's mean token."""

    name: ClassVar[str] = "contrast"
    summary: ClassVar[str] = "distance from the mean of the projected tokens"
    needs: ClassVar[tuple[str, ...]] = ("embeddings",)

    def score(self, tokens: TokenBatch) -> Tensor:
        """Return float32 [B, N]: the squared distance of each token from the mean."""
        embeddings = tokens.require("embeddings").float()
        mean = folded_sum(embeddings, dim=1) / embeddings.shape[1]
        # folded_sum adds in an order that does not depend on the batch, as `sum` may.
        return folded_sum((embeddings - mean[:, None]).square(), dim=-1)


def answer_with_own_method(questions: int = 40, keep: int = 12) -> None:
    """Ask the bundled model with few tokens, chosen by `Contrast` and by chance."""
    model, processor = tokenprune_hf.load("bundled")
    for method in (Contrast(), "random"):
        right = 0
        with tokenprune_hf.prune(model, method, keep) as pruning:
            for scene in SCENES[:questions]:
                image = Image.open(scene.image)
                inputs = tokenprune_hf.ask(processor, scene.question, image=image).to(model.device)
                output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
                new = output[0, inputs["input_ids"].shape[1] :]
                right += processor.decode(new, skip_special_tokens=True) == scene.answer
        (selection,) = pruning.selections  # of the last question
        name = method if isinstance(method, str) else method.name
        print(f"{name}: {right} of {questions} right with {len(selection)} of {selection.total}")


if __name__ == "__main__":
    select_from_own_tokens()
    answer_with_own_method()
