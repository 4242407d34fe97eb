"""What one question costs: encoding, selecting, the language model's prefill, and memory."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import tokenprune_hf
from tokenprune.budget import Keep, keeps_all
from tokenprune.registry import build
from tokenprune.selectors.base import Selector
from tokenprune_eval.evaluation.engines.peak_memory import peak_bytes
from tokenprune_eval.shared.asking import selected, without_pixels
from tokenprune_eval.shared.timing import moment
from tokenprune_hf.vision import vision_model

MEBIBYTE = 2**20


@dataclass(frozen=True)
class Cost:
    """What one question costs.

    Attributes
    ----------
    encode_ms
        Milliseconds in the vision encoder and the projector; median, the same for every condition.
    selection_ms
        Milliseconds that scoring and picking take, the language model's layers included that a
        method reads the question with; median.
    prefill_ms
        Milliseconds in the language model until the first answer token can be chosen; median, the
        same for every method that keeps as many tokens.
    peak_memory_mib
        MiB (2**20 bytes) that torch holds at most during that call, selection included, beyond
        the weights and the encoded image.
    """

    encode_ms: float
    selection_ms: float
    prefill_ms: float
    peak_memory_mib: float


def measure(
    model: Any,
    inputs: Mapping[str, Any],
    needs: Sequence[str],
    conditions: Sequence[tuple[str | Selector, Keep]],
    rounds: int,
) -> list[Cost]:
    """Measure several conditions on one question, turn by turn, so that noise hits all alike.

    torch's number of threads is the caller's to set.

    Parameters
    ----------
    model
        The model, not pruned.
    inputs
        One question about one image, as the processor lays it out.
    needs
        What the methods look at.
    conditions
        Method and budget of each condition; ``keep=1.0`` selects nothing.
    rounds
        How often each is measured, after one round to warm up.

    Returns
    -------
    list of Cost
        In the order of `conditions`.
    """
    text = without_pixels(inputs)
    vision = vision_model(model)
    encode: list[float] = []
    # One token and all of them, 1 and 1.0, are one key of a dict.
    prefill: dict[tuple[bool, Keep], list[float]] = {_budget(keep): [] for _, keep in conditions}
    selection: list[list[float]] = [[] for _ in conditions]
    peaks = []

    def call() -> None:
        model(**text, encoded=encoded, logits_to_keep=1)

    with torch.inference_mode():
        for _ in range(rounds + 1):
            start = moment(model.device)
            encoded = tokenprune_hf.encode(model, needs=needs, **inputs)
            encode.append(moment(model.device) - start)
            for (_, keep), spent in prefill.items():
                with (
                    # Which tokens they are makes no difference to the language model's time.
                    tokenprune_hf.prune(model, "uniform", keep),
                    _stopwatch(model.model.language_model, model.device) as seconds,
                ):
                    call()
                spent.append(seconds[-1])
            for (method, keep), spent in zip(conditions, selection, strict=True):
                if not keeps_all(keep):
                    selector = build(method, {}) if isinstance(method, str) else method
                    start = moment(model.device)
                    selected(vision, text, encoded, selector, keep)
                    spent.append(moment(model.device) - start)
        for method, keep in conditions:
            with tokenprune_hf.prune(model, method, keep):
                peaks.append(peak_bytes(call) / MEBIBYTE)
    return [
        Cost(
            encode_ms=_typical_ms(encode),
            selection_ms=_typical_ms(spent),
            prefill_ms=_typical_ms(prefill[_budget(keep)]),
            peak_memory_mib=peak,
        )
        for (_, keep), spent, peak in zip(conditions, selection, peaks, strict=True)
    ]


def _budget(keep: Keep) -> tuple[bool, Keep]:
    return keeps_all(keep), keep


def _typical_ms(seconds: Sequence[float]) -> float:
    """Return the median in milliseconds, without the first, which warmed up; 0 of nothing."""
    return 1000 * statistics.median(seconds[1:] or [0.0])


@contextmanager
def _stopwatch(module: Any, device: torch.device) -> Iterator[list[float]]:
    """Time every call of a module while the block runs; the list gets seconds."""
    seconds: list[float] = []
    started = 0.0

    def before(*_: Any) -> None:
        nonlocal started
        started = moment(device)

    def after(*_: Any) -> None:
        seconds.append(moment(device) - started)

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()
