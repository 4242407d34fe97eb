"""One odd question ends nothing; a run in which nothing can be answered ends with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pydantic", reason="evaluating needs the extra `eval`")

import torch
from PIL import Image

import tokenprune_hf
from tests.eval.test_openai import Faulty, Quiet, questions, records_of, serving
from tests.eval.test_openai import settings as server_settings
from tokenprune.errors import ConfigError, MissingPackageError, TokenPruneError
from tokenprune.media.video import Video
from tokenprune_eval.data.load import load_data
from tokenprune_eval.data.question import Question
from tokenprune_eval.evaluation import runner
from tokenprune_eval.evaluation.engines.base import Done, EngineAnswer, MediaQuestions
from tokenprune_eval.evaluation.engines.openai import ServerError
from tokenprune_eval.evaluation.engines.transformers import TransformersEngine
from tokenprune_eval.evaluation.failures import EngineLostError, alike, failure_of
from tokenprune_eval.evaluation.read_ahead import by_media, read_ahead
from tokenprune_eval.evaluation.runner import GIVE_UP, EvaluationError, run
from tokenprune_eval.evaluation.scoring import prompt_of
from tokenprune_eval.evaluation.settings import Settings
from tokenprune_eval.results.files import read_run
from tokenprune_eval.results.records import UNPRUNED, Condition, Record
from tokenprune_eval.results.summary import read_results
from tokenprune_eval.shared.output import OutputError

Rule = Callable[[Question, Condition], str | None]
"""What goes wrong with a question under a condition; None where it is answered."""


class Stub:
    """An engine that says the right answer, but for what its rule refuses."""

    def __init__(self, rule: Rule, odd: Sequence[str] = ()) -> None:
        self.rule, self.odd = rule, odd
        self.media_at_once = {"image": 4, "video": 1}

    def about(self) -> dict[str, Any]:
        return {}

    def prepare(self, asked: MediaQuestions) -> None:
        for item in asked.questions:
            if item.question in self.odd:
                raise ValueError(f"no such prompt: {item.question}")

    def begin(self, media: Sequence[MediaQuestions]) -> None:
        for one in media:
            if one.questions[0].question == "cannot be encoded":
                one.error = "RuntimeError: odd pixels"

    def answer(
        self,
        media: Sequence[MediaQuestions],
        wanted: Sequence[Question],
        condition: Condition,
        done: Done,
    ) -> None:
        for item in wanted:
            error = self.rule(item, condition)
            done(item, EngineAnswer(text="" if error else item.answer, error=error))

    def peak_bytes(
        self, media: Sequence[MediaQuestions], item: Question, condition: Condition
    ) -> int | None:
        raise ValueError("no peak for odd questions")

    def close(self) -> None:
        pass


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Return a data set of 12 pictures with two questions each."""
    lines = []
    for number in range(12):
        Image.new("RGB", (16, 16), "red").save(tmp_path / f"{number}.png")
        lines += [
            {"image": f"{number}.png", "question": f"what {ask} {number}?", "answer": "red"}
            for ask in ("color", "shape")
        ]
    file = tmp_path / "set.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def settings(file: Path, **more: Any) -> Settings:
    values = {"model": "stub", "data": [str(file)], "method": ["uniform"], "keep": [0.5]}
    return Settings.model_validate({**values, "out": file.parent / "out", **more})


def use(monkeypatch: pytest.MonkeyPatch, rule: Rule, odd: Sequence[str] = ()) -> None:
    monkeypatch.setattr(runner, "build_engine", lambda settings: Stub(rule, odd))
    monkeypatch.setattr(runner, "check_before_model", lambda settings, sets: None)  # no checkpoint


def records(file: Path) -> list[Record]:
    return read_run(file.parent / "out").records


def fine(item: Question, condition: Condition) -> None:
    return None


