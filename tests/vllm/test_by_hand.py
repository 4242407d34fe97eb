"""Architectures that vLLM alone has, pruned, against its own engine and a prompt made by hand."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import torch
from vllm import _custom_ops as custom_ops
from vllm.model_executor.models import registry

from tests.vllm import checkpoints
from tests.vllm.checkpoints import WORDS
from tests.vllm.engines import answer, engine, greedy, kept
from tests.vllm.looking import Looked
from tests.vllm.only_vllm import ONLY_VLLM
from tests.vllm.other_types import WIDTH
from tests.vllm.plain import PlainEngine, random_weights
from tests.vllm.processes import in_a_process
from tests.vllm.test_any_architecture import METHODS, architecture_in, record
from tests.vllm.test_families import KEEP, STEP, Case
from tokenprune.errors import UnsupportedModelError
from tokenprune.families.ovis import Ovis, Ovis25
from tokenprune.families.qwen import LlavaOnevision2
from tokenprune.registry import build
from tokenprune.selecting import select
from tokenprune.tokens import VisualTokens
from tokenprune.tower.layouts import Medium
from tokenprune_vllm.encoder_inputs import medium_of
from tokenprune_vllm.settings import RequestError

Answers = list[tuple[Case, list[int], list[list[int]]]]

LOOKING = ("feature-norm", "cls-attention", "zeroth-order")
"""Methods that look at features, attention and the projector of a tower."""


def cases(name: str) -> list[Case]:
    """Return requests whose media are all different, so that no cache knows them."""
    found = [
        Case("it", (0,), {"method": "divprune"}),
        Case("titi", (1, 2), {"method": "divprune", "keep": 0.3}),
        Case("tit", (5,), {"method": "random"}),
        Case("tit", (6,), {"method": "random", "keep": 11}),
        Case("titit", (15, 16), {"method": "information"}),
        Case("tit", (7,), {"off": True}),
        Case("tit", (8,), {"method": "divprune", "keep": 1.0}),
        Case("ttt", ()),
    ]
    if ONLY_VLLM[name].hears:
        found += [
            Case("tait", (20,), {"method": "divprune"}),
            Case("taivt", (21, 22), {"method": "divprune", "keep": 0.3}),
            Case("vtait", (23, 24), {"method": "random", "keep": 7}),
            Case("tat", ()),
        ]
    if ONLY_VLLM[name].videos:
        found += [
            Case("vt", (30,), {"method": "divprune"}),
            Case("titvt", (31, 32), {"method": "information", "keep": 0.3}),
            Case("tvtit", (33, 34), {"method": "uniform"}),
            Case("vt", (35,), {"off": True}),
        ]
    if ONLY_VLLM[name].tower:
        found += [
            Case("tit", (17,), {"method": "feature-norm"}),
            Case("titi", (18, 3), {"method": "cls-attention", "keep": 0.3}),
            Case("tit", (4,), {"method": "zeroth-order"}),
        ]
    if ONLY_VLLM[name].tower and ONLY_VLLM[name].videos:
        found.append(Case("tvt", (36,), {"method": "cls-attention", "keep": 0.2}))
    return [case for case in found if len(case.pictures) <= ONLY_VLLM[name].images]


@contextmanager
def start_here(name: str, folder: Path, method: str | None, **options: Any) -> Iterator[Any]:
    """Start the engine in this process, with weights that are always the same."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    registry._run_in_subprocess = lambda function: function()
    only = ONLY_VLLM[name]
    pruned: dict[str, Any] = {}
    if method:
        methods = METHODS[1:] + (LOOKING if only.tower else ())
        pruned = {"request_methods": methods, "positions": only.positions}
    keep = KEEP if method else None
    plain_mm = custom_ops.onednn_mm

    def onednn_mm(handler: Any, x: torch.Tensor, bias: Any) -> Any:
        """vLLM's towers hand transposed tensors to linear layers, which is fine on a GPU."""
        return plain_mm(handler, x.contiguous(), bias)

    with (
        random_weights(),
        mock.patch.object(custom_ops, "onednn_mm", onednn_mm),
        engine(
            folder,
            method,
            keep,
            load_format="dummy",
            distributed_executor_backend="uni",
            max_num_seqs=8,
            trust_remote_code=bool(only.code),
            **pruned,
            **{
                "max_model_len": 512,
                "num_gpu_blocks_override": 64,
                "limit_mm_per_prompt": {"image": only.images, "video": 0, "audio": 0},
                **only.engine,
                **options,
            },
        ) as llm,
    ):
        yield llm


def by_hand(name: str, folder: Path) -> Answers:
    """Return what the plain engine answers to the prompts of `cases`, and which rows they have."""
    answers: Answers = []
    differ = 0
    with start_here(
        name,
        folder,
        None,
        max_num_batched_tokens=8192,
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
    ) as llm:
        plain, only = PlainEngine(llm), ONLY_VLLM[name]
        runs = only.tower.watch(plain.model) if only.tower else []
        for case in cases(name):
            runs.clear()
            whole = plain.ask(request(name, Case(case.kinds, case.pictures)))
            asked = {"keep": KEEP, **case.asked}
            if case.whole or not case.pictures:
                answers.append((case, whole.answered, []))
                continue
            looked: list[Looked] = []
            if only.tower:
                looked = [one for run in runs for one in only.tower.looked(plain.model, run)]
            chosen, stays = [], []
            for kind, rows in zip(case.kinds.replace("t", ""), whole.rows, strict=True):
                if kind == "a":
                    stays.append(list(range(len(rows))))
                    continue
                parts = only.parts(len(rows))
                own = set(range(len(rows))) - {row for part in parts for row in part}
                for part in parts:
                    seen = next((one for one in looked if one.modality == kind), None)
                    if seen is not None:
                        looked.remove(seen)
                    tokens = tokens_of(rows[list(part)], seen)
                    chosen.append(choose(tokens, asked["method"], asked["keep"]))
                    own |= {part[token] for token in chosen[-1]}
                stays.append(sorted(own))
            answered = plain.ask_pruned(whole, stays, only.positions == "compact")
            differ += answered != whole.answered
            answers.append((case, answered, chosen))
    assert differ, "no answer would have been another one without pruning"
    return answers


