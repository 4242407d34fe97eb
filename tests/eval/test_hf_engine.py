"""The engine `hf` on the bundled model: what it says of a question, and what it keeps for later."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("pydantic", reason="evaluating needs the extra `eval`")

import tokenprune_hf
from tokenprune.errors import ConfigError, InputFileError, UnsupportedModelError
from tokenprune.media.images import load_image
from tokenprune_eval.bundled.model import bundled_model_path
from tokenprune_eval.data.load import load_data
from tokenprune_eval.data.question import Question
from tokenprune_eval.dominance import measure_dominance
from tokenprune_eval.evaluation.engines.base import EngineAnswer
from tokenprune_eval.evaluation.engines.transformers import TransformersEngine
from tokenprune_eval.evaluation.read_ahead import by_media, read_ahead
from tokenprune_eval.evaluation.runner import run
from tokenprune_eval.evaluation.scoring import likeliest, prompt_of
from tokenprune_eval.evaluation.settings import Settings
from tokenprune_eval.results.files import read_run
from tokenprune_eval.results.records import Condition, ModalityIndices, Record
from tokenprune_eval.results.summary import QuestionInfo, Results, summarise
from tokenprune_eval.shared.output import OutputError


class Silent:
    """A progress that tells nobody."""

    def plan(self, total: int, done: int) -> None: ...

    def at(self, text: str) -> None: ...

    def advance(self, answers: int) -> None: ...


def settings(folder: Path, **more: Any) -> Settings:
    given = {"model": "bundled", "data": ["scenes"], "out": folder / "out", "memory": 0, **more}
    return Settings.model_validate(given)


def questions(count: int) -> list[Question]:
    return list(load_data("scenes").questions[:count])


def answered(wanted: Settings, items: Sequence[Question]) -> dict[tuple[str, str], EngineAnswer]:
    """Return what an engine says to questions, by condition and question."""
    engine = TransformersEngine(wanted)
    found: dict[tuple[str, str], EngineAnswer] = {}
    try:
        media = list(read_ahead(by_media(items), wanted, prompt_of, engine.prepare))
        assert not [one.error for one in media if one.error]
        engine.begin(media)
        for condition in wanted.conditions():

            def done(item: Question, said: EngineAnswer, key: str = condition.key) -> None:
                assert (key, item.id) not in found
                found[key, item.id] = said

            engine.answer(media, items, condition, done)
    finally:
        engine.close()
    assert len(found) == len(items) * len(wanted.conditions())
    return found


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], EngineAnswer]:
    wanted = settings(
        tmp_path_factory.mktemp("alone"), method=["cls-attention", "flexselect"], keep=[0.25]
    )
    return answered(wanted, questions(8))


def test_a_batch_says_what_its_questions_say_alone(
    one_by_one: dict[tuple[str, str], EngineAnswer], tmp_path: Path
) -> None:
    wanted = settings(
        tmp_path, method=["cls-attention", "flexselect"], keep=[0.25], batch=4, workers=2
    )
    together = answered(wanted, questions(8))
    assert set(together) == set(one_by_one)
    for key, alone in one_by_one.items():
        said = together[key]
        assert said.error is None
        assert (said.text, said.batch, alone.batch) == (alone.text, 4, 1)
        assert (said.prompt_tokens, said.answer_tokens) == (
            alone.prompt_tokens,
            alone.answer_tokens,
        )
        assert said.kept is not None
        assert alone.kept is not None
        np.testing.assert_array_equal(said.kept, alone.kept)
        assert said.kv_bytes == alone.kv_bytes
        if alone.mass_kept is None:
            assert said.mass_kept is None
        else:
            assert said.mass_kept == pytest.approx(alone.mass_kept, rel=1e-4)
    kept = [said.kept for said in together.values() if said.kept is not None]
    assert {len(one) for one in kept} == {16, 64}
    # Of two methods: were one run under both names, this would not hold.
    assert any(
        not np.array_equal(
            together["cls-attention@0.25", item.id].kept,  # type: ignore[arg-type]
            together["flexselect@0.25", item.id].kept,  # type: ignore[arg-type]
        )
        for item in questions(8)
    )


def test_methods_inside_the_language_model_cost_what_each_layer_reads(tmp_path: Path) -> None:
    methods = ["fastv", "pyramid-drop", "sparsevlm"]
    asked = questions(4)
    alone = answered(settings(tmp_path / "1", method=methods, keep=[0.25]), asked)
    batched = settings(tmp_path / "2", method=methods, keep=[0.25], batch=4, workers=2)
    together = answered(batched, asked)
    whole = [said for (key, _), said in alone.items() if key == "unpruned"]
    # 4 layers: 64 tokens of an image are read up to layer 2 of fastv, and so on.
    for method, layers in (
        ("fastv", [64, 64, 16, 16]),
        ("pyramid-drop", [64, 40, 25, 16]),
        ("sparsevlm", [64, 36, 25, 16]),
    ):
        found = [said for (key, _), said in alone.items() if key.startswith(method)]
        assert len(found) == len(asked)
        for said, unpruned in zip(found, whole, strict=True):
            assert said.error is None
            assert said.visual_tokens == round(sum(layers) / 4)
            assert said.kept is not None
            assert len(said.kept) == 16
            assert said.prompt_tokens is not None
            assert unpruned.prompt_tokens is not None
            assert unpruned.kv_bytes is not None
            text = unpruned.prompt_tokens - 64
            share = sum(text + one for one in layers) / 4 / (text + 64)
            assert said.kv_bytes == pytest.approx(unpruned.kv_bytes * share, rel=1e-3)
            assert said.mass_kept is not None
            assert 0.25 < said.mass_kept < 1.0
    for key, said in alone.items():
        assert together[key].text == said.text
        assert together[key].kv_bytes == said.kv_bytes
    with pytest.raises(ValueError, match="with fastv tokens leave inside the language model"):
        settings(tmp_path, method=["fastv"], dominance=1)


def test_costs_add_up(one_by_one: dict[tuple[str, str], EngineAnswer]) -> None:
    text = json.loads((bundled_model_path() / "config.json").read_text("utf-8"))["text_config"]
    head = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    per_token = text["num_hidden_layers"] * 2 * text["num_key_value_heads"] * head * 4  # float32
    for (key, _), said in one_by_one.items():
        seconds = said.seconds
        assert seconds.encode is not None
        assert seconds.select is not None
        assert seconds.prefill is not None
        assert seconds.decode is not None
        assert min(seconds.encode, seconds.select, seconds.prefill, seconds.decode) > 0
        first = seconds.encode + seconds.select + seconds.prefill
        assert seconds.first_token == pytest.approx(first)
        assert seconds.total == pytest.approx(first + seconds.decode)
        assert said.prompt_tokens is not None
        assert said.kv_bytes == per_token * said.prompt_tokens
        assert said.visual_tokens == (64 if key == "unpruned" else 16)
        assert said.prompt_tokens > said.visual_tokens


@pytest.fixture(scope="module")
def with_letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with four colours of its vocabulary called A to D."""
    folder = tmp_path_factory.mktemp("letters") / "model"
    shutil.copytree(bundled_model_path(), folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    content["normalizer"] = None  # it makes letters small
    words = content["model"]["vocab"]
    for letter, colour in zip("ABCD", ("red", "blue", "green", "yellow"), strict=True):
        words[letter] = words.pop(colour)
    file.write_text(json.dumps(content), "utf-8")
    return folder


def test_likelihoods_are_those_of_the_first_token(with_letters: Path, tmp_path: Path) -> None:
    items = [
        replace(item, choices=("a", "two", "no", "is")[: 3 + place % 2], answer="A")
        for place, item in enumerate(questions(8))
    ]
    wanted = settings(tmp_path, model=str(with_letters), method=["uniform"], keep=[0.5], batch=4)
    found = answered(wanted, items)
    model, processor = tokenprune_hf.load(str(with_letters))
    likely = set()
    for item in items:
        inputs = tokenprune_hf.ask(processor, prompt_of(item), image=load_image(item.path))
        ids = [processor.tokenizer.vocab[letter] for letter in "ABCD"[: len(item.choices)]]
        for key, keep in (("unpruned", 1.0), ("uniform@0.5", 0.5)):
            with torch.inference_mode(), tokenprune_hf.prune(model, "uniform", keep):
                (shares,) = model(**inputs).logits[:, -1].softmax(dim=-1)
                # What greedy decoding says if it may say letters only.
                chosen = model.generate(
                    **inputs,
                    max_new_tokens=1,
                    do_sample=False,
                    prefix_allowed_tokens_fn=lambda *_, ids=ids: ids,
                )
            known = found[key, item.id].likelihoods
            assert known is not None
            assert "".join(known) == "ABCD"[: len(item.choices)]
            assert 0 < sum(map(math.exp, known.values())) <= 1
            assert list(map(math.exp, known.values())) == pytest.approx(
                shares[ids].tolist(), rel=1e-3, abs=1e-9
            )
            assert likeliest(known) == processor.decode(chosen[0, -1:])
            likely.add(likeliest(known))
    assert len(likely) > 1


def evaluated(wanted: Settings) -> Results:
    return run(wanted, Silent())


@pytest.fixture
def encoder_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How often the vision tower of any model that an engine loads has run."""
    calls: list[str] = []
    load = TransformersEngine.__init__

    def watched(engine: TransformersEngine, wanted: Settings) -> None:
        load(engine, wanted)
        tower = engine.model.model.vision_tower
        tower.register_forward_hook(lambda *_: calls.append("encoded"))

    monkeypatch.setattr(TransformersEngine, "__init__", watched)
    return calls


def test_a_second_run_reads_what_the_first_encoded(
    tmp_path: Path, encoder_calls: list[str]
) -> None:
    cache = tmp_path / "a" / "cache"
    shared: dict[str, Any] = {"limit": 6, "cache": cache}
    first = settings(tmp_path / "1", method=["uniform"], keep=[0.5], **shared)
    second = settings(
        tmp_path / "2", method=["cls-attention", "zeroth-order", "flexselect"], keep=[8], **shared
    )
    plain = settings(tmp_path / "3", method=second.method, keep=[8], limit=6)
    for one in (first, second, plain):
        assert evaluated(one).complete
        files = len(list(cache.iterdir()))
        assert len(encoder_calls) == (files if one is not plain else 2 * files)
    assert files == len({item.path for item in read_run(first.out).questions})
    said = [
        {(one.condition, one.item): (one.text, one.mass_kept) for one in read_run(of.out).records}
        for of in (second, plain)
    ]
    assert said[0] == said[1]
    encode = [
        {one.item: one.seconds.encode for one in read_run(of.out).records} for of in (first, second)
    ]
    assert encode[0] == encode[1]
    # Another model does not take them for its own.
    other = tmp_path / "other"
    shutil.copytree(bundled_model_path(), other)
    config = json.loads((other / "config.json").read_text("utf-8"))
    config["vision_config"]["layer_norm_eps"] = 1e-5
    (other / "config.json").write_text(json.dumps(config), "utf-8")
    evaluated(settings(tmp_path / "4", model=str(other), **shared))
    assert len(encoder_calls) == 3 * files
    assert len(list(cache.iterdir())) == 2 * files


def test_a_damaged_or_unwritable_cache_is_named(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    wanted = settings(tmp_path, limit=1, cache=cache)
    evaluated(wanted)
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    again = wanted.model_copy(update={"out": tmp_path / "again"})
    with pytest.raises(InputFileError, match=f"{file.name} is damaged.* Delete it"):
        evaluated(again)
    file.unlink()
    assert evaluated(again).complete
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Give another folder with --cache"):
        TransformersEngine(settings(tmp_path, cache=tmp_path / "file"))


def test_dominance_is_that_of_the_question_alone(tmp_path: Path) -> None:
    wanted = settings(
        tmp_path, method=["cls-attention"], keep=[0.25], limit=4, batch=4, dominance=2
    )
    results = evaluated(wanted)
    known = read_run(wanted.out)
    measured = {one.item for one in known.records if one.dominance is not None}
    assert measured == {item.id for item in known.questions[:2]}
    model, processor = tokenprune_hf.load(str(bundled_model_path()))
    for row, keep in zip(results.rows, (1.0, 0.25), strict=True):
        found = []
        for item in known.questions[:2]:
            inputs = tokenprune_hf.ask(processor, item.question, image=load_image(item.path))
            with (
                tokenprune_hf.prune(model, "cls-attention", keep),
                measure_dominance(model) as dominance,
            ):
                model.generate(**inputs, max_new_tokens=16, do_sample=False)
            found.append(dominance.result)
            (record,) = (
                one
                for one in known.records
                if (one.item, one.condition) == (item.id, row.condition)
            )
            assert record.dominance is not None
            assert list(record.dominance) == ["early", "middle", "late"]
            for part, indices in record.dominance.items():
                mean = found[-1].mean(part)
                assert indices.mdi == pytest.approx(mean.mdi, rel=1e-3)
                assert indices.aei_text == pytest.approx(mean.aei_text, rel=1e-3)
                assert indices.aei_visual == pytest.approx(mean.aei_visual, rel=1e-3)
        assert row.dominance is not None
        assert row.dominance.questions == 2
        late = [one.mean("late").mdi for one in found]
        assert row.dominance.late.mdi == pytest.approx(sum(late) / 2, rel=1e-3)
    # Nothing else changes: the same run without it says the same.
    without = wanted.model_copy(update={"out": tmp_path / "without", "dominance": 0})
    assert all(row.dominance is None for row in evaluated(without).rows)
    texts = [
        {(one.condition, one.item): one.text for one in read_run(of).records}
        for of in (wanted.out, without.out)
    ]
    assert texts[0] == texts[1]


def test_dominance_that_cannot_be_measured_stops_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="Give --max-new-tokens 2 or more"):
        evaluated(settings(tmp_path / "short", dominance=1, max_new_tokens=1))
    # The bundled checkpoint in a decoder that sees the last few tokens only.
    windowed = tmp_path / "windowed"
    shutil.copytree(bundled_model_path(), windowed)
    config = json.loads((windowed / "config.json").read_text("utf-8"))
    config["text_config"].update(
        use_sliding_window=True,
        sliding_window=16,
        max_window_layers=0,
        layer_types=["sliding_attention"] * 4,
    )
    (windowed / "config.json").write_text(json.dumps(config), "utf-8")
    wanted = settings(tmp_path, model=str(windowed), dominance=1)
    with pytest.raises(UnsupportedModelError, match="sees the last 16 tokens only"):
        evaluated(wanted)
    assert not (wanted.out / "run.json").exists()  # nothing was begun


def test_infinite_dominance_has_no_number() -> None:
    even = ModalityIndices.of(1.0, 1.0, 1.0)
    blind = ModalityIndices.of(math.inf, 4.0, 0.0)
    infos = [QuestionInfo.of("set", item) for item in questions(3)]
    records = [
        Record(
            item=info.id,
            condition="unpruned",
            text="yes",
            correct=True,
            dominance=None if late is None else {"early": even, "middle": even, "late": late},
        )
        for info, late in zip(infos, (even, blind, None), strict=True)
    ]
    lines = [one.model_dump_json(exclude_none=True, exclude_defaults=True) for one in records]
    assert "Infinity" not in "".join(lines)
    again = [Record.model_validate_json(line) for line in lines]
    assert again == records
    (row,) = summarise({}, infos, [Condition(method="unpruned", keep=1.0)], again).rows
    assert row.dominance is not None
    assert row.dominance.questions == 2
    assert row.dominance.early == even
    assert row.dominance.late == ModalityIndices(mdi=None, aei_text=2.5, aei_visual=0.5)
