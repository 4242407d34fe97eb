"""Processes that have vLLM imported when they start, so that tests' engines start in seconds.

An engine of vLLM starts a process for itself, one for each worker, and one to look at the model's
class; each imports torch, vLLM and transformers anew. Here they are forked from a server that has
imported all that and done nothing else. What a user starts, `tokenprune serve` and the examples,
is left alone: those tests have processes as vLLM makes them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any, TypeVar

import cloudpickle
import pytest

T = TypeVar("T")

IMPORTED = [
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "tokenprune_vllm.models",
    "tests.vllm.checkpoints",
    "tests.vllm.four_bits",
    "tests.vllm.recording",
]


class Process(ForkServerProcess):
    """A process with the environment of the one that starts it, not of the server."""

    def start(self) -> None:
        self._environment = dict(os.environ)
        super().start()

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self._environment)
        with forked_processes():  # also those that it starts itself
            super().run()


class Context(ForkServerContext):
    """What vLLM makes processes, locks and queues with."""

    Process = Process


PROCESSES = Context()
PROCESSES.set_forkserver_preload(IMPORTED)


@contextmanager
def forked_processes() -> Iterator[None]:
    """Let vLLM fork its processes from the server in the block."""
    from vllm.model_executor.models import registry
    from vllm.v1.engine import coordinator, utils
    from vllm.v1.executor import multiproc_executor

    with pytest.MonkeyPatch.context() as patch:
        for module in (coordinator, utils, multiproc_executor):
            patch.setattr(module, "get_mp_context", lambda: PROCESSES)
        patch.setattr(registry, "_run_in_subprocess", _run_in_subprocess)
        yield


def in_a_process(function: Callable[..., T], *arguments: Any) -> T:
    """Run a function in a process of its own and return what it returns."""
    with ProcessPoolExecutor(1, mp_context=PROCESSES) as executor:
        return executor.submit(function, *arguments).result()


def _run_in_subprocess(function: Callable[[], Any]) -> Any:
    """Do as vLLM's function of that name."""
    return in_a_process(_call, cloudpickle.dumps(function))


def _call(pickled: bytes) -> Any:
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    return cloudpickle.loads(pickled)()
