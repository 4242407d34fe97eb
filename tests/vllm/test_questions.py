"""Methods that choose by the question: what the caches must tell apart, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import tokenprune_vllm
from tests.hf.lites import saved
from tests.vllm import checkpoints
from tests.vllm.checkpoints import WORDS
from tests.vllm.engines import answer, greedy, kept
from tests.vllm.test_families import Case, Pair, reference, start
from tokenprune.config import PruningConfig
from tokenprune.errors import OptionError, UnsupportedModelError
from tokenprune_vllm.refusals import check_engine
from tokenprune_vllm.settings import RequestError, ServerSettings

ASKED: tuple[dict[str, Any], ...] = ({}, {"method": "flexselect"})
"""The server's own method, flexselect-lite, and the one that requests may ask for."""


@dataclass
class Questioned(Pair):
    """One family in both engines, and the options of its trained selector."""

    options: dict[str, Any]


@pytest.fixture(scope="module", params=["llava_onevision", "internvl"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Questioned]:
    family = request.param
    folder = tmp_path_factory.mktemp(family)
    hf = reference(family, checkpoints.save(family, folder / "model"))
    encoded = checkpoints.hf_inputs(family, hf.processor, "it", [checkpoints.image(0, (40, 40))])
    width = features_of(hf, encoded)
    vocabulary = hf.model.config.get_text_config().vocab_size
    options = saved(folder / "lite", width, vocabulary, hf.model.config.model_type)
    with start(
        family,
        folder / "model",
        "flexselect-lite",
        options=options,
        request_methods=["flexselect"],
        max_model_len=512,
        num_gpu_blocks_override=40,
    ) as llm:
        yield Questioned(family, llm, hf, options)


def features_of(hf: Any, inputs: Any) -> int:
    import tokenprune_hf

    encoded = tokenprune_hf.encode(hf.model, needs=("features",), **inputs)
    features = encoded.modalities["image"].items[0].tokens.features
    assert features is not None
    return features.shape[1]


def in_transformers(pair: Questioned, case: Case) -> tuple[list[int], list[list[int]]]:
    """Ask transformers; the selector's folder goes with the server's own method alone."""
    method = case.asked.get("method", "flexselect-lite")
    options = pair.options if method == "flexselect-lite" else {}
    return replace(pair.hf, options={**options, "method": method}).ask(case)


def ask_both(pair: Questioned, case: Case) -> list[list[int]]:
    """Check that both engines answer alike; return what vLLM selected for it, if it had to."""
    tokens, indices = in_transformers(pair, case)
    (answered,) = answer(pair.llm, [pair.request(case)], greedy(words=WORDS))
    assert answered == tokens, case
    chosen = [segment for item in kept(pair.llm) for segment in item]
    assert chosen in ([], indices, indices[1:]), case
    return chosen


@pytest.mark.parametrize("asked", ASKED)
def test_two_questions_never_share_a_selection(pair: Questioned, asked: dict[str, Any]) -> None:
    first = len(asked)  # other pictures for each method: nothing is known yet
    questions = [
        Case("vt", (first,), asked),
        Case("vtt", (first,), asked),  # begins with the same words
        Case("tvt", (first,), asked),
        Case("it", (20 + first,), asked),
        Case("itt", (20 + first,), asked),
    ]
    selected = [ask_both(pair, case) for case in questions]
    assert all(selected), "each question has a selection of its own"
    assert len({str(one) for one in selected[:3]}) > 1, "and the question decides it"
    for case in reversed(questions):
        assert ask_both(pair, case) == [], "the same question again is known"
    pair.llm.reset_prefix_cache()
    for case in questions:
        assert ask_both(pair, case) == [], "and the encoder's cache knows it too"


@pytest.mark.parametrize("asked", ASKED)
def test_two_videos_in_one_prompt(pair: Questioned, asked: dict[str, Any]) -> None:
    """Each is ranked by the text behind it, the other's frame labels included."""
    base = 4 + 10 * len(asked)
    assert len(ask_both(pair, Case("vtvt", (base, base + 2), asked))) == 2
    assert len(ask_both(pair, Case("vtvt", (base, base + 4), asked))) > 0


def test_a_batch_of_questions_about_one_video(pair: Questioned) -> None:
    cases = [Case(kinds, (7,), asked) for kinds in ("vt", "vtt", "tvt") for asked in ASKED]
    expected = [in_transformers(pair, case)[0] for case in cases]
    requests = [pair.request(case) for case in cases]
    assert answer(pair.llm, requests, greedy(words=WORDS)) == expected


def test_no_text_behind_it(pair: Questioned) -> None:
    if pair.family == "internvl":
        return  # an image's own closing tag comes after it
    request = pair.request(Case("ti", (30,)))
    prompt = request["prompt"]
    end = prompt.rfind("<image>") + len("<image>")
    for _ in range(2):  # the second time vLLM's cache knows the image
        with pytest.raises(RequestError, match="no text comes after the image"):
            answer(pair.llm, [{**request, "prompt": prompt[:end]}], greedy())
    kept(pair.llm)
    assert ask_both(pair, Case("tit", (30,)))


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("qwen2_5_vl", {"mm_processor_cache_type": "shm"}, "mm-processor-cache-type shm"),
        ("qwen3_vl_moe", {"data_parallel_size": 2}, "wait for each other in every layer"),
    ],
)
def test_settings_of_vllm_that_do_not_go_together(
    family: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    from vllm import EngineArgs

    folder = checkpoints.save(family, tmp_path / "model")
    given = {"dtype": "float32", **options}
    arguments = tokenprune_vllm.engine_args(folder, "flexselect", 4, **given)
    config = EngineArgs(**arguments).create_engine_config()
    with pytest.raises(UnsupportedModelError, match=message):
        check_engine(config, ServerSettings.build(PruningConfig("flexselect", 4)))


def test_a_selector_without_its_folder(tmp_path: Path) -> None:
    folder = checkpoints.save("llava", tmp_path / "model")
    with pytest.raises(OptionError, match="needs the option path"):
        tokenprune_vllm.engine_args(folder, "flexselect-lite", 4)
