"""The bundled model on easy-VQA: what transformers keeps and answers, vLLM keeps and answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

import tokenprune_hf
from tests.vllm.engines import answer, engine, greedy, kept
from tokenprune_eval.bundled.easyvqa import load_easy_vqa
from tokenprune_eval.bundled.model import bundled_model_path

tf: Any = transformers  # its auto classes are not typed

QUESTIONS = 100
KEEP = 12
METHODS = (
    "cls-attention",
    "zeroth-order",
    "divprune",
    "information",
    "feature-norm",
    "uniform",
    "random",
)
_BATCH = 25
_IN_BFLOAT16 = QUESTIONS if torch.cpu._is_avx512_supported() else 20
"""Without AVX-512 bfloat16 takes seven times as long as float32."""


@dataclass(frozen=True)
class Asked:
    """Questions on distinct images, as both engines take them."""

    prompts: list[str]
    images: list[Image.Image]

    def requests(self, **options: Any) -> list[dict[str, Any]]:
        """Return vLLM's requests; options go to `mm_processor_kwargs`."""
        return [
            {
                "prompt": prompt,
                "multi_modal_data": {"image": image},
                "mm_processor_kwargs": options,
            }
            for prompt, image in zip(self.prompts, self.images, strict=True)
        ]


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return bundled_model_path()


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> Any:
    return tf.AutoProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def asked(processor: Any) -> Asked:
    questions = {question.image: question for question in load_easy_vqa("test")}
    chosen = list(questions.values())[:QUESTIONS]
    assert len(chosen) == QUESTIONS
    prompts = []
    for question in chosen:
        content = [{"type": "image"}, {"type": "text", "text": question.question}]
        message = [{"role": "user", "content": content}]
        prompts.append(processor.apply_chat_template(message, add_generation_prompt=True))
    return Asked(prompts, [Image.open(question.image).convert("RGB") for question in chosen])


def in_transformers(
    checkpoint: Path,
    processor: Any,
    asked: Asked,
    dtype: torch.dtype,
    method: str | None,
    keep: int = KEEP,
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Return generated tokens and kept indices, in the form of `answer` and `kept`."""
    model = tf.AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    processor.tokenizer.padding_side = "left"
    answers: list[list[int]] = []
    indices: list[list[list[int]]] = []
    for start in range(0, len(asked.prompts), _BATCH):
        part = slice(start, start + _BATCH)
        images = [[image] for image in asked.images[part]]
        inputs = processor(
            images=images, text=asked.prompts[part], padding=True, return_tensors="pt"
        ).to(dtype)
        length = inputs["input_ids"].shape[1]
        options = {"max_new_tokens": 3, "do_sample": False}
        if method is None:
            output = model.generate(**inputs, **options)
        else:
            with tokenprune_hf.prune(model, method, keep) as pruning:
                output = model.generate(**inputs, **options)
            indices += [[one.kept.tolist()] for one in pruning.selections]
        answers += output[:, length:].tolist()
    return answers, indices


@pytest.fixture(scope="module")
def float32_engine(checkpoint: Path) -> Iterator[Any]:
    with engine(
        checkpoint,
        "cls-attention",
        KEEP,
        request_methods=METHODS[1:],
    ) as llm:
        yield llm


@pytest.mark.parametrize("method", METHODS)
def test_float32_keeps_and_answers_alike(
    method: str, checkpoint: Path, processor: Any, asked: Asked, float32_engine: Any
) -> None:
    count = QUESTIONS if method == "cls-attention" else 30
    some = Asked(asked.prompts[:count], asked.images[:count])
    expected, indices = in_transformers(checkpoint, processor, some, torch.float32, method)
    kept(float32_engine)
    answers = answer(float32_engine, some.requests(tokenprune={"method": method}), greedy(tokens=3))
    assert kept(float32_engine) == indices
    assert answers == expected


def test_without_pruning_it_answers_as_the_plain_engine(
    asked: Asked, checkpoint: Path, float32_engine: Any
) -> None:
    some = Asked(asked.prompts[:60], asked.images[:60])
    off = answer(float32_engine, some.requests(tokenprune={"off": True}), greedy(tokens=3))
    whole = answer(float32_engine, some.requests(tokenprune={"keep": 1.0}), greedy(tokens=3))
    with engine(checkpoint) as plain:
        requests = [
            {name: value for name, value in request.items() if name != "mm_processor_kwargs"}
            for request in some.requests()
        ]
        expected = answer(plain, requests, greedy(tokens=3))
    assert off == expected
    assert whole == expected


def test_bfloat16_keeps_alike_and_answers_within_its_own_noise(
    checkpoint: Path, processor: Any, asked: Asked
) -> None:
    dtype = torch.bfloat16
    some = Asked(asked.prompts[:_IN_BFLOAT16], asked.images[:_IN_BFLOAT16])
    with engine(checkpoint, "cls-attention", KEEP, dtype="bfloat16") as llm:
        pruned = answer(llm, some.requests(), greedy(tokens=3))
        indices = kept(llm)
        plain = answer(llm, some.requests(tokenprune={"off": True}), greedy(tokens=3))
    expected, expected_indices = in_transformers(
        checkpoint, processor, some, dtype, "cls-attention"
    )
    expected_plain, _ = in_transformers(checkpoint, processor, some, dtype, None)
    same = sum(a == b for a, b in zip(pruned, expected, strict=True))
    same_unpruned = sum(a == b for a, b in zip(plain, expected_plain, strict=True))
    # The two engines' towers round differently, so a token on the edge may stay in one alone.
    both = sum(
        len(set(a[0]) & set(b[0])) for a, b in zip(indices, expected_indices, strict=True)
    ) / (KEEP * _IN_BFLOAT16)
    alike = sum(a == b for a, b in zip(indices, expected_indices, strict=True))
    print(f"bfloat16, of {_IN_BFLOAT16}: kept alike {alike}, answered alike {same}, unpruned ")
    print(f"{same_unpruned}; of the tokens kept in one engine {both:.2%} are kept in the other")
    assert both > 0.98
    assert alike > 0.85 * _IN_BFLOAT16
    assert same >= same_unpruned - 2
