"""Where text stands behind videos with more frames than rows and columns.

The papers and vLLM count on from the highest position of all axes, transformers from the rows and
the columns. Pruned prompts follow the papers, in both engines; a prompt that loses nothing is the
plain engine's. tests/vllm/test_long_videos.py compares the engines themselves.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import tokenprune_hf
from tests.hf.models import IMAGE, TINY, VIDEO, _packed, prompt
from tokenprune_hf.engine import cache_argument, cache_of

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
SAMPLES = ["tvt", "tivtvt", "tit", "tt"]
SECONDS = [0.08, 0.7, 1.3]  # what 25 frames a second make, and others
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}


def setting(name: str, samples: list[str]) -> tuple[Any, dict[str, Any]]:
    """Return a model, and a batch with videos of 60 and 11 steps of 2 x 2 and 1 x 3 tokens."""
    grids = [[60, 4, 4], [11, 2, 6]]
    tiny = replace(TINY[name], video=_packed("pixel_values_videos", "video_grid_thw", grids))
    inputs = prompt(tiny, samples)
    if name == "qwen2_5_vl" and "video_grid_thw" in inputs:
        inputs["second_per_grid_ts"] = torch.tensor(SECONDS[: len(inputs["video_grid_thw"])])
    return tiny.model(), inputs


def by_hand(name: str, inputs: dict[str, Any]) -> list[NDArray[np.int64]]:
    """Return the published positions [3, n] of each prompt, without its padding."""
    grids = {
        IMAGE: iter(inputs.get("image_grid_thw", torch.empty(0, 3)).tolist()),
        VIDEO: iter(inputs.get("video_grid_thw", torch.empty(0, 3)).tolist()),
    }
    seconds = iter(inputs.get("second_per_grid_ts", torch.empty(0)).tolist())
    if name == "qwen3_vl":  # every frame is a picture of its own there
        frames = [[1, *grid[1:]] for grid in grids[VIDEO] for _ in range(grid[0])]
        grids[VIDEO] = iter(frames)
    result = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        parts: list[NDArray[np.int64]] = []
        for token, run in itertools.groupby(ids[mask.bool()].tolist()):
            begin = int(parts[-1].max()) + 1 if parts else 0
            length = len(list(run))
            if token not in grids:
                parts.append(np.broadcast_to(np.arange(length), (3, length)) + begin)
                continue
            steps, rows, columns = next(grids[token])
            own = np.indices((steps, rows // 2, columns // 2)).reshape(3, -1)
            assert own.shape[1] == length
            if token == VIDEO and name == "qwen2_5_vl":
                own[0] = np.floor(own[0] * (next(seconds) * 2))
            parts.append(own + begin)
        result.append(np.concatenate(parts, axis=1))
    return result


def engine_positions(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Return the plain engine's own positions [3, B, L]."""
    positions: Tensor = model._prepare_position_ids_for_generation(
        inputs["input_ids"], dict(inputs)
    )
    return positions[-3:]


