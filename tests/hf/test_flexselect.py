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
from tokenprune.errors import PromptError, UnsupportedModelError

VIDEOS = ["llava_onevision", "video_llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
IMAGES = [
    "llava",
    "llava_next",
    "llava_onevision",
    "internvl",
    "qwen2_5_vl",
    "qwen3_vl",
    "smolvlm",
    "kimi_k25",  # with latent attention
    "cohere2_vision",  # whose layers of full attention look at no positions
]


def attention_by_hand(
    model: Any,
    name: str,
    inputs: dict[str, Any],
    columns: Sequence[int],
    row_of: dict[int, Tensor],
    unread: Sequence[int] = (),
) -> list[Tensor]:
    """Run the whole language model, eager, on some columns of a prompt; return every layer's map.

    Parameters
    ----------
    columns
        Which columns of the first prompt the short one has.
    row_of
        Column -> what stands there in place of the token's embedding.
    unread
        Columns that are left out once positions are counted.
    """
    ids = inputs["input_ids"][:1, columns]
    embeddings = model.get_input_embeddings()(ids).clone()
    visual = torch.zeros_like(ids, dtype=torch.bool)
    for place, column in enumerate(columns):
        if column in row_of:
            embeddings[0, place] = row_of[column]
            visual[0, place] = True
    arguments: dict[str, Any] = {"position_ids": torch.arange(len(columns))[None]}
    if name.startswith(("qwen", "glm")):
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
    if unread:
        left = [place for place, column in enumerate(columns) if column not in unread]
        embeddings, visual = embeddings[:, left], visual[:, left]
        arguments["position_ids"] = arguments["position_ids"][..., left]
        arguments["attention_mask"] = torch.ones_like(visual, dtype=torch.int64)
        if name == "qwen3_vl":
            arguments["visual_pos_masks"] = visual
            rows = [n for n, c in enumerate(c for c in columns if c in row_of) if c not in unread]
            deep = arguments["deepstack_visual_embeds"]
            arguments["deepstack_visual_embeds"] = [layer[rows] for layer in deep]
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


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_candidates_are_read_where_they_stand_in_the_prompt(name: str) -> None:
    tiny = TINY[name]
    model = tiny.model()
    inputs = prompt(tiny, ["tit"])
    options: dict[str, Any] = {"candidates": 0.5, "min_candidates": 1, "layer": 1}
    with torch.no_grad():
        rows, sizes = encoder_rows(model, inputs, "image")
        with tokenprune_hf.prune(model, "relevant-information", 3, **options) as pruning:
            model(**inputs)
        with tokenprune_hf.prune(model, "information", 0.5) as blind:
            model(**inputs)
        place = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0].tolist()
        (item,) = item_rows(name, inputs, "image", sizes)
        loose = [place[row] for row in range(len(rows)) if row not in item]
        text = (inputs["input_ids"][0] != IMAGE).nonzero()[:, 0].tolist()
        read = [place[item[token]] for token in blind.selections[0].kept.tolist()]
        unread = [place[row] for row in item if place[row] not in read]
        assert unread
        columns = sorted(text + read + unread + loose)
        row_of = {column: rows[place.index(column)] for column in place}
        attention = attention_by_hand(model, name, inputs, columns, row_of, unread)[1]
        left = [column for column in columns if column not in unread]
        last = attention[:, -1, [left.index(column) for column in read]].mean(dim=0)
        scores = pruning.selections[0].scores
    assert scores is not None
    found = scores[blind.selections[0].kept]
    torch.testing.assert_close(found, 1 + last / last.mean(), atol=1e-5, rtol=1e-4)


