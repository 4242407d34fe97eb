"""What is found behind the rows of models of no family: features, attention and projector.

Types that have a family are encoded with it and without it, and selectors are shown the same; what
families show is compared with calculations by hand in `tests.hf.test_families`. Others are compared
with the tower's own output and its own attention maps.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import tokenprune_hf
from tests.hf import types
from tokenprune import select
from tokenprune.errors import UnsupportedModelError
from tokenprune.families.registry import FAMILIES
from tokenprune.tower.any_attention import Pictures, check_scored
from tokenprune.tower.model_projector import read_projector
from tokenprune.tower.tracing import NotFoundError, watch_calls
from tokenprune_hf.any_model import AnyModel
from tokenprune_hf.vision import VisionModel, vision_model


@pytest.fixture(autouse=True)
def no_deprecated_calls() -> None:
    """Transformers itself calls some types in a deprecated way, which is no concern here."""


NEEDS = ("features", "embeddings", "cls_attention", "projector")

EVERY_DAY = ("llava", "qwen2_5_vl", "mistral3", "glm4v")
"""CLIP and CLS; windows and a merger; Pixtral and an interleaved merger; a convolution."""
OTHERS_OF_FAMILIES = (
    *("video_llava", "internvl", "idefics3", "llava_next", "llava_next_video", "qwen2_vl"),
    *("qwen3_vl", "qwen3_5", "kimi_k25", "minicpmv4_6", "lfm2_vl", "glm_ocr"),
)


def named(*every_day: str, others: tuple[str, ...] = ()) -> list[Any]:
    """Return the types that are here; the others are run with all models alone."""
    here = types.present()
    marked = [pytest.param(kind, marks=pytest.mark.every_model) for kind in others if kind in here]
    return [kind for kind in every_day if kind in here] + marked


def shown(vision: VisionModel, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Return what selectors are shown of each row, NaN where it is in no item."""
    (given,) = vision.encoder_inputs(inputs)
    with torch.no_grad():
        media = vision.encode(given, NEEDS)
        found: dict[str, Tensor] = {}
        for item in media.items:
            tokens: Any = item.tokens
            of_item = {
                "features": tokens.features,
                "cls_attention": tokens.cls_attention.T,
                "projected": tokens.projector(tokens.features),
            }
            for name, value in of_item.items():
                empty = torch.full((len(media.rows), value.shape[1]), torch.nan)
                found.setdefault(name, empty)[item.rows] = value
    return found


@pytest.mark.parametrize("kind", named(*EVERY_DAY, others=OTHERS_OF_FAMILIES))
def test_what_is_found_is_what_the_family_says(kind: str) -> None:
    assert kind in FAMILIES
    model = types.model_of(kind)
    inputs = types.prompts_of(kind, model, [[0, 1], [2]])
    of_family = shown(vision_model(model), inputs)
    found = shown(AnyModel(model), inputs)
    for name, value in found.items():
        both = value.isfinite() & of_family[name].isfinite()
        assert both.any(), name
        torch.testing.assert_close(value[both], of_family[name][both], rtol=1e-4, atol=1e-6)


