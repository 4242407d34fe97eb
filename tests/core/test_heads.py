"""The heads file: what is written is read again, and whatever is wrong with it is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from tokenprune.errors import InputFileError, LayoutError
from tokenprune.masks import HeadCategories, ImageSpan, ModelIdentity, PromptLayout, Thresholds

MODEL = ModelIdentity("qwen2_vl", 2, 3, 1, 64, (0.5, -1.25, 2.0, 1e-3))
HEADS = HeadCategories(
    model=MODEL,
    categories=(("sink", "intra", "dense"), ("intra+sink", "sink", "sink")),
    sinks=(0, 3, -1),
    thresholds=Thresholds((0.9, 0.7), 0.25, 0.75, 0.5),
    density=0.4375,
    block=64,
    prompts=5,
)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "new" / "heads.json"
    HEADS.save(file)
    assert HeadCategories.load(file) == HEADS
    assert [one.name for one in file.parent.iterdir()] == ["heads.json"]
    again = replace(HEADS, prompts=6)
    again.save(str(file))
    assert HeadCategories.load(str(file)) == again


@pytest.mark.parametrize(
    "damage",
    [
        lambda values: values.pop("sinks"),
        lambda values: values.update(more=1),
        lambda values: values.update(block="128"),
        lambda values: values.update(prompts=1.5),
        lambda values: values.update(density=None),
        lambda values: values.update(sinks=[0, "first"]),
        lambda values: values.update(sinks=[0.5]),
        lambda values: values.update(model=[1, 2]),
        lambda values: values["model"].pop("sample"),
        lambda values: values["model"].update(layers="2"),
        lambda values: values["model"].update(layers=3),
        lambda values: values["thresholds"].update(alpha=[0.9]),
        lambda values: values["thresholds"].update(alpha=0.9),
        lambda values: values["thresholds"].update(dense="much"),
        lambda values: values["categories"].pop(),
        lambda values: values["categories"][0].pop(),
        lambda values: values["categories"][0].append("sink"),
        lambda values: values["categories"].__setitem__(0, ["sink", "intra", "sparse"]),
        lambda values: values["categories"].__setitem__(0, ["sink", "intra", ["dense"]]),
        lambda values: values.update(categories="sink"),
    ],
)
def test_a_damaged_file_is_refused(damage: Callable[[Any], Any], tmp_path: Path) -> None:
    file = tmp_path / "heads.json"
    HEADS.save(file)
    values = json.loads(file.read_text())
    damage(values)
    file.write_text(json.dumps(values))
    with pytest.raises(InputFileError, match=r"damaged heads file.*calibrate-heads MODEL"):
        HeadCategories.load(file)


def test_what_is_no_heads_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "heads.json"
    HEADS.save(file)
    values = json.loads(file.read_text())
    for other in ({"method": "uniform"}, [values], 3):
        file.write_text(json.dumps(other))
        with pytest.raises(InputFileError, match="no heads file"):
            HeadCategories.load(file)
    file.write_text(json.dumps({**values, "format": 2}))
    with pytest.raises(InputFileError, match=r"format 2 .*newer version.*calibrate-heads MODEL"):
        HeadCategories.load(file)
    del values["format"]
    file.write_text(json.dumps(values))
    assert HeadCategories.load(file) == HEADS
    HEADS.save(file)
    for raw in (b"", file.read_bytes()[:-20], b"\xff\xfe"):
        file.write_bytes(raw)
        with pytest.raises(InputFileError, match="cannot be read as JSON"):
            HeadCategories.load(file)
    for missing in (tmp_path / "none.json", tmp_path):
        with pytest.raises(InputFileError, match="cannot be read as JSON"):
            HeadCategories.load(missing)


def test_models_are_told_apart() -> None:
    assert MODEL.differences(MODEL) == []
    near = replace(MODEL, sample=(0.501, -1.25, 2.01, 0.0))
    assert MODEL.differences(near) == []
    for sample in ((2.0, 0.5, -1.25, 1e-3), (0.5, -1.25, 2.0), (0.0,) * 4, (float("nan"),) * 4):
        assert MODEL.differences(replace(MODEL, sample=sample)) == ["its weights are others"]
    other = replace(MODEL, layers=3, model_type="gemma3")
    assert MODEL.differences(other) == [
        "model_type is 'qwen2_vl', not 'gemma3'",
        "layers is 2, not 3",
    ]


def test_sinks_are_laid_into_every_image() -> None:
    images = (ImageSpan(1, 11), ImageSpan(12, 14), ImageSpan(20, 25))
    layout = HEADS.layout(30, images)
    # The image of two tokens has no place 3; its place 0 is not its place -1.
    assert layout == PromptLayout(30, images, (1, 4, 10, 12, 13, 20, 23, 24))
    assert replace(HEADS, sinks=()).layout(30, images).sinks == ()


def test_counts_and_wrong_categories() -> None:
    assert HEADS.counts() == {"sink": 3, "intra": 1, "intra+sink": 1, "dense": 1}
    with pytest.raises(LayoutError, match="2 layers of 3"):
        replace(HEADS, categories=HEADS.categories[:1])
    with pytest.raises(LayoutError, match="1 alphas"):
        replace(HEADS, thresholds=Thresholds((0.9,), 0.25, 0.75, 0.5))
    with pytest.raises(LayoutError, match=r"\['sparse'\] are no categories"):
        replace(HEADS, categories=cast(Any, (("sink", "sparse", "dense"),) * 2))
