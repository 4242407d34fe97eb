"""What one question costs: time of the language model's prefill, time of selecting, memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import tokenprune_hf
from tokenprune.budget import Keep
from tokenprune.registry import build
from tokenprune.selectors.base import Selector
from tokenprune_eval.evaluation.engines.peak_memory import peak_bytes
from tokenprune_eval.shared.asking import selected
from tokenprune_hf.vision import vision_model

ROUNDS = 9
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Cost:
    """What one question costs.

    Attributes
    ----------
    prefill_ms
        Milliseconds in the language model until the first answer token can be chosen; median.
    selection_ms
        Milliseconds that scoring and picking take; median. The vision encoder is not in it.
    peak_memory_mib
        MiB (2**20 bytes) that torch holds at most during that call, selection included, beyond
        the weights and the encoded image.
    """

    prefill_ms: float
    selection_ms: float
    peak_memory_mib: float


def measure(
    model: Any,
    inputs: dict[str, Any],
    encoded: tokenprune_hf.Encoded,
    conditions: Sequence[tuple[str | Selector, Keep]],
    rounds: int = ROUNDS,
) -> list[Cost]:
    """Measure several conditions on one question, turn by turn, so that noise hits all alike.

    torch's number of threads is the caller's to set.

    Parameters
    ----------
    model
        The model, not pruned.
    inputs
        input_ids and attention_mask [1, L].
    encoded
        The question's image.
    conditions
        Method and budget of each condition; ``keep=1.0`` selects nothing.
    rounds
        How often each is measured, after one round to warm up.

    Returns
    -------
    list of Cost
        In the order of `conditions`.
    """
    prefill: list[list[float]] = [[] for _ in conditions]
    selection: list[list[float]] = [[] for _ in conditions]
    peaks = [0.0 for _ in conditions]
    vision = vision_model(model)

    def call() -> None:
        model(**inputs, encoded=encoded, logits_to_keep=1)

    with torch.inference_mode():
        for turn in range(-1, rounds):
            for place, (method, keep) in enumerate(conditions):
                with (
                    tokenprune_hf.prune(model, method, keep),
                    _stopwatch(model.model.language_model) as seconds,
                ):
                    if turn == rounds - 1:
                        peaks[place] = peak_bytes(call) / MEBIBYTE
                    call()
                if turn < 0:
                    continue
                prefill[place].append(seconds[-1])
                if keep != 1.0:
                    selector = build(method, {}) if isinstance(method, str) else method
                    start = time.perf_counter()
                    selected(vision, inputs, encoded, selector, keep)
                    selection[place].append(time.perf_counter() - start)
    return [
        Cost(
            prefill_ms=1000 * statistics.median(prefill[place]),
            selection_ms=1000 * statistics.median(selection[place] or [0.0]),
            peak_memory_mib=peaks[place],
        )
        for place in range(len(conditions))
    ]


@contextmanager
def _stopwatch(module: Any) -> Iterator[list[float]]:
    """Time every call of a module while the block runs; the list gets seconds."""
    seconds: list[float] = []
    started = 0.0

    def before(*_: Any) -> None:
        nonlocal started
        started = time.perf_counter()

    def after(*_: Any) -> None:
        seconds.append(time.perf_counter() - started)

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()
