"""FlexSelect inside transformers: against attention maps, and what a user leans on."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import tokenprune_hf
from tests.hf.by_hand import item_rows
from tests.hf.models import IMAGE, TINY, VIDEO, prompt

VIDEOS = ["llava_onevision", "video_llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
IMAGES = ["llava", "llava_next", "llava_onevision", "internvl", "qwen2_5_vl", "qwen3_vl", "smolvlm"]


def attention_by_hand(
    model: Any, name: str, inputs: dict[str, Any], columns: Sequence[int], row_of: dict[int, Tensor]
) -> list[Tensor]:
    """Run the whole language model, eager, on some columns of a prompt; return every layer's map.

    Parameters
    ----------
    columns
        Which columns of the first prompt the short one has.
    row_of
        Column -> what stands there in place of the token's embedding.
    """
    ids = inputs["input_ids"][:1, columns]
    embeddings = model.get_input_embeddings()(ids).clone()
    visual = torch.zeros_like(ids, dtype=torch.bool)
    for place, column in enumerate(columns):
        if column in row_of:
            embeddings[0, place] = row_of[column]
            visual[0, place] = True
    arguments: dict[str, Any] = {"position_ids": torch.arange(len(columns))[None]}
    if name.startswith("qwen"):
        kind = 1 if bool((ids == IMAGE).any()) else 2
        key = "image_grid_thw" if kind == 1 else "video_grid_thw"
        _, height, width = (inputs[key][0] // 2).tolist()
        interval = model.config.vision_config.tokens_per_second if name == "qwen2_5_vl" else 1
        arguments["position_ids"] = axes_by_hand(
            visual[0].tolist(), height, width, interval if kind == 2 else 1
        )
        arguments["attention_mask"] = torch.ones_like(ids)
    language_model = getattr(model.model, "language_model", None) or model.model.text_model
    if name == "qwen3_vl":
        function = model.model.get_image_features if kind == 1 else model.model.get_video_features
        names = inspect.signature(function).parameters
        encoder = {name: value for name, value in inputs.items() if name in names}
        deep = function(**encoder, return_dict=True).deepstack_features
        place = (inputs["input_ids"][0] == (IMAGE if kind == 1 else VIDEO)).nonzero()[:, 0].tolist()
        rows = [place.index(column) for column in columns if column in row_of]
        arguments["visual_pos_masks"] = visual
        arguments["deepstack_visual_embeds"] = [torch.cat(list(layer))[rows] for layer in deep]
    model.set_attn_implementation("eager")
    try:
        output = language_model(
            inputs_embeds=embeddings, output_attentions=True, use_cache=False, **arguments
        )
    finally:
        model.set_attn_implementation("sdpa")
    return [layer[0].float() for layer in output.attentions]


def axes_by_hand(visual: list[bool], height: int, width: int, interval: int) -> Tensor:
    """Count as Qwen2-VL's paper says: text on from the furthest position so far."""
    positions: list[tuple[int, int, int]] = []
    start, place = 0, 0
    while place < len(visual):
        if not visual[place]:
            positions.append((start, start, start))
            start, place = start + 1, place + 1
            continue
        frame, run = 0, []
        while place < len(visual) and visual[place]:
            run += [
                (start + frame * interval, start + y, start + x)
                for y in range(height)
                for x in range(width)
            ]
            frame, place = frame + 1, place + height * width
        positions += run
        start = max(map(max, run)) + 1
    return torch.tensor(positions).T[:, None]


