"""Differentiable ranks, and the losses by which one ranking learns to be like another.

The sum over all pairs is computed in blocks of rows, forward and backward, so that the ranks of a
video's 13,440 tokens never need a matrix of 180 million numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_PAIRS_AT_ONCE = 2**23  # float32 numbers that exist at one time (32 MiB)


def soft_rank(values: Tensor, temperature: float) -> Tensor:
    """Return how many of the other values each value exceeds, softly.

    ``soft_rank(x)_i = sum_j sigmoid((x_i - x_j) / temperature) - 0.5``; for a temperature towards 0
    these are the ranks from 0. Source: FlexSelect (arXiv 2506.00993), the released trainers.

    Parameters
    ----------
    values
        Floating point [n].
    temperature
        Above 0, in the unit of `values`; the paper's is 1e-4.

    Returns
    -------
    Tensor
        float32 [n], differentiable.

    Raises
    ------
    ValueError
        If `values` has not one dimension, or `temperature` is not above 0.
    """
    if values.ndim != 1 or not temperature > 0:
        raise ValueError(
            f"soft_rank takes values [n] and a temperature above 0, not {list(values.shape)} and "
            f"{temperature}."
        )
    ranks: Tensor = _SoftRank.apply(values.float(), float(temperature))
    return ranks


class _SoftRank(torch.autograd.Function):
    """The sum over pairs, block by block; nothing of a block is kept for the way back."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(values)
        ctx.temperature = temperature
        return (
            torch.cat(
                [
                    torch.sigmoid((rows[:, None] - values) / temperature).sum(dim=1)
                    for rows in values.split(_rows_at_once(values))
                ]
            )
            - 0.5
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # s_ij, the slope of the pair (i, j), is symmetric: x_i moves rank i up by s_ij, and rank j
        # down by as much.
        (values,) = ctx.saved_tensors
        (gradient,) = gradients
        parts = []
        size = _rows_at_once(values)
        for rows, own in zip(values.split(size), gradient.split(size), strict=True):
            step = torch.sigmoid((rows[:, None] - values) / ctx.temperature)
            slope = step * (1 - step) / ctx.temperature
            parts.append(own * slope.sum(dim=1) - slope @ gradient)
        return torch.cat(parts), None


def _rows_at_once(values: Tensor) -> int:
    return max(1, _PAIRS_AT_ONCE // len(values))


def hard_rank(values: Tensor) -> Tensor:
    """Return the ranks from 0; of equal values the first has the lower rank.

    Parameters
    ----------
    values
        [n].

    Returns
    -------
    Tensor
        float32 [n].
    """
    order = torch.sort(values, stable=True).indices
    return torch.empty(len(values), device=values.device).scatter_(
        0, order, torch.arange(len(values), device=values.device, dtype=torch.float32)
    )


def spearman_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return 1 - Spearman's rank correlation, of soft ranks with hard ones.

    Source: FlexSelect (arXiv 2506.00993), the released trainers for InternVL and Qwen.

    Parameters
    ----------
    student
        Scores [n] that learn.
    teacher
        Scores [n] that are learnt from.
    temperature
        See `soft_rank`.

    Returns
    -------
    Tensor
        float32 scalar between 0 and 2.
    """
    ranks, target = soft_rank(student, temperature), hard_rank(teacher)
    ranks, target = ranks - ranks.mean(), target - target.mean()
    return 1 - torch.nn.functional.cosine_similarity(ranks, target, dim=0)


def l1_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the sum of absolute differences of the scores.

    Source: FlexSelect (arXiv 2506.00993), the released trainer for LLaVA-Video-7B.

    Parameters
    ----------
    student, teacher
        Scores [n].
    """
    return (student.float() - teacher.float()).abs().sum()
