"""``scope="image"`` in transformers: one set over all crops, against choices from rows by hand."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tokenprune_hf
from tests.core.test_methods import highest, spread_out
from tests.hf.by_hand import encode, greedy, item_rows
from tests.hf.models import END, IMAGE, START, TINY, pixels, prompt
from tests.hf.test_encoded_file import rewritten
from tests.hf.types import model_of
from tokenprune import PruningConfig, tokens_kept
from tokenprune.errors import ConfigError, PromptError, TokenPruneError, UnsupportedModelError
from tokenprune_hf.encoded_file import load_encoded, save_encoded
from tokenprune_hf.encoding import join

CROPS = {"llava_next": [5, 3], "llava_onevision": [2, 2], "molmo2": [2, 2]}
"""Family -> how many crops each of two images has."""
if "molmo2" not in TINY:
    del CROPS["molmo2"]


def tiled(*images: int) -> dict[str, Any]:
    """Return what InternVL's processor makes of images of so many tiles, side by side."""
    ids = [1, 11, 12]
    for number, tiles in enumerate(images):
        ids += [START, *[IMAGE] * (16 * tiles), END, 21 + number, 31]
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "pixel_values": pixels(sum(images), 3, 32, 32),
    }


def cases() -> dict[str, tuple[dict[str, Any], list[int], dict[str, Any]]]:
    """Return family -> inputs, how many crops each image has, and what the call is told."""
    found: dict[str, tuple[dict[str, Any], list[int], dict[str, Any]]] = {
        name: (prompt(TINY[name], ["titit"]), counts, {}) for name, counts in CROPS.items()
    }
    found["internvl"] = (tiled(3, 1, 2), [3, 1, 2], {})
    found["idefics3"] = (prompt(TINY["idefics3"], ["tiiiti"]), [3, 1], {"image_crops": [3, 1]})
    found["gemma3"] = (prompt(TINY["gemma3"], ["tiitit"]), [2, 1], {"image_crops": [2, 1]})
    return found


CASES = cases()


def rows_of_crops(name: str, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, list[list[int]]]:
    """Return all rows [R, D], and which of them each crop has."""
    with torch.no_grad():
        rows, sizes, _ = encode(model, inputs, "image")
    if name in ("internvl", "gemma3"):
        sizes = [16] * (len(rows) // 16)
    return rows, item_rows(name, inputs, "image", sizes)


def by_hand(
    rows: Tensor, crops: Sequence[list[int]], counts: Sequence[int], keep: Any, method: str
) -> list[list[int]]:
    """Return what is kept of each crop, by straight-line choices from all rows of an image."""
    vectors, found = np.asarray(rows.double().numpy()), []
    for start, count in zip(np.cumsum([0, *counts]), counts, strict=False):
        of_image = crops[start : start + count]
        every = sorted(row for crop in of_image for row in crop)
        number = sum(min(keep, len(crop)) for crop in of_image) if isinstance(keep, int) else 0
        number = number or tokens_kept(keep, len(every))
        if method == "divprune":
            kept = spread_out(vectors[every], number)
        else:
            kept = highest((vectors[every] ** 2).sum(axis=1), number)
        rows_kept = {every[index] for index in kept}
        found += [[i for i, row in enumerate(crop) if row in rows_kept] for crop in of_image]
    return found


def chosen(model: Any, inputs: dict[str, Any], method: str, keep: Any, **more: Any) -> Any:
    with torch.no_grad(), tokenprune_hf.prune(model, method, keep, scope="image", **more) as pruned:
        logits = model(**inputs).logits
    return [one.kept.tolist() for one in pruned.selections], logits[:, -1]


@pytest.mark.parametrize("keep", [3, 0.15])
@pytest.mark.parametrize("name", CASES)
def test_one_set_is_spread_over_all_rows_of_an_image(name: str, keep: Any) -> None:
    inputs, counts, told = CASES[name]
    model = TINY[name].model()
    rows, crops = rows_of_crops(name, model, inputs)
    assert len(crops) == sum(counts)
    kept, _ = chosen(model, {**inputs, **told}, "divprune", keep)
    assert kept == by_hand(rows, crops, counts, keep, "divprune")
    kept, _ = chosen(model, {**inputs, **told}, "feature-norm", keep, taken="after")
    assert kept == by_hand(rows, crops, counts, keep, "feature-norm")


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "idefics3"])
def test_answers_are_those_of_the_kept_rows(name: str, positions: Any) -> None:
    inputs, _, told = CASES[name]
    model = TINY[name].model()
    with tokenprune_hf.prune(model, "divprune", 3, positions, scope="image") as pruning:
        output = model.generate(**inputs, **told, max_new_tokens=4, do_sample=False)
    kept = {"image": [one.kept.tolist() for one in pruning.selections], "video": []}
    with torch.no_grad():
        expected = greedy(model, name, inputs, kept, positions, 4)
    assert output[:, inputs["input_ids"].shape[1] :].tolist() == expected
    assert {len(one) for one in kept["image"]} != {3}


