"""Sparse masks in prompts, layers and calls that are out of the ordinary."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import StaticCache

import tokenprune_hf
from tests.hf.models import END, IMAGE, START, TINY, Tiny, prompt
from tests.hf.test_sparse import GREEDY, MIXED, assert_same, heads_of, masked_by_hand
from tokenprune.errors import ConfigError, PromptError, UnsupportedModelError
from tokenprune.families.llava import Llava
from tokenprune_hf.engine import cache_argument, cache_of
from tokenprune_hf.layout import decoder_of


def with_windows(name: str) -> Tiny:
    """Return a model whose first layer sees few tokens."""

    def build() -> Any:
        config = TINY[name].build()
        text = config.get_text_config()
        text.sliding_window, text.use_sliding_window = 50, True
        text.layer_types = ["sliding_attention", "full_attention"]
        return config

    return replace(TINY[name], build=build)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_layers_with_a_window_keep_it(name: str, told: bool) -> None:
    """Over prompts several times as long; `told`: with token types, where a model reads them."""
    tiny = with_windows(name)
    model, inputs = tiny.model(), prompt(tiny, ["titititititi", "iti"], words=9)
    if not told:
        inputs.pop("token_type_ids", None)
    with torch.no_grad():
        with masked_by_hand(model, inputs, MIXED):
            expected = model(**inputs).logits
            answer = model.generate(**inputs, **GREEDY)
        for implementation in ("sdpa", "eager"):
            model.set_attn_implementation(implementation)
            with tokenprune_hf.sparse(model, heads_of(model, MIXED)) as sparse:
                assert_same(model(**inputs).logits, expected, inputs)
                assert 0 < sparse.density < 1
                assert torch.equal(model.generate(**inputs, **GREEDY), answer)
            assert decoder_of(model).config._attn_implementation == implementation


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision"])
def test_touching_images_are_told_apart_in_generate_too(name: str) -> None:
    """`generate` hands on what the encoder returned, in place of the pixels."""
    tiny = TINY[name]
    model, inputs = tiny.model(), prompt(tiny, ["tiiti"], words=9)
    assert tiny.image is not None
    sizes, ids = tiny.image(3)[1], inputs["input_ids"][0]
    real = (ids != START) & (ids != END)
    for key in ("input_ids", "attention_mask"):
        inputs[key] = inputs[key][:, real]
    starts = [10, 10 + sizes[0], 10 + sizes[0] + sizes[1] + 9]
    expected = [(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    with torch.no_grad(), tokenprune_hf.sparse(model, heads_of(model, MIXED)) as sparse:
        model(**inputs)
        assert [(one.start, one.stop) for one in sparse.layouts[0].images] == expected
        model.generate(**inputs, max_new_tokens=1, num_beams=2)
        assert len(sparse.layouts) == 2
        assert [(one.start, one.stop) for one in sparse.layouts[1].images] == expected


@pytest.mark.parametrize("name", ["llava_next_video", "llava_onevision"])
def test_a_video_in_generate(name: str) -> None:
    """Whose rows the encoder returns frame by frame, or end to end."""
    model, inputs = TINY[name].model(), prompt(TINY[name], ["tvt"])
    with torch.no_grad(), tokenprune_hf.sparse(model, heads_of(model, MIXED)) as sparse:
        model(**inputs)
        forward = sparse.layouts
        model.generate(**inputs, max_new_tokens=1)
        assert sparse.layouts == forward
    assert [len(one.images) for one in forward] == [1]


def test_frames_of_a_video_with_times_between_them() -> None:
    model = TINY["qwen3_vl"].model()
    inputs = prompt(TINY["qwen3_vl"], ["tvi", "iv"])
    with torch.no_grad(), tokenprune_hf.sparse(model, heads_of(model, MIXED)) as sparse:
        model(**inputs)
        forward = [len(one.images) for one in sparse.layouts]
        model.generate(**inputs, max_new_tokens=1)
    assert forward == [len(one.images) for one in sparse.layouts] == [3 + 1, 1 + 2]


def test_images_behind_a_filled_cache_are_refused() -> None:
    model, inputs = TINY["llava"].model(), prompt(TINY["llava"], ["titi"], words=9)
    qwen = TINY["qwen2_5_vl"]
    chunks, model2 = prompt(qwen, ["titi"], words=9), qwen.model()
    with torch.no_grad(), tokenprune_hf.sparse(model, heads_of(model, MIXED)):
        cache = cache_of(model(**inputs))
        with pytest.raises(PromptError, match="images come behind tokens"):
            model(input_ids=torch.tensor([[31, IMAGE, IMAGE]]), **cache_argument(model, cache))
    with (
        tokenprune_hf.sparse(model2, heads_of(model2, MIXED)),
        pytest.raises(PromptError, match="images come behind tokens"),
    ):
        model2.generate(**chunks, max_new_tokens=1, prefill_chunk_size=40)


def test_settings_that_cannot_be() -> None:
    model = TINY["llava"].model()
    heads = heads_of(model, MIXED)
    with pytest.raises(ConfigError, match="Did you mean 'gathered'"):
        tokenprune_hf.sparse(model, heads, kernel="gatherd")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="masks is a list"):
        tokenprune_hf.sparse(model, [1])  # type: ignore[arg-type]
    for layer in decoder_of(model).layers:
        layer.self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(UnsupportedModelError, match="has sinks"):
        tokenprune_hf.sparse(model, heads)
    config = TINY["gemma3"].build()
    config.text_config.attn_logit_softcapping = 30.0
    model = replace(TINY["gemma3"], build=lambda: config).model()
    with pytest.raises(UnsupportedModelError, match="attn_logit_softcapping"):
        tokenprune_hf.sparse(model, heads_of(model, MIXED))
    model = TINY["llava"].model()
    for name in ("flash_attention_2", "flex_attention", "paged|sdpa"):
        decoder_of(model).config._attn_implementation = name
        with pytest.raises(UnsupportedModelError, match="cannot be stood in for"):
            tokenprune_hf.sparse(model, heads)


def test_images_that_see_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Llava, "images_see_each_other", True)  # as Molmo 2's
    model = TINY["llava"].model()
    with pytest.raises(UnsupportedModelError, match="images of a prompt see each other"):
        tokenprune_hf.sparse(model, heads_of(model, MIXED))


def test_calls_that_cannot_be() -> None:
    tiny = TINY["qwen2_5_vl"]
    model, inputs = tiny.model(), prompt(tiny, ["titi", "i"])
    length = inputs["input_ids"].shape[1]
    with tokenprune_hf.sparse(model, heads_of(model, MIXED)), torch.no_grad():

        def refused(match: str, **changes: Any) -> None:
            with pytest.raises(PromptError, match=match):
                model(**{**inputs, **changes})

        refused("attention maps", output_attentions=True)
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=length + 8)
        refused("a cache that grows", **cache_argument(model, cache))
        with pytest.raises(PromptError, match="static cache"):
            model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
        with pytest.raises(PromptError, match="called by itself"):
            model.model.language_model(inputs_embeds=torch.zeros(1, 5, 32))
        grid, positions = inputs["image_grid_thw"][:2], torch.arange(length).expand(4, 1, -1) % 30
        refused(
            "packed prompts",
            input_ids=inputs["input_ids"][:1],
            attention_mask=None,
            image_grid_thw=grid,
            pixel_values=inputs["pixel_values"][: int(grid.prod(dim=1).sum())],
            mm_token_type_ids=inputs["mm_token_type_ids"][:1],
            position_ids=positions,
            use_cache=False,
        )
        for layer in decoder_of(model).layers:
            layer.self_attn.attention_dropout = 0.1
        model.train()
        refused("dropout")
        model.eval()
        model.set_attn_implementation("eager")
        refused("was set to 'eager' inside the block, which takes sparse masks off")
    assert decoder_of(model).config._attn_implementation == "sdpa"
