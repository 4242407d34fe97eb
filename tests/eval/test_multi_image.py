"""The script that trains, evaluates and compares with many images in a prompt."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx", reason="the bundled model needs the extra `eval`")
pytest.importorskip("rich", reason="the tables of the benchmarks need the extra `demo`")

import torch
from PIL import Image
from safetensors.torch import load_file

import tokenprune_hf
from tests.script_modules import imported
from tokenprune_eval.bundled import scenes
from tokenprune_eval.bundled.model import TRAINED_FILE, WEIGHTS, bundled_model_path


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    with imported("multi_image") as module:
        yield module


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Any]:
    return tokenprune_hf.load(str(bundled_model_path()))


def test_answers_and_log_probabilities_are_those_of_each_question_alone(
    script: Any, bundled: tuple[Any, Any]
) -> None:
    """In a batch, with encoded images, against the whole prompt with its pixels."""
    model, processor = bundled
    asked = script.test_prompts(6, 3)
    assert len({len(one.text.split()) for one in asked}) > 1  # so some are padded
    encoded = script.encode_images(model, processor, {i for one in asked for i in one.images})
    for found, one in zip(script.said_here(model, processor, asked, encoded), asked, strict=True):
        inputs = processor(
            text=script.chat(processor, one),
            images=[Image.open(file) for file in one.images],
            return_tensors="pt",
        )
        read = dict(inputs)
        for token, scores in zip(found.tokens, found.scores, strict=True):
            with torch.inference_mode():
                right = model(**read).logits[0, -1].log_softmax(dim=-1)
            assert token == int(right.argmax())
            assert list(scores.values()) == pytest.approx(right.tolist(), abs=1e-3)
            read["input_ids"] = torch.cat([read["input_ids"], torch.tensor([[token]])], dim=1)
            read["attention_mask"] = torch.ones_like(read["input_ids"])
        assert processor.decode(found.tokens, skip_special_tokens=True).strip() == found.text


def test_answers_of_two_engines_are_compared_as_far_as_both_read_the_same(script: Any) -> None:
    one = script.Said("red", (5, 1), ({5: -0.1, 6: -2.5, 7: -9.0}, {1: -0.25, 5: -3.0}))
    near = script.Said("red", (5, 1), ({5: -0.25, 6: -2.5}, {1: -0.5, 9: -1.0}))
    assert script.apart(one, near) == 0.25  # 7 and 9 are known on one side only
    assert script.difference(one, near) == ""
    # Behind the second token, which is another one, they have not read the same.
    other = script.Said(
        "red red", (5, 5, 1), ({5: -0.1, 6: -2.5}, {1: -0.875, 5: -0.75}, {1: -90.0})
    )
    longer = script.Said("red", (5, 1, 1), (*one.scores, {1: -0.5}))
    assert script.apart(longer, other) == 2.25
    assert script.difference(one, other) == (
        "'red' here, ahead by 2.8e+00; 'red red' in vLLM, ahead by 1.2e-01"
    )
    unknown = script.Said("blue", (6, 1), ({6: -0.5}, {1: -0.1}))
    assert script.difference(one, unknown).endswith("in vLLM, ahead by inf")
    assert "one goes on" in script.difference(one, script.Said("red", (5,), one.scores[:1]))


def test_a_step_of_training_moves_the_weights_that_are_written(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From encoding scenes to a folder that is a model; the encoder stays as it was."""
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    out = tmp_path / "weights"
    numbers = {"scenes": 8, "validation": 8, "workers": 1, "steps": 2, "images": 8}
    options = [text for name, value in numbers.items() for text in (f"--{name}", str(value))]
    arguments = ["train", "--work", str(tmp_path / "work"), "--out", str(out), *options]
    monkeypatch.setattr(sys, "argv", ["multi_image.py", *arguments])
    script.main()
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(("before: 2 images", "validation: 2 images")) for line in lines) == 2
    before, after = load_file(WEIGHTS / TRAINED_FILE), load_file(out / TRAINED_FILE)
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert torch.isfinite(tensor).all()
        moved = (tensor - before[name]).abs().max()
        assert moved < 0.05, name
        # Two steps of the warm-up move a factor of about 1 by less than float16 shows.
        assert moved > 0 or tensor.ndim == 1, name
    assert json.loads((out / "training.json").read_text("utf-8"))["steps"] == "2"
    features = np.load(tmp_path / "work" / "scenes-train-0-8.npy")
    assert features.shape == (8, 256, 384)
    assert math.isfinite(float(np.abs(features.astype(np.float32)).max()))
    assert bundled_model_path(tmp_path / "cache", weights=out).is_dir()


def test_prompts_of_the_test_have_the_question_s_image_at_its_number(script: Any) -> None:
    by_text = {(one.question, one.image): one.answer for one in scenes.load_scenes()}
    for images in (2, 8):
        asked = script.test_prompts(20, images)
        assert len(asked) == 20
        for one in asked:
            number, question = one.text.removeprefix("in image ").split(" : ", 1)
            assert len(set(one.images)) == len(one.images) == images
            assert by_text[question, one.images[int(number) - 1]] == one.answer
