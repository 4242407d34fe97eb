"""Where methods take tokens of transformers' models, against what the encoder itself returns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tokenprune_hf
from tests.core.test_methods import highest, spread_out
from tests.hf.by_hand import encode
from tests.hf.models import TINY, prompt
from tests.hf.types import model_of, prompts_of
from tokenprune import PruningConfig
from tokenprune.errors import UnsupportedModelError
from tokenprune_hf.encoded_file import load_encoded, save_encoded

WITH_TAPS = ("qwen3_vl", "qwen3_vl_moe")
KEEP = 5


def entering(model: Any, inputs: dict[str, Any], merger: Any, modality: str) -> Tensor:
    """Return what a merger is given, the patches of each token side by side [R, 4 * C]."""
    seen: list[Tensor] = []
    hook = merger.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    encode(model, inputs, modality)
    hook.remove()
    (patches,) = seen
    return patches.reshape(-1, 4 * patches.shape[-1])


def chosen(model: Any, inputs: dict[str, Any], method: str, **options: Any) -> list[list[int]]:
    with torch.no_grad(), tokenprune_hf.prune(model, method, KEEP, **options) as pruning:
        model(**inputs)
    return [one.kept.tolist() for one in pruning.selections]


def by_hand(rows: Tensor, sizes: list[int], method: str) -> list[list[int]]:
    found = []
    for own in rows.double().split(sizes):
        vectors = np.asarray(own.numpy())
        if method == "divprune":
            found.append(spread_out(vectors, KEEP))
        else:
            found.append(highest((vectors**2).sum(axis=1) ** 0.5, KEEP))
    return found


@pytest.mark.parametrize("method", ["divprune", "feature-norm"])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_before_and_after_the_merger_and_at_taps(name: str, method: str) -> None:
    tiny = TINY[name]
    model, inputs = tiny.model(), prompt(tiny, ["titit"])
    with torch.no_grad():
        rows, sizes, taps = encode(model, inputs, "image")
        places = {
            "before": entering(model, inputs, model.model.visual.merger, "image"),
            "after": rows,
            **{f"deepstack-{number}": tap for number, tap in enumerate(taps)},
        }
    assert len(taps) == (2 if name in WITH_TAPS else 0)
    found = {place: chosen(model, inputs, method, taken=place) for place in places}
    for place, vectors in places.items():
        assert found[place] == by_hand(vectors, sizes, method), place
    assert len({str(one) for one in found.values()}) == len(places)


@pytest.mark.parametrize("place", ["before", "deepstack-1"])
def test_a_video_and_an_image_and_a_batch(place: str) -> None:
    tiny = TINY["qwen3_vl"]
    model = tiny.model()
    alone = [prompt(tiny, [sample]) for sample in ("tit", "tvt")]
    apart = [chosen(model, inputs, "divprune", taken=place) for inputs in alone]
    batch = {**alone[0], **alone[1]}
    longest = max(inputs["input_ids"].shape[1] for inputs in alone)
    for key, fill in (("input_ids", 0), ("attention_mask", 0), ("mm_token_type_ids", 0)):
        padded = [
            torch.nn.functional.pad(one[key], (longest - one[key].shape[1], 0), value=fill)
            for one in alone
        ]
        batch[key] = torch.cat(padded)
    assert chosen(model, batch, "divprune", taken=place) == [*apart[0], *apart[1]]


def test_rows_that_stay_are_the_same_wherever_they_were_chosen() -> None:
    tiny = TINY["qwen3_vl"]
    model, inputs = tiny.model(), prompt(tiny, ["titit"])
    with torch.no_grad():
        with tokenprune_hf.prune(model, "divprune", KEEP, taken="deepstack-0") as pruning:
            found = model(**inputs).logits[:, -1]
            selections = pruning.selections
        with tokenprune_hf.prune(model, "divprune", KEEP) as usual:
            expected = model(**inputs, known=selections).logits[:, -1]
        assert [one.kept.tolist() for one in usual.selections] != chosen(model, inputs, "divprune")
        torch.testing.assert_close(found, expected)
        with tokenprune_hf.prune(model, "divprune", 1.0, taken="deepstack-0"):
            whole = model(**inputs).logits[:, -1]
        torch.testing.assert_close(whole, model(**inputs).logits[:, -1])


def test_what_was_encoded_once_serves_every_place(tmp_path: Any) -> None:
    tiny = TINY["qwen3_vl"]
    model, inputs = tiny.model(), prompt(tiny, ["titit"])
    encoded = tokenprune_hf.encode(model, **inputs)
    save_encoded(tmp_path / "one", encoded, model)
    for again in (encoded, load_encoded(tmp_path / "one", model)):
        for place in ("before", "after", "deepstack-1"):
            expected = chosen(model, inputs, "divprune", taken=place)
            assert chosen(model, {**inputs, "encoded": again}, "divprune", taken=place) == expected


def test_the_question_is_read_while_tokens_are_taken_at_a_tap() -> None:
    tiny = TINY["qwen3_vl"]
    model, inputs = tiny.model(), prompt(tiny, ["titt"])
    options = {"candidates": 1.0}
    found = {
        place: chosen(model, inputs, "relevant-information", taken=place, **options)
        for place in ("before", "after", "deepstack-0")
    }
    assert len({str(one) for one in found.values()}) == 3
    of_method = chosen(model, inputs, "relevant-information", **options)
    assert found["after"] == of_method


def test_a_model_of_no_family_has_taps_too() -> None:
    kind = "qwen3_omni_moe_thinker"
    model = model_of(kind)
    inputs = prompts_of(kind, model, [[0]])
    with torch.no_grad():
        output = model.get_image_features(
            pixel_values=inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"]
        )
    tap = torch.cat(list(output.deepstack_features[0]))
    assert chosen(model, inputs, "divprune", taken="deepstack-0") == by_hand(
        tap, [len(tap)], "divprune"
    )


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_5"])
def test_models_without_taps_are_refused(name: str) -> None:
    config = PruningConfig("divprune", 4, options={"taken": "deepstack-0"})
    with pytest.raises(UnsupportedModelError, match=r"has no deepstack tap.*taken='before'"):
        tokenprune_hf.prune(TINY[name].model(), config)


def test_a_tap_too_many_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="has deepstack-0 to deepstack-1"):
        tokenprune_hf.prune(TINY["qwen3_vl"].model(), "divprune", 4, taken="deepstack-2")
