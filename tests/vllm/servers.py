"""Real servers in processes of their own, and requests to them over HTTP."""

from __future__ import annotations

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

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
    """A running server.

    Attributes
    ----------
    url
        ``http://127.0.0.1:PORT``.
    log
        The file with everything it prints.
    """

    url: str
    log: Path

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
def serve(command: Sequence[str], folder: Path, **environment: str) -> Iterator[Server]:
    """Start a server and stop it, with all its processes, after the block.

    Parameters
    ----------
    command
        Without a port.
    folder
        For its log.
    **environment
        Variables beside this process's.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--host=127.0.0.1", f"--port={port}"],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "VLLM_LOGGING_LEVEL": "INFO", **environment},
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", log)
    try:
        _wait(server, process)
        yield server
    finally:
        for how in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, how)
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)


def _wait(server: Server, process: subprocess.Popen[bytes]) -> None:
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