def watch(model: Any) -> list[Tensor]:
    """Collect the positions [3, B, n] with which the language model is called."""
    seen: list[Tensor] = []

    def note(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_ids"][-3:])

    model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


@pytest.mark.parametrize("name", FAMILIES)
def test_pruned_prompts_are_counted_as_published(name: str) -> None:
    model, inputs = setting(name, SAMPLES)
    length = inputs["input_ids"].shape[1]
    expected = by_hand(name, inputs)
    seen = watch(model)
    # Hidden tokens stay in the prompt, so that every position can be seen.
    with tokenprune_hf.prune(model, "uniform", 0.4, apply="mask"):
        masked = model.generate(**inputs, **GREEDY)
    for sample, (mask, own) in enumerate(zip(inputs["attention_mask"], expected, strict=True)):
        assert np.array_equal(seen[0][:, sample, mask.bool()].numpy(), own), SAMPLES[sample]
        for step, given in enumerate(seen[1:], start=1):
            assert given[:, sample].flatten().tolist() == 3 * [int(own.max()) + step]
    with tokenprune_hf.prune(model, "uniform", 0.4):
        dropped = model.generate(**inputs, **GREEDY)
    assert torch.equal(dropped[:, length:], masked[:, length:])


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_transformers_counts_text_from_rows_and_columns(name: str) -> None:
    """If this fails transformers counts otherwise now, and docs/transformers.md is to be changed.

    Where it counts as published, `tokenprune_hf.positions` is not needed any more.
    """
    model, inputs = setting(name, ["tvt"])
    positions = engine_positions(model, inputs)[:, 0]
    video = (inputs["input_ids"][0] == VIDEO).nonzero()[:, 0]
    first, after = int(video[0]), int(video[-1]) + 1
    assert positions[:, after].tolist() == 3 * [int(positions[1, first]) + 2]
    (published,) = by_hand(name, inputs)
    assert published[0, after] == published[0, video].max() + 1
    assert published[0, after] > positions[0, after]


def test_transformers_multiplies_times_in_float32() -> None:
    """If this fails, `tokenprune_hf.positions` need not work out times any more."""
    model, inputs = setting("qwen2_5_vl", ["tvt"])
    video = inputs["input_ids"][0] == VIDEO
    positions = engine_positions(model, inputs)[0, 0, video].numpy()
    (published,) = by_hand("qwen2_5_vl", inputs)
    apart = positions - published[0, video.numpy()]
    assert sorted(set(apart.tolist())) == [0, 1]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_that_loses_nothing_is_the_plain_engines(name: str) -> None:
    model, inputs = setting(name, ["tvt"])
    length = inputs["input_ids"].shape[1]
    more = torch.tensor([[31, 32, 33]])

    def answers() -> list[list[int]]:
        """Return what `generate` says, then to a second question, then a loop of one's own."""
        first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        talk = torch.cat([first.sequences, more], dim=1)
        mask = torch.ones_like(talk)
        second = model.generate(
            input_ids=talk, attention_mask=mask, **cache_argument(model, cache_of(first)), **GREEDY
        )
        output = model(**inputs)
        loop = []
        for _ in range(5):
            logits = output.logits[:, -1]
            logits[:, model.generation_config.suppress_tokens] = -torch.inf
            loop.append(logits.argmax(dim=-1))
            output = model(input_ids=loop[-1][:, None], **cache_argument(model, cache_of(output)))
        return [
            first.sequences[0, length:].tolist(),
            second[0, talk.shape[1] :].tolist(),
            torch.cat(loop).tolist(),
        ]

    with torch.no_grad():
        plain = answers()
        for keep in (1.0, 10_000):
            with tokenprune_hf.prune(model, "feature-norm", keep):
                assert answers() == plain


def test_a_whole_prompt_beside_a_pruned_one() -> None:
    """A budget that is enough for one video leaves its prompt as it is."""
    model, inputs = setting("qwen2_5_vl", ["tvt", "tvt"])
    plain = engine_positions(model, inputs)
    expected = by_hand("qwen2_5_vl", inputs)
    seen = watch(model)
    with tokenprune_hf.prune(model, "uniform", 33, apply="mask"):
        model.generate(**inputs, **GREEDY)
    real = inputs["attention_mask"].bool()
    assert np.array_equal(seen[0][:, 0, real[0]].numpy(), expected[0])
    assert torch.equal(seen[0][:, 1, real[1]], plain[:, 1, real[1]])
    assert not np.array_equal(plain[:, 1, real[1]].numpy(), expected[1])


def test_positions_of_the_callers_own_stay() -> None:
    model, inputs = setting("qwen2_5_vl", ["tvt"])
    own = torch.cat(
        [torch.arange(inputs["input_ids"].shape[1])[None, None], engine_positions(model, inputs)]
    )
    seen = watch(model)
    with tokenprune_hf.prune(model, "uniform", 0.4, apply="mask"):
        model(**inputs, position_ids=own)
    assert torch.equal(seen[0], own[1:])


@pytest.mark.parametrize("name", FAMILIES)
def test_compact_positions_of_prompts_that_lose_nothing_are_the_engines(name: str) -> None:
    model, inputs = setting(name, SAMPLES)
    with torch.no_grad():
        expected = model(**inputs).logits[:, -1]
        with tokenprune_hf.prune(model, "uniform", 1.0, positions="compact"):
            assert torch.equal(model(**inputs).logits[:, -1], expected)
        # One that loses something, beside one that does not.
        model, inputs = setting(name, ["tt", "tit"])
        plain = model(**inputs).logits[0, -1]
        with tokenprune_hf.prune(model, "uniform", 1, positions="compact"):
            torch.testing.assert_close(model(**inputs).logits[0, -1], plain)
