"""LLaVA with a Pixtral tower: images of any sizes in one packed sequence, each its own grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import tokenprune_hf
from tests.hf.by_hand import full_attention_maps, greedy
from tests.hf.models import BOS, EOS, IMAGE, PAD
from tokenprune.errors import TokensError
from tokenprune_hf.encoded_file import load_encoded, save_encoded
from tokenprune_hf.layout import image_spans_of

tf: Any = transformers

SIZES = [(16, 16), (8, 32), (16, 24), (24, 8)]
GRIDS = [(4, 4), (2, 8), (4, 6), (6, 2)]
BREAK = 94


def pixtral(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    text = tf.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
    )
    vision = tf.PixtralVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=64,
        patch_size=4,
    )
    config = tf.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = tf.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.3)
    model.generation_config.update(
        pad_token_id=PAD, eos_token_id=None, suppress_tokens=[IMAGE, BREAK]
    )
    return model


def prompt(which: list[list[int]]) -> dict[str, Any]:
    """Return prompts with the images of these numbers, a break after each row as Pixtral has."""
    rows = []
    for images in which:
        row = [BOS, 5]
        for number in images:
            height, width = GRIDS[number]
            row += ([IMAGE] * width + [BREAK]) * height + [6]
        rows.append([*row, 7, 8])
    length = max(map(len, rows))
    numbers = [number for images in which for number in images]
    generator = torch.Generator().manual_seed(3)
    pixels = torch.zeros(len(numbers), 3, 24, 32)
    for place, number in enumerate(numbers):
        height, width = SIZES[number]
        pixels[place, :, :height, :width] = torch.randn(3, height, width, generator=generator)
    return {
        "input_ids": torch.tensor([[PAD] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor(
            [[0] * (length - len(row)) + [1] * len(row) for row in rows]
        ),
        "pixel_values": pixels,
        "image_sizes": torch.tensor([SIZES[number] for number in numbers]),
    }


@pytest.mark.parametrize("number", range(4))
def test_an_image_has_its_own_rows_and_columns(number: int) -> None:
    model = pixtral()
    with torch.no_grad(), tokenprune_hf.prune(model, "uniform", keep=4) as pruning:
        model(**prompt([[number]]))
    (selection,) = pruning.selections
    assert selection.grid == (1, *GRIDS[number])
    assert selection.is_picture
    kept = selection.grid_mask[0]
    used = (kept.sum(1) > 0).sum() * (kept.sum(0) > 0).sum()
    assert int(used) >= 4  # an even grid of the true shape


def test_a_batch_of_different_images_is_right() -> None:
    model, inputs = pixtral(), prompt([[0, 1], [2], [3, 0]])
    length = inputs["input_ids"].shape[1]
    encoded = tokenprune_hf.encode(model, **inputs)
    items = encoded.modalities["image"].items
    assert [item.tokens.grid[1:] for item in items] == [GRIDS[n] for n in (0, 1, 2, 3, 0)]
    for item in items:
        tokens = item.tokens
        assert tokens.features is not None
        assert tokens.projector is not None
        with torch.no_grad():
            torch.testing.assert_close(tokens.projector(tokens.features), tokens.embeddings)
    with torch.no_grad(), tokenprune_hf.prune(model, "feature-norm", 0.3) as pruning:
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    kept = [one.kept.tolist() for one in pruning.selections]
    with torch.no_grad():
        expected = greedy(model, "llava", inputs, {"image": kept, "video": []}, "original", 4)
    assert output[:, length:].tolist() == expected


def test_attention_stays_inside_each_image_and_knows_places() -> None:
    model, numbers = pixtral(), [1, 3, 2]
    inputs = prompt([numbers])
    with torch.no_grad(), tokenprune_hf.prune(model, "cls-attention", 5) as pruning:
        model(**inputs)
    for place, (number, selection) in enumerate(zip(numbers, pruning.selections, strict=True)):
        height, width = SIZES[number]
        alone: Tensor = inputs["pixel_values"][place : place + 1, :, :height, :width]
        with torch.no_grad(), full_attention_maps(model.model.vision_tower) as maps:
            model.model.vision_tower(alone, image_sizes=torch.tensor([[height, width]]))
        expected = maps[-1].mean(dim=(1, 2))[0]
        torch.testing.assert_close(selection.scores, expected)


def test_images_without_sizes_are_as_large_as_their_pixels() -> None:
    model, inputs = pixtral(), prompt([[0]])
    inputs["pixel_values"] = inputs["pixel_values"][..., :16, :16]
    del inputs["image_sizes"]
    with torch.no_grad(), tokenprune_hf.prune(model, "cls-attention", 5) as pruning:
        model(**inputs)
    assert [one.grid for one in pruning.selections] == [(1, 4, 4)]


@pytest.mark.parametrize("method", ["flexselect", "relevant-information", "zeroth-order"])
def test_other_methods_agree_alone_and_in_a_batch(method: str) -> None:
    model = pixtral()
    with torch.no_grad(), tokenprune_hf.prune(model, method, 5) as pruning:
        inputs = prompt([[1, 2], [3]])
        model(**inputs)
        together = [one.kept.tolist() for one in pruning.selections]
        single = prompt([[1, 2]])
        single["pixel_values"] = inputs["pixel_values"][:2]
        model(**single)
    assert [one.kept.tolist() for one in pruning.selections] == together[:2]


def test_spans_of_images_that_touch() -> None:
    model, inputs = pixtral(), prompt([[0]])
    ids = torch.tensor([[BOS, *[IMAGE] * (16 + 12), 7]])
    arguments = {
        "pixel_values": torch.zeros(2, 3, 24, 32),
        "image_sizes": torch.tensor([SIZES[0], SIZES[3]]),
    }
    spans = image_spans_of(model, ids, arguments)
    assert [(span.start, span.stop) for span in spans[0]] == [(1, 17), (17, 29)]
    assert len(image_spans_of(model, inputs["input_ids"], inputs)[0]) == 4  # a break ends a run


def siglip() -> Any:
    """Return a LLaVA whose encoder has no CLS token, and whose first patch is dropped for one."""
    torch.manual_seed(0)
    vision = tf.SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=24,
        patch_size=4,
        vision_use_head=False,
    )
    text = pixtral().config.text_config
    config = tf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    return tf.LlavaForConditionalGeneration(config).eval()


def test_tokens_that_make_no_grid_are_no_picture(tmp_path: Path) -> None:
    model = siglip()
    ids = torch.tensor([[BOS, *[IMAGE] * 35, 7]])
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, 24, 24),
    }
    for method in ("cls-attention", "divprune", "uniform"):
        with torch.no_grad(), tokenprune_hf.prune(model, method, 5) as pruning:
            model(**inputs)
        (selection,) = pruning.selections
        assert (selection.grid, selection.is_picture) == ((1, 1, 35), False)
    encoded = tokenprune_hf.encode(model, **inputs)
    save_encoded(tmp_path / "one", encoded, model)
    (item,) = load_encoded(tmp_path / "one", model).modalities["image"].items
    assert not item.tokens.is_picture


def test_a_cls_token_among_the_features_stays() -> None:
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=24,
            patch_size=4,
        ),
        text_config=pixtral().config.text_config,
        image_token_id=IMAGE,
        vision_feature_select_strategy="full",
    )
    clip = tf.LlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[BOS, *[IMAGE] * 37, 7]])
    with torch.no_grad(), tokenprune_hf.prune(clip, "cls-attention", 5) as pruning:
        clip(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=torch.randn(1, 3, 24, 24),
        )
    (selection,) = pruning.selections
    assert (selection.grid, selection.total) == ((1, 6, 6), 36)


def test_show_refuses_what_is_no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    from tokenprune_eval import show

    model = siglip()

    class Inputs(dict[str, Any]):
        def to(self, _device: Any, _dtype: Any) -> Inputs:
            return self

    ids = torch.tensor([[BOS, *[IMAGE] * 35, 7]])
    inputs = Inputs(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=torch.randn(1, 3, 24, 24),
    )
    monkeypatch.setattr("tokenprune_hf.loading.ask", lambda *_args, **_kwargs: inputs)
    picture = Image.new("RGB", (24, 24))
    with pytest.raises(TokensError, match=r"image 0: how its 35 tokens lie .* cannot be drawn"):
        show.picture(model, None, picture, ["uniform"], 5)
