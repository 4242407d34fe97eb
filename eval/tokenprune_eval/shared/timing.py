"""Times of what a device computes: for the engine `hf`, the demo, `advise` and scripts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")

Clock = Callable[[], float]
"""Returns seconds from some moment on, as `time.perf_counter` does."""


def wait(device: torch.device) -> None:
    """Let a device finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def moment(device: torch.device, clock: Clock = time.perf_counter) -> float:
    """Return the time at which a device has finished what it was given."""
    wait(device)
    return clock()


def seconds(
    run: Callable[[], Any], device: torch.device = CPU, clock: Clock = time.perf_counter
) -> float:
    """Return how long one run takes, until its device has finished."""
    start = moment(device, clock)
    run()
    return moment(device, clock) - start


class StepTimes:
    """A logits processor that changes nothing: it notes when the logits of each token came.

    Attributes
    ----------
    at
        These moments, in order.
    """

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self._clock = clock
        self.at: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Note the moment, and return the scores [B, vocabulary] as they are."""
        self.at.append(moment(scores.device, self._clock))
        return scores
