"""The picture made smaller, as a condition of a run: alone, and before a method."""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from torch import Tensor

pytest.importorskip("pydantic", reason="evaluating needs the extra `eval`")

import tokenprune_hf
from tests.hf.models import tf
from tests.vllm import checkpoints as tiny
from tokenprune.cli import main
from tokenprune.errors import ConfigError, UnknownMethodError
from tokenprune.media.images import load_image
from tokenprune.media.video import read_video
from tokenprune_eval.bundled.model import bundled_model_path
from tokenprune_eval.data.load import choose, load_data
from tokenprune_eval.evaluation.engines.base import EngineAnswer
from tokenprune_eval.evaluation.engines.transformers import TransformersEngine
from tokenprune_eval.evaluation.settings import Settings, read_settings
from tokenprune_eval.results.files import read_run
from tokenprune_eval.results.records import Record
from tokenprune_eval.results.summary import read_results

FAMILIES = ("qwen2_5_vl", "idefics3", "gemma3")

QUESTIONS = 8


def evaluate(model: Path | str, out: Path, *more: str, data: str = "scenes") -> int:
    """Run a small evaluation, and return its exit status."""
    return main(
        [
            *("eval", str(model), "--data", data, "--limit", str(QUESTIONS), "--out", str(out)),
            *("--memory", "1", *more),
        ]
    )


def records(out: Path) -> dict[tuple[str, str], Record]:
    """Return (condition, item) -> record; a record that comes twice fails."""
    known = read_run(out).records
    found = {(record.condition, record.item): record for record in known}
    assert len(found) == len(known)
    return found


def greedy(model: Any, processor: Any, inputs: Any) -> str:
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    text: str = processor.decode(output[0, inputs["input_ids"].shape[1] :], True)
    return text.strip()


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("resized") / "run"
    methods = ["--method", "resize", "resize+information", "information"]
    assert evaluate("bundled", out, *methods, "--keep", "0.25", "20", "--batch", "4") == 0
    return out


def test_it_answers_as_the_smaller_picture_does(ran: Path) -> None:
    """The bundled model's 8 x 8 tokens become 4 x 4, and 6 x 6 or 5 x 5 before a method."""
    known = records(ran)
    model, processor = tokenprune_hf.load(str(bundled_model_path()))
    for item in choose(load_data("scenes"), QUESTIONS, 0).questions:
        image = load_image(item.path)
        for keep, side, kept in ((0.25, 4, 16), (20, 4, 16)):
            small = tokenprune_hf.ask(processor_of(side), item.question, image=image)
            record = known[f"resize@{keep}", f"scenes/{item.id}"]
            assert record.text == greedy(model, processor, small)
            assert (record.visual_tokens, record.of_visual_tokens) == (kept, 64)
            assert record.prompt_tokens == small["input_ids"].shape[1]
        for keep, side, kept in ((0.25, 5, 16), (20, 6, 20)):
            # The geometric mean of 64 and 16 is 32, that of 64 and 20 is 35.8, rounded to 36.
            assert side == math.isqrt(round(math.sqrt(64 * kept)))
            small = tokenprune_hf.ask(processor_of(side), item.question, image=image)
            with tokenprune_hf.prune(model, "information", kept) as pruning:
                text = greedy(model, processor, small)
            assert [one.total for one in pruning.selections] == [side**2]
            record = known[f"resize+information@{keep}", f"scenes/{item.id}"]
            assert record.text == text
            assert (record.visual_tokens, record.of_visual_tokens) == (kept, 64)
            plain = known["unpruned", f"scenes/{item.id}"]
            assert record.prompt_tokens == (plain.prompt_tokens or 0) - 64 + kept


@functools.cache
def processor_of(side: int) -> Any:
    """Return the bundled model's processor for pictures of `side` x `side` tokens."""
    processor: Any = tf.AutoProcessor.from_pretrained(bundled_model_path())
    processor.image_seq_length = side**2
    processor.image_processor.size = {"height": 28 * side, "width": 28 * side}
    return processor


