"""Models without a family of their own, against a calculation by hand."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import tokenprune_hf
from tests.hf import types
from tests.hf.models import IMAGE, Tiny
from tokenprune.errors import UnsupportedModelError
from tokenprune.families.registry import FAMILIES
from tokenprune_hf import any_model
from tokenprune_hf.loading import load
from tokenprune_hf.vision import vision_model

tf: Any = transformers  # its config classes are not typed the way they are called

TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
MROPE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "mrope_section": [2, 1, 1],
    "partial_rotary_factor": 1.0,
}
GRIDS = torch.tensor([[1, 4, 6], [1, 8, 4]])
TYPES = ("token_type_ids", "mm_token_type_ids")


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


@dataclass(frozen=True)
class Case:
    """A type: how its tiny model is made, what its encoder is given, how many rows are newlines."""

    build: Callable[[], Any]
    architecture: str
    media: Callable[[], dict[str, Any]]
    types: str | None = None
    newlines: int = 0


def glm() -> Any:
    tower = {"depth": 2, "hidden_size": 32, "num_heads": 4, "out_hidden_size": 32}
    return tf.Glm4vConfig(
        text_config={**TEXT, "rope_parameters": MROPE},
        vision_config={**tower, "intermediate_size": 48, "patch_size": 4, "image_size": 32},
        image_token_id=IMAGE,
    )


def qwen35() -> Any:
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    kinds = ["linear_attention", "full_attention"]
    tower = {"depth": 2, "hidden_size": 32, "num_heads": 4, "out_hidden_size": 32}
    return tf.Qwen3_5Config(
        text_config={**TEXT, **linear, **heads, "layer_types": kinds, "rope_parameters": MROPE},
        vision_config={**tower, "intermediate_size": 48, "patch_size": 4},
        image_token_id=IMAGE,
    )


def gridded() -> dict[str, Any]:
    return {"pixel_values": noise(int(GRIDS.prod(-1).sum()), 96), "image_grid_thw": GRIDS}


def lighton() -> Any:
    return tf.LightOnOcrConfig(
        text_config={**TEXT, "model_type": "qwen3"},
        vision_config={**TOWER, "model_type": "pixtral", "patch_size": 4, "head_dim": 8},
        image_token_id=IMAGE,
    )


def paligemma() -> Any:
    return tf.PaliGemmaConfig(
        text_config={**TEXT, "model_type": "gemma"},
        vision_config={**TOWER, "model_type": "siglip_vision_model", "projection_dim": 32},
        image_token_index=IMAGE,
        projection_dim=32,
    )


def next_video() -> Any:
    return tf.LlavaNextVideoConfig(
        text_config={**TEXT, "model_type": "llama"},
        vision_config={**TOWER, "model_type": "clip_vision_model", "projection_dim": 16},
        image_token_index=IMAGE,
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
    )


CASES = {
    "glm4v": Case(glm, "Glm4vForConditionalGeneration", gridded, "mm_token_type_ids"),
    "qwen3_5": Case(qwen35, "Qwen3_5ForConditionalGeneration", gridded, "mm_token_type_ids"),
    "lighton_ocr": Case(
        lighton,
        "LightOnOcrForConditionalGeneration",
        lambda: {
            "pixel_values": noise(2, 3, 32, 24),
            "image_sizes": torch.tensor([[16, 24], [32, 16]]),
        },
    ),
    "paligemma": Case(
        paligemma,
        "PaliGemmaForConditionalGeneration",
        lambda: {"pixel_values": noise(2, 3, 32, 32)},
        "token_type_ids",
    ),
    "llava_next_video": Case(
        next_video,
        "LlavaNextVideoForConditionalGeneration",
        lambda: {
            "pixel_values": noise(2, 5, 3, 32, 32),
            "image_sizes": torch.tensor([[60, 64], [30, 60]]),
        },
        newlines=8 + 4,  # one behind each row of tokens of an image that was cut into crops
    ),
}


@pytest.fixture(autouse=True)
def no_family_knows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that have a family are pruned without it here: their kinds are what is tried."""
    for name in CASES:
        monkeypatch.delitem(FAMILIES, name, raising=False)


def model_of(name: str) -> Any:
    case = CASES[name]
    return Tiny(case.build, getattr(transformers, case.architecture)).model()


def encoded(model: Any, media: dict[str, Any]) -> list[Tensor]:
    """Return the rows of each image, out of the model's own encoder."""
    with torch.no_grad():
        output = model.model.get_image_features(**media, return_dict=True)
    return [entry.reshape(-1, entry.shape[-1]) for entry in output.pooler_output]


