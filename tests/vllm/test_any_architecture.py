"""Architectures of no family on vLLM's real engine, against transformers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from vllm.v1.engine.exceptions import EngineDeadError

from tests.vllm import checkpoints
from tests.vllm.checkpoints import OTHERS, WORDS
from tests.vllm.engines import answer, greedy, kept
from tests.vllm.test_families import Case, Pair, Reference, reference, start

METHODS = ("divprune", "uniform", "random", "information")
READERS = {"own_llava": ("flexselect", "relevant-information")}
PLUGIN = Path(__file__).parent / "plugin"


def cases(name: str) -> list[Case]:
    """Return requests whose media are all different, so that no cache knows them."""
    found = [
        Case("it", (0,), {"method": "divprune"}),
        Case("titi", (1, 2), {"method": "divprune", "keep": 0.3}),
        Case("tit", (5,), {"method": "uniform"}),
        Case("tit", (6,), {"method": "random", "keep": 11}),
        Case("titit", (15, 16), {"method": "information"}),
        Case("tit", (7,), {"off": True}),
        Case("tit", (8,), {"method": "divprune", "keep": 1.0}),
        Case("ttt", ()),
    ]
    if name in READERS:
        found += [
            Case("titit", (11, 12), {"method": "flexselect", "keep": 7}),
            Case("tit", (14,), {"method": "relevant-information"}),
        ]
    if name == "own_vl":
        found += [
            Case("vt", (0,), {"method": "divprune"}),
            Case("tivtvt", (13, 10, 12), {"method": "information", "keep": 0.3}),
            Case("vt", (4,), {"off": True}),
        ]
    return found


@contextmanager
def plugin_installed() -> Iterator[None]:
    """Let Python find the plugin, here and in the engine's processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PLUGIN))
        patch.setenv("PYTHONPATH", str(PLUGIN), prepend=os.pathsep)
        yield


def in_transformers(name: str, folder: Path) -> Reference:
    """Load the model in transformers, where the plugin's types have the weights of known ones."""
    known = {"own_llava": "llava", "own_vl": "qwen2_vl"}.get(name)
    if known is None:
        return reference(name, folder)
    hf = reference(known, checkpoints.save(known, folder.with_name("known")))
    hf.model.config.model_type = name
    return hf


@pytest.fixture(scope="module", params=[name for name in OTHERS if name != "own_llava_next"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    name = request.param
    folder = checkpoints.save(name, tmp_path_factory.mktemp(name) / "model")
    methods = METHODS[1:] + READERS.get(name, ())
    with plugin_installed():
        videos = {"limit_mm_per_prompt": {"image": 2, "video": 2}} if name == "own_vl" else {}
        with start(name, folder, METHODS[0], request_methods=methods, **videos) as llm:
            yield Pair(name, llm, in_transformers(name, folder))


def test_the_same_tokens_are_kept_and_generated(pair: Pair) -> None:
    kept(pair.llm)
    expected = []
    for case in cases(pair.family):
        tokens, indices = pair.hf.ask(case)
        (answered,) = answer(pair.llm, [pair.request(case)], greedy(words=WORDS))
        chosen = [segment for item in kept(pair.llm) for segment in item]
        assert chosen == ([] if case.whole else indices), case
        assert answered == tokens, case
        expected.append(tokens)
    pair.llm.reset_prefix_cache()
    pair.llm.llm_engine.reset_encoder_cache()
    together = answer(
        pair.llm, [pair.request(case) for case in cases(pair.family)], greedy(words=WORDS)
    )
    assert together == expected


def test_rows_that_are_newlines_are_found_and_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoints.save("own_llava_next", tmp_path / "model")
    with plugin_installed(), start("own_llava_next", folder, "uniform", request_methods=()) as llm:
        pair = Pair("own_llava_next", llm, Reference("own_llava_next", None, None))
        with pytest.raises(EngineDeadError):
            answer(llm, [pair.request(Case("it", (0,)))], greedy())
    assert "are the same whatever the pixels are" in capfd.readouterr().out
