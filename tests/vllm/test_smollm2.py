"""The bundled model with SmolLM2-135M: both engines keep and say the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tokenprune_hf
from tests.vllm.engines import engine, greedy, kept
from tokenprune.providers import BUNDLED_SMOLLM2, model_path
from tokenprune_eval.bundled.scenes import load_scenes

KEEP = 12
METHODS = ("relevant-information", "cls-attention", "zeroth-order", "information", "flexselect")
LIKELIEST = 10
STEPS = 3


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    model, processor = tokenprune_hf.load(BUNDLED_SMOLLM2)
    model.generation_config.eos_token_id = None
    return model, processor


@pytest.fixture(scope="module")
def asked() -> list[tuple[str, Image.Image]]:
    """One question about each of twelve scenes, of every type."""
    of_image = {question.image: question for question in load_scenes()[::3]}
    chosen = list(of_image.values())[:12]
    assert len(chosen) == 12
    return [(one.question, Image.open(one.image).convert("RGB")) for one in chosen]


@pytest.fixture(scope="module")
def served() -> Iterator[Any]:
    with engine(
        Path(model_path(BUNDLED_SMOLLM2)),
        METHODS[0],
        KEEP,
        request_methods=METHODS[1:],
        max_logprobs=LIKELIEST,
        max_model_len=256,
    ) as llm:
        yield llm


def in_transformers(
    loaded: tuple[Any, Any], question: str, image: Image.Image, method: str | None
) -> tuple[list[int], torch.Tensor, list[list[int]]]:
    """Return generated tokens, float32 log-probabilities ``[STEPS, V]`` and what was kept."""
    model, processor = loaded
    inputs = tokenprune_hf.ask(processor, question, image=image)
    with tokenprune_hf.prune(model, method or "random", KEEP if method else 1.0) as pruning:
        output = model.generate(
            **inputs,
            max_new_tokens=STEPS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    tokens = output.sequences[0, inputs.input_ids.shape[1] :].tolist()
    said = torch.cat(output.logits).float().log_softmax(-1)
    return tokens, said, [one.kept.tolist() for one in pruning.selections]


@pytest.mark.parametrize("method", [None, *METHODS])
def test_both_engines_keep_and_say_the_same(
    method: str | None, loaded: tuple[Any, Any], asked: list[tuple[str, Image.Image]], served: Any
) -> None:
    processor = loaded[1]
    requests = []
    for question, image in asked:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        options = {"off": True} if method is None else {"method": method}
        requests.append(
            {
                "prompt": prompt,
                "multi_modal_data": {"image": image},
                "mm_processor_kwargs": {"tokenprune": options},
            }
        )
    kept(served)
    outputs = served.generate(requests, greedy(STEPS, logprobs=LIKELIEST), use_tqdm=False)
    indices = kept(served)
    expected = [in_transformers(loaded, *one, method) for one in asked]
    if method is not None:
        assert indices == [selections for _, _, selections in expected]
    for output, (tokens, said, _) in zip(outputs, expected, strict=True):
        given = output.outputs[0]
        assert list(given.token_ids) == tokens
        for step, logprobs in enumerate(given.logprobs):
            assert len(logprobs) >= LIKELIEST
            for token, one in logprobs.items():
                assert one.logprob == pytest.approx(float(said[step, token]), abs=1e-3)
