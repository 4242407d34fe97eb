"""Every family against a calculation by hand: which tokens are kept, and what the model says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tokenprune_hf
from tests.hf.by_hand import encode, full_attention_maps, greedy, item_rows
from tests.hf.models import APART, IMAGE, TINY, UNATTENDING, mixing, pixels, prompt
from tokenprune.errors import PromptError, UnsupportedModelError
from tokenprune.families.minicpm import NemotronOmni
from tokenprune.selection import Selection
from tokenprune_hf.vision import vision_model

IMAGE_BATCH = ["titit", "ttit", "it"]
VIDEO_BATCH = ["tvtit", "titvt"]

CASES = [(name, IMAGE_BATCH) for name in TINY] + [
    (name, mixing(name, VIDEO_BATCH)) for name, tiny in TINY.items() if tiny.video is not None
]

MERGED = (
    "internvl",
    "idefics3",
    "smolvlm",
    "aya_vision",
    "cohere2_vision",
    "perception_lm",
    "ovis2",
    "llama4",
    "gemma3",
)
"""Those whose tokens are 2 x 2 patches of a square of 8 x 8."""

GRIDDED = [name for name in TINY if name.startswith(("qwen", "glm", "paddle", "kimi", "minicpm"))]


def by_modality(samples: list[str], items_of: dict[str, list[int]], chosen: list[Selection]) -> Any:
    """Sort selections, which come in prompt order, into images and videos."""
    result: dict[str, list[list[int]]] = {"image": [], "video": []}
    left = list(chosen)
    counts = {key: list(value) for key, value in items_of.items()}
    for kind in "".join(samples):
        if kind in "iv":
            modality = "image" if kind == "i" else "video"
            for _ in range(counts[modality].pop(0)):
                result[modality].append(left.pop(0).kept.tolist())
    assert not left
    return result


def items_per_medium(name: str, inputs: dict[str, Any]) -> dict[str, list[int]]:
    """Return how many items each image and each video is cut into."""
    if name.startswith("llava_next"):
        crops = {(48, 36): 5, (24, 48): 3, (40, 48): 5}
        sizes = inputs["image_sizes"].tolist()
        return {"image": [crops[tuple(size)] for size in sizes], "video": [1] * 99}
    if name == "gemma4":
        return {
            "image": [1] * 99,
            "video": inputs.get("num_frames_per_video", torch.ones(0)).int().tolist(),
        }
    if name == "molmo2":
        return {
            "image": [2] * 99,
            "video": inputs.get("video_grids", torch.ones(1, 1))[:, 0].tolist(),
        }
    image = {"llava_onevision": 2, "perception_lm": 3}.get(name, 1)
    return {"image": [image] * 99, "video": [1] * 99}


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize(("name", "samples"), CASES)
def test_generation_equals_splicing_by_hand(name: str, samples: list[str], positions: Any) -> None:
    tiny = TINY[name]
    model, inputs = tiny.model(), prompt(tiny, samples)
    length = inputs["input_ids"].shape[1]
    with (
        torch.no_grad(),
        tokenprune_hf.prune(model, "feature-norm", 0.3, positions=positions) as pruning,
    ):
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        logits = model(**inputs).logits[:, -1]
    assert torch.equal(output[:, :length], inputs["input_ids"])
    kept = by_modality(samples, items_per_medium(name, inputs), pruning.selections)
    with torch.no_grad():
        expected = greedy(model, name, inputs, kept, positions, steps=4)
    assert output[:, length:].tolist() == expected
    logits[:, model.generation_config.suppress_tokens] = -torch.inf
    assert logits.argmax(dim=-1).tolist() == [answer[0] for answer in expected]


@pytest.mark.parametrize(("name", "samples"), CASES)
def test_keeping_everything_changes_nothing(name: str, samples: list[str]) -> None:
    tiny = TINY[name]
    model, inputs = tiny.model(), prompt(tiny, samples)
    with torch.no_grad():
        plain = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        plain_logits = None
        if name != "gemma4" or "video_position_ids" not in inputs:
            # Gemma 4's forward, in some releases, does not tell its encoder which frames are whose.
            plain_logits = model(**inputs).logits[:, -1]
        with tokenprune_hf.prune(model, "zeroth-order", 1.0, estimator="jvp", directions=4):
            pruned = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            pruned_logits = model(**inputs).logits[:, -1]
    assert torch.equal(plain, pruned)
    if plain_logits is not None:
        torch.testing.assert_close(pruned_logits, plain_logits)


@pytest.mark.parametrize(("name", "samples"), CASES)
def test_a_batch_equals_its_single_prompts(name: str, samples: list[str]) -> None:
    tiny = TINY[name]
    model, inputs = tiny.model(), prompt(tiny, samples)
    length = inputs["input_ids"].shape[1]
    method = "feature-norm" if name in UNATTENDING else "cls-attention"
    with torch.no_grad(), tokenprune_hf.prune(model, method, 4) as pruning:
        together = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        selections = list(pruning.selections)
        single: list[Selection] = []
        for index, sample in enumerate(samples):
            alone = _one_prompt(name, inputs, samples, index)
            output = model.generate(**alone, max_new_tokens=4, do_sample=False)
            width = alone["input_ids"].shape[1]
            assert output[0, width:].tolist() == together[index, length:].tolist(), sample
            single += pruning.selections
    assert [one.kept.tolist() for one in single] == [one.kept.tolist() for one in selections]


def _one_prompt(
    name: str, inputs: dict[str, Any], samples: list[str], index: int
) -> dict[str, Any]:
    """Cut one prompt with its images and videos out of a batch."""
    real = inputs["attention_mask"][index].bool()
    alone: dict[str, Any] = {
        key: inputs[key][index : index + 1, real]
        for key in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
        if key in inputs
    }
    for kind, grid, keys in (
        (
            "i",
            "image_grid_thw",
            (
                "pixel_values",
                "pixel_values_images",
                "image_sizes",
                "image_position_ids",
                "spatial_shapes",
                "pixel_attention_mask",
                "image_token_pooling",
                "image_grids",
                "image_grid_hw",
            ),
        ),
        (
            "v",
            "video_grid_thw",
            (
                "pixel_values_videos",
                "video_position_ids",
                "video_token_pooling",
                "video_grids",
            ),
        ),
    ):
        first = sum(sample.count(kind) for sample in samples[:index])
        last = first + samples[index].count(kind)
        if first == last:
            continue
        for key in keys:
            if key not in inputs:
                continue
            sizes = {"i": "target_sizes", "v": "target_sizes_videos"}[kind]
            if sizes in inputs:  # MiniCPM-V lays all patches side by side
                edges = [0, *(4 * inputs[sizes].prod(dim=1)).cumsum(0).tolist()]
                alone[key] = inputs[key][..., edges[first] : edges[last]]
                alone[sizes] = inputs[sizes][first:last]
            elif grid in inputs:  # patches of all images lie one after another
                edges = [0, *inputs[grid].prod(dim=1).cumsum(0).tolist()]
                alone[key] = inputs[key][edges[first] : edges[last]]
                alone[grid] = inputs[grid][first:last]
            elif kind == "v" and "num_frames_per_video" in inputs:  # likewise frames
                counts = inputs["num_frames_per_video"]
                edges = [0, *counts.cumsum(0).tolist()]
                alone[key] = inputs[key][edges[first] : edges[last]]
                alone["num_frames_per_video"] = counts[first:last]
            elif "image_grid_hw" in inputs and key == "pixel_values":
                edges = [0, *inputs["image_grid_hw"].prod(dim=1).cumsum(0).tolist()]
                alone[key] = inputs[key][edges[first] : edges[last]]
            elif name == "molmo2":
                counts = inputs.get("video_grids", torch.tensor([[3, 3]] * 99))[:, 0]
                crops = [0, *counts.cumsum(0).tolist()]
                each = {"pixel": 1, "video_token": 9, "image_token": 44 / 3, "video": 0, "image": 0}
                per_crop = next(size for start, size in each.items() if key.startswith(start))
                edges = [int(per_crop * crop) for crop in crops]
                if not per_crop:
                    edges = list(range(len(crops)))
                alone[key] = inputs[key][edges[first] : edges[last]]
                if "pooling" in key:
                    counted = alone[key] - 64 * crops[first]
                    alone[key] = torch.where(alone[key] < 0, -1, counted)
            elif name in ("idefics3", "smolvlm"):
                alone[key] = inputs[key][:, first:last]
            else:
                alone[key] = inputs[key][first:last]
    return alone


@pytest.mark.parametrize("name", [name for name in APART if TINY[name].video is not None])
def test_images_beside_videos_are_refused_where_the_model_takes_no_such_call(name: str) -> None:
    model, inputs = TINY[name].model(), prompt(TINY[name], ["tivt"])
    with (
        pytest.raises(ValueError, match=r"do not match|at the same time|feature vectors"),
        torch.no_grad(),
    ):
        model(**inputs)
    with (
        pytest.raises(PromptError, match="same placeholder for images and videos"),
        tokenprune_hf.prune(model, "uniform", 4),
    ):
        model(**inputs)


@pytest.mark.parametrize(("name", "samples"), [case for case in CASES if case[0] in GRIDDED])
def test_grids_are_those_of_the_inputs(name: str, samples: list[str]) -> None:
    tiny = TINY[name]
    model, inputs = tiny.model(), prompt(tiny, samples)
    encoded = tokenprune_hf.encode(model, **inputs)
    for modality, media in encoded.modalities.items():
        if name.startswith("minicpm"):
            sizes = inputs["target_sizes" if modality == "image" else "target_sizes_videos"]
            expected = [(1, height // 4, width // 4) for height, width in sizes.tolist()]
        else:
            expected = [
                (1 if name == "kimi_k25" else frames, height // 2, width // 2)
                for frames, height, width in inputs[f"{modality}_grid_thw"].tolist()
            ]
        assert [item.tokens.grid for item in media.items] == expected
        assert all(item.tokens.is_picture for item in media.items)


def received(maps: Tensor) -> Tensor:
    """[B, H, P, P] -> [B, P]: what each key gets, mean over heads and queries."""
    return maps.mean(dim=(1, 2))


def merged_by_hand(patches: Tensor, side: int, factor: int) -> Tensor:
    """[side * side] -> [N]: mean over each factor x factor square of patches."""
    return torch.stack(
        [
            torch.stack(
                [
                    patches[(factor * row + dy) * side + factor * column + dx]
                    for dy in range(factor)
                    for dx in range(factor)
                ]
            ).mean()
            for row in range(side // factor)
            for column in range(side // factor)
        ]
    )


def _pooled_by_hand(patches: Tensor, sides: tuple[int, int]) -> Tensor:
    rows, columns = sides
    grid = patches.view(rows, columns)
    return torch.stack(
        [grid[y : y + 2, x : x + 2].mean() for y in range(0, rows, 2) for x in range(0, columns, 2)]
    )


def scores_by_hand(name: str, model: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """Return each image item's attention scores from the whole maps of the scoring layer."""
    vision = vision_model(model)
    tower = vision.tower("image")
    with full_attention_maps(tower) as maps:
        encode(model, inputs, "image")
    early = ("llava", "llava_next", "llava_next_video", "video_llava")
    layers = {**dict.fromkeys(early, 3), "qwen2_5_vl": 4}
    if name.startswith(("qwen", "glm", "paddle", "kimi")):
        return _packed_scores(name, model, maps, inputs["image_grid_thw"].tolist())
    if name.startswith("minicpm"):  # last layers see 2 x 2 patches as one, tokens 2 x 2 of those
        grids = [[1, *(size // 2).tolist()] for size in inputs["target_sizes"]]
        return _packed_scores(name, model, maps, grids)
    # LLaVA's feature is the output of the last layer but one
    scoring = 1 if name in early else len(maps) - 1
    assert len(maps) == layers.get(name, len(maps))
    weights = maps[scoring]
    if name == "pixtral":
        return [weights[0, :, s:e, s:e].mean(dim=(0, 1)) for s, e in ((0, 48), (48, 72))]
    if name == "mistral3":  # patches of all images in one sequence
        places = torch.tensor([0, 48, 72])
        return [
            _pooled_by_hand(weights[0, :, start:end, start:end].mean(dim=(0, 1)), sides)
            for start, end, sides in zip(places, places[1:], ((6, 8), (4, 6)), strict=False)
        ]
    if name == "nemotron_h_omni":  # ten tokens stand in front of each picture's patches
        return [
            _pooled_by_hand(one[0, :, :, 10:].mean(dim=(0, 1)), (height, width))
            for one, (height, width) in zip(
                maps[-2:], inputs["image_grid_hw"].tolist(), strict=True
            )
        ]
    if name == "molmo2":
        received_by = received(weights).flatten()
        tokens = [
            torch.stack([received_by[patch] for patch in patches if patch >= 0]).mean()
            for patches in inputs["image_token_pooling"].tolist()
        ]
        return list(torch.stack(tokens).split([16, 28] * (len(tokens) // 44)))
    if name == "lfm2_vl":
        return [
            _pooled_by_hand(one[:, : h * w, : h * w].mean(dim=(0, 1)), (h, w))
            for one, (h, w) in zip(weights, inputs["spatial_shapes"].tolist(), strict=True)
        ]
    if name == "gemma4":  # patches of 8 x 12 and 12 x 8, then padding, which asks and is asked none
        return [
            _pooled_by_hand(one[:, :96, :96].mean(dim=(0, 1)), side)
            for one, side in zip(weights, ((8, 12), (12, 8)), strict=True)
        ]
    if name == "llama4":  # its CLS token stands last
        patches = weights[:, :, -1, :-1].mean(dim=1)
    elif name in (*early, "internvl", "perception_lm"):
        patches = weights[:, :, 0, 1:].mean(dim=1)
    else:
        patches = received(weights)
    if name in MERGED:
        return [merged_by_hand(one, 8, 2) for one in patches]
    if name.startswith("llava_next"):
        return _crop_scores(patches, inputs["image_sizes"].tolist())
    if name == "llava_onevision":
        # 24 x 48, not resampled: the whole image, then two crops side by side
        wide = patches[1:3].view(2, 6, 6).transpose(0, 1).reshape(-1)
        return [patches[0], wide]
    return list(patches)


def _crop_scores(patches: Tensor, image_sizes: list[list[int]]) -> list[Tensor]:
    """Cut the padding's columns or rows off the crops that hold it."""
    result = []
    crop = iter(patches.view(-1, 6, 6))
    for size in image_sizes:
        result.append(next(crop))
        if size == [48, 36]:
            parts = [(slice(None), slice(1, None)), (slice(None), slice(None, -1))] * 2
        elif size == [40, 48]:
            parts = [(slice(1, None), slice(None))] * 2 + [(slice(None, -1), slice(None))] * 2
        else:
            parts = [(slice(None), slice(None))] * 2
        result += [next(crop)[rows, columns] for rows, columns in parts]
    return [one.reshape(-1) for one in result]


def _packed_scores(
    name: str, model: Any, maps: list[Tensor], grids: list[list[int]]
) -> list[Tensor]:
    """Put the last block's maps, one per image, back into raster order of 2 x 2 tokens."""
    result = []
    last = maps[-len(grids) :]
    for weights, (_, height, width) in zip(last, grids, strict=True):
        patches = received(weights)[0]
        if name in (
            "paddleocr_vl",
            "kimi_k25",
            "minicpmv4_6",
            "minicpmv4_7",
        ):  # towers with patches in raster order
            patches = patches.view(height // 2, 2, width // 2, 2).transpose(1, 2)
        tokens = patches.reshape(-1, 4).mean(dim=1)
        rows, columns = height // 2, width // 2
        if name == "qwen2_5_vl":
            # Windows of 16 pixels hold 2 x 2 tokens; the tower lays them one after another.
            order = [
                (top + y) * columns + left + x
                for top in range(0, rows, 2)
                for left in range(0, columns, 2)
                for y in range(2)
                for x in range(2)
            ]
            raster = torch.empty_like(tokens)
            raster[order] = tokens
            tokens = raster
        result.append(tokens)
    return result


# Rows and columns of tokens of two images, and of the frames of a video of three and one of two.
GRIDS: dict[str, tuple[list[tuple[int, int]], list[tuple[int, int]]]] = {
    "aya_vision": ([(4, 4), (4, 4)], []),
    "cohere2_vision": ([(4, 4), (4, 4)], []),
    "perception_lm": ([(4, 4)] * 6, []),
    "gemma3": ([(4, 4), (4, 4)], []),
    "ovis2": ([(4, 4), (4, 4)], []),
    "llama4": ([(4, 4), (4, 4)], []),
    "gemma3n": ([(4, 4), (4, 4)], []),
    "gemma4": ([(4, 6), (6, 4)], [(2, 4)] * 3 + [(3, 3)] * 2),
    "idefics3": ([(4, 4), (4, 4)], []),
    "lfm2_vl": ([(2, 3), (4, 2)], []),
    "mistral3": ([(3, 4), (2, 3)], []),
    "pixtral": ([(6, 8), (4, 6)], []),
    "nemotron_h_omni": ([(4, 6), (6, 4)], []),
    "molmo2": ([(4, 4), (4, 7), (4, 4), (7, 4)], [(3, 3)] * 5),
}


@pytest.mark.parametrize("name", [name for name in GRIDS if name in TINY])
def test_items_lie_in_rows_and_columns(name: str) -> None:
    tiny = TINY[name]
    samples = zip(("titit", "vtv"), ("image", "video"), GRIDS[name], strict=True)
    for sample, modality, expected in samples:
        if not expected:
            continue
        encoded = tokenprune_hf.encode(tiny.model(), **prompt(tiny, [sample]))
        tokens = [item.tokens for item in encoded.modalities[modality].items]
        assert [one.grid for one in tokens] == [(1, *sides) for sides in expected]
        assert all(one.is_picture for one in tokens)


@pytest.mark.parametrize("name", UNATTENDING)
def test_towers_that_end_in_convolutions_have_no_attention(name: str) -> None:
    model, inputs = TINY[name].model(), prompt(TINY[name], ["tit"])
    with pytest.raises(UnsupportedModelError, match="ends in convolutions"):
        tokenprune_hf.prune(model, "cls-attention", 5)
    assert "cls_attention" not in tokenprune_hf.encode(model, **inputs).needs


@pytest.mark.parametrize("name", [name for name in TINY if name not in UNATTENDING])
def test_attention_scores_equal_the_full_maps(name: str) -> None:
    tiny = TINY[name]
    model = tiny.model()
    inputs = prompt(tiny, ["titit"])
    if name == "llava_onevision":  # the image that is not resampled, alone
        inputs = prompt(tiny, ["tit"])
        inputs["image_sizes"] = torch.tensor([[24, 48]])
        row = [2, *[5] * 3, *[90] * (36 + 6 * 13), 6, 7]
        inputs["input_ids"] = torch.tensor([row])
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad(), tokenprune_hf.prune(model, "cls-attention", 5) as pruning:
        model(**inputs)
        expected = scores_by_hand(name, model, inputs)
    assert len(pruning.selections) == len(expected)
    for selection, scores in zip(pruning.selections, expected, strict=True):
        assert selection.scores is not None
        torch.testing.assert_close(selection.scores, scores)
        best = torch.sort(scores, descending=True, stable=True).indices[:5].sort().values
        assert torch.equal(selection.kept, best)


def test_attention_scores_of_pooled_frames_equal_the_full_maps() -> None:
    tiny = TINY["llava_next_video"]
    model, inputs = tiny.model(), prompt(tiny, ["tvt"])
    with torch.no_grad(), tokenprune_hf.prune(model, "cls-attention", 5) as pruning:
        model(**inputs)
        with full_attention_maps(vision_model(model).tower("video")) as maps:
            encode(model, inputs, "video")
    (selection,) = pruning.selections
    assert selection.grid == (4, 3, 3)
    frames = maps[1][:, :, 0, 1:].mean(dim=1)
    expected = torch.cat([merged_by_hand(frame, 6, 2) for frame in frames])
    torch.testing.assert_close(selection.scores, expected)


def test_nemotron_puts_two_frames_of_a_video_together() -> None:
    family = vision_model(TINY["nemotron_h_omni"].model()).family
    assert isinstance(family, NemotronOmni)
    assert [one.grid for one in family.videos((5, 3, 32, 48))] == [(3, 8, 12)]
    assert [one.grid for one in family.videos((2, 3, 6, 32, 48))] == [(3, 8, 12)] * 2


def test_a_nemotron_that_drops_parts_of_videos_itself_is_refused() -> None:
    tiny = TINY["nemotron_h_omni"]
    model = tiny.model()
    model.config.video_pruning_rate = 0.5
    # Frames of one video, or of newer releases pairs of frames of several.
    shape = (4, 3, 32, 48) if tiny.video is None else (1, 2, 6, 32, 48)
    video = {"pixel_values_videos": pixels(*shape)}
    inputs = {**prompt(tiny, ["tit"]), **video}
    with pytest.raises(UnsupportedModelError, match=r"video_pruning_rate=0\.5.* second time"):
        tokenprune_hf.encode(model, **{name: inputs[name] for name in ("input_ids", *video)})


def test_minicpm_with_more_tokens_for_each_image() -> None:
    tiny = TINY["minicpmv4_6"]
    model, inputs = tiny.model(), prompt(tiny, ["tit"])
    row = [2, 5, 6, *[IMAGE] * 96, 7, 8]
    longer = {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row)).long()}
    inputs |= longer
    with torch.no_grad(), tokenprune_hf.prune(model, "cls-attention", 5):  # noqa: SIM117
        with pytest.raises(UnsupportedModelError, match="96"):
            model(**inputs, downsample_mode="4x")
    model.config.downsample_mode = "4x"
    with torch.no_grad(), tokenprune_hf.prune(model, "cls-attention", 5) as pruning:
        model(**inputs)
        with full_attention_maps(vision_model(model).tower("image")) as maps:
            encode(model, inputs, "image")
    (selection,) = pruning.selections
    (scores,) = _packed_scores("minicpmv4_6", model, maps, [[1, 16, 24]])
    assert selection.grid == (1, 8, 12)
    torch.testing.assert_close(selection.scores, scores)


@pytest.mark.parametrize(("name", "samples"), CASES)
def test_features_projector_and_embeddings_belong_together(name: str, samples: list[str]) -> None:
    tiny = TINY[name]
    model, inputs = tiny.model(), prompt(tiny, samples)
    encoded = tokenprune_hf.encode(model, **inputs)
    for modality, media in encoded.modalities.items():
        with torch.no_grad():
            rows, sizes, _ = encode(model, inputs, modality)
        layout = item_rows(name, inputs, modality, sizes)
        assert [item.rows.tolist() for item in media.items] == layout
        for item in media.items:
            tokens = item.tokens
            assert tokens.embeddings is not None
            assert tokens.features is not None
            assert tokens.projector is not None
            torch.testing.assert_close(tokens.embeddings, rows[item.rows])
            pooled = name == "llava_onevision" and (modality == "video" or tokens.total == 64)
            pooled |= name == "perception_lm"
            with torch.no_grad():
                projected = tokens.projector(tokens.features)
            if pooled:  # averaged before the projector here, after it in the model
                assert projected.shape == tokens.embeddings.shape
            else:
                torch.testing.assert_close(projected, tokens.embeddings)
