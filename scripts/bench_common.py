"""What the benchmarks share: names of machine and releases, times of runs in turn, and tables."""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from rich.table import Table

# As the engine `hf` and `tokenprune advise` take times, so that figures mean the same.
from tokenprune_eval.shared.machine import processor as processor
from tokenprune_eval.shared.timing import CPU as CPU
from tokenprune_eval.shared.timing import seconds as seconds
from tokenprune_eval.shared.timing import wait as wait

# Machine ---------------------------------------------------------------------------------------


def device_name(device: torch.device) -> str:
    """Name what a device computes on: a GPU, or the processor."""
    return processor() if device.type == "cpu" else torch.cuda.get_device_name(device)


def releases() -> dict[str, str]:
    """Return the releases of what every time depends on."""
    return {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def releases_line() -> str:
    """Return the releases in one line."""
    return ", ".join(f"{name} {release}" for name, release in releases().items())


def quiet() -> None:
    """Keep transformers' remarks out of the tables."""
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]


# Times -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """One of several things that are run in turn.

    Attributes
    ----------
    run
        What is timed.
    around
        What is entered before the clock starts and left after it stops.
    """

    run: Callable[[], Any]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass
class Measured:
    """What was measured of one variant.

    Attributes
    ----------
    seconds
        One number for each turn.
    peak
        The most bytes that were allocated on the GPU above what was there before; None elsewhere.
    """

    seconds: list[float] = field(default_factory=list)
    peak: int | None = None

    @property
    def median(self) -> float:
        """The median of the turns; NaN without any."""
        return statistics.median(self.seconds) if self.seconds else math.nan


def in_turn(
    variants: Mapping[str, Variant],
    turns: int,
    device: torch.device = CPU,
    until: float = math.inf,
    warm_up: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Measured]:
    """Run variants in turn, so that whatever slows the machine down meets all of them.

    Parameters
    ----------
    variants
        By name.
    turns
        Timed turns.
    device
        Waited for before and after each run.
    until
        A time of `time.perf_counter`. No turn begins that would end after it, judged by the one
        before; the first timed turn always runs.
    warm_up
        Whether a turn that is not timed comes first.
    clock
        What the runs are timed with.
    """
    measured = {name: Measured() for name in variants}
    for turn in range(turns + warm_up):
        started = time.perf_counter()
        for name, variant in variants.items():
            with variant.around():
                before = _forget_peak(device)
                took = seconds(variant.run, device, clock)
                if turn or not warm_up:
                    measured[name].seconds.append(took)
                    measured[name].peak = _peak_above(before, device, measured[name].peak)
        ended = time.perf_counter()
        if turn >= warm_up and ended + (ended - started) > until:
            break
    return measured


def _forget_peak(device: torch.device) -> int:
    """Start the peak of allocated memory anew and return what is allocated now."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak_above(before: int, device: torch.device, earlier: int | None) -> int | None:
    """Return the higher one of this run's peak and of earlier runs'."""
    if device.type != "cuda":
        return None
    return max(torch.cuda.max_memory_allocated(device) - before, earlier or 0)


# Tables ----------------------------------------------------------------------------------------


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the median, and lowest and highest in brackets."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def table_of(title: str, *headings: str, words: Iterable[str] = ()) -> Table:
    """Return a table whose columns are numbers, but for those named in `words`."""
    words = set(words)
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in words else "right")
    return table
