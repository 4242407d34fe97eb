"""Processes that have vLLM imported when they start, so that tests' engines start in seconds.

An engine of vLLM starts a process for itself, one for each worker, and one to look at the model's
class; each imports torch, vLLM and transformers anew. Here they are forked from a server that has
imported all that and done nothing else. What a user starts and leaves running, `tokenprune serve`
and the examples, is left alone: those tests have processes as vLLM makes them.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any, TypeVar

import cloudpickle
import pytest

T = TypeVar("T")

SERVER: Any = forkserver._forkserver  # of this process
IMPORTED = [
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "tokenprune_vllm.models",
    "tests.vllm.checkpoints",
    "tests.vllm.four_bits",
    "tests.vllm.recording",
    "tests.vllm.frozen",  # the last
]


class Process(ForkServerProcess):
    """A process with the environment of the one that starts it, not of the server.

    Those that it starts itself come from the same server. By itself it would start one of its own,
    which imports everything anew.
    """

    def start(self) -> None:
        self._environment = dict(os.environ)
        SERVER.ensure_running()
        self._address = SERVER._forkserver_address
        super().start()

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self._environment)
        SERVER._forkserver_address = self._address
        SERVER.ensure_running = lambda: None
        with forked_processes():
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


def run_command(*words: str) -> tuple[int, str]:
    """Run the command `tokenprune` in a process of its own.

    Returns
    -------
    status
        Its exit status.
    printed
        What it and its processes wrote, errors too.
    """
    with tempfile.NamedTemporaryFile("r") as printed:
        return in_a_process(_main, words, printed.name), printed.read()


def _main(words: Sequence[str], printed: str) -> int:
    from tokenprune.cli import main

    with open(printed, "w") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
        try:
            return main(words)
        except SystemExit as ended:
            return int(ended.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()


def _run_in_subprocess(function: Callable[[], Any]) -> Any:
    """Do as vLLM's function of that name."""
    return in_a_process(_call, cloudpickle.dumps(function))


def _call(pickled: bytes) -> Any:
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    return cloudpickle.loads(pickled)()
