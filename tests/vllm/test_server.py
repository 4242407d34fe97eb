"""`tokenprune serve` and `tokenprune export` over real HTTP, on the bundled model."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from tests.vllm.servers import COMMON, PLAIN, TOKENPRUNE, Server, chat, serve
from tokenprune_eval.bundled.model import bundled_model_path

ROOT = Path(__file__).resolve().parents[2]
QUESTION = "what color is the shape?"
REQUEST_METHODS = ("feature-norm", "flexselect", "uniform")


def picture(number: int) -> Image.Image:
    """Return a reproducible image of coloured squares."""
    squares = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(squares).resize((224, 224), Image.Resampling.NEAREST)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    command = [
        *TOKENPRUNE,
        "serve",
        str(bundled_model_path()),
        "--method=cls-attention",
        "--keep=16",
        "--allow-request-keep",
        "--request-method",
        *REQUEST_METHODS,
        *COMMON,
        # A cache of 12 blocks: concurrent requests push each other out.
        "--max-model-len=256",
        "--num-gpu-blocks-override=12",
        "--block-size=32",
        "--max-num-batched-tokens=48",
    ]
    with serve(command, tmp_path_factory.mktemp("serve")) as running:
        yield running


def tokens_of(response: httpx.Response) -> int:
    """Return how many prompt tokens the server counted."""
    assert response.status_code == 200, response.text
    return int(response.json()["usage"]["prompt_tokens"])


def said(response: httpx.Response) -> str:
    """Return the answer's text."""
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def asking(**values: Any) -> dict[str, Any]:
    """Return the part of a request's body that asks for a pruning of its own."""
    return {"mm_processor_kwargs": {"tokenprune": values}}


def test_usage_counts_the_pruned_prompt(server: Server) -> None:
    image = picture(0)
    text = tokens_of(server.ask(image, QUESTION, **asking(off=True))) - 64
    assert tokens_of(server.ask(image, QUESTION)) == text + 16
    assert tokens_of(server.ask(image, QUESTION, **asking(keep=5))) == text + 5
    assert tokens_of(server.ask(image, QUESTION, **asking(keep=0.25))) == text + 16
    assert tokens_of(server.ask(image, QUESTION, **asking(keep=1.0))) == text + 64
    assert tokens_of(server.ask(image, QUESTION, **asking(method="feature-norm"))) == text + 16


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"keep": 0}, "keeps nothing"),
        ({"keep": -3}, "keeps nothing"),
        ({"keep": 1.5}, "is not a fraction"),
        ({"keep": "many"}, "is no published budget"),
        ({"keep": [4]}, "is not a budget"),
        ({"kepe": 4}, "Did you mean 'keep'"),
        ({"method": "divprune"}, "is not loaded by this server"),
        ({"method": ["a"]}, "is not loaded by this server"),
        ({"off": "yes"}, "is not true or false"),
        ({"off": True, "keep": 4}, "one or the other"),
    ],
)
def test_a_bad_request_is_a_400_and_the_server_lives(
    values: dict[str, Any], message: str, server: Server
) -> None:
    response = server.ask(picture(1), QUESTION, **asking(**values))
    assert response.status_code == 400, response.text
    assert message in response.json()["error"]["message"]
    assert said(server.ask(picture(1), QUESTION))


def test_other_processor_settings_stay_closed(server: Server) -> None:
    response = server.ask(picture(1), QUESTION, mm_processor_kwargs={"crop_to_patches": True})
    assert response.status_code == 400, response.text
    assert "crop_to_patches" in response.json()["error"]["message"]
    bare = server.ask(picture(1), QUESTION, mm_processor_kwargs={"tokenprune": 4})
    assert bare.status_code == 400, bare.text


