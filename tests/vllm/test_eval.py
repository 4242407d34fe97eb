"""`tokenprune eval` through vLLM: the answers are those of transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import pytest
from PIL import Image

from tests.vllm.checkpoints import save
from tests.vllm.processes import run_command
from tests.vllm.servers import COMMON, TOKENPRUNE, Server, serve
from tokenprune.errors import UnsupportedModelError
from tokenprune.media.images import load_image
from tokenprune_eval.bundled.model import bundled_model_path
from tokenprune_eval.data.load import load_data
from tokenprune_eval.data.question import Question
from tokenprune_eval.evaluation.checks import check_before_model
from tokenprune_eval.evaluation.engines.base import EngineAnswer, MediaQuestions
from tokenprune_eval.evaluation.engines.openai import OpenAIEngine
from tokenprune_eval.evaluation.settings import Settings
from tokenprune_eval.results.files import read_run
from tokenprune_eval.results.records import Record

PRUNED = "cls-attention@0.25"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    command = [*TOKENPRUNE, "serve", str(bundled_model_path()), "--method=uniform", "--keep=16"]
    requests = ["--allow-request-keep", "--request-method", "cls-attention"]
    with serve(
        [*command, *requests, *COMMON], tmp_path_factory.mktemp("serve"), forked=True
    ) as running:
        yield running


def clips(folder: Path) -> Path:
    """Write four videos of 40 frames, each of other colours, and a question about each."""
    lines = []
    for number in range(4):
        name = f"{number}.mp4"
        colors = np.random.default_rng(number).integers(0, 256, (4, 4, 4, 3), dtype=np.uint8)
        with av.open(folder / name, "w") as container:
            stream = cast(Any, container.add_stream("libx264", rate=10))
            stream.width = stream.height = 224
            stream.pix_fmt = "yuv420p"
            for part in colors:
                frame = np.kron(part, np.ones((56, 56, 1), np.uint8))
                for _ in range(10):
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
            container.mux(stream.encode())
        lines.append({"video": name, "question": "what color is the shape?", "answer": "red"})
    file = folder / "clips.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def evaluate(out: Path, data: Path, *engine: str) -> dict[tuple[str, str], Record]:
    """Return the records of a run of the command."""
    words = ["eval", *engine, "--data", "scenes", str(data), "--limit=12"]
    more = ["--method=cls-attention", "--keep=0.25", "--frames=4", f"--out={out}", "--memory=0"]
    status, printed = run_command(*words, *more)
    assert status == 0, printed
    return {(one.item, one.condition): one for one in read_run(out).records}


def test_all_engines_answer_alike(server: Server, tmp_path: Path) -> None:
    data = clips(tmp_path)
    here = evaluate(tmp_path / "hf", data, "--engine=hf", "--model=bundled")
    assert len(here) == (12 + 4) * 2
    arguments = ("dtype=float32", "enforce_eager=true", "max_model_len=512", "max_num_seqs=8")
    others = {
        "openai": (f"--base-url={server.url}/v1", "--model=tiny"),
        "vllm": ("--model=bundled", "--batch=8", *(f"--engine-arg={one}" for one in arguments)),
    }
    for engine, more in others.items():
        there = evaluate(tmp_path / engine, data, f"--engine={engine}", *more)
        assert there.keys() == here.keys()
        for condition in ("unpruned", PRUNED):
            for name, most, fewest in (("scenes/", 12, 11), ("clips/", 4, 4)):
                keys = [key for key in here if key[1] == condition and key[0].startswith(name)]
                assert len(keys) == most
                assert all(there[key].error is None for key in keys), there[keys[0]].error
                assert [there[key].prompt_tokens for key in keys] == [
                    here[key].prompt_tokens for key in keys
                ]
                if engine == "vllm":
                    assert [there[key].visual_tokens for key in keys] == [
                        here[key].visual_tokens for key in keys
                    ]
                same = sum(there[key].text == here[key].text for key in keys)
                assert same >= fewest, (engine, condition)


def test_resized_pictures_are_those_of_transformers(tmp_path: Path) -> None:
    folder = save("qwen2_5_vl", tmp_path / "model")
    methods = ("--method", "resize", "resize+divprune", "--keep", "0.3", "50")
    words = ("eval", str(folder), "--data", "scenes", "--limit=6", "--memory=0")
    arguments = ("dtype=float32", "enforce_eager=true", "max_model_len=1024", "max_num_seqs=4")
    engines = {"hf": (), "vllm": tuple(f"--engine-arg={one}" for one in arguments)}
    known: dict[str, dict[tuple[str, str], Record]] = {}
    for engine, more in engines.items():
        out = tmp_path / engine
        asked = (*methods, f"--engine={engine}", "--batch=4", f"--out={out}", *more)
        status, printed = run_command(*words, *asked)
        assert status == 0, printed
        known[engine] = {(one.item, one.condition): one for one in read_run(out).records}
    here, there = known["hf"], known["vllm"]
    assert here.keys() == there.keys()
    assert len({condition for _, condition in here}) == 5
    for key, record in here.items():
        assert there[key].error is None
        assert there[key].visual_tokens == record.visual_tokens
        if key[1].startswith("resize@"):
            full = here[key[0], "unpruned"].visual_tokens or 0
            assert (record.visual_tokens or 0) <= max(50, 0.3 * full + 0.5)
        saved = [
            (of[key[0], "unpruned"].prompt_tokens or 0) - (of[key].prompt_tokens or 0)
            for of in (here, there)
        ]
        assert saved[0] == saved[1]
    # The resized pictures are read, and not the same one again.
    for condition in ("resize@50", "resize+divprune@50"):
        items = [item for item, of in there if of == condition]
        assert any(there[one, condition].text != there[one, "unpruned"].text for one in items)


def test_a_model_of_one_size_in_vllm_is_refused_at_the_start(tmp_path: Path) -> None:
    """vLLM lays out as many tokens for each of InternVL's tiles, whatever their size."""
    settings = Settings(
        engine="vllm", model="bundled", data=["scenes"], method=["resize"], out=tmp_path / "out"
    )
    sets = [load_data("scenes")]
    with pytest.raises(UnsupportedModelError, match=r"in vLLM whatever its size.* --engine hf"):
        check_before_model(settings, sets)
    check_before_model(settings.model_copy(update={"engine": "hf"}), sets)


