"""Models with layers that keep a state (linear attention): what they are asked for, and refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokenprune_hf
from tests.hf.by_hand import item_rows
from tests.hf.models import IMAGE, STATEFUL, TINY, VIDEO, prompt
from tests.hf.test_flexselect import attention_by_hand, encoder_rows
from tokenprune.errors import UnsupportedModelError
from tokenprune_hf.layout import decoder_of

UNREAD = ("lfm2_vl", "glm5_next", "nemotron_h_omni", "minicpmv4_7")  # no method reads their layers
READ = [name for name in STATEFUL if name not in UNREAD]
CASES = [(name, modality) for name in READ for modality in ("image", "video")]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(("name", "modality"), [*CASES, ("glm4v", "image"), ("glm_ocr", "image")])
def test_the_layer_that_attends_ranks_tokens(name: str, modality: str, named: bool) -> None:
    """The last one's map, by the engine's own eager attention, behind layers that keep a state."""
    tiny = TINY[name]
    model, inputs = tiny.model(), prompt(tiny, ["tit" if modality == "image" else "tvt"])
    layer = model.config.get_text_config().num_hidden_layers - 1 if named else None
    with torch.no_grad():
        rows, sizes = encoder_rows(model, inputs, modality)
        with tokenprune_hf.prune(model, "flexselect", 5, layer=layer) as pruning:
            model(**inputs)
        ids = inputs["input_ids"][0]
        place = (ids == (IMAGE if modality == "image" else VIDEO)).nonzero()[:, 0].tolist()
        (item,) = item_rows(name, inputs, modality, sizes)
        columns = list(range(len(ids)))
        attention = attention_by_hand(
            model, name, inputs, columns, dict(zip(place, rows, strict=True))
        )[-1]
    questions = len(ids) - 1 - place[-1]
    scores = attention[:, -questions:][..., [place[row] for row in item]].amax((0, 1))
    (selection,) = pruning.selections
    assert selection.scores is not None
    torch.testing.assert_close(selection.scores, scores, atol=1e-6, rtol=1e-4)
    best = torch.sort(scores, descending=True, stable=True).indices[:5].sort().values
    assert torch.equal(selection.kept, best)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"apply": "mask"}, "3 of the 4 layers of Qwen3_5.* no attention mask hides"),
        ({"proportional_attention": True}, "3 of the 4 layers .* count for several"),
    ],
)
def test_what_a_state_cannot_do_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        tokenprune_hf.prune(TINY["qwen3_5"].model(), "uniform", 4, **options)


def test_a_layer_that_does_not_attend_ranks_nothing() -> None:
    with pytest.raises(UnsupportedModelError, match=r"layer=1 .* does not attend .* Layers 3 "):
        tokenprune_hf.prune(TINY["qwen3_5"].model(), "flexselect", 4, layer=1)


def test_positions_on_a_canvas_are_not_read() -> None:
    model, inputs = TINY["minicpmv4_7"].model(), prompt(TINY["minicpmv4_7"], ["tit"])
    with (
        pytest.raises(UnsupportedModelError, match="on one canvas of positions"),
        tokenprune_hf.prune(model, "flexselect", 4),
    ):
        model(**inputs)


def test_a_decoder_with_other_layers_is_not_read() -> None:
    tiny = TINY["nemotron_h_omni"]
    model, inputs = tiny.model(), prompt(tiny, ["tit"])
    with (
        pytest.raises(UnsupportedModelError, match="have no self_attn"),
        tokenprune_hf.prune(model, "flexselect", 4),
    ):
        model(**inputs)


def test_masks_reach_no_layer_with_a_state() -> None:
    with pytest.raises(UnsupportedModelError, match="layers without self_attn"):
        decoder_of(TINY["qwen3_5"].model())


@pytest.mark.skipif("llama4" not in TINY, reason="this release of transformers cannot run it")
def test_layers_that_see_one_chunk_are_not_read_nor_masked() -> None:
    model = TINY["llama4"].model()
    inputs = prompt(TINY["llama4"], ["tit"])
    with (
        pytest.raises(UnsupportedModelError, match="attends to one chunk of the prompt"),
        tokenprune_hf.prune(model, "flexselect", 4),
    ):
        model(**inputs)
    with pytest.raises(UnsupportedModelError, match="see one chunk of the prompt"):
        tokenprune_hf.prune(model, "uniform", 4, proportional_attention=True)
