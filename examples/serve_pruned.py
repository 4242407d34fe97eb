#!/usr/bin/env python
"""Serve a pruned vision-language model through vLLM, and ask it as any OpenAI client would.

    examples/serve_pruned.py

Starts `tokenprune serve` on the bundled model, waits until it answers, asks one question with the
server's budget and one with a budget of its own, and stops it. Whatever `tokenprune serve` does
not know goes to `vllm serve`; on a GPU leave out the lines that say CPU.
"""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from openai import OpenAI

from tokenprune_eval.bundled.scenes import load_scenes

PORT = int(os.environ.get("PORT", "8000"))
SERVER = [
    *(sys.executable, "-m", "tokenprune.cli", "serve", "bundled"),
    *("--method", "information", "--keep", "16", "--allow-request-keep"),
    *("--served-model-name", "bundled", "--port", str(PORT), "--max-model-len", "512"),
    *("--dtype", "float32", "--enforce-eager"),  # CPU
]
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # CPU: GiB for the cache


def wait_for(server: subprocess.Popen[bytes], seconds: float = 600.0) -> None:
    """Return as soon as the server answers."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5).close()
            return
        except OSError:  # nobody listens yet
            time.sleep(1)
    raise SystemExit("the server did not start; its messages are above")


def data_url(image: Path) -> str:
    """Return a picture as OpenAI's protocol takes it."""
    data = base64.b64encode(image.read_bytes()).decode("ascii")
    return f"data:image/{image.suffix.removeprefix('.')};base64,{data}"


def ask(client: OpenAI, image: Path, question: str, **pruning: Any) -> None:
    """Ask about a picture, and print the answer and how long the prompt was."""
    picture = {"type": "image_url", "image_url": {"url": data_url(image)}}
    messages: Any = [{"role": "user", "content": [picture, {"type": "text", "text": question}]}]
    reply = client.chat.completions.create(
        model="bundled",
        messages=messages,
        max_tokens=6,
        temperature=0,
        # No part of OpenAI's protocol: the budget of this request alone.
        extra_body={"mm_processor_kwargs": {"tokenprune": pruning}} if pruning else None,
    )
    length = reply.usage.prompt_tokens if reply.usage else "unknown"
    answer = (reply.choices[0].message.content or "").strip()
    print(f"{question} {answer} (tokens of the prompt: {length})", flush=True)


def main() -> None:
    """Start the server, ask, and stop it."""
    server = subprocess.Popen(SERVER)
    try:
        wait_for(server)
        client = OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none")
        scene = load_scenes()[0]
        ask(client, scene.image, scene.question)
        ask(client, scene.image, scene.question, keep=4)
    finally:
        server.terminate()
        try:
            server.wait(timeout=60)
        except subprocess.TimeoutExpired:  # it was stopped while it started
            server.kill()


if __name__ == "__main__":
    main()
