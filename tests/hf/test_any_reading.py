"""Models of no family read with the question, against their own attention on the unpruned prompt.

A set of all tokens of the only image or video is the unpruned prompt, so what `flexselect` scores
by is the map that the model's own layer makes when it reads that prompt as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import tokenprune_hf
from tests.hf import types
from tests.hf.models import BOS, END, IMAGE, START, VIDEO
from tests.hf.test_every_type import marked
from tests.hf.type_table import TYPES, VIDEOS
from tokenprune.errors import UnsupportedModelError
from tokenprune.families.registry import FAMILIES, attending_layers
from tokenprune.question.prompt import counted_interval
from tokenprune_hf import any_model
from tokenprune_hf.any_model import AnyModel
from tokenprune_hf.prefix import sliding_window

KEEP = 5
NO_LAYER = "none of the 2 layers"
NOT_FOUND = "looks at query_attention"
UNREAD = {
    # images seen both ways
    **dict.fromkeys(("paligemma", "shieldgemma2", "gemma3", "gemma3n"), NOT_FOUND),
    **dict.fromkeys(("gemma4", "gemma4_unified", "molmo2"), NOT_FOUND),
    # decoders that are told more than rows and positions
    **dict.fromkeys(
        ("granite4_vision", "qwen4_exp", "chameleon", "glm5_next", "llama4"), NOT_FOUND
    ),
    "hunyuan_vl": NOT_FOUND,  # four axes
    "minicpmv4_7": "otherwise than frame by frame",  # on a canvas
    # layers
    **dict.fromkeys(("idefics2", "exaone4_5"), "sees 16 tokens only"),
    **dict.fromkeys(("inkling_mm_model", "inkling2", "inkling2_loop"), NO_LAYER),
    **dict.fromkeys(("unlimited_ocr", "mistral_large4", "dots3_note", "hy_v4_vl"), NO_LAYER),
    "nemotron_h_omni": NOT_FOUND,
}
BY_FAMILY_ALONE = {"ovis2": "text in front of an image is embedded by the model itself"}
"""Types that are wrong without their family, which they always have."""


@pytest.fixture(autouse=True)
def no_families(monkeypatch: pytest.MonkeyPatch) -> None:
    """Types that have a family of their own are pruned without it here."""
    monkeypatch.setattr(any_model, "supported_models", dict)


@pytest.fixture(autouse=True)
def no_deprecated_calls() -> None:
    """Transformers itself calls some types in a deprecated way, which is no concern here."""


def own_maps(model: Any, inputs: dict[str, Any]) -> dict[int, Tensor]:
    """Return the attention [H, L, L] of each layer of the decoder that attends."""
    maps: dict[int, Tensor] = {}

    def note(number: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            maps[number] = output[1][0].float()

        return hook

    hooks = [
        layer.self_attn.register_forward_hook(note(number))
        for number, layer in enumerate(AnyModel(model).decoder().layers)
        if hasattr(layer, "self_attn")
    ]
    text_config = model.config.get_text_config()
    before, text_config._attn_implementation = text_config._attn_implementation, "eager"
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
        text_config._attn_implementation = before
    return maps


def layer_to_read(model: Any) -> int:
    """Return the last layer that attends to all tokens."""
    attending = attending_layers(model.config.get_text_config())
    layers = AnyModel(model).decoder().layers
    return max(
        number
        for number in (range(len(layers)) if attending is None else attending)
        if sliding_window(layers[number].self_attn) is None
    )


def check_scores(
    kind: str, model: Any, inputs: dict[str, Any], token: int, structure: Sequence[int]
) -> None:
    """Compare what `flexselect` scores by with the model's own map."""
    columns = (inputs["input_ids"][0] == token).nonzero()[:, 0].tolist()
    ranked = [column for row, column in enumerate(columns) if row not in structure]
    layer = layer_to_read(model)
    maps = own_maps(model, inputs)
    how: dict[str, Any] = {"positions": TYPES[kind].positions, "layer": layer, "frames_per_set": 8}
    with torch.no_grad(), tokenprune_hf.prune(model, "flexselect", KEEP, **how) as pruning:
        model(**inputs)
    (selection,) = pruning.selections
    expected = maps[layer][:, columns[-1] + 1 :, ranked].amax(dim=(0, 1))
    assert selection.scores is not None
    torch.testing.assert_close(selection.scores, expected, atol=2e-6, rtol=2e-4)