def test_metrics_count_tokens_and_time(server: Server) -> None:
    def totals() -> tuple[float, float, float]:
        page = server.metrics()
        labels = '{method="cls-attention",modality="image"}'
        seen = page.get(f"tokenprune_visual_tokens_seen_total{labels}", 0.0)
        kept = page.get(f"tokenprune_visual_tokens_kept_total{labels}", 0.0)
        spent = [
            value
            for name, value in page.items()
            if name.startswith("tokenprune_selecting_seconds_total") and "cls-attention" in name
        ]
        return seen, kept, sum(spent)

    server.ask(picture(100), QUESTION)
    before = totals()
    for number in range(3):
        said(server.ask(picture(101 + number), QUESTION))
    after = totals()
    assert after[0] - before[0] == 3 * 64
    assert after[1] - before[1] == 3 * 16
    assert 0 < after[2] - before[2] < 60


def test_flexselect_answers_each_question_as_transformers_does(server: Server) -> None:
    import tokenprune_hf

    def selecting() -> float:
        return sum(
            value
            for name, value in server.metrics().items()
            if name.startswith("tokenprune_selecting_seconds_total") and "flexselect" in name
        )

    image = picture(200)
    model, processor = tokenprune_hf.load(str(bundled_model_path()))
    questions = (QUESTION, "what is the blue item?", "where is the circle?")
    for question in questions:
        text = tokens_of(server.ask(image, question, **asking(off=True))) - 64
        spent = []
        answers = []
        for _ in range(2):
            before = selecting()
            response = server.ask(image, question, **asking(method="flexselect", keep=8))
            spent.append(selecting() - before)
            assert tokens_of(response) == text + 8
            answers.append(said(response).strip())
        assert spent[0] > 0, "no question shares another's selection"
        assert spent[1] == 0, "and the same question again is known"
        inputs = tokenprune_hf.ask(processor, question, image=image)
        with tokenprune_hf.prune(model, "flexselect", keep=8):
            output = model.generate(
                **inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, eos_token_id=None
            )
        (answered,) = processor.batch_decode(
            output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        assert answers == [answered.strip()] * 2


def test_it_says_at_the_start_how_it_prunes(server: Server) -> None:
    lines = [line for line in server.log.read_text().splitlines() if "tokenprune: " in line]
    level, pruning = lines
    assert level.startswith("tokenprune: InternVLForConditionalGeneration is of a known family")
    for part in ("cls-attention", "16", "scoring layer", "image: 64 -> 16"):
        assert part in pruning


def test_64_requests_at_once_and_clients_that_hang_up(server: Server) -> None:
    bodies = []
    for number in range(64):
        values: dict[str, Any] = {}
        match number % 5:
            case 0:
                values = asking(keep=1 + number % 11)
            case 1:
                values = asking(off=True)
            case 2:
                values = asking(method="feature-norm")
        image = None if number % 5 == 4 else picture(number % 20)
        bodies.append(chat(image, QUESTION, max_tokens=40, **values))
    alone = [
        said(httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120))
        for body in bodies[:20]
    ]

    async def at_once() -> list[str]:
        async with httpx.AsyncClient(timeout=300) as client:

            async def ask(body: dict[str, Any]) -> str:
                answer = await client.post(f"{server.url}/v1/chat/completions", json=body)
                return said(answer)

            async def hang_up(body: dict[str, Any]) -> None:
                streamed = {**body, "stream": True, "max_tokens": 200}
                async with client.stream(
                    "POST", f"{server.url}/v1/chat/completions", json=streamed
                ) as stream:
                    async for _ in stream.aiter_lines():
                        return

            hanging = [hang_up(body) for body in bodies[:8]]
            together = await asyncio.gather(*[ask(body) for body in bodies], *hanging)
            return [str(one) for one in together[: len(bodies)]]

    together = asyncio.run(at_once())
    assert together[:20] == alone
    # Some of the others are the same requests again.
    known = dict(zip(map(str, bodies[:20]), alone, strict=True))
    repeated = [number for number, body in enumerate(bodies) if str(body) in known]
    assert len(repeated) > 30
    assert [together[number] for number in repeated] == [known[str(bodies[n])] for n in repeated]
    again = [
        said(httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120))
        for body in bodies[:20]
    ]
    assert again == alone
    page = server.metrics()
    preempted = [value for name, value in page.items() if "num_preemptions_total" in name]
    assert sum(preempted) > 0, "the cache was meant to be too small"
    used = [value for name, value in page.items() if "kv_cache_usage_perc" in name]
    assert sum(used) == 0
    running = [value for name, value in page.items() if "num_requests_running" in name]
    assert sum(running) == 0