@pytest.mark.parametrize("name", ["llava_next", "internvl", "idefics3"])
def test_selections_are_those_of_crops(name: str) -> None:
    inputs, counts, told = CASES[name]
    model = TINY[name].model()
    with torch.no_grad():
        with tokenprune_hf.prune(model, "divprune", 3) as pruning:
            model(**inputs)
            usual = pruning.selections
        with tokenprune_hf.prune(
            model, "feature-norm", 3, scope="image", proportional_attention=True
        ) as pruning:
            found = model(**inputs, **told).logits[:, -1]
            selections = pruning.selections
            again = model(**inputs, **told, known=selections).logits[:, -1]
            torch.testing.assert_close(found, again)
    for one, other in zip(selections, usual, strict=True):
        assert (one.grid, one.total, one.is_picture) == (other.grid, other.total, other.is_picture)
        assert one.scores is not None
        assert one.represented is not None
        assert len(one.represented) == len(one)
    starts = np.cumsum([0, *counts]).tolist()
    for first, last in itertools.pairwise(starts):
        of_image = selections[first:last]
        assert sum(len(one) for one in of_image) == 3 * len(of_image)
        # Together they stand for all tokens of the image, of whatever crop.
        stand_for: list[Any] = [one.represented for one in of_image]
        counted = sum(int(numbers.sum()) for numbers in stand_for)
        assert counted == sum(one.total for one in of_image)


@pytest.mark.parametrize("name", CASES)
def test_everything_stays_where_everything_is_kept(name: str) -> None:
    inputs, _, told = CASES[name]
    model = TINY[name].model()
    with torch.no_grad():
        plain = model(**inputs).logits[:, -1]
    _, found = chosen(model, {**inputs, **told}, "divprune", 1.0)
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_a_batch_is_chosen_from_as_each_prompt_alone(name: str) -> None:
    tiny = TINY[name]
    model, batch = tiny.model(), prompt(tiny, ["titit", "tti"])
    kept, _ = chosen(model, batch, "divprune", 3)
    rows, crops = rows_of_crops(name, model, batch)
    counts = {"llava_next": [5, 3, 5], "llava_onevision": [2, 2, 2]}[name]
    assert len(crops) == sum(counts)
    assert kept == by_hand(rows, crops, counts, 3, "divprune")


def test_a_video_beside_it_stays_an_item_of_its_own() -> None:
    tiny = TINY["llava_onevision"]
    model, inputs = tiny.model(), prompt(tiny, ["titvt"])
    kept, _ = chosen(model, inputs, "divprune", 4)
    with torch.no_grad(), tokenprune_hf.prune(model, "divprune", 4) as pruning:
        model(**inputs)
    assert kept[2] == pruning.selections[2].kept.tolist()
    assert len(kept[0]) + len(kept[1]) == 8


def test_reading_methods_read_all_crops_together() -> None:
    tiny = TINY["llava_next"]
    model, inputs = tiny.model(), prompt(tiny, ["titt"])
    kept, _ = chosen(model, inputs, "flexselect", 4, layer=0)
    assert sum(map(len, kept)) == 4 * len(kept)
    with torch.no_grad(), tokenprune_hf.prune(model, "flexselect", 4, layer=0) as pruning:
        model(**inputs)
    assert kept != [one.kept.tolist() for one in pruning.selections]
    words, _ = chosen(model, inputs, "mmtok", 4)
    assert sum(map(len, words)) == 4 * len(words)