def test_costs_are_those_of_the_smaller_picture(ran: Path) -> None:
    rows = {row.condition: row for row in read_results(ran).rows}
    assert list(rows) == [
        "unpruned",
        *("resize@0.25", "resize@20", "resize+information@0.25", "resize+information@20"),
        *("information@0.25", "information@20"),
    ]
    # One encoding of full size for all, and others that are shared by conditions of their size.
    known = records(ran)
    of_full = {
        item: record.seconds.encode for (key, item), record in known.items() if key == "unpruned"
    }
    for (key, item), record in known.items():
        if key.startswith("resize"):
            assert record.seconds.encode is not None
            assert record.seconds.encode != of_full[item]
        else:
            assert record.seconds.encode == of_full[item]
        assert record.seconds.first_token == pytest.approx(
            sum(getattr(record.seconds, name) or 0.0 for name in ("encode", "select", "prefill"))
        )
    assert rows["resize@0.25"].kv_bytes == rows["resize@20"].kv_bytes
    assert (rows["resize@0.25"].peak_bytes or 0) < (rows["unpruned"].peak_bytes or 0)
    lines = (ran / "table.md").read_text("utf-8").splitlines()
    for method in ("resize", "resize+information"):
        assert sum(line.startswith(f"| {method} ") for line in lines) == 2
    assert "resize+information" in (ran / "report.html").read_text("utf-8")


def test_a_batch_and_workers_say_what_its_questions_say_alone(ran: Path, tmp_path: Path) -> None:
    out = tmp_path / "alone"
    methods = ["--method", "resize", "resize+information", "--keep", "0.25", "20"]
    assert evaluate("bundled", out, *methods, "--workers", "2") == 0
    batched = records(ran)
    for key, record in records(out).items():
        assert record.text == batched[key].text
        assert record.visual_tokens == batched[key].visual_tokens
        assert record.prompt_tokens == batched[key].prompt_tokens


def test_a_run_takes_it_up_later_and_asks_nothing_twice(tmp_path: Path) -> None:
    out, cache = tmp_path / "run", tmp_path / "cache"
    assert evaluate("bundled", out, "--method", "uniform", "--keep", "0.25") == 0
    before = (out / "records.jsonl").read_bytes()
    more = ["--method", "uniform", "resize", "--keep", "0.25", "--cache", str(cache)]
    assert evaluate("bundled", out, *more) == 0
    assert (out / "records.jsonl").read_bytes().startswith(before)
    assert Counter(key for key, _ in records(out)) == dict.fromkeys(
        ("unpruned", "uniform@0.25", "resize@0.25"), QUESTIONS
    )
    # What was encoded at each size is in the cache, and read from there.
    pictures = len({item.path for item in read_run(out).questions})
    assert len(list(cache.iterdir())) == 2 * pictures
    again = tmp_path / "again"
    assert evaluate("bundled", again, *more) == 0
    assert len(list(cache.iterdir())) == 2 * pictures
    assert {key: one.text for key, one in records(again).items()} == {
        key: one.text for key, one in records(out).items()
    }


# The engine -------------------------------------------------------------------------------------


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of all pixels that any engine's tower has seen."""
    shapes: list[tuple[int, ...]] = []
    load = TransformersEngine.__init__

    def watched(engine: TransformersEngine, *given: Any) -> None:
        load(engine, *given)

        def note(_: Any, arguments: Sequence[Tensor], named: dict[str, Any]) -> None:
            pixels = named["pixel_values"] if "pixel_values" in named else arguments[0]
            shapes.append(tuple(pixels.shape))

        engine.model.model.vision_tower.register_forward_pre_hook(note, with_kwargs=True)

    monkeypatch.setattr(TransformersEngine, "__init__", watched)
    return shapes