@pytest.fixture(scope="module")
def soaking() -> Iterator[Any]:
    folder = str(ROOT / "scripts")
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module("soak")
    finally:
        sys.path.remove(folder)


def test_mixed_requests_are_answered_and_counted_and_nothing_grows(
    server: Server, soaking: Any
) -> None:
    assert server.process is not None
    target = soaking.Target(
        server.url, server.process.pid, server.temporary, "tiny", 256, server.log
    )
    methods = ["cls-attention", *(name for name in REQUEST_METHODS if name != soaking.GIVEN_UP)]
    cases = soaking.draw_cases(24, methods, frames=3)
    assert len({case.words for case in cases}) > 8, "one answer must not stand for all"
    # In so short a time memory is still growing: what vLLM keeps of each prompt, pruned or not.
    report = soaking.soak(target, cases, seconds=12, clients=4, every=1, allowed=400)
    assert not report.failures
    assert report.sent.keys() == soaking.SHARES.keys()
    assert sum(report.sent.values()) > 60
    assert sum(one.counted for one in report.sums if "tokens seen" in one.name) > 1000


def test_a_soak_sees_what_is_wrong(server: Server, soaking: Any) -> None:
    assert server.process is not None
    target = soaking.Target(
        server.url, server.process.pid, server.temporary, "tiny", 256, server.log
    )
    (case, *_) = soaking.draw_cases(1, ["cls-attention"])
    wrong = dataclasses.replace(
        case, words=("no", *case.words[1:]), visual={("cls-attention", "image"): (64, 17)}
    )
    report = soaking.soak(target, [wrong], seconds=2, clients=1, every=0.2)
    texts = " ".join(report.failures)
    assert "in place of 'no " in texts
    assert "tokens kept, cls-attention, image" in texts
    assert "tokens seen" not in texts

    samples = [
        soaking.Sample(second, {"server": (1000 + 0.5 * second, 20, 30)}, second // 10)
        for second in range(100)
    ]
    found = {one.name: one for one in soaking.grown(samples, 20, allowed=32)}
    assert [name for name, one in found.items() if not one.holds] == [
        "server: memory in MiB",
        "temporary files",
    ]
    assert found["server: memory in MiB"].grown == pytest.approx(0.5 * 79)


def test_processes_are_looked_at_once_more_after_the_load(soaking: Any, tmp_path: Path) -> None:
    target = soaking.Target("", os.getpid(), tmp_path, "tiny", 256, tmp_path / "log")
    with soaking.Watcher(target, 60, soaking.Tally()) as watcher:
        while not watcher.samples:
            time.sleep(0.01)
        ended = time.monotonic()
    assert time.monotonic() - ended < 30, "nobody waits for the next look"
    first, last = watcher.samples
    assert 0 <= first.seconds < last.seconds
    assert "server" in last.processes
    assert soaking.grown(watcher.samples, last.seconds, 32)
    assert soaking.grown(watcher.samples, last.seconds + 1, 32) == []


@pytest.mark.parametrize(
    "title",
    [
        "VLLM::Worker",  # the engine core ends for it, and the server for the engine core
        pytest.param("VLLM::EngineCore", marks=pytest.mark.every_model),
    ],
)
def test_a_killed_process_ends_the_server_and_a_restart_answers(title: str, server: Server) -> None:
    assert server.process is not None
    before = said(server.ask(picture(300), QUESTION))
    (victim,) = (child for name, child in server.processes().items() if name.startswith(title))
    others = list(server.processes().values())
    body = chat(picture(301), QUESTION, max_tokens=100, stream=True)
    victim.suspend()  # the request is surely on its way when the process dies
    killed = threading.Timer(1.0, victim.kill)
    killed.start()
    finished = []
    with (
        suppress(httpx.TransportError),  # the answer may also break off
        httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as stream,
    ):
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                finished += [
                    choice["finish_reason"] for choice in json.loads(line[6:]).get("choices", [])
                ]
    killed.join()
    assert not any(finished), "the request fails"
    server.process.wait(60)  # with 0, as vLLM's server ends on its own, too
    _, left = psutil.wait_procs(others, 30)
    assert not left
    assert not list(server.temporary.glob("tokenprune*"))
    server.start()
    assert said(server.ask(picture(300), QUESTION)) == before


def test_the_script_serves_the_bundled_model_and_the_readme_asks_it(tmp_path: Path) -> None:
    blocks = (ROOT / "README.md").read_text("utf-8").split("```")
    (asking,) = [block.removeprefix("bash") for block in blocks if "curl http" in block]
    with serve([str(ROOT / "scripts" / "serve")], tmp_path) as running:
        command = asking.replace("http://localhost:8000", f"--silent --show-error {running.url}")
        done = subprocess.run(
            ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert answer["model"] == "bundled"
        assert answer["choices"][0]["message"]["content"].strip() == "bag"
        alone = tokens_of(running.ask(None, "what is the yellow item?", model="bundled"))
        # Two tokens begin and end an image.
        assert answer["usage"]["prompt_tokens"] == alone + 16 + 2


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "pruned"
    command = [*TOKENPRUNE, "export", str(bundled_model_path()), str(out)]
    done = subprocess.run(
        [*command, "--method=divprune", "--keep=9", "--copy"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout
    return out


def test_an_exported_checkpoint_is_served_pruned_by_vllm_itself(
    exported: Path, server: Server, tmp_path: Path
) -> None:
    whole = tokens_of(server.ask(picture(0), QUESTION, **asking(off=True)))
    command = [*PLAIN, "--model", str(exported), *COMMON]
    with serve(command, tmp_path, forked=True) as running:
        assert tokens_of(running.ask(picture(0), QUESTION)) == whole - 64 + 9
        refused = running.ask(picture(0), QUESTION, **asking(keep=3))
        assert refused.status_code == 400, refused.text
        assert "--trust-request-mm-kwargs" in refused.json()["error"]["message"]


def test_an_exported_checkpoint_does_not_start_without_the_plugin(
    exported: Path, tmp_path: Path
) -> None:
    command = [*PLAIN, "--model", str(exported), *COMMON]
    with (
        pytest.raises(RuntimeError, match="the server did not start"),
        serve(command, tmp_path, VLLM_PLUGINS=""),
    ):
        pass
    log = (tmp_path / "server.log").read_text()
    assert "['TokenPruneInternVLForConditionalGeneration'] are not supported" in log


def test_transformers_loads_an_exported_checkpoint_as_before(exported: Path) -> None:
    import torch
    from transformers import AutoModelForImageTextToText

    plain, again = (
        AutoModelForImageTextToText.from_pretrained(folder).state_dict()
        for folder in (bundled_model_path(), exported)
    )
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_a_keep_that_prunes_nothing_does_not_start(tmp_path: Path) -> None:
    command = [*TOKENPRUNE, "serve", str(bundled_model_path()), "--method=cls-attention"]
    images = '--limit-mm-per-prompt={"image": 1, "video": 0}'  # a video has 64 for each frame
    with (
        pytest.raises(RuntimeError, match="the server did not start"),
        serve([*command, "--keep=64", images, *COMMON], tmp_path, forked=True),
    ):
        pass
    log = (tmp_path / "server.log").read_text()
    assert "keep=64 prunes nothing: of this model's tokens the largest image has 64" in log