def test_a_server_takes_a_question_with_choices(server: Server, tmp_path: Path) -> None:
    settings = Settings(
        engine="openai",
        model="tiny",
        base_url=f"{server.url}/v1",
        data=["scenes"],
        method=["cls-attention"],
        keep=[8],
        out=tmp_path / "out",
    )
    file = tmp_path / "white.png"
    Image.new("RGB", (224, 224), "white").save(file)
    item = Question("a", "image", file, "what color?", "A", choices=("red", "blue"))
    asked = MediaQuestions([item], ["what color is the shape?"], load_image(file))
    said: list[EngineAnswer] = []
    engine = OpenAIEngine(settings)
    try:
        engine.prepare(asked)
        for condition in settings.conditions():
            engine.answer([asked], [item], condition, lambda _, one: said.append(one))
    finally:
        engine.close()
    assert [one.error for one in said] == [None, None]
    whole, pruned = (one.prompt_tokens or 0 for one in said)
    assert whole - pruned == 64 - 8


def test_memory_that_vllm_would_not_find_is_found_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Worked out as vLLM does on a CPU: keys and values beside the weights, or a share of all."""
    from tokenprune.errors import ConfigError
    from tokenprune_eval.evaluation import checks

    settings = Settings(model="bundled", data=["scenes"], engine="vllm", out=tmp_path)
    weights = (bundled_model_path() / "model.safetensors").stat().st_size
    gib = 2**30

    def check(free: int, space: str | None, **engine_args: Any) -> None:
        monkeypatch.setattr(checks, "_memory", lambda: (64 * gib, free))
        monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
        if space is not None:
            monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", space)
        checks._check_vllm_memory(settings.model_copy(update={"engine_args": engine_args}))

    check(3 * gib + weights, "3")
    with pytest.raises(ConfigError, match=r"3 GiB of keys and values and .* GiB of weights"):
        check(3 * gib + weights - 1, "3")
    with pytest.raises(ConfigError, match="no whole number of GiB"):
        check(64 * gib, "1.5")
    check(60 * gib, None)
    with pytest.raises(ConfigError, match=r"0\.92 of all memory, 58\.9 GiB, and 30 GiB are free"):
        check(30 * gib, None)
    check(33 * gib, None, gpu_memory_utilization=0.5)
    check(2 * gib, None, kv_cache_memory_bytes=gib)
    with pytest.raises(ConfigError, match="VLLM_CPU_KVCACHE_SPACE"):
        check(gib, None, kv_cache_memory_bytes=gib)


def test_a_prompt_that_is_too_long_fails_alone(server: Server, tmp_path: Path) -> None:
    Image.new("RGB", (224, 224), "white").save(tmp_path / "white.png")
    texts = ["what color is the shape?", "word " * 600, "is there a circle?"]
    file = tmp_path / "odd.jsonl"
    lines = [{"image": "white.png", "question": text, "answer": "red"} for text in texts]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ("dtype=float32", "enforce_eager=true", "max_model_len=512", "max_num_seqs=8")
    engines = {
        "openai": (f"--base-url={server.url}/v1", "--model=tiny"),
        "vllm": ("--model=bundled", "--batch=8", *(f"--engine-arg={one}" for one in arguments)),
    }
    for engine, more in engines.items():
        out = tmp_path / engine
        words = ["eval", f"--engine={engine}", *more, f"--data={file}"]
        # One token is no whole answer to an open question.
        words += ["--method=uniform", "--keep=0.25", "--max-new-tokens=1", f"--out={out}"]
        status, printed = run_command(*words)
        assert status == 0, printed
        records = read_run(out).records
        assert len(records) == 6
        for record in records:
            if record.item == "odd/odd-2":
                assert record.error is not None
                assert "512" in record.error, engine
            else:
                assert (record.error, record.cut, record.correct) == (None, True, None), engine