def test_every_size_is_encoded_once(tmp_path: Path, encoded: list[tuple[int, ...]]) -> None:
    methods = ["--method", "resize", "resize+uniform", "resize+divprune", "divprune"]
    # 16 and 0.25 are the same size; 25 tokens of 64 are as many as those before a method.
    keeps = ["--keep", "16", "0.25", "0.4", "64"]
    assert evaluate("bundled", tmp_path / "run", *methods, *keeps) == 0
    pictures = len({item.path for item in read_run(tmp_path / "run").questions})
    sides = Counter(shape[-1] // 28 for shape in encoded)
    # 0.4 is 26 tokens: 5 x 5, and before a method the root of 26 x 64, 6 x 6.
    assert sides == {8: pictures, 5: pictures, 4: pictures, 6: pictures}
    known = records(tmp_path / "run")
    for (key, item), record in known.items():
        if key.endswith("@64"):
            assert record.visual_tokens == 64
            assert record.text == known["unpruned", item].text


def test_what_is_needed_no_more_is_freed_and_made_again(tmp_path: Path) -> None:
    wanted = Settings.model_validate(
        {
            **{"model": "bundled", "data": ["scenes"], "out": tmp_path, "keep": [16]},
            "method": ["resize", "resize+uniform"],
        }
    )
    from tokenprune_eval.evaluation.read_ahead import by_media, read_ahead
    from tokenprune_eval.evaluation.scoring import prompt_of

    engine = TransformersEngine(wanted)
    items = list(load_data("scenes").questions[:2])
    said: list[tuple[str, str]] = []
    try:
        media = list(read_ahead(by_media(items), wanted, prompt_of, engine.prepare))
        engine.begin(media)

        def ask(method: str) -> None:
            (condition,) = (one for one in wanted.conditions() if one.method == method)

            def done(item: Any, answer: EngineAnswer) -> None:
                assert answer.error is None
                said.append((item.id, answer.text))

            engine.answer(media, items, condition, done)

        def sizes() -> list[int]:
            return [len(one.prepared.smaller._made) for one in media]

        assert sizes() == [2] * len(media)
        ask("resize")
        assert sizes() == [1] * len(media)
        ask("resize+uniform")
        assert sizes() == [0] * len(media)
        ask("resize")
        assert sizes() == [0] * len(media)
    finally:
        engine.close()
    assert said[: len(items)] == said[-len(items) :]


def test_a_tower_that_makes_other_tokens_is_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenprune_hf.resized import Resized
    from tokenprune_hf.resizing import Resizer

    make = Resizer.__call__

    def wrong(self: Resizer, *given: Any, **named: Any) -> Resized:
        resized = make(self, *given, **named)
        object.__setattr__(resized, "tokens", resized.tokens - 1)
        return resized

    monkeypatch.setattr(Resizer, "__call__", wrong)
    out = tmp_path / "run"
    assert evaluate("bundled", out, "--method", "resize", "--keep", "0.25") == 0
    for (key, _), record in records(out).items():
        assert (record.error is None) == (key == "unpruned")
    failed = next(one for one in records(out).values() if one.error)
    assert "the encoder made 16 visual tokens" in (failed.error or "")


# Families ---------------------------------------------------------------------------------------


def test_a_tiny_qwen_is_pruned_as_its_resized_picture(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = checkpoints["qwen2_5_vl"]
    limits = ["--max-new-tokens", "16", "--batch", "4"]
    methods = ["--method", "resize", "resize+divprune", "--keep", "0.2", "60"]
    evaluate(folder, tmp_path / "run", *limits, *methods)
    known = records(tmp_path / "run")
    model, processor = tokenprune_hf.load(str(folder))
    for item in choose(load_data("scenes"), QUESTIONS, 0).questions[:3]:
        image = load_image(item.path)
        full = 28 * 28 if image.size == (448, 448) else None
        for keep in (0.2, 60):
            plain = known["unpruned", f"scenes/{item.id}"]
            total = plain.visual_tokens or 0
            assert full in (None, total)
            kept = math.floor(keep * total + 0.5) if isinstance(keep, float) else keep
            alone = known[f"resize@{keep}", f"scenes/{item.id}"]
            assert 0.8 * kept < (alone.visual_tokens or 0) <= kept
            resized = tokenprune_hf.resize(model, processor, image, keep, halfway=True)
            assert resized.keep == kept
            inputs = tokenprune_hf.ask(processor, item.question, image=resized)
            with tokenprune_hf.prune(model, "divprune", kept):
                text = greedy(model, processor, inputs)
            record = known[f"resize+divprune@{keep}", f"scenes/{item.id}"]
            assert (record.visual_tokens, record.of_visual_tokens) == (kept, total)
            assert record.text == text


def test_what_cannot_be_resized_is_refused_before_the_run(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert evaluate(checkpoints["gemma3"], out, "--method", "resize", "--keep", "0.5") == 2
    said = capsys.readouterr().err
    assert "Gemma3Processor makes 16 visual tokens" in said
    assert "Leave resize out" in said
    assert evaluate(checkpoints["idefics3"], out, "--method", "resize", "--keep", "0.1") == 2
    assert "makes at least 16 of 80 visual tokens" in capsys.readouterr().err
    assert not out.exists()
    validate = ["eval", "validate", str(checkpoints["gemma3"]), "--data", "scenes"]
    assert main([*validate, "--method", "resize", "--out", str(out)]) != 0
    assert "whatever its size" in " ".join(capsys.readouterr().err.split())


# Videos and several pictures ---------------------------------------------------------------------


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """A file of 12 frames, each of another colour."""
    file = tmp_path / "video.mkv"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("ffv1", rate=Fraction(2))
        stream.width, stream.height, stream.pix_fmt = 48, 32, "bgr0"
        for frame in tiny.video(0, 12):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="bgr0")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return file


def test_of_a_video_there_are_fewer_frames(
    checkpoints: dict[str, Path], video: Path, tmp_path: Path
) -> None:
    data = tmp_path / "questions.jsonl"
    data.write_text(json.dumps({"video": str(video), "question": "what", "answer": "yes"}) + "\n")
    folder, out = checkpoints["qwen2_5_vl"], tmp_path / "run"
    methods = ["--method", "resize", "resize+uniform", "--keep", "0.5", "--frames", "12"]
    evaluate(folder, out, *methods, "--max-new-tokens", "16", data=str(data))
    known = {key: record for (key, _), record in records(out).items()}
    model, processor = tokenprune_hf.load(str(folder))
    seen = read_video(video, 12)
    chosen = [round(place) for place in np.linspace(0, 11, 6)]
    fewer = tokenprune_hf.Video(
        seen.frames[chosen],
        seen.times[chosen],
        seen.indices[chosen],
        *(seen.total, seen.duration, seen.path, seen.backend),
    )
    inputs = tokenprune_hf.ask(processor, "what", video=fewer)
    assert known["resize@0.5"].text == greedy(model, processor, inputs)
    total = known["unpruned"].visual_tokens or 0
    assert known["resize@0.5"].visual_tokens == total // 2
    assert known["resize@0.5"].of_visual_tokens == total
    # 9 frames come nearest to 12 times the root of a half, and go in pairs: 8.
    assert known["resize+uniform@0.5"].visual_tokens == total // 2
    resized = tokenprune_hf.resize(model, processor, seen, 0.5, halfway=True)
    assert resized.tokens == total * 8 // 12


def test_several_pictures_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        tiny.image(number).save(tmp_path / f"{number}.png")
    line = {"images": ["0.png", "1.png"], "question": "what", "answer": "yes"}
    data = tmp_path / "questions.jsonl"
    data.write_text(json.dumps(line) + "\n")
    arguments = ["--method", "resize", "--keep", "0.5"]
    assert evaluate("bundled", tmp_path / "run", *arguments, data=str(data)) == 2
    assert "resize makes one image smaller" in capsys.readouterr().err


# Settings ---------------------------------------------------------------------------------------


def test_options_are_those_of_the_method() -> None:
    base = {"model": "bundled", "data": ["scenes"], "out": "run", "keep": [0.5]}
    given = {"method": ["resize+information"], "options": {"information": {"noise": 0.5}}}
    settings = read_settings(base | given)
    (_, condition) = settings.conditions()
    assert settings.pruning(condition).options == {"noise": 0.5}
    settings.check_methods()
    with pytest.raises(ConfigError, match="not among the methods"):
        read_settings(base | {"method": ["resize"], "options": {"information": {}}})
    for name in ("resize+nothing", "resize+", "resize+resize"):
        with pytest.raises(UnknownMethodError):
            read_settings(base | {"method": [name]}).check_methods()


def test_a_picture_is_resized_once_whatever_the_positions() -> None:
    given = {"model": "bundled", "data": ["scenes"], "out": "run", "keep": [0.5, 1.0]}
    given |= {"method": ["resize", "resize+uniform"], "proportional_attention": "both"}
    keys = [one.key for one in read_settings(given | {"positions": "compact"}).conditions()]
    assert keys == [
        *("unpruned", "resize@0.5", "resize+uniform@0.5,compact"),
        "resize+uniform@0.5,compact,proportional",
    ]


def test_what_has_another_budget_is_refused_beside_it() -> None:
    given = {"model": "bundled", "data": ["scenes"], "out": "run"}
    with pytest.raises(ConfigError, match="leave out resize, or scope"):
        read_settings(given | {"method": ["resize"], "scope": "image"})
    with pytest.raises(ConfigError, match="name resize and fastv apart"):
        read_settings(given | {"method": ["resize+fastv"]})


def test_a_server_cannot_be_asked_for_it() -> None:
    given = {"model": "bundled", "data": ["scenes"], "out": "run", "method": ["resize"]}
    given |= {"engine": "openai", "base_url": "http://127.0.0.1:1/v1"}
    with pytest.raises(ConfigError, match="resize needs the engine hf or vllm"):
        read_settings(given)