def kept_of(model: Any, inputs: dict[str, Any], **options: Any) -> list[list[int]]:
    with torch.no_grad(), tokenprune_hf.prune(model, "flexselect", 6, **options) as pruning:
        model(**inputs)
    return [one.kept.tolist() for one in pruning.selections]


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl", "qwen3_vl"])
def test_a_batch_equals_its_single_prompts(name: str) -> None:
    """Also with several sets in one pass, padding, and an image and a video in one prompt."""
    tiny = TINY[name]
    model = tiny.model()
    inputs = prompt(tiny, ["tvttt", "tvt"])
    together = kept_of(model, inputs, frames_per_set=1, sets_per_pass=3)
    for index in range(2):
        single = {
            key: value[index : index + 1]
            for key, value in inputs.items()
            if key in ("input_ids", "attention_mask", "mm_token_type_ids", "video_grid_thw")
        }
        pixels = inputs["pixel_values_videos"]
        if name == "llava_onevision":
            single["pixel_values_videos"] = pixels[index : index + 1]
        else:
            sizes = inputs["video_grid_thw"].prod(dim=1).tolist()
            single["pixel_values_videos"] = pixels.split(sizes)[index]
        assert kept_of(model, single, frames_per_set=1) == [together[index]]
    both = prompt(tiny, ["titvt"])
    assert kept_of(model, both)[0] != kept_of(model, prompt(tiny, ["tit"]))[0]


def test_the_question_decides_and_what_comes_before_counts() -> None:
    tiny = TINY["llava_onevision"]
    model = tiny.model()
    inputs = prompt(tiny, ["tvt"])
    first = kept_of(model, inputs)
    assert kept_of(model, inputs) == first
    for column in (-1, 1):
        other = {**inputs, "input_ids": inputs["input_ids"].clone()}
        other["input_ids"][0, column] = 3 + (int(other["input_ids"][0, column]) + 40) % 80
        assert kept_of(model, other) != first


def test_the_scores_of_one_encoding_follow_the_prompt() -> None:
    """`encoded` may be asked about twice; what it holds is no prompt's."""
    tiny = TINY["qwen2_5_vl"]
    model = tiny.model()
    one, other = prompt(tiny, ["tvt"]), prompt(tiny, ["tvtt"])
    encoded = tokenprune_hf.encode(model, **one)
    names = ("input_ids", "attention_mask", "mm_token_type_ids", "video_grid_thw")
    for inputs in (one, other):
        expected = kept_of(model, inputs)
        text = {name: inputs[name] for name in names}
        with torch.no_grad(), tokenprune_hf.prune(model, "flexselect", 6) as pruning:
            model.generate(**text, encoded=encoded, max_new_tokens=1)
        assert [one.kept.tolist() for one in pruning.selections] == expected


def test_the_model_is_as_it_was_also_after_an_error() -> None:
    tiny = TINY["llava_onevision"]
    model = tiny.model()
    before = [(name, id(module)) for name, module in model.named_modules()]
    inputs = prompt(tiny, ["tvt"])
    plain = model(**inputs).logits
    with pytest.raises(UnsupportedModelError, match=r"layer=2 is no layer .* 0 to 1"):
        tokenprune_hf.prune(model, "flexselect", 6, layer=2)
    with pytest.raises(PromptError), tokenprune_hf.prune(model, "flexselect", 6):
        model(**{**inputs, "attention_mask": inputs["attention_mask"][:, 1:]})
    kept_of(model, inputs)
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert torch.equal(model(**inputs).logits, plain)
    with tokenprune_hf.prune(model, "flexselect", 1.0):
        torch.testing.assert_close(model(**inputs).logits, plain)


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_answers_are_read_at_the_positions_asked_for(positions: Any) -> None:
    tiny = TINY["llava_onevision"]
    model = tiny.model()
    inputs = prompt(tiny, ["tvt"])
    seen: list[Tensor] = []
    with torch.no_grad(), tokenprune_hf.prune(model, "flexselect", 6, positions) as pruning:
        # On the model's own language model, whose copy ranks: the last call is the final pass.
        handle = model.model.language_model.register_forward_pre_hook(
            lambda _module, _args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
        )
        model(**inputs)
        handle.remove()
    (selection,) = pruning.selections
    first = (inputs["input_ids"][0] == VIDEO).nonzero()[0, 0]
    expected = selection.kept + first
    if positions == "compact":
        expected = torch.arange(len(selection.kept)) + first
    assert seen[-1][0, first : first + 6].tolist() == expected.tolist()


