"""Published methods on vLLM's real engine: the same tokens and rows as in transformers.

What each of them looks at (keys, attention received, question embeddings) and what it merges is
gathered and put together by either adapter on its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tokenprune
from tests.vllm import checkpoints
from tests.vllm.checkpoints import VIDEOS, WORDS
from tests.vllm.engines import answer, greedy, kept
from tests.vllm.test_families import METHODS, Case, reference, request, start
from tokenprune.tokens import FROM_CALLER

ZOO = [
    name
    for name, method in tokenprune.methods().items()
    if name not in (*METHODS, "flexselect-lite") and not FROM_CALLER & set(method.needs)
]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_published_methods_choose_and_merge_alike(family: str, tmp_path: Path) -> None:
    folder = checkpoints.save(family, tmp_path / "model")
    hf = reference(family, folder)
    kinds = [("titit", 2)] if family not in VIDEOS else [("titit", 2), ("tvt", 1)]
    asked = {
        name: [
            # Media of their own, so that every method's are encoded.
            Case(of, tuple(range(3 * place, 3 * place + many)), {"method": name, "keep": 6})
            for of, many in kinds
        ]
        for place, name in enumerate(ZOO)
    }
    assert {"visionzip", "hiprune", "mmtok", "prumerge-plus", "fastvid"} <= asked.keys()
    expected = {name: [hf.ask(case) for case in cases] for name, cases in asked.items()}
    with start(family, folder, "uniform", request_methods={name: {} for name in ZOO}) as llm:
        found: dict[str, Any] = {}
        for name, cases in asked.items():
            found[name] = []
            for case in cases:
                (tokens,) = answer(llm, [request(family, case)], greedy(words=WORDS))
                found[name].append((tokens, [one for item in kept(llm) for one in item]))
    for name in ZOO:
        assert found[name] == expected[name], name