def encoder_rows(model: Any, inputs: dict[str, Any], modality: str) -> tuple[Tensor, list[int]]:
    function = getattr(model.model, f"get_{modality}_features")
    names = inspect.signature(function).parameters
    given = {name: value for name, value in inputs.items() if name in names}
    output = function(**given, return_dict=True).pooler_output
    return torch.cat(list(output)), [len(part) for part in output]


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("reduction", ["max", "mean"])
@pytest.mark.parametrize("name", VIDEOS)
def test_a_video_is_ranked_as_the_attention_maps_say(name: str, layer: int, reduction: str) -> None:
    """Sets, softmax, slice and reduction written out, with the engine's own eager attention."""
    tiny = TINY[name]
    model = tiny.model()
    inputs = prompt(tiny, ["tvt"])
    with torch.no_grad():
        rows, sizes = encoder_rows(model, inputs, "video")
        (mine,) = item_rows(name, inputs, "video", sizes)
        with tokenprune_hf.prune(
            model, "flexselect", 7, layer=layer, reduction=reduction, frames_per_set=2
        ) as pruning:
            model(**inputs)
        (selection,) = pruning.selections
        frames, height, width = selection.grid
        place = (inputs["input_ids"][0] == VIDEO).nonzero()[:, 0].tolist()
        text = (inputs["input_ids"][0] != VIDEO).nonzero()[:, 0].tolist()
        item_columns = [place[row] for row in mine]
        loose = [place[row] for row in range(len(rows)) if row not in mine]
        sets = -(-frames // 2)
        budgets = [7 // sets + (number < 7 % sets) for number in range(sets)]
        expected: list[int] = []
        assert selection.scores is not None
        for number in range(sets):
            own_frames = list(range(number, frames, sets))
            tokens = [
                frame * height * width + cell
                for frame in own_frames
                for cell in range(height * width)
            ]
            labels = []
            for column in text:
                if item_columns[0] < column < item_columns[-1]:
                    following = next(i for i, c in enumerate(item_columns) if c > column)
                    if following // (height * width) not in own_frames:
                        labels.append(column)
            columns = sorted(
                [column for column in text if column not in labels]
                + [item_columns[token] for token in tokens]
                + [c for c in loose if item_columns[0] < c <= item_columns[-1] + 1]
            )
            row_of = {column: rows[place.index(column)] for column in columns if column in place}
            attention = attention_by_hand(model, name, inputs, columns, row_of)[layer]
            questions = sum(1 for column in text if column > item_columns[-1])
            asked = [columns.index(item_columns[token]) for token in tokens]
            part = attention[:, -questions:][..., asked]
            scores = part.amax((0, 1)) if reduction == "max" else part.mean((0, 1))
            torch.testing.assert_close(selection.scores[tokens], scores, atol=1e-6, rtol=1e-4)
            best = sorted(range(len(tokens)), key=lambda i: (-float(scores[i]), i))
            expected += [tokens[i] for i in best[: budgets[number]]]
    assert selection.kept.tolist() == sorted(expected)


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_is_one_set(name: str) -> None:
    tiny = TINY[name]
    model = tiny.model()
    inputs = prompt(tiny, ["tit"])
    with torch.no_grad():
        rows, sizes = encoder_rows(model, inputs, "image")
        with tokenprune_hf.prune(model, "flexselect", 5, layer=1) as pruning:
            model(**inputs)
        place = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0].tolist()
        text = (inputs["input_ids"][0] != IMAGE).nonzero()[:, 0].tolist()
        items = item_rows(name, inputs, "image", sizes)
        in_items = {row for item in items for row in item}
        for selection, item in zip(pruning.selections, items, strict=True):
            first, last = place[item[0]], place[item[-1]]
            loose = [place[row] for row in range(len(rows)) if row not in in_items]
            columns = sorted(
                text + [place[row] for row in item] + [c for c in loose if first < c <= last + 1]
            )
            row_of = {c: rows[place.index(c)] for c in columns if c in place}
            attention = attention_by_hand(model, name, inputs, columns, row_of)[1]
            questions = sum(1 for column in text if column > last)
            part = attention[:, -questions:][..., [columns.index(place[row]) for row in item]]
            assert selection.scores is not None
            torch.testing.assert_close(selection.scores, part.amax((0, 1)), atol=1e-6, rtol=1e-4)
