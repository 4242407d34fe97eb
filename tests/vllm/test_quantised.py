"""Quantised checkpoints on vLLM's real engine, against transformers with the same weights whole.

W8A8 also rounds what goes into a layer; the model of transformers is made to do likewise, and all
is in float32, so both calculate alike. What vLLM runs in bfloat16 alone is compared up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vllm import checkpoints
from tests.vllm.checkpoints import WORDS
from tests.vllm.engines import answer, greedy, kept
from tests.vllm.quantised import AWQ, EVERY_LAYER, GPTQ, LANGUAGE_MODEL, W8A8, Scheme, round_inputs
from tests.vllm.quantised import save as quantise
from tests.vllm.test_families import Case, reference, request, start

METHODS = (
    "cls-attention",
    "zeroth-order",
    "divprune",
    "information",
    "flexselect",
    "relevant-information",
)
NEAR = 0.35
"""Of the logits' standard deviation: what rounding to bfloat16 makes of equal ones; an answer by
chance is more than three of them away."""


@dataclass(frozen=True)
class Quantised:
    """A checkpoint of which some layers are quantised.

    Attributes
    ----------
    family
        Of the checkpoint.
    scheme, layers
        How, and which layers.
    changes
        Of its config: vLLM's kernels for CPUs take layers of some sizes alone.
    """

    family: str
    scheme: Scheme
    layers: str
    changes: dict[str, Any]

    @property
    def exact(self) -> bool:
        """Whether both engines calculate alike."""
        return self.scheme.dtype is torch.float32


_WIDE = {"hidden_size": 64, "intermediate_size": 64}
CHECKPOINTS = {
    # Of these sizes vLLM runs W8A8 by the kernel that takes float32, and pictures side by side.
    "w8a8": Quantised(
        "llava",
        W8A8,
        EVERY_LAYER,
        {
            "text_config": {"hidden_size": 40, "intermediate_size": 64},
            "vision_config": {
                "hidden_size": 40,
                "intermediate_size": 64,
                "num_attention_heads": 2,
            },
        },
    ),
    "awq": Quantised("qwen2_5_vl", AWQ, LANGUAGE_MODEL, {"text_config": {"intermediate_size": 64}}),
    "gptq": Quantised(
        "llava",
        GPTQ,
        EVERY_LAYER,
        {"text_config": {"intermediate_size": 64}, "vision_config": _WIDE},
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_quantised_checkpoints_keep_and_say_what_their_weights_stand_for(
    name: str, tmp_path: Path
) -> None:
    made = CHECKPOINTS[name]
    folder = checkpoints.save(made.family, tmp_path / "model", **made.changes)
    hf = reference(made.family, quantise(folder, made.scheme, made.layers))
    if made.scheme is W8A8:
        round_inputs(hf.model, made.layers)
    asked = [
        *(Case("tit", (n,), {"method": name, "keep": 12}) for n, name in enumerate(METHODS)),
        # Without pruning: the checkpoint is what it was meant to be.
        Case("tit", (20,), {"off": True}),
        Case("tit", (21,), {"keep": 1.0}),
        Case("ttt", ()),
    ]
    dtype = str(made.scheme.dtype).removeprefix("torch.")
    methods = list(METHODS[1:])
    with start(made.family, folder, METHODS[0], request_methods=methods, dtype=dtype) as llm:
        kept(llm)
        for case in asked:
            (answered,) = answer(llm, [request(made.family, case)], greedy(words=WORDS))
            chosen = [segment for item in kept(llm) for segment in item]
            if made.exact:
                tokens, indices = hf.ask(case)
                assert chosen == ([] if case.whole else indices), case
                assert answered == tokens, case
                continue
            own, away = hf.rates(case, answered, chosen)
            assert away < NEAR, case
            for selection, kept_here in zip(own, [] if case.whole else chosen, strict=False):
                assert len(kept_here) == len(selection)
                # By chance it would be two thirds of them.
                others = set(kept_here) - set(selection.kept.tolist())
                assert len(others) <= 0.25 * len(kept_here), (case, others)
            assert bool(chosen) is not (case.whole or not case.pictures)
