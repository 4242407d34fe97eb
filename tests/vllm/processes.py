"""Processes that have vLLM imported when they start, so that tests' engines start in seconds.

An engine of vLLM starts a process for itself, one for each worker, and one to look at the model's
class; each imports torch, vLLM and transformers anew. Here they are forked from a server that has
imported all that and done nothing else. So are servers of tests that look at what they answer;
those of tests that look at the server are started as a user does.
"""

from __future__ import annotations

import gc
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, TypeVar

import cloudpickle
import pytest

T = TypeVar("T")

SERVER: Any = forkserver._forkserver  # of this process
IMPORTED = [
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.entrypoints.cli.main",
    "vllm.entrypoints.openai.api_server",
    "tokenprune_vllm.models",
    "tests.vllm.checkpoints",
    "tests.vllm.four_bits",
    "tests.vllm.recording",
    "tests.vllm.frozen",  # the last
]


class Process(ForkServerProcess):
    """A process with the environment and the output of the one that starts it, not of the server.

    Those that it starts itself come from the same server. By itself it would start one of its own,
    which imports everything anew.
    """

    def start(self) -> None:
        self._environment = dict(os.environ)
        SERVER.ensure_running()
        self._address = SERVER._forkserver_address
        self._printed = _printed
        super().start()

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self._environment)
        tempfile.tempdir = None  # anew, by this environment
        if self._printed is not None:
            _print_to(self._printed)
        # When an engine ends vLLM undoes what `tests.vllm.frozen` did, and collects twice.
        setattr(gc, "unfreeze", lambda: None)  # noqa: B010  # not assignable for mypy
        SERVER._forkserver_address = self._address
        SERVER.ensure_running = lambda: None
        with forked_processes():
            super().run()


class Context(ForkServerContext):
    """What vLLM makes processes, locks and queues with."""

    Process = Process


_printed: Path | None = None
"""The file to which this process prints, where it is not what the first one printed to."""

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


class Forked:
    """A command, ``python -m MODULE ...``, in a forked process: what is used of `subprocess.Popen`.

    Where it puts another command of Python in its place (`os.execv`), that one is run in the same
    process.

    Parameters
    ----------
    command
        From Python on.
    log
        The file to whose end it and its processes print.
    environment
        Variables beside this process's.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        SERVER.ensure_running()  # with an environment that outlives this process
        self._process = PROCESSES.Process(target=_serve, args=(command, log))
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Return its exit status, or None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        """Wait until it ends and return its exit status."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout)
        return self._process.exitcode


def _serve(command: Sequence[str], log: Path) -> None:
    os.setsid()
    _print_to(log)
    os.execv = _run_module  # type: ignore[assignment]
    _run_module(command[0], command)


def _run_module(_python: str, command: Sequence[str]) -> None:
    _, option, module, *words = command
    assert option == "-m"
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__")


def _print_to(file: Path) -> None:
    """Let this process and those that it starts print to the end of a file."""
    global _printed
    _printed = file
    with file.open("a") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)


def _main(words: Sequence[str], printed: str) -> int:
    from tokenprune.cli import main

    _print_to(Path(printed))
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
