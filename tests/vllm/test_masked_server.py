"""Sparse masks over real HTTP, against the bundled model in transformers under the same masks."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

import tokenprune_hf
from tests.vllm.servers import COMMON, TOKENPRUNE, Server, data_url, serve
from tests.vllm.test_masks import MIXED, heads_of
from tests.vllm.test_server import asking, picture
from tokenprune.arguments import Parser
from tokenprune.errors import InputFileError, UnsupportedModelError
from tokenprune.masks import HeadCategories, ImageSpan
from tokenprune_eval.bundled.model import bundled_model_path
from tokenprune_hf.layout import image_spans_of
from tokenprune_vllm import serve as command_of_serve

QUESTION = "what color is the shape?"
NEAR = 1e-4
"""How far log-probabilities of the two engines may be from each other, in float32."""

STEPS = 4
LIKELIEST = 20
"""Tokens of each step of which the server says the log-probability; it says no more of them."""


@dataclass(frozen=True)
class Said:
    """What was answered.

    Attributes
    ----------
    tokens
        Ids of the answer.
    scores
        For each of them, token id -> log-probability: of all tokens, or of the likeliest.
    """

    tokens: list[int]
    scores: list[dict[int, float]]

    def away(self, other: Said) -> float:
        """Return the largest difference of a log-probability, as long as both say the same."""
        alike = [one == two for one, two in zip(self.tokens, other.tokens, strict=True)]
        steps = 1 + (alike.index(False) if False in alike else len(alike) - 1)
        return max(
            abs(score - theirs[token])
            for own, theirs in zip(self.scores[:steps], other.scores[:steps], strict=True)
            for token, score in own.items()
        )


@dataclass
class Masked:
    """The bundled model under masks: a server, and transformers."""

    server: Server
    heads: HeadCategories
    model: Any
    processor: Any

    def asked(self, images: Sequence[int], question: str, **asked: Any) -> dict[str, Any]:
        """Return the body of a request about some pictures."""
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": data_url(picture(one))}} for one in images
        ]
        return {
            "model": "tiny",
            "messages": [
                {"role": "user", "content": [*content, {"type": "text", "text": question}]}
            ],
            "max_tokens": STEPS,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": True,
            "top_logprobs": LIKELIEST,
            "return_tokens_as_token_ids": True,
            **(asking(**asked) if asked else {}),
        }

    def send(self, images: Sequence[int], question: str, **asked: Any) -> httpx.Response:
        """Ask the server."""
        body = self.asked(images, question, **asked)
        return httpx.post(f"{self.server.url}/v1/chat/completions", json=body, timeout=120)

    def said(self, response: httpx.Response) -> Said:
        """Return what it answered."""
        assert response.status_code == 200, response.text
        steps = response.json()["choices"][0]["logprobs"]["content"]
        assert all(len(step["top_logprobs"]) == LIKELIEST for step in steps)
        return Said(
            [_id_of(step) for step in steps],
            [{_id_of(one): one["logprob"] for one in step["top_logprobs"]} for step in steps],
        )

    def inputs(self, images: Sequence[int], question: str) -> Any:
        """Return the same request as inputs of transformers."""
        content: list[dict[str, Any]] = [{"type": "image"}] * len(images)
        message = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
        text = self.processor.apply_chat_template([message], add_generation_prompt=True)
        pictures = {"images": [picture(one) for one in images]} if images else {}
        return self.processor(text=[text], return_tensors="pt", **pictures)

    def spans(self, images: Sequence[int], question: str) -> list[ImageSpan]:
        """Return where its images stand."""
        inputs = self.inputs(images, question)
        return image_spans_of(self.model, inputs["input_ids"], inputs)[0]

    def expected(self, images: Sequence[int], question: str, masked: bool = True) -> Said:
        """Return what transformers says."""
        inputs = self.inputs(images, question)
        with tokenprune_hf.sparse(self.model, self.heads) if masked else nullcontext():
            output = self.model.generate(
                **inputs,
                max_new_tokens=STEPS,
                min_new_tokens=STEPS,
                do_sample=False,
                eos_token_id=None,
                return_dict_in_generate=True,
                output_logits=True,
            )
        scores = [step[0].log_softmax(dim=-1).tolist() for step in output.logits]
        return Said(
            output.sequences[0, inputs["input_ids"].shape[1] :].tolist(),
            [dict(enumerate(one)) for one in scores],
        )

    def check(
        self, response: httpx.Response, images: Sequence[int], question: str, masked: bool = True
    ) -> None:
        """Raise AssertionError unless the server says what transformers does, masked or not."""
        said, right = self.said(response), self.expected(images, question, masked)
        assert said.tokens == right.tokens
        assert said.away(right) < NEAR
        if len(images) > 1:  # one has no more tokens than any head sees before it
            other = self.expected(images, question, not masked)
            assert 20 * said.away(right) < said.away(other), "masks say something"


def _id_of(step: dict[str, Any]) -> int:
    return int(step["token"].removeprefix("token_id:"))


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return tokenprune_hf.load(str(bundled_model_path()))


@pytest.fixture(scope="module")
def masked(loaded: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Masked]:
    model, processor = loaded
    folder = tmp_path_factory.mktemp("masked")
    heads = heads_of(model, MIXED)
    heads.save(folder / "heads.json")
    command = [
        *(*TOKENPRUNE, "serve", str(bundled_model_path())),
        *("--masks", str(folder / "heads.json"), "--allow-request-keep"),
        *COMMON,
        *('--limit-mm-per-prompt={"image": 4}', "--max-num-batched-tokens=48"),
        *("--block-size=32", "--enable-prompt-tokens-details"),
    ]
    with serve(command, folder, forked=True) as running:
        yield Masked(running, heads, model, processor)


def test_requests_are_read_under_masks_or_without(masked: Masked) -> None:
    images = (0, 1, 2)
    for asked, under_masks in (
        ({}, True),
        ({"masks": False}, False),  # what the cache knows of the same images is under masks
        ({"masks": True}, True),
        ({"off": True}, True),
        ({"off": True, "masks": False}, False),
    ):
        masked.check(masked.send(images, QUESTION, **asked), images, QUESTION, under_masks)


@pytest.mark.parametrize("images", [(3,), ()], ids=["one", "none"])
def test_prompts_of_one_image_or_none(images: tuple[int, ...], masked: Masked) -> None:
    for asked, under_masks in (({}, True), ({"masks": False}, False)):
        masked.check(masked.send(images, QUESTION, **asked), images, QUESTION, under_masks)


def test_a_cached_prefix_that_ends_inside_an_image(masked: Masked) -> None:
    images, questions = (4, 5), (QUESTION, "where is the circle?")

    def cached(response: httpx.Response) -> int:
        return int(response.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    *_, last = masked.spans(images, QUESTION)
    for number, question in enumerate(questions):
        response = masked.send(images, question)
        masked.check(response, images, question)
        if number:
            assert last.start < cached(response) < last.stop
    # Without masks nothing of the images is shared: what stands before them is no whole block.
    first, *_ = masked.spans(images, QUESTION)
    response = masked.send(images, QUESTION, masks=False)
    assert cached(response) <= first.start
    masked.check(response, images, QUESTION, masked=False)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"masks": "yes"}, "masks='yes' in mm_processor_kwargs is not true or false"),
        ({"mask": True}, "Did you mean 'masks'"),
        ({"keep": 8}, "this server prunes nothing by itself"),
    ],
)
def test_a_bad_request_is_a_400(asked: dict[str, Any], message: str, masked: Masked) -> None:
    response = masked.send((0, 1), QUESTION, **asked)
    assert response.status_code == 400, response.text
    assert message in response.json()["error"]["message"]


def test_heads_of_another_model_are_refused(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    heads = heads_of(loaded[0], MIXED)
    file = tmp_path / "heads.json"

    def command() -> list[str]:
        parser = Parser()
        command_of_serve.configure(parser)
        arguments, more = parser.parse_known_args([str(bundled_model_path()), "--masks", str(file)])
        arguments.more = more
        return command_of_serve.server_command(arguments)

    replace(heads, model=replace(heads.model, model_type="llava")).save(file)
    with pytest.raises(UnsupportedModelError, match=r"of type 'llava', and .* is 'internvl'"):
        command()
    file.write_text("{}")
    with pytest.raises(InputFileError, match=r"heads\.json"):
        command()
    # Of the same type, with twice as many heads: the worker sees it before it loads weights.
    twice = replace(
        heads,
        model=replace(heads.model, heads=2 * heads.model.heads),
        categories=tuple(2 * layer for layer in heads.categories),
    )
    twice.save(file)
    running = functools.partial(
        serve,
        [*TOKENPRUNE, "serve", str(bundled_model_path()), "--masks", str(file), *COMMON],
        tmp_path,
        forked=True,
    )
    with pytest.raises(RuntimeError, match="the server did not start"), running():
        pass
    log = (tmp_path / "server.log").read_text()
    assert f"heads is {2 * heads.model.heads}, not {heads.model.heads}" in log
