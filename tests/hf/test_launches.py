"""What a pruned call of transformers launches, and where it waits for the device."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers

import tokenprune_hf
from tests.hf.models import TINY, prompt
from tokenprune.errors import TokensError
from tokenprune.launches import Launch, counting, on_device
from tokenprune_hf.engine import cache_argument


@dataclass(frozen=True)
class Bound:
    """At most so many launches and waits for one image, and so many more for each further one."""

    kernels: int
    kernels_an_image: int
    waits: int
    waits_an_image: int


MOST = {
    ("llava", "cls-attention"): Bound(67, 2, 1, 0),
    ("llava", "divprune"): Bound(207, 19, 1, 0),
    ("llava", "zeroth-order"): Bound(270, 23, 8, 2),
    ("llava", "information"): Bound(406, 9, 10, 0),
    ("llava", "relevant-information"): Bound(433, 391, 14, 13),
    # Images of two sizes come: those of each are chosen from together.
    ("qwen2_5_vl", "cls-attention"): Bound(94, 15, 1, 0),
    ("qwen2_5_vl", "divprune"): Bound(175, 108, 1, 0),
    ("qwen2_5_vl", "zeroth-order"): Bound(385, 318, 14, 13),
    ("qwen2_5_vl", "information"): Bound(310, 243, 7, 6),
    ("qwen2_5_vl", "relevant-information"): Bound(339, 290, 11, 11),
}
"""Family and method -> what a pruned call may launch and wait for, but for the engine's own."""


def ours(launch: Launch) -> bool:
    """Say whether the adapter or the library launches it, and not the engine."""
    return launch.made_by("tokenprune", "tokenprune_hf")


@pytest.mark.parametrize(("family", "method"), MOST)
def test_launches_and_waits_of_a_pruned_call(family: str, method: str) -> None:
    model = TINY[family].model()
    there = on_device(copy.deepcopy(model))
    most = MOST[family, method]
    for images in (1, 2, 3):
        inputs: dict[str, Any] = prompt(TINY[family], ["t" + "i" * images + "t"])
        with torch.no_grad(), tokenprune_hf.prune(model, method, keep=0.25) as pruning:
            expected = model(**inputs).logits
            kept = [selection.kept for selection in pruning.selections]
        with torch.no_grad(), tokenprune_hf.prune(there, method, keep=0.25) as pruning:
            for _ in range(2):  # the first call works out what holds for the model
                with counting() as counted:
                    logits = there(**on_device(inputs)).logits
        assert logits.is_cuda
        assert torch.equal(logits.cpu(), expected)
        for selection, indices in zip(pruning.selections, kept, strict=True):
            assert torch.equal(selection.kept.cpu(), indices)
        own = counted.where(ours)
        assert own.kernels <= most.kernels + (images - 1) * most.kernels_an_image
        assert own.waits <= most.waits + (images - 1) * most.waits_an_image, own.waiting()


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_generate_and_calls_for_the_last_logits_wait_once(family: str) -> None:
    model = TINY[family].model()
    there = on_device(copy.deepcopy(model))
    inputs: dict[str, Any] = prompt(TINY[family], ["tit"])
    moved = on_device(inputs)
    found = []
    for one, given in ((model, inputs), (there, moved)):
        with torch.no_grad(), tokenprune_hf.prune(one, "divprune", keep=0.25):
            for _ in range(2):
                with counting() as counted:
                    tokens = one.generate(**given, max_new_tokens=3, do_sample=False)
                with counting() as of_call:
                    logits = one(**given, logits_to_keep=2).logits
        found.append((tokens.cpu(), logits.cpu()))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][1].shape[1] == 2
    for each in (counted, of_call):
        assert each.where(ours).waits == 1, each.where(ours).waiting()


class Streamer:
    """Notes what it is given."""

    def __init__(self) -> None:
        self.given: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None:
        self.given.append(value)

    def end(self) -> None: ...


@pytest.mark.parametrize("cuda", [False, True])
def test_a_nan_is_raised_before_anything_comes_of_it(cuda: bool) -> None:
    model = TINY["llava"].model()
    inputs: dict[str, Any] = prompt(TINY["llava"], ["tit", "tit"])
    good = {name: value.clone() for name, value in inputs.items()}
    inputs["pixel_values"][1, 0, 0, 0] = torch.nan
    if cuda:
        model, inputs, good = map(on_device, (model, inputs, good))
    streamer = Streamer()
    with torch.no_grad(), counting(), tokenprune_hf.prune(model, "divprune", keep=0.25) as pruning:
        model(**good)
        before = pruning.selections
        with pytest.raises(TokensError, match=r"image 1: embeddings holds \d+ NaN"):
            model(**inputs)
        with pytest.raises(TokensError, match=r"image 1: embeddings holds \d+ NaN"):
            model.generate(**inputs, max_new_tokens=3, num_beams=1, streamer=None)
        one = {name: value[1:] for name, value in inputs.items()}
        with pytest.raises(TokensError, match=r"image 0: embeddings holds \d+ NaN"):
            model.generate(**one, max_new_tokens=3, streamer=streamer)
        assert pruning.selections == before
    # The caller's own prompt at most.
    assert len(streamer.given) <= 1


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_a_nan_leaves_the_callers_cache_as_it_was(call: str) -> None:
    model = TINY["llava"].model()
    inputs: dict[str, Any] = prompt(TINY["llava"], ["tit"])
    inputs["pixel_values"][0, 0, 0, 0] = torch.nan
    cache = transformers.DynamicCache()
    with (
        torch.no_grad(),
        tokenprune_hf.prune(model, "divprune", keep=0.25),
        pytest.raises(TokensError, match="NaN"),
    ):
        getattr(model, call)(**inputs, **cache_argument(model, cache), use_cache=True)
    assert cache.get_seq_length() == 0
