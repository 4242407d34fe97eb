"""The class behind ``--model tokenprune_hf``: what it reads, what it asks, when it stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tokenprune_hf
from tokenprune.errors import BudgetError, ConfigError, OptionError, PromptError
from tokenprune.media.images import load_image
from tokenprune_eval.bundled import needles, scenes
from tokenprune_eval.bundled.model import bundled_model_path
from tokenprune_lmms_eval.arguments import read_arguments
from tokenprune_lmms_eval.generation import MAX_NEW_TOKENS, read_generation
from tokenprune_lmms_eval.prompt import lay_out

from .there import run_there

GOOD: dict[str, Any] = {"pretrained": "m", "method": "cls-attention", "keep": 0.25}
LONG = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}


@pytest.fixture(scope="module")
def model_and_processor() -> tuple[Any, Any]:
    return tokenprune_hf.load(str(bundled_model_path()))


def user(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


# --- inside lmms-eval ---------------------------------------------------------------------------


def test_inside_lmms_eval(tmp_path: Path, model_and_processor: tuple[Any, Any]) -> None:
    model, processor = model_and_processor
    questions = scenes.load_scenes()[:40:10]
    images = [[str(q.image)] for q in questions]
    images[1] = [images[1][0], images[0][0]]  # two in one prompt

    def plain(values: dict[str, Any], **media: Any) -> Any:
        with tokenprune_hf.prune(
            model, "zeroth-order", 16, estimator="jvp", seed=3, diversity=False
        ):
            inputs = processor(return_tensors="pt", **media)
            output = model.generate(**inputs, **values)
        return output[0, inputs["input_ids"].shape[1] :]

    def prompt(pictures: int, question: str) -> str:
        content = [{"type": "image"}] * pictures + [text(question)]
        message = [{"role": "user", "content": content}]
        return str(processor.apply_chat_template(message, add_generation_prompt=True))

    greedy = {"max_new_tokens": 6, "do_sample": False}
    expected, long = [], None
    for q, files in zip(questions, images, strict=True):
        media = {"text": prompt(len(files), q.question), "images": [load_image(f) for f in files]}
        expected.append(processor.decode(plain(greedy, **media), skip_special_tokens=True))
        long = plain(LONG, **media) if long is None else long
    assert long is not None
    end = processor.decode(long[3:4], skip_special_tokens=True)
    first = [processor.decode(long[: n + 1], skip_special_tokens=True) for n in range(len(long))]
    enough = next(n for n, words in enumerate(first, 1) if end in words)
    assert enough < len(long) == 12

    given = {
        "wrong": [
            "pretrained=bundled,method=cls-attention,keep=0.25,max_num_frames=8",
            "pretrained=bundled,keep=0.25",
            "pretrained=bundled,method=cls-attention,keep=0.25,option_sed=1",
        ],
        "model_args": "pretrained=bundled,method=zeroth-order,keep=16,option_diversity=false,"
        'options={"estimator": "jvp", "seed": 3}',
        "docs": [
            {"images": files, "question": q.question}
            for q, files in zip(questions, images, strict=True)
        ],
        "greedy": {"max_new_tokens": 6, "temperature": 0.0, "image_aspect_ratio": "pad"},
        "drawn": {"max_new_tokens": 12, "min_new_tokens": 12, "temperature": 5.0},
        "long": LONG,
        "until": [end],
    }
    (tmp_path / "given.json").write_text(json.dumps(given), "utf-8")
    driver = Path(__file__).with_name("driver.py")
    said = run_there("python", str(driver), "given.json", "found.json", folder=tmp_path)
    found = json.loads((tmp_path / "found.json").read_text("utf-8"))

    unknown, missing, option = found["errors"]
    assert unknown.startswith("ConfigError: model_args has no 'max_num_frames'. Did you mean 'max_")
    assert "lacks method" in missing
    assert option.startswith("OptionError")
    assert "output_type generate_until" in found["loglikelihood"]
    assert "one turn" in found["generate_until_multi_round"]
    assert found["texts"] == expected
    assert said.count("image_aspect_ratio='pad' has no effect") == 1
    assert found["drawn"]["1"] == found["drawn"]["1 again"] != found["drawn"]["2"]
    assert found["ended"] == [first[-1].split(end)[0], enough]
    assert "until=3 must be" in found["note"][0]
    assert found["note"][1] == "This was the task t, document 0 of test."
    assert found["cleaned"]


# --- model_args ---------------------------------------------------------------------------------


def test_options_come_either_way() -> None:
    given = {"option_seed": 3, "options": '{"estimator": "jvp"}', "method": "zeroth-order"}
    options = read_arguments({**GOOD, **given}).pruning.options
    assert options == {"seed": 3, "estimator": "jvp"}
    assert read_arguments(GOOD).pruning.options == {}
    assert read_arguments({**GOOD, "keep": 1}).pruning.keep == 1
    assert isinstance(read_arguments({**GOOD, "keep": 1.0}).pruning.keep, float)
    read = read_arguments({**GOOD, "fps": 2, "max_side": 448, "batch_size": "1"})
    assert (read.max_frames_num, read.fps, read.max_side) == (32, 2.0, 448)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"metod": "random"}, ConfigError, "Did you mean 'method'?"),
        ({"pretrained": ""}, ConfigError, "lacks pretrained"),
        ({"keep": None}, ConfigError, "keep=1.0 prunes nothing"),
        ({"keep": "half"}, BudgetError, "half"),
        ({"positions": "packed"}, ConfigError, "compact"),
        ({"batch_size": "auto"}, ConfigError, "one by one"),
        ({"max_frames_num": 0}, ConfigError, "max_frames_num=0"),
        ({"max_frames_num": 8.5}, ConfigError, "whole number"),
        ({"max_side": True}, ConfigError, "max_side=True"),
        ({"fps": -1.0}, ConfigError, "fps=-1.0"),
        ({"fps": "fast"}, ConfigError, "fps='fast'"),
        ({"options": "{seed: 1}"}, ConfigError, "not JSON"),
        ({"options": "[1]"}, ConfigError, "not an object"),
        ({"option_sed": 1}, OptionError, "sed"),
        ({"option_seed": 1, "options": '{"seed": 2}'}, ConfigError, "came twice"),
    ],
)
def test_wrong_arguments(given: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words.replace("[", r"\[").replace("?", r"\?")):
        read_arguments({**GOOD, **given})


# --- generation_kwargs --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "drawn"),
    [
        ({}, False),
        ({"temperature": 0}, False),
        ({"temperature": 0.7}, True),
        ({"temperature": 0.7, "do_sample": False}, False),
        ({"temperature": 0.0, "do_sample": True}, False),
        ({"do_sample": True, "top_p": 0.9}, True),
    ],
)
def test_when_tokens_are_drawn(given: dict[str, Any], drawn: bool) -> None:
    arguments = read_generation(given).arguments
    assert arguments["do_sample"] is drawn
    for name in ("temperature", "top_p", "top_k"):
        assert arguments.get(name) == (given.get(name) if drawn else None)


def test_other_generation_kwargs() -> None:
    read = read_generation({"until": "\n\n", "num_beams": 2, "image_aspect_ratio": "pad"})
    assert read.until == ("\n\n",)
    assert read.arguments["num_beams"] == 2
    assert read.arguments["max_new_tokens"] == MAX_NEW_TOKENS
    assert read.unused == ("image_aspect_ratio",)
    assert read_generation({"until": ["", "a"]}).until == ("a",)
    assert read_generation({"until": None, "max_new_tokens": 5}).arguments["max_new_tokens"] == 5
    with pytest.raises(ConfigError, match="until"):
        read_generation({"until": [1]})


# --- messages -----------------------------------------------------------------------------------


def test_one_image_or_video_is_laid_out_as_by_ask(
    tmp_path: Path, model_and_processor: tuple[Any, Any]
) -> None:
    _, processor = model_and_processor
    arguments = read_arguments({**GOOD, "max_frames_num": 8})
    asked = needles.needle_set(tmp_path, videos=1, frames=32, types=("kind",), fashion=None)[0]
    scene = scenes.load_scenes()[0]
    video, image = str(asked.video), load_image(scene.image)
    for url, expected in (
        ({"type": "video", "url": video}, {"video": tokenprune_hf.read_video(video, 8)}),
        ({"type": "image", "url": image}, {"image": image}),
        ({"type": "image", "url": str(scene.image)}, {"image": image}),
    ):
        mine = lay_out(processor, user(url, text("what is it ?")), arguments)
        theirs = tokenprune_hf.ask(processor, "what is it ?", **expected)
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            same = torch.equal if isinstance(value, torch.Tensor) else np.array_equal
            assert same(mine[name], value), name


class _NoTemplate:
    """A processor without a chat template, as old checkpoints have them."""

    chat_template = None
    image_token = "<image>"

    def __call__(self, **inputs: Any) -> dict[str, Any]:
        return inputs


def test_without_a_chat_template_the_parts_follow_each_other() -> None:
    picture = {"type": "image", "url": Image.new("L", (4, 4))}
    processor, arguments = _NoTemplate(), read_arguments(GOOD)
    inputs = lay_out(processor, user(picture, text("a "), picture, text("b")), arguments)
    assert inputs["text"] == ["<image>\na <image>\nb"]
    assert [one.mode for one in inputs["images"]] == ["RGB", "RGB"]
    with pytest.raises(PromptError, match="2 messages"):
        lay_out(processor, user(text("a")) * 2, arguments)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "audio", "url": "a.wav"}, "'audio'"),
        ({"type": "image", "url": 3}, "an image as int"),
        ({"type": "video", "url": [1, 2]}, "a video as list"),
        ({"type": "video", "url": "a.mp4", "start_time": 1.0}, "a part of a.mp4"),
    ],
)
def test_what_cannot_be_asked(part: dict[str, Any], words: str) -> None:
    with pytest.raises(PromptError, match=words):
        lay_out(_NoTemplate(), user(part, text("?")), read_arguments(GOOD))


def test_pictures_and_videos_at_once_are_not_told_apart(
    tmp_path: Path, model_and_processor: tuple[Any, Any]
) -> None:
    asked = needles.needle_set(tmp_path, videos=1, frames=32, types=("kind",), fashion=None)[0]
    video = {"type": "video", "url": str(asked.video)}
    image = {"type": "image", "url": Image.new("RGB", (224, 224))}
    arguments = read_arguments({**GOOD, "max_frames_num": 4})
    with pytest.raises(PromptError, match="images and videos"):
        lay_out(model_and_processor[1], user(image, video, text("?")), arguments)