def tokens_of(rows: torch.Tensor, seen: Looked | None) -> VisualTokens:
    """Return an image's or video's tokens, of which these are the rows, for methods to look at."""
    rows = rows[:, :WIDTH]
    if seen is None:
        return VisualTokens((1, 1, len(rows)), is_picture=False, embeddings=rows)
    return VisualTokens(
        seen.grid,
        embeddings=rows,
        features=seen.features,
        cls_attention=seen.attention,
        projector=seen.projector,
    )


def choose(tokens: VisualTokens, method: str, keep: Any) -> list[int]:
    """Return which tokens of an image or video stay."""
    kept: list[int] = select(tokens, build(method, {}), keep).kept.tolist()
    assert len(kept) < tokens.total
    return kept


def request(name: str, case: Case) -> dict[str, Any]:
    """Return a case as vLLM takes it."""
    images, videos = case.media()
    times = ONLY_VLLM[name].enlarged
    images = [one.resize((times * one.width, times * one.height)) for one in images]
    made = checkpoints.vllm_request(name, case.kinds, images, videos)
    if "a" in case.kinds:
        made["multi_modal_data"]["audio"] = [(checkpoints.sound(sum(case.pictures)), 16000)]
    if case.asked:
        made["mm_processor_kwargs"] = {"tokenprune": case.asked}
    return made


def check(name: str, folder: Path, expected: Answers) -> None:
    """Compare the pruned engine with what was expected, requests one by one and together."""
    with start_here(name, folder, METHODS[0], max_num_batched_tokens=STEP) as llm:
        kept(llm)
        for case, tokens, indices in expected:
            (answered,) = answer(llm, [request(name, case)], greedy(words=WORDS))
            chosen = [segment for item in kept(llm) for segment in item]
            if "v" in case.kinds:  # of what is read in one step vLLM encodes images first
                chosen, indices = sorted(chosen), sorted(indices)
            assert chosen == indices, case
            assert answered == tokens, case
        llm.reset_prefix_cache()
        llm.llm_engine.reset_encoder_cache()
        requests = [request(name, case) for case, _, _ in expected]
        assert answer(llm, requests, greedy(words=WORDS)) == [tokens for _, tokens, _ in expected]


@pytest.mark.every_model
@pytest.mark.parametrize("name", ONLY_VLLM)
def test_architectures_that_vllm_alone_has(
    name: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    folder = checkpoints.save_without_weights(name, tmp_path / "model")
    record(record_property, architecture_in(folder))
    check_in_processes(name, folder)


def check_in_processes(name: str, folder: Path) -> None:
    """Run the plain engine in one process, and the pruned one in another."""
    expected = in_a_process(by_hand, name, folder)
    in_a_process(check, name, folder, expected)


@pytest.mark.every_model
def test_videos_that_are_packed_by_their_codec_are_refused() -> None:
    family = LlavaOnevision2(cast(Any, SimpleNamespace(model_type="llava_onevision2")))
    frames = {"video_grid_thw": torch.tensor([[1, 4, 6]] * 5), "video_is_codec": torch.tensor(0)}
    assert medium_of(family, "video", 30, frames).grid == (5, 4, 6)
    canvases = {"video_grid_thw": torch.tensor([[5, 4, 6]]), "video_is_codec": torch.tensor(1)}
    with pytest.raises(RequestError, match="packed by its codec"):
        medium_of(family, "video", 30, canvases)


@pytest.mark.every_model
def test_attention_inside_windows_is_refused() -> None:
    vit = SimpleNamespace(num_hidden_layers=4, fullatt_block_indexes="0|3")
    family = Ovis25(cast(Any, SimpleNamespace(model_type="ovis2_5", vit_config=vit)))
    family.check_needs("cls-attention", ["cls_attention"])
    vit.num_hidden_layers = 5
    family.check_needs("feature-norm", ["features"])
    with pytest.raises(UnsupportedModelError, match="sees windows"):
        family.check_needs("cls-attention", ["cls_attention"])


@pytest.mark.every_model
def test_an_ovis_of_one_tile_has_two_indicators_behind_it() -> None:
    vit = SimpleNamespace(image_size=32, patch_size=4)
    tokenizer = SimpleNamespace(hidden_stride=2, backbone_config=vit)
    config = SimpleNamespace(model_type="ovis", visual_tokenizer_config=tokenizer)
    family, image = Ovis(cast(Any, config)), Medium("image", 19)
    (segment,) = family.segments(image)
    assert segment.rows.tolist() == list(range(1, 17))
    values = torch.arange(16.0)[None, :, None]
    laid_out = family.lay_out(image, values)
    assert len(laid_out) == 19
    assert laid_out[segment.rows].equal(values[0])
