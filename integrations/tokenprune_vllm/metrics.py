"""Counters at ``/metrics``: visual tokens seen and kept, and the time spent choosing.

Tokens are counted where prompts are made, in the process that serves ``/metrics``. The time is
spent in a worker, another process: it writes into a small file that prometheus_client's own
reader for several processes adds to the page.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from typing import Any

DIRECTORY = "TOKENPRUNE_METRICS_DIR"
_OF_PROMETHEUS = "PROMETHEUS_MULTIPROC_DIR"
_counters: dict[str, Any] = {}
_times: Any = None
_seconds: dict[tuple[str, str], float] = {}


def prepare() -> None:
    """Choose where workers write, before any is started; processes started later inherit it."""
    if _OF_PROMETHEUS not in os.environ and DIRECTORY not in os.environ:
        folder = os.environ[DIRECTORY] = tempfile.mkdtemp(prefix="tokenprune-metrics-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


def count_tokens(modality: str, method: str, seen: int, kept: int) -> None:
    """Add one image or video of a request."""
    for name, value in (("seen", seen), ("kept", kept)):
        _counter(name).labels(modality=modality, method=method).inc(value)


def _counter(name: str) -> Any:
    if not _counters:
        from prometheus_client import REGISTRY, Counter
        from prometheus_client.multiprocess import MultiProcessCollector

        for kind, what in (("seen", "before pruning"), ("kept", "after pruning")):
            _counters[kind] = Counter(
                f"tokenprune_visual_tokens_{kind}",
                f"Visual tokens of requests, {what}.",
                ["modality", "method"],
            )
        if _OF_PROMETHEUS not in os.environ:
            collector: Any = MultiProcessCollector
            collector(REGISTRY, path=os.environ[DIRECTORY])
    return _counters[name]


def count_time(modality: str, method: str, seconds: float) -> None:
    """Add time that a worker spent choosing tokens."""
    global _times
    from prometheus_client.mmap_dict import MmapedDict, mmap_key

    if _times is None:
        folder = os.environ.get(_OF_PROMETHEUS) or os.environ[DIRECTORY]
        # One file for each process; prometheus_client adds them up by their names.
        file_of_numbers: Any = MmapedDict
        _times = file_of_numbers(os.path.join(folder, f"counter_tokenprune-{os.getpid()}.db"))
    total = _seconds[modality, method] = _seconds.get((modality, method), 0.0) + seconds
    name = "tokenprune_selecting_seconds"
    labels = {"modality": modality, "method": method}
    key = mmap_key(name, f"{name}_total", list(labels), list(labels.values()), _HELP)
    _times.write_value(key, total, 0.0)


_HELP = "Time spent choosing which visual tokens stay."
