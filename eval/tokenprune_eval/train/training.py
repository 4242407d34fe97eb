"""Training a `LiteModel` on the teacher's rankings, and measuring it on files it never saw."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tokenprune.budget import tokens_kept
from tokenprune.errors import ConfigError
from tokenprune_eval.train.data import Example
from tokenprune_eval.train.ranking import l1_loss, spearman_loss
from tokenprune_hf.lite.model import LiteModel

Loss = Literal["spearman", "l1"]

KEEPS = (1 / 16, 1 / 32)
"""Fractions at which the overlap with the teacher's best tokens is reported."""


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes
    ----------
    loss
        ``"spearman"`` (1 - Spearman on soft ranks) or ``"l1"``.
    temperature
        Of the soft ranks.
    epochs
        Passes over the examples.
    batch
        Examples a step.
    learning_rate, warmup, weight_decay
        Peak of a cosine schedule, the share of steps that leads up to it, and AdamW's decay.
    seed
        Of the order of examples.
    """

    loss: Loss = "spearman"
    temperature: float = 1e-4
    epochs: int = 1
    batch: int = 1
    learning_rate: float = 1e-5
    warmup: float = 0.03
    weight_decay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("temperature", "epochs", "batch", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0.")

    def steps(self, examples: int) -> int:
        """Return how many steps so many examples make."""
        return self.epochs * -(-examples // self.batch)


@dataclass(frozen=True)
class Agreement:
    """How a selector's ranking agrees with the teacher's, means over examples.

    Attributes
    ----------
    correlation
        Spearman's rank correlation over all tokens.
    overlap
        Fraction kept -> share of the teacher's best tokens that the selector keeps.
    examples
        How many examples.
    """

    correlation: float
    overlap: dict[float, float]
    examples: int

    def __str__(self) -> str:
        shares = ", ".join(f"top 1/{1 / keep:.0f} {self.overlap[keep]:.3f}" for keep in KEEPS)
        return f"rank correlation {self.correlation:.3f}, overlap {shares} ({self.examples})"


def split(files: Sequence[Sequence[Example]], share: float, seed: int) -> tuple[list[Example], ...]:
    """Return examples to learn from and examples held out; no file is in both.

    Parameters
    ----------
    files
        Examples by file.
    share
        Of the files, how many to hold out: at least one.
    seed
        Of the draw.

    Raises
    ------
    ConfigError
        If there are fewer than two files.
    """
    if len(files) < 2 or not 0 < share < 1:
        raise ConfigError(
            f"a share of {share} of {len(files)} files cannot be held out. Give a share between 0 "
            "and 1, and data about at least two files: what a selector has learnt shows on files "
            "it never saw."
        )
    order = list(range(len(files)))
    random.Random(seed).shuffle(order)
    held = set(order[: min(max(1, round(share * len(files))), len(files) - 1)])
    return (
        [one for index, own in enumerate(files) if index not in held for one in own],
        [one for index, own in enumerate(files) if index in held for one in own],
    )


@torch.no_grad()
def agreement(model: LiteModel, examples: Sequence[Example]) -> Agreement:
    """Return how a selector's ranking agrees with the teacher's on some examples."""
    from scipy.stats import spearmanr

    device = next(model.parameters()).device
    model.eval()
    correlations = []
    overlaps: dict[float, list[float]] = {keep: [] for keep in KEEPS}
    for example in examples:
        features, question, teacher = example.tensors()
        own = model(features[None].to(device), question)[0].cpu()
        if len(own) > 1:
            correlations.append(float(spearmanr(own.numpy(), teacher.numpy()).statistic))
        for keep in KEEPS:
            count = tokens_kept(keep, len(own))
            best, wanted = own.topk(count).indices, teacher.topk(count).indices
            overlaps[keep].append(float(torch.isin(best, wanted).float().mean()))
    known = [value for value in correlations if not math.isnan(value)]
    return Agreement(
        sum(known) / max(1, len(known)),
        {keep: sum(values) / max(1, len(values)) for keep, values in overlaps.items()},
        len(examples),
    )


def train(
    model: LiteModel,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    recipe: Recipe,
    out: Path,
    say: Callable[[dict[str, Any]], None],
) -> Agreement:
    """Train a selector; the folder always holds the epoch that ranks held-out files best.

    Parameters
    ----------
    model
        What learns.
    examples, held_out
        See `split`.
    recipe
        How.
    out
        Where the selector is saved.
    say
        Called after each step with ``{"step", "steps", "loss", "learning_rate"}``, and after each
        epoch with ``{"epoch", "agreement"}``.

    Returns
    -------
    Agreement
        Of the saved selector, on the held-out examples.
    """
    device = next(model.parameters()).device
    torch.manual_seed(recipe.seed)
    steps = recipe.steps(len(examples))
    optimizer = torch.optim.AdamW(
        model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    warm = max(1, round(recipe.warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / warm)
            * 0.5
            * (1 + math.cos(math.pi * max(0, step - warm) / max(1, steps - warm)))
        ),
    )
    order = list(examples)
    shuffle = random.Random(recipe.seed)
    best: Agreement | None = None
    step = 0
    for epoch in range(recipe.epochs):
        shuffle.shuffle(order)
        model.train()
        for start in range(0, len(order), recipe.batch):
            part = order[start : start + recipe.batch]
            total = 0.0
            for example in part:
                features, question, teacher = example.tensors()
                own = model(features[None].to(device), question)[0]
                loss = _loss(recipe, own, teacher.to(device)) / len(part)
                loss.backward()
                total += float(loss.detach())
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            rate = optimizer.param_groups[0]["lr"]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            say({"step": step, "steps": steps, "loss": total, "learning_rate": rate})
        found = agreement(model, held_out)
        say({"epoch": epoch + 1, "agreement": found})
        if best is None or _rank_of(found) > _rank_of(best):
            best = found
            model.save(out)
    if best is None:  # a recipe has at least one epoch
        raise ConfigError("nothing was trained: there are no examples.")
    return best


def _rank_of(found: Agreement) -> tuple[float, float]:
    """Return what the best epoch is chosen by: what pruning needs first, then the whole ranking."""
    return found.overlap[KEEPS[0]], found.correlation


def _loss(recipe: Recipe, own: Tensor, teacher: Tensor) -> Tensor:
    if recipe.loss == "l1":
        return l1_loss(own, teacher)
    return spearman_loss(own, teacher, recipe.temperature)
