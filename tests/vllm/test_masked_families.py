"""Sparse masks in vLLM for every family: as transformers answers under them, or refused.

`tests.vllm.test_masks` asks four of them more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.vllm import checkpoints
from tests.vllm.checkpoints import TRUSTED, VIDEOS, VIDEOS_ALONE
from tests.vllm.processes import in_a_process
from tests.vllm.test_any_architecture import start_here
from tests.vllm.test_families import Case
from tests.vllm.test_masks import NEAR, Said, assert_alike, both, heads_of, small
from tokenprune.errors import UnsupportedModelError

# So does transformers' processor of GLM-4V read the tensors that vLLM asks it for.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

# Text stands between the tiles of an image of Idefics3 and SmolVLM, and between the rows of one of
# Mistral 3 and Pixtral.
FAMILIES = [
    *("idefics3", "smolvlm", "llava_next", "llava_next_video", "llava_onevision", "qwen2_vl"),
    *("qwen3_vl", "qwen3_vl_moe", "mistral3", "pixtral", "glm4v", "glm4v_moe", "glm_ocr"),
    *("paddleocr_vl", "cohere2_vision", "gemma3n", "gemma4"),
]
# As the small models of Gemma 4, whose images do not see themselves both ways.
CHANGES: dict[str, dict[str, Any]] = {
    "gemma4": {"text_config": {"use_bidirectional_attention": None}}
}


def cases_of(family: str) -> list[Case]:
    """Return prompts of several images, of one and of none, and of a video."""
    videos = [Case("tvt", (5,))] if family in VIDEOS else []
    if family in VIDEOS_ALONE:
        return [*videos, Case("ttt", ())]
    return [
        *(Case("titit", (0, 1)), Case("iit", (2, 3)), Case("tit", (4,)), Case("ttt", ())),
        *videos,
    ]


def away(some: Sequence[Said], others: Sequence[Said]) -> float:
    """Return the largest difference of a log-probability; infinity where they say other tokens."""
    found = 0.0
    for one, other in zip(some, others, strict=True):
        if one[0] != other[0]:
            return math.inf
        found = max(found, *(abs(a - b) for a, b in zip(one[1], other[1], strict=True)))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    pair = both(family, tmp_path / "model", **CHANGES.get(family, {}))
    heads_of(pair.hf.model, ["dense"]).save(pair.folder / "dense.json")
    (pair.folder / "generation_config.json").unlink()  # vLLM's Gemma 4 suppresses logits by it
    cases = cases_of(family)
    masked = [pair.expected(case) for case in cases]
    plain = [pair.expected(case, False) for case in cases]
    unmasked = [replace(case, asked={"masks": False}) for case in cases]
    longest = max(pair.hf.inputs(case)["input_ids"].shape[1] for case in cases)
    limits = {} if family in VIDEOS_ALONE else {"image": 2}
    if family in VIDEOS:
        limits["video"] = 1
    options = {"limit_mm_per_prompt": limits, "trust_remote_code": family in TRUSTED}
    # In chunks of fewer tokens than an image has, prompts with masks and without in one batch.
    with pair.start(**small(family, longest), **options) as llm:
        found = pair.said(llm, [*cases, *unmasked])
        llm.collective_rpc("exchange_heads", args=(str(pair.folder / "dense.json"),))
        llm.reset_prefix_cache()
        dense = pair.said(llm, cases)
    for said, right, case in zip(found, [*masked, *plain], [*cases, *unmasked], strict=True):
        assert_alike(said, right, case)
    under_masks, without = found[: len(cases)], found[len(cases) :]
    for said, right, case in zip(dense, without, cases, strict=True):
        assert_alike(said, right, case)
    assert away(dense, without) < NEAR / 10
    # A video of fewer tokens than heads see before them is whole under masks.
    if family not in VIDEOS_ALONE:
        assert away(masked, plain) > 10 * away(under_masks, masked), "masks say something"


# What `tokenprune_hf.sparse` refuses too.
REFUSED = {
    **dict.fromkeys(("qwen3_5", "minicpmv4_6", "lfm2_vl"), "a kind that no mask reaches"),
    "llama4": "layers that see one chunk of the prompt",
    "gemma4": "text attends to what stands behind it",
}


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_masks_do_not_reach_are_refused(family: str, tmp_path: Path) -> None:
    folder = checkpoints.save(family, tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match=REFUSED[family]):
        in_a_process(begin, family, folder, {"masks": "pooled:0.5"})


def test_counted_tokens_are_refused_where_layers_see_a_window(tmp_path: Path) -> None:
    folder = checkpoints.save("gemma3", tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match="see a window of tokens, where proportional"):
        in_a_process(begin, "gemma3", folder, {"proportional_attention": True})


def begin(family: str, folder: Path, options: dict[str, Any]) -> None:
    """Start the engine in this process."""
    with start_here(family, folder, "uniform", (), **options):
        pass