def readable(only: Collection[str]) -> list[Any]:
    """Return types that are here and can be read; see `tests.hf.test_every_type.marked`."""
    kinds = [kind for kind in types.present() if kind in only and kind not in UNREAD]
    return marked([kind for kind in kinds if kind not in BY_FAMILY_ALONE])


@pytest.mark.parametrize("kind", readable(TYPES))
def test_an_image(kind: str) -> None:
    model = types.model_of(kind)
    inputs = types.prompts_of(kind, model, [[0]])
    check_scores(kind, model, inputs, IMAGE, TYPES[kind].structure(0))


@pytest.mark.parametrize("kind", readable([kind for kind in VIDEOS if kind not in FAMILIES]))
def test_a_video(kind: str) -> None:
    model = types.model_of(kind)
    media = types.video_media(kind, model)
    own, video = TYPES[kind], VIDEOS[kind]
    around = own.around if own.around[0] else ([START], [END])
    length = sum(map(len, types.encoded(model, media, "video")[1]))
    frames = 2 if video.by_frame else 1
    ids = [BOS, 11, 12]
    for frame in range(frames):
        ids += [30 + frame, *around[0], *[VIDEO] * (length // frames), *around[1]]
    input_ids = torch.tensor([[*ids, 21, 22]])
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    inputs |= dict.fromkeys(own.types, 2 * (input_ids == VIDEO).long()) | media
    check_scores(kind, model, inputs, VIDEO, video.structure)


@pytest.mark.parametrize("kind", marked([kind for kind in types.present() if kind in UNREAD]))
def test_others_are_refused_with_the_reason(kind: str) -> None:
    model = types.model_of(kind)
    inputs = types.prompts_of(kind, model, [[0]])
    with (
        pytest.raises(UnsupportedModelError, match=UNREAD[kind]),
        torch.no_grad(),
        tokenprune_hf.prune(model, "flexselect", KEEP, positions=TYPES[kind].positions),
    ):
        model(**inputs)


def test_positions_are_compared_whatever_the_default_device_is() -> None:
    positions = torch.tensor([[3, 3, 4, 4, 6, 7], [3, 4, 3, 4, 6, 7], [3, 3, 3, 3, 6, 7]])
    positions[1:, 2:4] = positions[1:, :2]
    positions[:, 4:] = torch.tensor([5, 6])
    is_visual = torch.tensor([True] * 4 + [False] * 2)
    with torch.device("meta"):
        assert counted_interval(positions, is_visual, (2, 2, 1)) == 1
        assert counted_interval(positions, is_visual, (1, 4, 1)) is None
        assert counted_interval(positions.flip(0), is_visual, (2, 2, 1)) is None


@pytest.mark.parametrize("kind", ["qwen2_vl"])
def test_a_prompt_that_is_counted_otherwise_is_refused(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = types.model_of(kind)
    inputs = types.prompts_of(kind, model, [[0]])
    counted = type(model.model).get_rope_index

    def transposed(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        positions, deltas = counted(*args, **kwargs)
        return positions[[0, 2, 1]], deltas

    monkeypatch.setattr(type(model.model), "get_rope_index", transposed)
    with (
        pytest.raises(UnsupportedModelError, match="otherwise than frame by frame"),
        torch.no_grad(),
        tokenprune_hf.prune(model, "flexselect", KEEP, layer=1),
    ):
        model(**inputs)
