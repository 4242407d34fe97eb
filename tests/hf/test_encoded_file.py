"""What an encoder made comes back from its file as it was, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import tokenprune_hf
from tests.hf.models import TINY, prompt
from tokenprune.errors import InputFileError, PromptError
from tokenprune_hf.encoded_file import (
    encoded_key,
    encoder_fingerprint,
    encoding_seconds,
    load_encoded,
    save_encoded,
)
from tokenprune_hf.encoding import Encoded

METHODS: list[tuple[str, float]] = [
    ("uniform", 1.0),
    ("cls-attention", 0.3),
    ("divprune", 5),
    ("zeroth-order", 0.3),
    ("flexselect", 5),
]
"""What the encoder gathers for them, together: all that it can."""

CASES: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "images, in a batch": ("llava", ["titit", "it"], {}),
    "an image and a video as pictures": ("internvl", ["iiiiit"], {"video_frames": [4, 1]}),
    "images and videos": ("qwen2_5_vl", ["tvtit", "vt"], {}),
    "rows of no item": ("llava_next", ["it"], {}),
    "deeper layers": ("qwen3_vl", ["tvt"], {}),
}


def case(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Any]]:
    """Return a model and what its processor would return."""
    tiny_name, samples, more = CASES[name]
    tiny = TINY[tiny_name]
    inputs = {**prompt(tiny, samples), **more}
    return tiny.model().to(dtype), {
        key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }


def without_pixels(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if not name.startswith("pixel")}


def said(model: Any, inputs: dict[str, Any], encoded: Encoded) -> list[Any]:
    """Return kept tokens, scores and generated tokens of every method."""
    found: list[Any] = []
    for method, keep in METHODS:
        with tokenprune_hf.prune(model, method, keep) as pruning:
            output = model.generate(**without_pixels(inputs), encoded=encoded, max_new_tokens=4)
        found += [one.kept.tolist() for one in pruning.selections]
        found += [None if one.scores is None else one.scores for one in pruning.selections]
        found.append(output)
    return found


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_nothing_is_lost(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, inputs = case(name, dtype)
    encoded = tokenprune_hf.encode(model, **inputs)
    save_encoded(tmp_path / "one", encoded, model, seconds=1.25)
    again = load_encoded(tmp_path / "one", model)
    assert again.needs == encoded.needs
    assert list(again.modalities) == list(encoded.modalities)
    for modality, media in encoded.modalities.items():
        other = again.modalities[modality]
        assert equal(media.rows, other.rows)
        assert (media.sizes, media.stacked) == (other.sizes, other.stacked)
        assert media.videos_told == other.videos_told
        assert len(media.deepstack) == len(other.deepstack)
        assert all(map(equal, media.deepstack, other.deepstack))
        assert len(media.items) == len(other.items)
        for one, two in zip(media.items, other.items, strict=True):
            assert equal(one.rows, two.rows)
            assert (one.tokens.grid, one.tokens.label) == (two.tokens.grid, two.tokens.label)
            for tensor in ("features", "embeddings", "cls_attention"):
                assert equal(getattr(one.tokens, tensor), getattr(two.tokens, tensor))
    # A model of its own with the same weights, as in another process.
    other_model = case(name, dtype)[0]
    loaded = load_encoded(tmp_path / "one", other_model)
    first, second = said(model, inputs, encoded), said(other_model, inputs, loaded)
    assert len(first) == len(second)
    assert all(map(equal, first, second))
    assert encoding_seconds(tmp_path / "one") == 1.25
    assert list(tmp_path.iterdir()) == [tmp_path / "one"]


def test_needs_are_those_that_were_encoded(tmp_path: Path) -> None:
    model, inputs = case("images, in a batch")
    save_encoded(tmp_path / "one", tokenprune_hf.encode(model, needs=["features"], **inputs), model)
    again = load_encoded(tmp_path / "one", model)
    tokens = again.modalities["image"].items[0].tokens
    assert (again.needs, tokens.projector, tokens.cls_attention) == (("features",), None, None)
    with (
        tokenprune_hf.prune(model, "zeroth-order", 4),
        pytest.raises(PromptError, match="made without embeddings, projector"),
    ):
        model.generate(**without_pixels(inputs), encoded=again, max_new_tokens=2)


def test_a_batch_of_one_image_many_times(tmp_path: Path) -> None:
    """Its items share their tensors, and safetensors takes no tensor twice."""
    model, inputs = case("rows of no item")
    once = tokenprune_hf.encode(model, **inputs)
    save_encoded(tmp_path / "one", tokenprune_hf.join([once, once]), model)
    items = load_encoded(tmp_path / "one", model).modalities["image"].items
    count = len(once.modalities["image"].items)
    assert len(items) == 2 * count
    for one, two in zip(items[:count], items[count:], strict=True):
        assert equal(one.tokens.features, two.tokens.features)
        assert bool((two.rows - one.rows == once.modalities["image"].sizes[0]).all())


def test_only_the_encoder_makes_the_file_unusable(tmp_path: Path) -> None:
    model, inputs = case("images, in a batch")
    save_encoded(tmp_path / "one", tokenprune_hf.encode(model, **inputs), model)
    other_language = TINY["llava"].model()
    with torch.no_grad():
        other_language.lm_head.weight.add_(1.0)
        other_language.model.language_model.layers[0].mlp.up_proj.weight.add_(1.0)
    assert load_encoded(tmp_path / "one", other_language).needs
    others = [TINY["llava"].model(seed=1), TINY["internvl"].model(), TINY["llava"].model()]
    with torch.no_grad():
        others[-1].model.multi_modal_projector.linear_2.bias[3] += 1e-3
    for other in others:
        with pytest.raises(InputFileError, match="was made by another model"):
            load_encoded(tmp_path / "one", other)
    assert len({encoder_fingerprint(one) for one in (model, *others)}) == 4


def test_the_key_tells_all_that_matters() -> None:
    model, inputs = case("an image and a video as pictures")
    needs = ("features", "embeddings")
    key = encoded_key(model, needs, inputs)
    other_pixels = inputs["pixel_values"].clone()
    other_pixels[4, 0, 0, 0] += 1e-3
    different = [
        encoded_key(model, ("features",), inputs),
        encoded_key(model, needs, {**inputs, "pixel_values": other_pixels}),
        encoded_key(model, needs, {**inputs, "pixel_values": inputs["pixel_values"].double()}),
        encoded_key(model, needs, {**inputs, "video_frames": [3, 2]}),
        encoded_key(TINY["internvl"].model(seed=1), needs, inputs),
    ]
    assert len({key, *different}) == len(different) + 1
    # Another question is none of the encoder's business, nor is a need that it does not serve.
    other_question = {**inputs, "input_ids": inputs["input_ids"].flip(1)}
    assert encoded_key(model, ("embeddings", "features", "question"), other_question) == key
    with pytest.raises(PromptError, match="nothing to encode"):
        encoded_key(model, needs, without_pixels(inputs))


def rewritten(file: Path, to: Path, change: Any) -> Path:
    """Write a file again with its JSON or its tensors changed."""
    with safe_open(file, "pt") as opened:
        head = json.loads(opened.metadata()["tokenprune_encoded"])
    tensors = load_file(file)
    change(head, tensors)
    save_file(tensors, to, {"tokenprune_encoded": json.dumps(head)})
    return to


def test_what_is_damaged_is_refused(tmp_path: Path) -> None:
    model, inputs = case("images and videos")
    good = tmp_path / "good"
    save_encoded(good, tokenprune_hf.encode(model, **inputs), model)
    whole = good.read_bytes()
    (tmp_path / "cut").write_bytes(whole[:-9])
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "noise").write_bytes(b"no safetensors at all, but a few words")
    save_file({"image.rows": torch.zeros(2, 2)}, tmp_path / "plain")

    def shift_rows(_: Any, tensors: dict[str, Tensor]) -> None:
        tensors["video.items.0.rows"] -= 1

    changes: dict[str, Any] = {
        "fewer": lambda head, tensors: tensors.pop("image.items.0.features"),
        "rows": shift_rows,
        "sizes": lambda head, tensors: head["modalities"]["video"]["sizes"].append(3),
        "grid": lambda head, tensors: head["modalities"]["image"]["items"][0].update(grid=[1, 2]),
        "width": lambda head, tensors: tensors.update(
            {"image.items.0.cls_attention": torch.ones(3)}
        ),
        "needs": lambda head, tensors: head.update(needs=["features", "secrets"]),
        "untold": lambda head, tensors: head.pop("modalities"),
        "none": lambda head, tensors: head.update(modalities={}),
    }
    for name, change in changes.items():
        rewritten(good, tmp_path / name, change)
    for name in ("cut", "empty", "noise", "plain", *changes):
        with pytest.raises(InputFileError, match=rf"{name} is damaged.* encode again"):
            load_encoded(tmp_path / name, model)
    newer = rewritten(good, tmp_path / "newer", lambda head, tensors: head.update(layout=2))
    for read in (lambda file: load_encoded(file, model), encoding_seconds):
        with pytest.raises(InputFileError, match=r"layout 2 .*newer version.*encode again"):
            read(newer)
        with pytest.raises(InputFileError, match="cannot be read"):
            read(tmp_path / "missing")
    unchanged = rewritten(good, tmp_path / "unchanged", lambda head, tensors: None)
    assert load_encoded(unchanged, model).needs  # it is not the rewriting that breaks them


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    model, inputs = case("images, in a batch")
    encoded = tokenprune_hf.encode(model, **inputs)
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="directory"):
        save_encoded(tmp_path / "taken", encoded, model)
    assert list(tmp_path.iterdir()) == [tmp_path / "taken"]
    with pytest.raises(OSError, match="No such file"):
        save_encoded(tmp_path / "nowhere" / "one", encoded, model)
