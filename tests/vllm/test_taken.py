"""Where tokens are taken, and one set over all crops, on vLLM's real engine: as in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tokenprune_hf
import tokenprune_vllm
from tests.vllm import checkpoints
from tests.vllm.checkpoints import WORDS
from tests.vllm.engines import answer, greedy, kept
from tests.vllm.test_families import Case, Reference, reference, request, start
from tokenprune.errors import ConfigError

TAKEN: dict[str, dict[str, Any]] = {
    "divprune": {"taken": "before"},
    "information": {"taken": "deepstack-0"},
    "feature-norm": {"taken": "deepstack-1"},
    "zeroth-order": {"taken": "before"},
    "cdpruner-llm": {"taken": "deepstack-1"},
    "scope": {"taken": "after"},
    "relevant-information": {"taken": "before", "candidates": 1.0},
}


def asked_in_transformers(
    hf: Reference, inputs: Any, method: str, keep: Any, **options: Any
) -> tuple[list[int], Any]:
    """Return the tokens generated, and the selections."""
    with tokenprune_hf.prune(hf.model, method, keep, **options) as pruning:
        output = hf.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist(), pruning.selections


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl"])
def test_both_engines_take_tokens_at_one_place(family: str, tmp_path: Path) -> None:
    folder = checkpoints.save(family, tmp_path / "model")
    hf = reference(family, folder)
    taken = {
        name: options
        for name, options in TAKEN.items()
        if family == "qwen3_vl" or not options["taken"].startswith("deepstack")
    }
    asked = {
        name: [
            Case(kinds, tuple(range(5 * place, 5 * place + many)), {"method": name, "keep": keep})
            for kinds, many, keep in (("titit", 2, 6), ("tvt", 1, 0.3))
        ]
        for place, name in enumerate(taken)
    }
    first, *others = taken
    with start(
        family,
        folder,
        first,
        options=taken[first],
        request_methods={name: taken[name] for name in others},
    ) as llm:
        found: dict[str, Any] = {}
        for name, cases in asked.items():
            found[name] = []
            for case in cases:
                (tokens,) = answer(llm, [request(family, case)], greedy(words=WORDS))
                found[name].append((tokens, [one for item in kept(llm) for one in item]))
    usual = []
    for name, cases in asked.items():
        for case, of_vllm in zip(cases, found[name], strict=True):
            inputs, keep = hf.inputs(case), case.asked["keep"]
            said, selections = asked_in_transformers(hf, inputs, name, keep, **taken[name])
            assert of_vllm == (said, [one.kept.tolist() for one in selections]), name
            options = {key: value for key, value in taken[name].items() if key != "taken"}
            _, at_default = asked_in_transformers(hf, inputs, name, keep, **options)
            usual.append([one.kept.tolist() for one in at_default] == of_vllm[1])
    assert not all(usual[::2])  # it is another place


def crops_of(hf: Reference, image: Any) -> int:
    """Return how many tiles Idefics3's processor makes of an image."""
    made = hf.processor.image_processor([image], return_tensors="pt")
    return int(made["pixel_values"].shape[1])


def rows_of_items(hf: Reference, inputs: Any) -> list[torch.Tensor]:
    """Return which rows of the encoder each crop has."""
    encoded = tokenprune_hf.encode(hf.model, needs=["embeddings"], **inputs)
    return [item.rows for item in encoded.modalities["image"].items]


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "internvl", "idefics3"])
def test_both_engines_choose_one_set_over_all_crops(family: str, tmp_path: Path) -> None:
    folder = checkpoints.save(family, tmp_path / "model")
    hf = reference(family, folder)
    methods = ["divprune", "feature-norm", "relevant-information"]
    cases = [
        Case("titit", (0, 1), {"method": "divprune", "keep": 3}),
        Case("tit", (2,), {"method": "divprune", "keep": 0.2}),
        Case("tit", (3,), {"method": "feature-norm", "keep": 4}),
        Case("tit", (6,), {"method": "relevant-information", "keep": 4}),
        Case("tit", (4,), {"keep": 1.0}),
    ]
    others: dict[str, dict[str, Any]] = {name: {} for name in methods[1:]}
    with start(family, folder, methods[0], scope="image", request_methods=others) as llm:
        found = []
        for case in cases:
            (tokens,) = answer(llm, [request(family, case)], greedy(words=WORDS))
            found.append((tokens, kept(llm)))
    uneven = False
    for case, (said, of_images) in zip(cases, found, strict=True):
        inputs = hf.inputs(case)
        if family == "idefics3":
            inputs["image_crops"] = [crops_of(hf, image) for image in case.media()[0]]
        method, keep = case.asked.get("method", methods[0]), case.asked["keep"]
        expected, selections = asked_in_transformers(hf, inputs, method, keep, scope="image")
        assert said == expected, case
        if case.whole:
            continue
        rows = rows_of_items(hf, inputs)
        here = [own[one.kept] for own, one in zip(rows, selections, strict=True)]
        # vLLM counts in all crops of an image, in the order of the prompt.
        every = torch.cat(rows).sort().values
        alone = (hf.inputs(Case("it", (number,))) for number in case.pictures)
        counts = [sum(map(len, rows_of_items(hf, of_image))) for of_image in alone]
        there = [
            of_one[chosen] for of_one, (chosen,) in zip(every.split(counts), of_images, strict=True)
        ]
        assert torch.cat(there).tolist() == torch.cat(here).sort().values.tolist(), case
        uneven |= len({len(selection) for selection in selections}) > 1
    assert uneven


def test_what_cannot_be_served_is_refused(tmp_path: Path) -> None:
    folder = checkpoints.save("llava_next", tmp_path / "next")
    for options, kind, says in (
        ({"method": "evs", "scope": "image"}, ConfigError, "scope='item'"),
        (
            {"method": "divprune", "scope": "image", "request_methods": ["holov"]},
            ConfigError,
            "holov",
        ),
    ):
        with pytest.raises(kind, match=says):
            tokenprune_vllm.engine_args(folder, keep=4, **options)


def test_crops_that_see_themselves_both_ways_are_counted_beforehand(tmp_path: Path) -> None:
    folder = checkpoints.save("gemma3", tmp_path / "model")
    with (
        pytest.raises(Exception, match="crops of this image, each of which sees itself both ways"),
        start("gemma3", folder, "divprune", scope="image", request_methods=[]) as llm,
    ):
        answer(llm, [request("gemma3", Case("tit", (1,)))], greedy(words=WORDS))