def test_one_odd_question_is_recorded_and_the_others_answered(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rule(item: Question, condition: Condition) -> str | None:
        odd = item.question == "what color 0?" and condition.method == UNPRUNED
        return "too long" if odd else None

    use(monkeypatch, rule, odd=["what shape 1?"])
    results = run(settings(pictures), Quiet())
    found = {(one.item, one.condition): one.error for one in records(pictures)}
    assert len(found) == 48
    failed = {key: error for key, error in found.items() if error}
    assert failed == {
        ("set/set-1", "unpruned"): "too long",
        ("set/set-4", "unpruned"): "ValueError: no such prompt: what shape 1?",
        ("set/set-4", "uniform@0.5"): "ValueError: no such prompt: what shape 1?",
    }
    (unpruned, pruned) = results.rows
    assert (unpruned.answered, unpruned.errors, pruned.answered, pruned.errors) == (22, 2, 23, 1)
    assert results.data[0].failed == 2
    assert pruned.against_unpruned
    assert pruned.against_unpruned.questions == 22
    page = (pictures.parent / "out" / "report.html").read_text("utf-8")
    assert "no such prompt: what shape 1?" in page
    assert "too long" in page
    # Failed questions count as done, unless they are to be asked again.
    use(monkeypatch, fine)
    assert read_results(pictures.parent / "out").rows[0].errors == 2
    assert [row.errors for row in run(settings(pictures), Quiet()).rows] == [2, 1]
    assert [row.errors for row in run(settings(pictures, retry_errors=True), Quiet()).rows] == [
        0,
        0,
    ]


def test_what_cannot_be_encoded_fails_under_every_condition(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = pictures.read_text().replace("what color 3?", "cannot be encoded")
    pictures.write_text(lines)
    use(monkeypatch, fine)
    results = run(settings(pictures), Quiet())
    assert [row.errors for row in results.rows] == [2, 2]
    assert [(error.message, error.count) for error in results.errors] == [
        ("RuntimeError: odd pixels", 4)
    ]


def test_a_run_without_any_answer_ends_with_the_reason(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures.write_text("".join(pictures.read_text().splitlines(keepends=True)[:6]))
    asked: list[str] = []

    def refuse(item: Question, condition: Condition) -> str:
        asked.append(item.id)
        return f"nothing is answered, not even {item.question}"

    use(monkeypatch, refuse)
    with pytest.raises(
        EvaluationError, match="none of the 6 questions could be answered"
    ) as caught:
        run(settings(pictures), Quiet())
    assert "set/set-1: nothing is answered, not even what color 0?" in str(caught.value)
    assert len(asked) == 12
    assert not records(pictures)
    assert not (pictures.parent / "out" / "results.json").exists()
    # Nothing was recorded, so the same command asks again.
    use(monkeypatch, fine)
    assert run(settings(pictures), Quiet()).complete
    # Further questions that all fail do not take the results away.
    more = pictures.read_text().splitlines(keepends=True)
    extra = json.loads(more[0]) | {"question": "another?", "id": "late"}
    pictures.write_text("".join([*more, json.dumps(extra) + "\n"]))
    use(monkeypatch, lambda item, condition: "late")
    assert [row.errors for row in run(settings(pictures), Quiet()).rows] == [1, 1]


def test_pictures_that_all_fail_alike_end_the_run_early(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def refuse(item: Question, condition: Condition) -> str:
        asked.append(item.question)
        return f"no room for {len(asked)} tokens"

    use(monkeypatch, refuse)
    with pytest.raises(EvaluationError, match="the first 12 images or videos could be answered"):
        run(settings(pictures), Quiet())
    assert not records(pictures)


def test_what_fails_unpruned_alone_does_not_end_the_run(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, lambda item, one: "too long" if one.method == UNPRUNED else None)
    unpruned, pruned = run(settings(pictures), Quiet()).rows
    assert (unpruned.errors, pruned.answered) == (24, 24)


def test_many_failures_after_an_answer_end_nothing(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, lambda item, one: None if item.question.endswith(" 0?") else "too long")
    assert GIVE_UP < 11
    assert [row.errors for row in run(settings(pictures), Quiet()).rows] == [22, 22]
    # Nor do they when they alone are asked again.
    again = run(settings(pictures, retry_errors=True), Quiet())
    assert [row.errors for row in again.rows] == [22, 22]
    assert again.complete


@pytest.mark.parametrize(
    "error",
    [
        OutputError("the disk is full"),
        MissingPackageError("av is not there"),
        EngineLostError("vLLM has stopped"),
    ],
)
def test_what_is_about_the_run_ends_it(error: TokenPruneError) -> None:
    with pytest.raises(type(error), match=str(error)):
        failure_of(error)


def test_reasons() -> None:
    assert failure_of(ConfigError("times lie behind the end.")) == "times lie behind the end."
    assert failure_of(ValueError("bad\n  pixels")) == "ValueError: bad pixels"
    assert failure_of(IndexError()) == "IndexError"
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB")):
        assert "not enough memory" in failure_of(error)
    with pytest.raises(EngineLostError, match="run the same command to continue"):
        failure_of(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert alike("12 tokens of 'a.png'") == alike("7 tokens of 'b.png'") != alike("7 words")


# The engines ------------------------------------------------------------------------------------


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[TransformersEngine]:
    values = {"model": "bundled", "data": ["scenes"], "out": tmp_path / "out", "batch": 8}
    made = TransformersEngine(Settings.model_validate({**values, "max_new_tokens": 4}))
    yield made
    made.close()


def media_of(engine: TransformersEngine, count: int) -> tuple[list[MediaQuestions], list[Question]]:
    items = list(load_data("scenes").questions[:count])
    return list(read_ahead(by_media(items), engine.settings, prompt_of, engine.prepare)), items


def said_by(
    engine: TransformersEngine, media: Sequence[MediaQuestions], items: Sequence[Question]
) -> dict[str, EngineAnswer]:
    said: dict[str, EngineAnswer] = {}
    condition = Condition(method=UNPRUNED, keep=1.0)
    engine.answer(media, items, condition, lambda item, one: said.update({item.id: one}))
    assert len(said) == len(items)
    return said


@pytest.mark.parametrize("error", [ValueError("odd prompt"), torch.OutOfMemoryError("too large")])
def test_a_batch_with_an_odd_question_answers_the_others(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    media, items = media_of(engine, 6)
    engine.begin(media)
    before = said_by(engine, media, items)
    assert all(one.error is None for one in before.values())
    ask = engine.ask

    def odd(questions: Any, *more: Any) -> list[EngineAnswer]:
        if any(one.question.id == items[2].id for one in questions):
            raise error
        return ask(questions, *more)

    monkeypatch.setattr(engine, "ask", odd)
    said = said_by(engine, media, items)
    assert str(error) in str(said.pop(items[2].id).error)
    assert {name: one.text for name, one in said.items()} == {
        item.id: before[item.id].text for item in items if item.id != items[2].id
    }


def test_a_picture_that_the_encoder_refuses_fails_alone(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    media, items = media_of(engine, 12)
    assert len(media) > 1
    encode, calls = tokenprune_hf.encode, []

    def odd(*given: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("odd pixels")
        return encode(*given, **more)

    monkeypatch.setattr(tokenprune_hf, "encode", odd)
    engine.begin(media)
    said = said_by(engine, media, items)
    errors = {name: one.error for name, one in said.items() if one.error}
    assert errors == {item.id: "RuntimeError: odd pixels" for item in media[0].questions}


def test_answers_are_cut_where_the_model_has_not_ended(engine: TransformersEngine) -> None:
    media, items = media_of(engine, 4)
    engine.begin(media)
    whole = said_by(engine, media, items)
    assert not any(one.cut for one in whole.values())
    engine.settings = engine.settings.model_copy(update={"max_new_tokens": 1})
    short = said_by(engine, media, items)
    assert all(one.cut and one.answer_tokens == 1 for one in short.values())


def test_a_server_that_goes_away_ends_the_run(tmp_path: Path) -> None:
    file = questions(tmp_path, 12)
    # From #5 on nothing is answered, the small question of the start included.
    with serving(Faulty(dies_at="#5 ")) as faulty:
        asking = server_settings(faulty.url, tmp_path, file, concurrency=1, retries=0)
        with pytest.raises(ServerError, match="does not answer"):
            run(asking, Quiet())
        found = records_of(tmp_path)
        assert [item for item, _ in found] == [f"q{number}" for number in range(5)]
        assert all(record.error is None for record in found.values())
        # It is back: the same command continues.
        faulty.dies_at, faulty.dead = "", False
        assert run(asking, Quiet()).complete
    assert len(records_of(tmp_path)) == 12


def test_a_server_tells_that_an_answer_was_cut(tmp_path: Path) -> None:
    file = questions(tmp_path, 3)
    with serving(Faulty(plan={"#1 ": ["length"]})) as faulty:
        (row,) = run(server_settings(faulty.url, tmp_path, file), Quiet()).rows
    assert (row.answered, row.cut, row.errors) == (2, 1, 0)
    assert records_of(tmp_path)["q1", UNPRUNED].cut is True


# Videos that are cut off -----------------------------------------------------------------------


def test_truncated_videos_are_read_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    av = pytest.importorskip("av")
    whole = tmp_path / "whole.mkv"
    with av.open(str(whole), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width = stream.height = 64
        stream.options = {"g": "5"}
        random = np.random.default_rng(0)
        for _ in range(60):
            picture = random.integers(0, 256, (64, 64, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
    (tmp_path / "cut.mkv").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    file = tmp_path / "set.jsonl"
    lines = [{"video": name, "question": name, "answer": "x"} for name in ("cut.mkv", "whole.mkv")]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    seen: dict[str, Video] = {}

    def prepare(self: Stub, asked: MediaQuestions) -> None:
        assert isinstance(asked.content, Video)
        seen[asked.questions[0].question] = asked.content

    monkeypatch.setattr(Stub, "prepare", prepare)
    use(monkeypatch, fine)
    results = run(settings(file, frames=4), Quiet())
    assert [row.errors for row in results.rows] == [1, 1]
    assert "--allow-truncated" in results.errors[0].message
    allowed = settings(file, frames=4, allow_truncated=True, out=tmp_path / "allowed")
    assert [row.errors for row in run(allowed, Quiet()).rows] == [0, 0]
    assert seen["cut.mkv"].duration < seen["whole.mkv"].duration
    # What was read otherwise does not go into one run.
    with pytest.raises(ConfigError, match="allow_truncated"):
        run(settings(file, frames=4, allow_truncated=True), Quiet())
