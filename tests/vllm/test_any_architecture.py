"""Architectures of no family on vLLM's real engine, against transformers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.vllm import checkpoints
from tests.vllm.checkpoints import OTHERS, WORDS
from tests.vllm.engines import answer, greedy, kept
from tests.vllm.test_families import Case, Pair, reference, start

METHODS = ("divprune", "uniform", "random", "information")


def cases() -> list[Case]:
    """Return requests whose media are all different, so that no cache knows them."""
    return [
        Case("it", (0,), {"method": "divprune"}),
        Case("titi", (1, 2), {"method": "divprune", "keep": 0.3}),
        Case("tit", (5,), {"method": "uniform"}),
        Case("tit", (6,), {"method": "random", "keep": 11}),
        Case("titit", (15, 16), {"method": "information"}),
        Case("tit", (7,), {"off": True}),
        Case("tit", (8,), {"method": "divprune", "keep": 1.0}),
        Case("ttt", ()),
    ]


@pytest.fixture(scope="module", params=OTHERS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    name = request.param
    folder = checkpoints.save(name, tmp_path_factory.mktemp(name) / "model")
    with start(name, folder, METHODS[0], request_methods=METHODS[1:]) as llm:
        yield Pair(name, llm, reference(name, folder))


def test_the_same_tokens_are_kept_and_generated(pair: Pair) -> None:
    kept(pair.llm)
    expected = []
    for case in cases():
        tokens, indices = pair.hf.ask(case)
        (answered,) = answer(pair.llm, [pair.request(case)], greedy(words=WORDS))
        chosen = [segment for item in kept(pair.llm) for segment in item]
        assert chosen == ([] if case.whole else indices), case
        assert answered == tokens, case
        expected.append(tokens)
    pair.llm.reset_prefix_cache()
    pair.llm.llm_engine.reset_encoder_cache()
    together = answer(pair.llm, [pair.request(case) for case in cases()], greedy(words=WORDS))
    assert together == expected
