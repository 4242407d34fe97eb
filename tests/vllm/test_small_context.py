"""Prompts that fit an engine's context only because they are pruned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError

import tokenprune_hf
from tests.vllm import checkpoints
from tests.vllm.checkpoints import WORDS
from tests.vllm.engines import answer, engine, greedy
from tests.vllm.test_families import reference

CONTEXT = 128
METHOD = "zeroth-order"


@pytest.mark.parametrize(
    ("family", "images", "frames", "keep", "unpruned", "pruned"),
    [("llava", 8, 0, 5, 292, 44), ("qwen2_5_vl", 0, 64, 32, 773, 37)],
    ids=["8 images", "64 frames"],
)
def test_a_context_that_only_fits_when_pruned(
    family: str,
    images: int,
    frames: int,
    keep: int,
    unpruned: int,
    pruned: int,
    tmp_path: Path,
) -> None:
    folder = checkpoints.save(family, tmp_path / "model")
    kinds = "i" * images + "v" * bool(frames) + "t"
    media = (
        [checkpoints.image(number) for number in range(images)],
        [checkpoints.video(0, frames)] if frames else [],
    )
    request = checkpoints.vllm_request(family, kinds, *media)
    settings: dict[str, Any] = {
        "max_model_len": CONTEXT,
        "limit_mm_per_prompt": {"image": images, "video": bool(frames)},
    }
    sampling = greedy(words=WORDS)
    too_long = rf"\(length {unpruned}\) is longer than the maximum model length of {CONTEXT}"
    with engine(folder, METHOD, keep, **settings) as llm:
        (output,) = llm.generate([request], sampling, use_tqdm=False)
        assert len(output.prompt_token_ids) == pruned
        answered = list(output.outputs[0].token_ids)
        # Unpruned it is refused by vLLM itself, there and in a plain engine.
        off = {**request, "mm_processor_kwargs": {"tokenprune": {"off": True}}}
        with pytest.raises(VLLMValidationError, match=too_long):
            answer(llm, [off], sampling)
        assert answer(llm, [request], sampling) == [answered]
    with (
        engine(folder, **settings) as plain,
        pytest.raises(VLLMValidationError, match=too_long),
    ):
        answer(plain, [request], sampling)
    hf = reference(family, folder)
    inputs = checkpoints.hf_inputs(family, hf.processor, kinds, *media)
    assert inputs["input_ids"].shape[1] == unpruned
    with tokenprune_hf.prune(hf.model, METHOD, keep):
        expected = hf.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert answered == expected[0, unpruned:].tolist()