def test_a_question_longer_than_the_video_and_a_budget_above_it() -> None:
    tiny = TINY["qwen2_vl"]
    model = tiny.model()
    inputs = prompt(tiny, ["vt"], words=300)
    total = int((inputs["input_ids"] == VIDEO).sum())
    assert total < 300
    (kept,) = kept_of(model, inputs)
    assert len(kept) == 6
    plain = model(**inputs).logits
    with tokenprune_hf.prune(model, "flexselect", total + 50) as pruning:
        torch.testing.assert_close(model(**inputs).logits, plain)
    assert len(pruning.selections[0].kept) == total


def test_no_text_behind_the_video() -> None:
    tiny = TINY["qwen2_5_vl"]
    inputs = prompt(tiny, ["tv"])
    inputs = {
        name: value[:, :-1]
        if name in ("input_ids", "attention_mask", "mm_token_type_ids")
        else value
        for name, value in inputs.items()
    }
    with pytest.raises(PromptError, match="video 0: no text comes after it"):
        kept_of(tiny.model(), inputs)


def frames_of_internvl() -> tuple[Any, dict[str, Any]]:
    """An InternVL with a video of four frames, each with a word before it, and one image."""
    tiny = TINY["internvl"]
    inputs = prompt(tiny, ["iiiiit"])
    return tiny.model(), inputs


def test_videos_that_are_given_as_images() -> None:
    model, inputs = frames_of_internvl()
    with pytest.raises(PromptError, match=r"Pass video_frames .* video_frames=\[5\]"):
        kept_of(model, inputs)
    with torch.no_grad():
        for told, grids in (([4, 1], [(4, 2, 2), (1, 2, 2)]), ([5], [(5, 2, 2)]), ([1] * 5, None)):
            with tokenprune_hf.prune(model, "flexselect", 6) as pruning:
                output = model.generate(**inputs, video_frames=told, max_new_tokens=2)
            assert output.shape[1] == inputs["input_ids"].shape[1] + 2
            sides = [one.grid for one in pruning.selections]
            expected = grids or [(1, 2, 2)] * 5
            assert [(t, h // 2, w // 2) for t, h, w in sides] == expected
            with tokenprune_hf.prune(model, "cls-attention", 6) as pruning:
                model(**inputs, video_frames=told)
            assert [one.grid for one in pruning.selections] == sides
    for wrong in ([4], [5, 0], [6]):
        with pytest.raises(PromptError, match="the processor made 5"):
            kept_of(model, {**inputs, "video_frames": wrong})


def test_gemma_is_refused() -> None:
    tiny = TINY["gemma3"]
    with pytest.raises(UnsupportedModelError, match="flexselect does not read that"):
        kept_of(tiny.model(), prompt(tiny, ["it"]))


@pytest.mark.parametrize("of_config", [False, True])
def test_a_layer_with_a_window_is_refused(of_config: bool) -> None:
    """Some attention modules have their window, others (Mistral's) take their config's."""
    tiny = TINY["llava"]
    model, inputs = tiny.model(), prompt(tiny, ["it"])
    attention = model.model.language_model.layers[1].self_attn
    (attention.config if of_config else attention).sliding_window = 8
    with (
        tokenprune_hf.prune(model, "flexselect", 4, layer=1),
        pytest.raises(UnsupportedModelError, match="sees 8 tokens only"),
    ):
        model.generate(**inputs, max_new_tokens=1)


@pytest.mark.parametrize("how", ["each.compile()", "torch.compile(each)"])
def test_layers_that_are_compiled_one_by_one_are_read_alike(how: str) -> None:
    model, inputs = TINY["llava"].model(), prompt(TINY["llava"], ["it"])
    layers = model.model.language_model.layers

    def selections() -> list[Any]:
        with torch.no_grad(), tokenprune_hf.prune(model, "flexselect", 5, layer=1) as pruning:
            model(**inputs)
        scores = [one.scores for one in pruning.selections]
        return [each.tolist() for each in scores if each is not None]

    expected = selections()
    assert len(expected) == 1
    for number, layer in enumerate(list(layers)):
        if how == "each.compile()":
            layer.compile(backend="eager")
        else:
            layers[number] = torch.compile(layer, backend="eager")
    assert selections() == expected
