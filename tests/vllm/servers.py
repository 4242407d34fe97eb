"""Real servers in processes of their own, and requests to them over HTTP."""

from __future__ import annotations

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from PIL import Image

from tests.vllm.processes import Forked

COMMON = (
    "--dtype=float32",
    "--enforce-eager",
    "--max-model-len=512",
    "--max-num-seqs=16",
    "--served-model-name=tiny",
)
TOKENPRUNE = (sys.executable, "-m", "tokenprune.cli")
PLAIN = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
_PATIENCE = 600.0  # a start takes half a minute, and many times that beside other work


@dataclass
class Server:
    """A server in a process group of its own.

    Attributes
    ----------
    command
        What starts it, host and port included.
    url
        ``http://127.0.0.1:PORT``.
    log
        The file with everything that it printed since its last start.
    environment
        Variables beside this process's.
    temporary
        Its folder for temporary files.
    forked
        Whether its processes are forked from one that has imported everything (`Forked`). They are
        no children of the one that serves, which ends them when it ends.
    process
        The one that serves HTTP.
    """

    command: Sequence[str]
    url: str
    log: Path
    environment: dict[str, str]
    temporary: Path
    forked: bool = False
    process: subprocess.Popen[bytes] | Forked | None = None

    def start(self) -> None:
        """Start it, also again, and wait until it answers."""
        more = {
            "VLLM_LOGGING_LEVEL": "INFO",
            "TMPDIR": str(self.temporary),
            **self.environment,
        }
        self.log.unlink(missing_ok=True)
        if self.forked:
            self.process = Forked(self.command, self.log, more)
        else:
            with self.log.open("w") as output:
                self.process = subprocess.Popen(
                    self.command,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **more},
                    start_new_session=True,
                )
        _wait(self, self.process)

    def stop(self) -> None:
        """Stop it, with all its processes."""
        if self.process is None:
            return
        for how in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, how)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(30)

    def processes(self) -> dict[str, psutil.Process]:
        """Return its processes but the one that serves, by the titles that vLLM gives them."""
        assert self.process is not None
        assert not self.forked
        children = psutil.Process(self.process.pid).children(recursive=True)
        return {child.cmdline()[0]: child for child in children if child.cmdline()}

    def ask(self, image: Image.Image | None, text: str, **body: Any) -> httpx.Response:
        """Ask for a greedy chat completion of 4 tokens."""
        return httpx.post(
            f"{self.url}/v1/chat/completions", json=chat(image, text, **body), timeout=120
        )

    def metrics(self) -> dict[str, float]:
        """Return the counters at /metrics, by name and labels as they are printed."""
        page = httpx.get(f"{self.url}/metrics", timeout=30).text
        lines = [line.rpartition(" ") for line in page.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}


def chat(image: Image.Image | None, text: str, **body: Any) -> dict[str, Any]:
    """Return the body of a chat completion request."""
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if image is not None:
        content.insert(0, {"type": "image_url", "image_url": {"url": data_url(image)}})
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 4,
        "temperature": 0,
        "ignore_eos": True,
        **body,
    }


def data_url(image: Image.Image) -> str:
    """Return an image as a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@contextmanager
def serve(
    command: Sequence[str], folder: Path, *, forked: bool = False, **environment: str
) -> Iterator[Server]:
    """Start a server and stop it, with all its processes, after the block.

    Parameters
    ----------
    command
        Without a port.
    folder
        For its log.
    forked
        Whether its processes are forked from one that has imported everything.
    **environment
        Variables beside this process's.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # vLLM puts sockets among its temporary files, whose paths may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="server-") as temporary:
        server = Server(
            [*command, "--host=127.0.0.1", f"--port={port}"],
            f"http://127.0.0.1:{port}",
            folder / "server.log",
            environment,
            Path(temporary),
            forked,
        )
        try:
            server.start()
            yield server
        finally:
            server.stop()


def _wait(server: Server, process: subprocess.Popen[bytes] | Forked) -> None:
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            if httpx.get(f"{server.url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise RuntimeError(f"the server did not start:\n{server.log.read_text()[-4000:]}")