def test_encoded_images_may_be_joined_stored_and_pruned(tmp_path: Any) -> None:
    tiny = TINY["llava_next"]
    model, inputs = tiny.model(), prompt(tiny, ["titit"])
    expected, _ = chosen(model, inputs, "divprune", 3)
    encoded = tokenprune_hf.encode(model, **inputs)
    save_encoded(tmp_path / "one", encoded, model)
    again = load_encoded(tmp_path / "one", model)

    def forget(head: dict[str, Any], _tensors: Any) -> None:
        for item in head["modalities"]["image"]["items"]:
            del item["medium"]

    # As files were before it was written which image a crop is of.
    earlier = load_encoded(rewritten(tmp_path / "one", tmp_path / "earlier", forget), model)
    for one in (encoded, again, earlier):
        assert chosen(model, {**inputs, "encoded": one}, "divprune", 3)[0] == expected
    twice = {
        "input_ids": inputs["input_ids"].repeat(2, 1),
        "attention_mask": inputs["attention_mask"].repeat(2, 1),
        "encoded": join([encoded, again]),
    }
    assert chosen(model, twice, "divprune", 3)[0] == [*expected, *expected]


def test_a_config_and_a_copy_of_the_model_have_the_scope() -> None:
    tiny = TINY["llava_next"]
    model, inputs = tiny.model(), prompt(tiny, ["tit"])
    expected, _ = chosen(model, inputs, "divprune", 3)
    config = PruningConfig("divprune", 3, scope="image")
    with torch.no_grad(), tokenprune_hf.prune(model, config) as pruning:
        model(**inputs)
        assert pruning.scope == "image"
        assert [one.kept.tolist() for one in pruning.selections] == expected
        twin = copy.deepcopy(model)
    with torch.no_grad():
        plain = model(**inputs).logits
        assert twin(**inputs).logits.shape[1] < plain.shape[1]
    with pytest.raises(TokenPruneError, match="scope"):
        tokenprune_hf.prune(model, config, scope="image")


def test_tiles_of_nobody_knows_which_image() -> None:
    tiny = TINY["idefics3"]
    model, inputs = tiny.model(), prompt(tiny, ["tiit"])
    with pytest.raises(PromptError, match=r"image_crops=\[2\]"):
        chosen(model, inputs, "divprune", 3)
    with pytest.raises(PromptError, match=r"adds up to 3 crops and .* was given 2"):
        chosen(model, {**inputs, "image_crops": [3]}, "divprune", 3)
    apart = prompt(tiny, ["tii", "it"])
    with pytest.raises(PromptError, match=r"crops of several prompts"):
        chosen(model, {**apart, "image_crops": [1, 2]}, "divprune", 3)
    with torch.no_grad():  # the failed calls left nothing behind
        expected = model(**inputs).logits
        with tokenprune_hf.prune(model, "divprune", 1.0):
            torch.testing.assert_close(model(**inputs).logits, expected)
    one_each = prompt(tiny, ["tit", "it"])
    kept, _ = chosen(model, one_each, "divprune", 3)
    assert [len(one) for one in kept] == [3, 3]


def test_what_cannot_be_chosen_so_is_refused_before_a_call() -> None:
    model = TINY["llava_next"].model()
    with pytest.raises(ConfigError, match=r"evs.*scope='item'"):
        tokenprune_hf.prune(model, "evs", 3, scope="image")
    with pytest.raises(ConfigError, match=r"holov.*adds tokens"):
        tokenprune_hf.prune(model, "holov", 3, scope="image")
    with pytest.raises(ConfigError, match="Did you mean 'image'"):
        tokenprune_hf.prune(model, "divprune", 3, scope="imag")  # type: ignore[arg-type]


def test_models_of_no_family_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"no known family.*scope='item'"):
        tokenprune_hf.prune(model_of("paligemma"), "divprune", 3, scope="image")
