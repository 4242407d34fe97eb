"""`scripts/real_lm_tables.py`: what it looks at in a model, on a few questions to the small one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("scipy", reason="rank correlations need scipy")

import tokenprune_hf
from tests.script_modules import imported
from tokenprune_eval.bundled import scenes


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    with imported("real_lm_tables") as module:
        yield module


def test_recall_is_that_of_what_flexselect_keeps(script: Any) -> None:
    model, processor = tokenprune_hf.load("bundled")
    model.set_attn_implementation("eager")
    question = next(one for one in scenes.load_scenes() if one.type == "kind")
    with torch.inference_mode():
        rows = script.of_question(model, processor, question)
    assert len(rows) == 4
    image = Image.open(question.image)
    shown = script.evidence_mask(question.evidence, script.image_size(question.image), (8, 8))
    count = int(shown.sum())
    inputs = tokenprune_hf.ask(processor, question.question, image=image)
    for layer, row in enumerate(rows):
        for name, drop in (("recall", False), ("recall_without_sinks", True)):
            options: dict[str, Any] = {"layer": layer, "drop_sinks": drop}
            with tokenprune_hf.prune(model, "flexselect", keep=count, **options) as pruning:
                model.generate(**inputs, max_new_tokens=1, do_sample=False)
            (kept,) = pruning.selections
            assert row[name] == pytest.approx(float(shown[kept.kept].sum()) / count)
        assert 0 < row["first"] + row["visual"] < 1


def test_what_is_seen_becomes_tables(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(script, "BUNDLED_MODELS", ("bundled",))
    monkeypatch.setattr(script, "HAYSTACKS", script.HAYSTACKS[:1])
    monkeypatch.setattr(script, "default_cache_dir", lambda: tmp_path)
    for name in ("LOOKED_AT", "PAIRS", "CALIBRATED"):
        monkeypatch.setattr(script, name, 2)
    script.look(tmp_path / "look")
    seen = {"bundled": script.Seen.read(tmp_path / "look", "bundled")}
    lines = script.layers(seen).splitlines()
    assert [line.split(" | ")[0] for line in lines[-4:]] == ["| 0", "| 1", "| 2", "| 3"]
    assert all(line.count("|") == 11 for line in lines[2:])
    heads = seen["bundled"].heads
    assert sum(heads["categories"].values()) == 16
    assert 0 <= heads["right"] <= heads["questions"] == 2
    assert "`bundled`" in script.heads_table(seen)