def inputs_of(name: str, model: Any) -> dict[str, Any]:
    """Return a prompt of text, an image, text, an image and text."""
    case = CASES[name]
    media = case.media()
    ids = [2, 11, 12]
    for number, rows in enumerate(encoded(model, media)):
        ids += [IMAGE] * len(rows) + [20 + number, 21, 22]
    input_ids = torch.tensor([[*ids, 40, 41]])
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **media}
    if case.types is not None:
        inputs[case.types] = (input_ids == IMAGE).long()
    return inputs


def logits(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found[0, -1]


def positions_by_hand(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Return the positions that the model hands to its language model on the unpruned prompt."""
    seen: list[Tensor | None] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs.get("position_ids")), with_kwargs=True
    )
    logits(model, **inputs)
    hook.remove()
    length = inputs["input_ids"].shape[1]
    return torch.arange(length)[None] if seen[0] is None else seen[0]


def by_hand(model: Any, inputs: dict[str, Any], media: dict[str, Any], keep: Tensor) -> Tensor:
    """Return the logits of the short prompt, BoolTensor [rows] saying which rows stay."""
    column = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
    column[inputs["input_ids"][0] == IMAGE] = keep
    with torch.no_grad():
        output = copy.copy(model.model.get_image_features(**media, return_dict=True))
    rows = torch.cat([entry.reshape(-1, entry.shape[-1]) for entry in output.pooler_output])
    output.pooler_output = (
        rows[keep][None] if isinstance(output.pooler_output, Tensor) else [rows[keep]]
    )
    types = {name: inputs[name][:, column] for name in TYPES if name in inputs}
    return logits(
        model,
        input_ids=inputs["input_ids"][:, column],
        attention_mask=torch.ones(1, int(column.sum()), dtype=torch.long),
        position_ids=positions_by_hand(model, inputs)[..., column],
        mm_encoder_outputs={"image": output},
        **types,
    )


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_dropping_equals_the_calculation_by_hand(name: str) -> None:
    model = model_of(name)
    inputs, media = inputs_of(name, model), CASES[name].media()
    sizes = [len(rows) for rows in encoded(model, media)]
    plain = logits(model, **inputs)
    with tokenprune_hf.prune(model, "information", keep=0.5) as pruning:
        pruned = logits(model, **inputs)
        selections = pruning.selections
        generated = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    newlines = CASES[name].newlines
    assert sum(selection.total for selection in selections) == sum(sizes) - newlines
    # Rows that are in no selection are the newlines, which are one weight of the model.
    rows = torch.cat(encoded(model, media))
    keep = torch.ones(len(rows), dtype=torch.bool)
    if newlines:
        keep = (rows == model.model.image_newline).all(dim=-1)
        assert int(keep.sum()) == newlines
        keep[~keep] = torch.cat([selection.mask for selection in selections])
    else:
        keep = torch.cat([selection.mask for selection in selections])
    expected = by_hand(model, inputs, media, keep)
    torch.testing.assert_close(pruned, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(pruned, plain, atol=1e-3)
    assert generated[0, -1] == pruned_choice(model, expected)
    torch.testing.assert_close(logits(model, **inputs), plain)  # outside the block: as it was


def pruned_choice(model: Any, found: Tensor) -> Tensor:
    """Return the likeliest token of those that `generate` may say."""
    found = found.clone()
    found[model.generation_config.suppress_tokens] = float("-inf")
    return found.argmax()


def test_all_tokens_kept_is_the_plain_model(name: str) -> None:
    model = model_of(name)
    inputs = inputs_of(name, model)
    plain = logits(model, **inputs)
    with tokenprune_hf.prune(model, "uniform", keep=1.0):
        kept = logits(model, **inputs)
    torch.testing.assert_close(kept, plain, rtol=1e-4, atol=1e-5)


def test_encoded_beforehand_is_the_same(name: str) -> None:
    model = model_of(name)
    inputs = inputs_of(name, model)
    encoded_once = tokenprune_hf.encode(model, needs=("embeddings",), **inputs)
    with tokenprune_hf.prune(model, "divprune", keep=0.25):
        pixels = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        media = CASES[name].media()
        without = {key: value for key, value in inputs.items() if key not in media}
        sizes = {key: value for key, value in media.items() if not key.startswith("pixel")}
        again = model.generate(
            **without, **sizes, encoded=encoded_once, max_new_tokens=3, do_sample=False
        )
    assert pixels.tolist() == again.tolist()


def test_generating_step_by_step_is_reading_the_prompt_again(name: str) -> None:
    """Several tokens, several beams: with a cache as without one."""
    model = model_of(name)
    inputs = inputs_of(name, model)
    for beams in (1, 2):
        how = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
        with tokenprune_hf.prune(model, "divprune", keep=0.25):
            cached = model.generate(**inputs, **how)
            again = model.generate(**inputs, **how, use_cache=False)
        assert cached.tolist() == again.tolist(), beams


def test_threads_that_begin_together_get_what_one_gets_alone() -> None:
    model = model_of("llava_next_video")
    inputs = inputs_of("llava_next_video", model)
    with tokenprune_hf.prune(model, "divprune", keep=0.25):
        alone = logits(model, **inputs)
    for _ in range(3):
        barrier = threading.Barrier(4)

        def ask(_number: int, barrier: threading.Barrier = barrier) -> Tensor:
            barrier.wait()
            return logits(model, **inputs)

        with (
            tokenprune_hf.prune(model, "divprune", keep=0.25),
            ThreadPoolExecutor(4) as threads,
        ):
            for found in threads.map(ask, range(4)):
                torch.testing.assert_close(found, alone)


def test_newlines_are_found_after_their_weights_were_changed() -> None:
    model = model_of("llava_next_video")
    inputs = inputs_of("llava_next_video", model)
    with tokenprune_hf.prune(model, "uniform", keep=4) as pruning:
        logits(model, **inputs)
        before = [selection.total for selection in pruning.selections]
        with torch.no_grad():
            model.model.image_newline.normal_()
        logits(model, **inputs)
        assert [selection.total for selection in pruning.selections] == before


def test_a_call_that_failed_leaves_nothing_to_the_next_one() -> None:
    model = model_of("lighton_ocr")
    inputs = inputs_of("lighton_ocr", model)
    text = torch.tensor([[2, 11, 12]])
    plain = logits(model, input_ids=text)

    def fail(_module: Any, _args: Any) -> None:
        raise MemoryError

    with tokenprune_hf.prune(model, "uniform", keep=4):
        hook = model.model.register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            logits(model, **inputs)
        hook.remove()
        torch.testing.assert_close(logits(model, input_ids=text), plain)


def test_a_copy_is_pruned_alike_and_plain_again_afterwards() -> None:
    model = model_of("llava_next_video")
    inputs = inputs_of("llava_next_video", model)
    plain = logits(model, **inputs)
    pruning = tokenprune_hf.apply(model, "divprune", keep=0.25)
    pruned = logits(model, **inputs)
    other = copy.deepcopy(model)
    torch.testing.assert_close(logits(other, **inputs), pruned)
    tokenprune_hf.remove(other)
    assert not other.get_decoder()._forward_pre_hooks
    torch.testing.assert_close(logits(other, **inputs), plain)
    torch.testing.assert_close(logits(model, **inputs), pruned)
    tokenprune_hf.remove(model)
    assert not model.get_decoder()._forward_pre_hooks
    assert len(pruning.selections) == 2


def test_hiding_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="layers that look past the attention mask"):
        tokenprune_hf.prune(model_of("qwen3_5"), "uniform", 4, apply="mask")


def test_methods_that_look_at_what_is_not_known_are_refused() -> None:
    model = types.model_of("fuyu")  # it has no tower
    for method in ("cls-attention", "zeroth-order", "feature-norm"):
        with pytest.raises(UnsupportedModelError, match="such as information, divprune or uniform"):
            tokenprune_hf.prune(model, method, keep=4)


def test_a_model_that_counts_positions_itself_is_refused_until_they_are_compact() -> None:
    model = model_of("lighton_ocr")
    inputs = inputs_of("lighton_ocr", model)

    def forget(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        length = kwargs["inputs_embeds"].shape[1]
        return args, {**kwargs, "position_ids": torch.arange(length)[None]}

    hook = model.get_decoder().register_forward_pre_hook(forget, with_kwargs=True)
    with (
        tokenprune_hf.prune(model, "uniform", keep=4),
        pytest.raises(UnsupportedModelError, match="Use positions='compact'"),
    ):
        logits(model, **inputs)
    with tokenprune_hf.prune(model, "uniform", keep=4, positions="compact"):
        assert logits(model, **inputs).isfinite().all()
    hook.remove()


def test_types_whose_positions_are_looked_up_need_compact_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(any_model.COMPACT_ONLY, "lighton_ocr", "it looks up blocks by position")
    model = model_of("lighton_ocr")
    with pytest.raises(UnsupportedModelError, match="looks up blocks by position"):
        tokenprune_hf.prune(model, "uniform", keep=4)
    with tokenprune_hf.prune(model, "uniform", keep=4, positions="compact"):
        assert logits(model, **inputs_of("lighton_ocr", model)).isfinite().all()


def test_proportional_attention_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="may have layers that do not attend"):
        tokenprune_hf.prune(model_of("qwen3_5"), "uniform", 4, proportional_attention=True)


def test_commands_that_need_a_family_say_so() -> None:
    model = model_of("lighton_ocr")
    with pytest.raises(UnsupportedModelError, match="is of no family that can be used here"):
        vision_model(model)


def refusal(model: Any) -> str:
    """Return what `prune` says of a model."""
    with pytest.raises(UnsupportedModelError) as refused:
        tokenprune_hf.prune(model, "uniform", keep=4)
    return str(refused.value)


def test_an_encoder_decoder_is_refused() -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 96}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    text = tf.BartConfig(**sizes, **heads)
    vision = tf.ViTConfig(**{name: TOWER[name] for name in TOWER if name != "num_channels"})
    pair = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    said = refusal(tf.VisionEncoderDecoderModel(pair))
    assert "it has an encoder for its text, where visual tokens cannot be dropped" in said


def test_an_audio_model_is_refused() -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 96}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = tf.WhisperConfig(**sizes, **heads, pad_token_id=0, decoder_start_token_id=2)
    said = refusal(tf.WhisperForConditionalGeneration(config))
    assert "it reads audio and text and no images" in said


def test_a_text_model_is_refused() -> None:
    said = refusal(tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)))
    assert "it reads text and no images" in said
    assert "any model with a decoder alone whose forward takes mm_encoder_outputs" in said


class NobodysConfig(tf.LlavaConfig):  # type: ignore[misc]  # not typed
    """Of a type that nobody knows."""

    model_type = "nobodys"


class Nobodys(tf.LlavaForConditionalGeneration):  # type: ignore[misc]  # not typed
    """Somebody's own class, which takes rows."""

    config_class = NobodysConfig


class Wordless(Nobodys):
    """Somebody's own class, which takes no rows."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        return super().forward(input_ids, **kwargs)


def nobodys(architecture: type = Nobodys) -> Any:
    tower = {**TOWER, "model_type": "clip_vision_model", "projection_dim": 16}
    text = {**TEXT, "model_type": "llama"}

    def config() -> Any:
        return NobodysConfig(text_config=text, vision_config=tower, image_token_index=IMAGE)

    return Tiny(config, architecture).model()


def test_a_type_that_nobody_knows_is_pruned_if_it_takes_rows() -> None:
    model = nobodys()
    ids = torch.tensor([[2, 11, *[IMAGE] * 16, 12]])
    with tokenprune_hf.prune(model, "uniform", keep=4) as pruning:
        logits(model, input_ids=ids, pixel_values=noise(1, 3, 32, 32))
    assert [len(selection.kept) for selection in pruning.selections] == [4]


def test_a_type_that_nobody_knows_is_refused_if_it_takes_none() -> None:
    said = refusal(nobodys(Wordless))
    assert "its forward takes no rows of an encoder (mm_encoder_outputs)" in said


def test_images_under_a_name_that_is_not_known_are_refused() -> None:
    """They would be read unpruned."""
    model = nobodys()
    ids = torch.tensor([[2, 11, *[IMAGE] * 16, 12]])
    with (
        tokenprune_hf.prune(model, "uniform", keep=4),
        pytest.raises(UnsupportedModelError, match="is given image_patches_of_mine, and"),
    ):
        logits(model, input_ids=ids, image_patches_of_mine=noise(1, 3, 32, 32))


def test_an_encoder_that_does_not_look_is_refused() -> None:
    """All of its rows would be taken for structure, and none be dropped."""
    model = nobodys()
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.weight.zero_()
    ids = torch.tensor([[2, 11, *[IMAGE] * 16, 12]])
    with (
        tokenprune_hf.prune(model, "uniform", keep=4),
        pytest.raises(UnsupportedModelError, match="the same 16 rows for any picture"),
    ):
        logits(model, input_ids=ids, pixel_values=noise(1, 3, 32, 32))


def test_code_of_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    own = {"AutoConfig": "mine.Config", "AutoModelForImageTextToText": "mine.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": own}))
    (tmp_path / "mine.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(UnsupportedModelError, match="brings code of its own, which tokenprune"):
        load(str(tmp_path))