def by_hand(kind: str, model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Return what the tower returns, and the attention that its own maps say, row by row."""
    whole = copy.deepcopy(model)
    whole.set_attn_implementation("eager")  # it returns its maps
    tower, attention, merged = HANDS[kind](whole.model)
    maps: list[Tensor] = []
    hook = attention.register_forward_hook(lambda _m, _a, output: maps.append(output[1]))
    with torch.no_grad():
        _, entries = types.encoded(whole, inputs)
        again = tower(**{k: v for k, v in inputs.items() if k in ("pixel_values", "image_sizes")})
    hook.remove()
    tokens = again.last_hidden_state
    weights = maps[0]
    if weights.shape[0] == 1:  # packed: of each picture its own mean over queries
        seen = (weights > 0).sum(dim=-2)
        scores = weights.sum(dim=-2) / seen
    else:
        scores = weights.mean(dim=-2)
    return {
        "features": merged(tokens.flatten(0, 1), inputs),
        "cls_attention": merged(scores.transpose(1, 2).flatten(0, 1), inputs, mean=True),
        "projected": torch.cat(entries),
    }


def each(values: Tensor, inputs: dict[str, Any], mean: bool = False) -> Tensor:
    """Return values of tokens, each of which is a row."""
    return values


def blocks(values: Tensor, inputs: dict[str, Any], mean: bool = False) -> Tensor:
    """Return values of 2 x 2 patches, which are a row, side by side or their mean."""
    found, start = [], 0
    for height, width in (inputs["image_sizes"] // 4).tolist():
        of_image = values[start : start + height * width].view(height // 2, 2, width // 2, 2, -1)
        cells = of_image.transpose(1, 2).reshape(height * width // 4, 4, -1)
        found.append(cells.mean(dim=1) if mean else cells.flatten(1))
        start += height * width
    return torch.cat(found)


HANDS: dict[str, Any] = {
    "deepseek_vl": lambda model: (
        model.vision_model,
        model.vision_model.encoder.layers[-1].self_attn,
        each,
    ),
    "paligemma": lambda model: (
        model.vision_tower,
        model.vision_tower.encoder.layers[-1].self_attn,
        each,
    ),
    "lighton_ocr": lambda model: (
        model.vision_encoder,
        model.vision_encoder.transformer.layers[-1].attention,
        blocks,
    ),
}
"""Type of no family -> its tower, the attention of the last layer, and how rows are made."""


@pytest.mark.parametrize("kind", named("lighton_ocr", others=("deepseek_vl", "paligemma")))
def test_what_is_found_is_what_the_tower_returns(kind: str) -> None:
    assert kind not in FAMILIES
    model = types.model_of(kind)
    inputs = types.prompts_of(kind, model, [[0, 1]])
    found = shown(AnyModel(model), inputs)
    for name, expected in by_hand(kind, model, inputs).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)


NAMES = ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")
CHAINS = ("muse_glimmer", "hyperclovax_vision_v2", "cosmos3_omni", "glmga")
OTHER_TOWERS = ("qianfan_ocr", "minicpmv4_7", "glm5_next", "minimax_m3_vl", "nemotron_h_omni")


@pytest.mark.parametrize("kind", named("ernie4_5_vl_moe", others=(*NAMES, *CHAINS, *OTHER_TOWERS)))
def test_the_projector_makes_rows_of_the_features(kind: str) -> None:
    model = types.model_of(kind)
    inputs = types.prompts_of(kind, model, [[0, 1]])
    vision = AnyModel(model)
    found = shown(vision, inputs)
    rows = torch.cat(types.encoded(model, inputs)[1])
    in_item = found["projected"].isfinite().all(dim=1)
    assert in_item.any()
    torch.testing.assert_close(found["projected"][in_item], rows[in_item], rtol=1e-4, atol=1e-5)
    # Other images of the same sizes, and of others.
    for images in ([[1, 0]], [[2]]):
        others = types.prompts_of(kind, model, images)
        projected = shown(vision, others)["projected"]
        rows = torch.cat(types.encoded(model, others)[1])
        in_item = projected.isfinite().all(dim=1)
        torch.testing.assert_close(projected[in_item], rows[in_item], rtol=1e-4, atol=1e-5)


@pytest.mark.every_model
@pytest.mark.parametrize("kind", named("muse_glimmer", "qwen3_vl"))
def test_a_video_is_followed_after_an_image(kind: str) -> None:
    model = types.model_of(kind)
    inputs = types.video_prompt(kind, model)
    vision = AnyModel(model)
    for given in vision.encoder_inputs(inputs):
        with torch.no_grad():
            items = vision.encode(given, NEEDS).items
        rows = torch.cat(types.encoded(model, inputs, given.modality)[1])
        for item in items:
            tokens: Any = item.tokens
            assert tokens.cls_attention.shape[1] == len(item.rows)
            with torch.no_grad():
                projected = tokens.projector(tokens.features)
            torch.testing.assert_close(projected, rows[item.rows], rtol=1e-4, atol=1e-5)


REFUSED = {
    "step3p7": "not put together of the tokens",  # convolutions that overlap
    "got_ocr2": "not put together of the tokens",
    "video_llama_3": "not put together of the tokens",  # resampled between tower and projector
    "idefics2": "not put together of the tokens",  # queries
    "gemma3": "each made of its own tokens",  # pooled inside
}


@pytest.mark.parametrize("kind", named("got_ocr2", others=tuple(REFUSED)))
def test_what_cannot_be_found_is_refused_with_the_reason(kind: str) -> None:
    model = types.model_of(kind)
    inputs = types.prompts_of(kind, model, [[0]])
    vision = AnyModel(model)
    (given,) = vision.encoder_inputs(inputs)
    for needs in (["features"], ["cls_attention"], ["projector"]):
        with pytest.raises(UnsupportedModelError, match=REFUSED[kind]), torch.no_grad():
            vision.encode(given, needs)
    with torch.no_grad():
        assert vision.encode(given, ["embeddings"]).items


def test_methods_run_and_keep_what_a_selector_says_by_hand() -> None:
    kind = "lighton_ocr"
    model = types.model_of(kind)
    inputs = types.prompts_of(kind, model, [[0, 1]])
    hand = by_hand(kind, model, inputs)
    counts = [len(entry) for entry in types.encoded(model, inputs)[1]]
    scores = {
        "feature-norm": hand["features"].float().norm(dim=1),
        "cls-attention": hand["cls_attention"].mean(dim=1),
    }
    for method, score in scores.items():
        with tokenprune_hf.prune(model, method, keep=5) as pruning, torch.no_grad():
            model(**inputs)
        kept = [selection.kept.tolist() for selection in pruning.selections]
        best = [sorted(part.topk(5).indices.tolist()) for part in score.split(counts)]
        assert kept == best, method


def test_the_closed_form_of_a_projector_that_was_found() -> None:
    model = types.model_of("paligemma")
    inputs = types.prompts_of("paligemma", model, [[0]])
    vision = AnyModel(model)
    (given,) = vision.encoder_inputs(inputs)
    with torch.no_grad():
        tokens: Any = vision.encode(given, NEEDS).items[0].tokens
    closed = read_projector(tokens.projector)
    with torch.no_grad():
        torch.testing.assert_close(closed(tokens.features), tokens.embeddings)


def test_a_copy_finds_its_own() -> None:
    model = types.model_of("paligemma")
    inputs = types.prompts_of("paligemma", model, [[0]])
    with tokenprune_hf.prune(model, "zeroth-order", keep=5) as pruning, torch.no_grad():
        model(**inputs)
        first = pruning.selections[0].kept
        vision = copy.deepcopy(AnyModel(model))
    (given,) = vision.encoder_inputs(inputs)
    with torch.no_grad():
        tokens = vision.encode(given, NEEDS).items[0].tokens
    assert tokens.projector.module is vision.model.model.multi_modal_projector  # type: ignore[union-attr]
    assert select(tokens, method="zeroth-order", keep=5).kept.equal(first)


def test_threads_watch_one_model_at_once() -> None:
    """Layers of some releases have a ``__call__`` of their own, and hooks watch them all the same.

    What is put in place of a forward would have to be taken away in reverse order, which threads do
    not keep to.
    """
    model = types.model_of("internvl")
    layers = list(model.modules())
    first, second = watch_calls(layers), watch_calls(layers)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert not any("forward" in vars(module) or module._forward_hooks for module in layers)
    inputs = types.prompts_of("internvl", model, [[0]])
    expected = shown(AnyModel(model), inputs)
    hooks = [list(module._forward_hooks) for module in layers]  # some releases leave their own
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: shown(AnyModel(model), inputs), range(8)))
    for of_thread in found:
        for name, value in expected.items():
            assert torch.equal(of_thread[name], value), name
    assert [list(module._forward_hooks) for module in layers] == hooks


@pytest.mark.parametrize(
    "pictures", [Pictures(lengths=(3, 3)), Pictures(real=torch.tensor([[True] * 5 + [False]]))]
)
def test_a_cls_token_is_not_looked_for_among_packed_or_padded_pictures(pictures: Pictures) -> None:
    runs, returned = [((1, 6), pictures)], [torch.zeros(1, 6, 4)]
    check_scored(runs, returned, torch.tensor([[1], [4]]), has_cls=False)
    with pytest.raises(NotFoundError, match="packs or pads"):
        check_scored(runs, returned, torch.tensor([[1], [4]]), has_cls=True)
    with pytest.raises(NotFoundError, match="other tokens"):
        check_scored(runs, [torch.zeros(1, 5, 4)], torch.tensor([[1]]), has_cls=False)
