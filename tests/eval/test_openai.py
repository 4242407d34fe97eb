"""The engine `openai` against a small real HTTP server that can be told to fail."""

from __future__ import annotations

import base64
import io
import json
import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tokenprune.errors import ConfigError, TokenPruneError
from tokenprune.media.images import load_image
from tokenprune.media.video import Video
from tokenprune_eval.data.question import Question
from tokenprune_eval.evaluation.engines.base import EngineAnswer, MediaQuestions
from tokenprune_eval.evaluation.engines.openai import OpenAIEngine, ServerError, check_server
from tokenprune_eval.evaluation.runner import EvaluationError, run
from tokenprune_eval.evaluation.settings import Settings
from tokenprune_eval.results.files import read_run
from tokenprune_eval.results.records import UNPRUNED, Condition, Record

COLORS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "white": (255, 255, 255),
}
VISUAL = 64
"""Tokens that the server counts for a picture."""

NO_KWARGS = "Per-request mm_processor_kwargs are disabled by default. Start the server with"


@dataclass
class Faulty:
    """A server: what it is, how it fails, and what it was sent.

    `plan` gives for a text of a question what goes wrong, request by request; then all is well.
    With the question that has `dies_at` in it the server becomes `dead`: it answers nothing more.
    """

    methods: tuple[str, ...] = ("cls-attention", "uniform")
    open: bool = True  # takes mm_processor_kwargs
    prunes: bool = True
    models: tuple[str, ...] = ("tiny", "other")
    key: str | None = None
    metrics: str | None = None
    max_logprobs: int = 20
    images: bool = True
    seconds: float = 0.0
    top: dict[str, float] = field(default_factory=dict)
    plan: dict[str, list[str]] = field(default_factory=dict)
    dies_at: str = ""
    dead: bool = False
    bodies: list[dict[str, Any]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def questions(self) -> list[dict[str, Any]]:
        """Return the bodies of requests, without those that try the server."""
        return [body for body in self.bodies if body.get("stream")]

    def asked(self, text: str) -> int:
        """Return how many requests asked this."""
        return sum(text in text_of(body) for body in self.questions())


def text_of(body: dict[str, Any]) -> str:
    (message,) = body["messages"]
    return str(message["content"][1]["text"])


def pixels_of(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2], validate=True)))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faulty: Faulty

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        faulty = self.faulty
        if self.path == "/metrics" and faulty.metrics is not None:
            self._send(200, faulty.metrics.encode(), "text/plain")
        elif self.path == "/page/models":
            self._send(200, b"<html>welcome</html>", "text/html")
        elif self.path != "/v1/models":
            self._error(404, "Not Found")
        elif faulty.key and self.headers.get("Authorization") != f"Bearer {faulty.key}":
            self._error(401, "Incorrect API key provided.")
        else:
            models = [
                {"id": name, "object": "model", "max_model_len": 512} for name in faulty.models
            ]
            self._json(200, {"object": "list", "data": models})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        faulty = self.faulty
        with faulty.lock:
            faulty.bodies.append(body)
            faulty.at_once += 1
            faulty.most_at_once = max(faulty.most_at_once, faulty.at_once)
            waiting = next((p for text, p in faulty.plan.items() if text in text_of(body)), [])
            fault = waiting.pop(0) if waiting and body.get("stream") else ""
            faulty.dead |= bool(faulty.dies_at) and faulty.dies_at in text_of(body)
        try:
            with suppress(ConnectionError):  # clients that have given up
                self._chat(body, fault)
        finally:
            with faulty.lock:
                faulty.at_once -= 1

    def _chat(self, body: dict[str, Any], fault: str) -> None:
        faulty = self.faulty
        time.sleep(faulty.seconds)
        part = body["messages"][0]["content"][0]
        asked = body.get("mm_processor_kwargs", {}).get("tokenprune")
        if refusal := self._refusal(body, part, asked):
            self._error(400, refusal)
            return
        if faulty.dead:
            fault = "500"
        if fault in ("500", "503", "400"):
            self._error(int(fault), f"this is a planned {fault}.")
            return
        if fault == "hang":
            time.sleep(1.5)
        keeps = 1.0 if asked is None or asked.get("off") or not faulty.prunes else asked["keep"]
        kept = max(1, math.floor(keeps * VISUAL + 0.5)) if isinstance(keeps, float) else keeps
        tokens = len(text_of(body).split()) + kept
        usage = {"prompt_tokens": tokens, "completion_tokens": 2, "total_tokens": tokens + 2}
        if not body.get("stream"):
            message = {"role": "assistant", "content": "x"}
            choice = {"index": 0, "message": message, "finish_reason": "length"}
            self._json(200, {"id": "1", "choices": [choice], "usage": usage})
            return
        if part["type"] == "image_url":
            picture = pixels_of(part["image_url"]["url"])
        else:
            picture = pixels_of(",".join(part["video_url"]["url"].split(",")[:2]))
        pixel = picture.convert("RGB").getpixel((picture.width // 2, picture.height // 2))
        color = next(name for name, value in COLORS.items() if value == pixel)
        self._stream(body, color, usage, fault)

    def _refusal(
        self, body: dict[str, Any], part: dict[str, Any], asked: dict[str, Any] | None
    ) -> str | None:
        faulty = self.faulty
        if body.get("top_logprobs", 0) > faulty.max_logprobs:
            return "Requested sample logprobs of 20, which is greater than max allowed."
        if part["type"] == "image_url" and not faulty.images:
            return "At most 0 image(s) may be provided in one prompt."
        if (asked is not None or "media_io_kwargs" in body) and not faulty.open:
            return NO_KWARGS
        if (
            asked is not None
            and faulty.prunes
            and asked.get("method", "uniform") not in (faulty.methods)
        ):
            return f"tokenprune.method={asked['method']!r} is not loaded by this server."
        return None

    def _stream(self, body: dict[str, Any], color: str, usage: dict[str, int], fault: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._chunk({"role": "assistant", "content": ""})
        if fault == "silent":
            time.sleep(1.5)
        if fault == "trickle":
            for _ in range(10):
                time.sleep(0.25)
                self._chunk({"content": "x"})
        logprobs = None
        if body.get("logprobs"):
            top = [{"token": name, "logprob": value} for name, value in self.faulty.top.items()]
            logprobs = {"content": [{"token": color, "logprob": -0.1, "top_logprobs": top}]}
        self._chunk({"content": color[:2]}, logprobs=logprobs)
        if fault == "drop":
            self.close_connection = True
            return
        if fault == "garbage":
            self._event("{no JSON")
        if fault in ("error 500", "error 400"):
            code = int(fault.split()[1])
            self._event(json.dumps({"error": {"message": "planned.", "code": code}}))
        if fault not in ("unfinished", "abort"):
            self._chunk({"content": color[2:]})
            self._chunk({}, finish="length" if fault == "length" else "stop")
        elif fault == "abort":
            self._chunk({}, finish="abort")
        self._event(json.dumps({"id": "1", "choices": [], "usage": usage}))
        self._event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def _chunk(
        self,
        delta: dict[str, Any],
        finish: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> None:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
        self._event(json.dumps({"id": "1", "choices": [choice]}))

    def _event(self, data: str) -> None:
        line = f"data: {data}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
        self.wfile.flush()

    def _error(self, status: int, message: str) -> None:
        self._json(status, {"error": {"message": message, "type": "x", "code": status}})

    def _json(self, status: int, body: dict[str, Any]) -> None:
        self._send(status, json.dumps(body).encode(), "application/json")

    def _send(self, status: int, data: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        # Clients hang up when they have waited long enough.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def serving(faulty: Faulty) -> Iterator[Faulty]:
    handler = type("Handler", (_Handler,), {"faulty": faulty})
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    faulty.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield faulty
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Quiet:
    def plan(self, total: int, done: int) -> None:
        pass

    def at(self, text: str) -> None:
        pass

    def advance(self, answers: int) -> None:
        pass


def questions(folder: Path, count: int) -> Path:
    """Write as many questions about the colour of a picture, numbered ``#0 ``, ``#1 ``, …"""
    lines = []
    for number in range(count):
        name = list(COLORS)[number % len(COLORS)]
        image = Image.new("RGB", (32 + number, 32), COLORS[name])
        image.save(folder / f"{number}.{'webp' if number % 2 else 'png'}", lossless=True)
        lines.append(
            {
                "id": f"q{number}",
                "image": f"{number}.{'webp' if number % 2 else 'png'}",
                "question": f"#{number} what color?",
                "answer": name,
            }
        )
    file = folder / "colors.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def settings(url: str, folder: Path, data: Path | str = "x", **more: Any) -> Settings:
    values: dict[str, Any] = {
        "engine": "openai",
        "model": "tiny",
        "data": [str(data)],
        "out": folder / "out",
        "base_url": url,
        "keep": [0.25],
        "retries": 1,
        "timeout": 10.0,
        **more,
    }
    return Settings.model_validate(values)


def records_of(folder: Path) -> dict[tuple[str, str], Record]:
    records = read_run(folder / "out").records
    found = {(one.item.partition("/")[2], one.condition): one for one in records}
    assert len(found) == len(records)
    return found


def test_a_run_asks_side_by_side_and_goes_on_where_it_was(tmp_path: Path) -> None:
    file = questions(tmp_path, 9)
    short = tmp_path / "short" / "colors.jsonl"
    short.parent.mkdir()
    short.write_text("".join(file.read_text().splitlines(keepends=True)[:5]))
    with serving(Faulty(seconds=0.05)) as faulty:
        asking = settings(
            faulty.url, tmp_path, short, media=tmp_path, method=["cls-attention"], concurrency=3
        )
        run(asking, Quiet())
        assert len(faulty.questions()) == 10
        run(asking, Quiet())
        assert len(faulty.questions()) == 10, "nothing is asked twice"
        file.replace(short)
        more = asking.model_copy(update={"method": ["cls-attention", "uniform"]})
        results = run(more, Quiet())
    assert faulty.most_at_once == 3
    records = records_of(tmp_path)
    assert len(records) == 9 * 3
    for (item, condition), record in records.items():
        assert record.error is None
        assert (record.text, record.correct) == (list(COLORS)[int(item[1:]) % 4], True)
        assert record.prompt_tokens == 3 + (64 if condition == UNPRUNED else 16)
        assert record.answer_tokens == 2
        assert record.batch is None
        taken = record.seconds
        assert taken.first_token is not None
        assert taken.total is not None
        assert 0.05 <= taken.first_token <= taken.total < 5
    asked = Counter(
        (text_of(body).split()[0], json.dumps(body["mm_processor_kwargs"]["tokenprune"]))
        for body in faulty.questions()
    )
    ways = [
        {"off": True},
        {"method": "cls-attention", "keep": 0.25},
        {"method": "uniform", "keep": 0.25},
    ]
    assert asked == {(f"#{number}", json.dumps(way)): 1 for number in range(9) for way in ways}
    for body in faulty.questions():
        assert (body["temperature"], body["max_tokens"]) == (0, 16)
        assert "media_io_kwargs" not in body
    assert results.complete


FAULTS = {
    # What goes wrong, how often it is asked, and why there is no answer.
    "#0 ": (["500", "503"], 3, None),
    "#1 ": (["500"] * 9, 3, "HTTP 500: this is a planned 500. Tried 3 times."),
    "#2 ": (["400"], 1, "HTTP 400: this is a planned 400. Tried once."),
    "#3 ": (["hang", "silent"], 3, None),
    "#4 ": (["hang"] * 9, 3, "the server gave no answer within 0.8 s. Tried 3 times."),
    "#5 ": (["drop", "garbage"], 3, None),
    "#6 ": (["drop"] * 9, 3, "the connection to the server failed: "),
    "#7 ": (["trickle"] * 9, 3, "the server gave no answer within 0.8 s. Tried 3 times."),
    "#8 ": (["500", "drop", "unfinished"], 3, "the answer broke off. Tried 3 times."),
    "#9 ": (["error 500", "abort"], 3, None),
    "#10 ": (["error 400"], 1, "the server broke the answer off: planned. Tried once."),
    "#11 ": (["500", "400"], 2, "HTTP 400: this is a planned 400. Tried 2 times."),
    "#12 ": ([], 1, None),
}


def test_faults_are_tried_again_and_recorded(tmp_path: Path) -> None:
    plan = {text: list(faults) for text, (faults, _, _) in FAULTS.items()}
    with serving(Faulty(plan=plan)) as faulty:
        file = questions(tmp_path, len(FAULTS))
        results = run(settings(faulty.url, tmp_path, file, retries=2, timeout=0.8), Quiet())
    records = records_of(tmp_path)
    for number, (text, (_, tries, error)) in enumerate(FAULTS.items()):
        record = records[f"q{number}", UNPRUNED]
        assert faulty.asked(text) == tries, text
        if error is None:
            assert (record.error, record.correct) == (None, True), text
        else:
            assert record.error is not None, text
            assert record.error.startswith(error), text
            assert record.text is None
    assert records["q6", UNPRUNED].error is not None
    assert "Tried 3 times." in str(records["q6", UNPRUNED].error)
    assert records["q0", UNPRUNED].seconds.total is None, "the library's pauses are no measurement"
    assert records["q12", UNPRUNED].seconds.total is not None
    (row,) = results.rows
    assert row.errors == sum(error is not None for _, _, error in FAULTS.values())


def test_strict_ends_at_the_first_error(tmp_path: Path) -> None:
    with serving(Faulty(plan={"#1 ": ["400"]}, seconds=0.02)) as faulty:
        asking = settings(faulty.url, tmp_path, questions(tmp_path, 12), strict=True, concurrency=2)
        with pytest.raises(EvaluationError, match=r"colors/q1, unpruned: HTTP 400: .*planned"):
            run(asking, Quiet())
        assert len(faulty.questions()) < 12
        assert records_of(tmp_path)["q1", UNPRUNED].error is not None
        run(asking, Quiet())
        assert len(records_of(tmp_path)) == 12


def refused(asking: Settings) -> str:
    """Return why neither a run nor a check takes these settings."""
    messages = set()
    for start in (OpenAIEngine, check_server):
        with pytest.raises(TokenPruneError) as caught:
            start(asking)
        assert isinstance(caught.value, ConfigError | ServerError)
        messages.add(str(caught.value))
    (message,) = messages
    return message


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"positions": "compact", "method": ["uniform"]}, "positions='compact' cannot be asked"),
        ({"method": ["uniform"], "options": {"uniform": {"a": 1}}}, "options cannot be asked"),
        ({"model": "tyni"}, "no model called 'tyni'. Did you mean 'tiny'? Allowed: other, tiny."),
        ({"api_key": "NO_SUCH_KEY"}, "the environment variable NO_SUCH_KEY is not set"),
        ({"method": ["uniform", "divprune"]}, "'divprune' is not loaded by this server"),
    ],
)
def test_settings_that_no_request_can_carry(
    more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with serving(Faulty()) as faulty:
        assert message in refused(settings(faulty.url, tmp_path, **more))


def test_servers_that_cannot_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving(Faulty(key="right")) as faulty:
        gone = faulty.url
        without = settings(faulty.url, tmp_path)
        assert "OPENAI_API_KEY, which is not set" in refused(without)
        monkeypatch.setenv("MY_KEY", "wrong")
        keyed = settings(faulty.url, tmp_path, api_key="MY_KEY")
        assert "Incorrect API key provided). It is looked for in the" in refused(keyed)
        assert "MY_KEY, which is another" in refused(keyed)
        monkeypatch.setenv("MY_KEY", "right")
        check_server(keyed)
        root = faulty.url.removesuffix("/v1")
        for elsewhere in (root, f"{root}/page"):
            assert "usually ends in /v1" in refused(settings(elsewhere, tmp_path))
    message = refused(settings(gone, tmp_path, retries=0))
    assert "cannot be asked: the connection to the server failed" in message
    assert gone in message


def test_servers_that_do_not_prune_as_asked(tmp_path: Path) -> None:
    pruning: dict[str, Any] = {"method": ["uniform"]}
    with serving(Faulty(open=False)) as faulty:
        message = refused(settings(faulty.url, tmp_path, **pruning))
        assert f"HTTP 400: {NO_KWARGS}" in message
        assert "--allow-request-keep --request-method uniform" in message
    with serving(Faulty(prunes=False)) as faulty:
        assert "it does not prune" in refused(settings(faulty.url, tmp_path, **pruning))
    page = 'tokenprune_visual_tokens_seen_total{method="uniform",modality="image"} 64.0'
    with serving(Faulty(open=False, metrics=page)) as faulty:
        message = refused(settings(faulty.url, tmp_path))
        assert "prunes, and lets no request ask for the unpruned model" in message


@pytest.mark.parametrize("metrics", [None, "vllm:num_requests_running 0.0"])
def test_a_plain_server_is_asked_plainly(metrics: str | None, tmp_path: Path) -> None:
    with serving(Faulty(open=False, metrics=metrics)) as faulty:
        run(settings(faulty.url, tmp_path, questions(tmp_path, 2)), Quiet())
    assert all(record.correct for record in records_of(tmp_path).values())
    assert len(faulty.questions()) == 2
    for body in faulty.questions():
        assert "mm_processor_kwargs" not in body


def test_keeping_everything_under_a_method_is_the_plain_model(tmp_path: Path) -> None:
    with serving(Faulty(open=False)) as faulty:
        check_server(settings(faulty.url, tmp_path, method=["uniform"], keep=[1.0]))


def answers(
    engine: OpenAIEngine, asked: MediaQuestions, condition: Condition, content: Image.Image | Video
) -> dict[str, EngineAnswer]:
    asked.content = content
    engine.prepare(asked)
    asked.content = None
    engine.begin([asked])
    found: dict[str, EngineAnswer] = {}
    engine.answer(
        [asked], asked.questions, condition, lambda item, said: found.update({item.id: said})
    )
    return found


@contextmanager
def engine_of(asking: Settings) -> Iterator[OpenAIEngine]:
    engine = OpenAIEngine(asking)
    try:
        yield engine
    finally:
        engine.close()


PLAIN = Condition(method=UNPRUNED, keep=1.0)


def test_likelihoods_only_where_all_letters_are_known(tmp_path: Path) -> None:
    file = tmp_path / "red.png"
    Image.new("RGB", (32, 32), "red").save(file)
    item = Question("a", "image", file, "which?", "A", choices=("red", "blue"))
    openly = Question("b", "image", file, "which?", "red")
    known = {"A": math.log(0.3), " A": math.log(0.2), "B": math.log(0.1), "Bo": math.log(0.4)}
    wanted = {"A": math.log(0.5), "B": math.log(0.1)}
    for top, most, expected in (
        (known, 20, wanted),
        ({"A": -0.1, "b": -2.0}, 20, None),
        (known, 5, None),
    ):
        with (
            serving(Faulty(top=top, max_logprobs=most)) as faulty,
            engine_of(settings(faulty.url, tmp_path)) as engine,
        ):
            said = answers(
                engine, MediaQuestions([item, openly], ["A or B?", "open"]), PLAIN, load_image(file)
            )
        assert said["b"].likelihoods is None
        assert [said["a"].text, said["b"].text] == ["red", "red"]
        if expected is None:
            assert said["a"].likelihoods is None
        else:
            assert said["a"].likelihoods == pytest.approx(expected)


def _gradient(mode: str, folder: Path, name: str, **more: Any) -> Path:
    values = np.random.default_rng(0).integers(0, 256, (24, 40, 4), dtype=np.uint8)
    Image.fromarray(values, "RGBA").convert(mode).save(folder / name, **more)
    return folder / name


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.mark.parametrize(
    ("make", "own"),
    [
        (lambda folder: _gradient("RGB", folder, "a.jpg"), True),
        (lambda folder: _gradient("L", folder, "a.jpg"), True),
        (lambda folder: _gradient("RGB", folder, "a.png"), True),
        (lambda folder: _gradient("RGB", folder, "a.jpg", exif=_turned()), False),
        (lambda folder: _gradient("CMYK", folder, "a.jpg"), False),
        (lambda folder: _gradient("RGBA", folder, "a.png"), False),
        (lambda folder: _gradient("I;16", folder, "a.png"), False),
        (lambda folder: _gradient("RGB", folder, "a.webp"), False),
    ],
)
def test_the_server_sees_the_pixels_that_other_engines_see(
    make: Callable[[Path], Path], own: bool, tmp_path: Path
) -> None:
    file = make(tmp_path)
    with serving(Faulty()) as faulty, engine_of(settings(faulty.url, tmp_path)) as engine:
        asked = MediaQuestions([Question("a", "image", file, "?", "x")], ["?"], load_image(file))
        engine.prepare(asked)
    url = asked.prepared.part["image_url"]["url"]
    data = base64.b64decode(url.partition(",")[2], validate=True)
    assert (data == file.read_bytes()) == own
    sent = Image.open(io.BytesIO(data))
    assert url.startswith(f"data:{Image.MIME[sent.format or '']};base64,")
    assert np.array_equal(np.asarray(sent.convert("RGB")), np.asarray(load_image(file)))


def video(count: int, step: float = 0.5) -> Video:
    frames = np.random.default_rng(1).integers(0, 256, (count, 6, 8, 3), dtype=np.uint8)
    frames[0] = COLORS["green"]
    times = np.arange(count, dtype=np.float64) * step
    indices = np.rint(times * 30).astype(np.int64)
    return Video(frames, times, indices, 15 * count, count * step, Path("v.mp4"), "pyav")


@pytest.mark.parametrize(
    "faulty", [Faulty(), Faulty(open=False), Faulty(images=False)], ids=["open", "plain", "videos"]
)
def test_frames_and_their_times(faulty: Faulty, tmp_path: Path) -> None:
    asked = MediaQuestions([Question("a", "video", Path("v.mp4"), "?", "green")], ["color?"])
    gap = replace(video(4), times=np.array([0.0, 0.4, 3.1, 3.2]), duration=3.3)
    with serving(faulty), engine_of(settings(faulty.url, tmp_path)) as engine:
        # A server that is not told takes frames for one a second.
        said = answers(engine, asked, PLAIN, gap if faulty.open else video(4, 1.01))
        if faulty.open:
            engine.prepare(MediaQuestions(asked.questions, asked.prompts, video(33)))
        else:
            with pytest.raises(ConfigError, match="33 frames, of which this server may read"):
                engine.prepare(MediaQuestions(asked.questions, asked.prompts, video(33, 1.0)))
            late = replace(video(4, 1.0), times=np.array([0.0, 1.0, 2.0, 3.2]))
            with pytest.raises(
                ConfigError, match=r"frame 3 is at 3\.20 s\. Give --fps 1, or start"
            ):
                engine.prepare(MediaQuestions(asked.questions, asked.prompts, late))
    assert (said["a"].text, said["a"].error) == ("green", None)
    (body,) = faulty.questions()
    kind, _, frames = body["messages"][0]["content"][0]["video_url"]["url"].partition(",")
    assert kind == "data:video/jpeg;base64"
    seen = [np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))) for one in frames.split(",")]
    assert np.array_equal(np.stack(seen), video(4).frames)
    how = {
        "num_frames": -1,
        "fps": 1000.0,
        "duration": 3.3,
        "total_num_frames": 4267,  # four mean steps
        "frames_indices": [0, 400, 3100, 3200],
    }
    assert body.get("media_io_kwargs") == ({"video": how} if faulty.open else None)


def test_no_thread_is_left_behind(tmp_path: Path) -> None:
    def threads() -> set[str]:
        return {one.name for one in threading.enumerate() if one.is_alive()}

    with serving(Faulty()) as faulty:
        before: Sequence[str] = sorted(threads())
        OpenAIEngine(settings(faulty.url, tmp_path)).close()
        with pytest.raises(ConfigError):
            OpenAIEngine(settings(faulty.url, tmp_path, model="none"))
        assert [one for one in sorted(threads()) if "process_request" not in one] == before
