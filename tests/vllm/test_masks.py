"""Sparse masks on vLLM's real engine, against the transformers adapter under the same masks."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from vllm import _custom_ops as custom_ops
from vllm.v1.attention.backends import cpu_attn

import tokenprune_hf
import tokenprune_vllm
from tests.hf.models import SLIDING
from tests.vllm import checkpoints
from tests.vllm.checkpoints import CALLED_WITH, WORDS
from tests.vllm.engines import engine, greedy, kept
from tests.vllm.test_families import Case, Reference, reference, request
from tokenprune.arguments import Parser
from tokenprune.config import Application, PruningConfig
from tokenprune.errors import ConfigError, InputFileError, OptionError, UnsupportedModelError
from tokenprune.masks import HeadCategories, ImageSpan, PooledBlocks, PromptLayout, Thresholds
from tokenprune.masks.patterns import Category
from tokenprune_hf.layout import decoder_of, identity_of
from tokenprune_vllm import paged, serve
from tokenprune_vllm.export import export
from tokenprune_vllm.masks import Masks, _Step
from tokenprune_vllm.paged import Axis, Order, keys_and_values
from tokenprune_vllm.refusals import check_masks
from tokenprune_vllm.settings import (
    UNPRUNED,
    HeadsFile,
    Pooled,
    RequestError,
    ServerSettings,
    source_of,
)
from tokenprune_vllm.tags import Codes, Tags, around, edges, from_codes, layout_of, to_codes

MIXED: tuple[Category, ...] = ("intra", "intra+sink", "sink", "dense")
SINKS = (0, 2, -1, -3)
FAMILIES = ["llava", "internvl", "qwen2_5_vl", "gemma3"]
NEAR = 2e-3
"""How far log-probabilities of the two engines may be from each other."""


def heads_of(model: Any, categories: Sequence[Category]) -> HeadCategories:
    """Return a heads file's content in which layers take turns at these categories."""
    identity = identity_of(model)
    turns = itertools.cycle(categories)
    return HeadCategories(
        model=identity,
        categories=tuple(
            tuple(next(turns) for _ in range(identity.heads)) for _ in range(identity.layers)
        ),
        sinks=SINKS,
        thresholds=Thresholds((0.9,) * len(decoder_of(model).layers), 0.5, 0.5, 0.5),
        density=1.0,
        block=16,
        prompts=1,
    )


Said = tuple[list[int], list[float]]
"""Tokens of an answer, and the log-probability of each."""


@dataclass
class Both:
    """One family in both engines."""

    family: str
    folder: Path
    heads: HeadCategories
    hf: Reference

    def start(self, **options: Any) -> AbstractContextManager[Any]:
        """Start vLLM with these heads."""
        return engine(
            self.folder,
            **{
                "masks": self.folder / "heads.json",
                "max_num_seqs": 8,
                "limit_mm_per_prompt": {"image": 4},
                "mm_processor_kwargs": CALLED_WITH.get(self.family),
                **options,
            },
        )

    def expected(
        self, case: Case, under: Callable[[Any], AbstractContextManager[Any]] | bool = True
    ) -> Said:
        """Return what transformers says under its masks, under none, or under something else."""
        inputs = self.hf.inputs(case)
        inputs.pop("video_frames", None)
        length = inputs["input_ids"].shape[1]
        options: dict[str, Any] = {
            "max_new_tokens": 6,
            "do_sample": False,
            "return_dict_in_generate": True,
            "output_logits": True,
        }
        if callable(under):
            context = under(self.hf.model)
        else:
            context = tokenprune_hf.sparse(self.hf.model, self.heads) if under else nullcontext()
        with context:
            output = self.hf.model.generate(**inputs, **options)
        tokens = output.sequences[0, length:].tolist()
        # vLLM scales the logits of Cohere2, and transformers' class of Cohere2 Vision does not.
        scale = getattr(self.hf.model.config.get_text_config(), "logit_scale", 1.0)
        scores = [(scale * logits[0]).log_softmax(dim=-1) for logits in output.logits]
        return tokens, [float(one[token]) for one, token in zip(scores, tokens, strict=True)]

    def said(self, llm: Any, cases: Sequence[Case]) -> list[Said]:
        """Return what vLLM says to all of them at once."""
        requests = [request(self.family, case) for case in cases]
        outputs = llm.generate(requests, greedy(6, WORDS, logprobs=0), use_tqdm=False)
        result = []
        for output in outputs:
            tokens = list(output.outputs[0].token_ids)
            steps = output.outputs[0].logprobs
            result.append((tokens, [s[t].logprob for s, t in zip(steps, tokens, strict=True)]))
        return result


def assert_alike(found: Said, expected: Said, what: object) -> None:
    assert found[0] == expected[0], what
    assert found[1] == pytest.approx(expected[1], abs=NEAR), what


def differ(one: Said, other: Said) -> bool:
    """Say whether two answers are not those of one model."""
    return (
        one[0] != other[0]
        or max(abs(a - b) for a, b in zip(one[1], other[1], strict=True)) > 10 * NEAR
    )


def both(family: str, folder: Path, categories: Sequence[Category] = MIXED, **changes: Any) -> Both:
    folder = checkpoints.save(family, folder, **changes)
    hf = reference(family, folder)
    heads = heads_of(hf.model, categories)
    heads.save(folder / "heads.json")
    return Both(family, folder, heads, hf)


def small(family: str, tokens: int) -> dict[str, Any]:
    """Return settings for prompts of so many tokens to come in small chunks, and be preempted."""
    blocks = -(-(tokens + 8) // 32)
    return {
        "max_num_batched_tokens": 20,
        "disable_log_stats": False,
        "scheduler_reserve_full_isl": False,  # prompts begin for which there is no room
        "block_size": 32,
        "max_model_len": 32 * blocks,
        # Layers with a window have blocks of their own.
        "num_gpu_blocks_override": (blocks + 1) * (1 + (family in SLIDING)) + 1,
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    pair = both(family, tmp_path / "model")
    cases = [
        Case("titit", (0, 1)),
        Case("iit", (2, 3)),
        Case("titititit", (4, 5, 6, 7)),
        Case("tit", (8,)),
        Case("ttt", ()),
    ]
    expected = [pair.expected(case) for case in cases]
    plain = [pair.expected(case, False) for case in cases]
    assert differ(expected[2], plain[2])  # the masks say something
    every = [*cases, *(replace(case, asked={"masks": False}) for case in cases)]
    longest = max(pair.hf.inputs(case)["input_ids"].shape[1] for case in cases)

    def check(llm: Any, together: bool) -> None:
        found = pair.said(llm, every) if together else [pair.said(llm, [one])[0] for one in every]
        for case, said, right in zip(every, found, [*expected, *plain], strict=True):
            assert_alike(said, right, case)

    with pair.start() as llm:
        check(llm, together=False)
        llm.reset_prefix_cache()
        check(llm, together=True)
    # In chunks of fewer tokens than an image has, some of them preempted, and all asked again when
    # the cache knows them.
    with pair.start(**small(family, longest)) as llm:
        check(llm, together=True)
        check(llm, together=True)
        check(llm, together=False)
        for case, right in zip(cases, expected, strict=True):
            for _ in range(2):
                assert_alike(pair.said(llm, [case])[0], right, case)
        counted = {metric.name: metric for metric in llm.get_metrics()}
        if family != "gemma3":  # whose two kinds of layers leave room for each other
            assert counted["vllm:num_preemptions"].value > 0, "the cache was meant to be too small"
        assert counted["vllm:prefix_cache_hits"].value > 0


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_masks_are_over_what_pruning_leaves(positions: str, tmp_path: Path) -> None:
    pair = both("llava", tmp_path / "model")
    cases = [Case("titititit", (4, 5, 6, 7)), Case("iit", (2, 3)), Case("ttt", ())]
    with pair.start(
        method="divprune",
        keep=9,
        positions=positions,
        **{**small("llava", 160), "max_num_batched_tokens": 16},
    ) as llm:
        for case in cases:
            (found,) = pair.said(llm, [case])
            chosen = [one for item in kept(llm) for one in item]
            (plain,) = pair.said(llm, [replace(case, asked={"masks": False})])
            assert [one for item in kept(llm) for one in item] == chosen
            for answered, masked in ((found, True), (plain, False)):
                token, score = first_of_pruned(pair, case, chosen, positions, masked)
                assert answered[0][0] == token, (case, masked)
                assert answered[1][0] == pytest.approx(score, abs=NEAR), (case, masked)


def first_of_pruned(
    pair: Both, case: Case, chosen: list[list[int]], positions: str, masked: bool
) -> tuple[int, float]:
    """Return LLaVA's first token, and its log-probability, for a prompt that is spliced by hand."""
    model, inputs = pair.hf.model, pair.hf.inputs(case)
    ids = inputs["input_ids"][0]
    stays = torch.ones_like(ids, dtype=torch.bool)
    more: dict[str, Any] = {}
    if chosen:
        places = (ids == model.config.image_token_id).nonzero()[:, 0].chunk(len(chosen))
        for place, rows in zip(places, chosen, strict=True):
            stays[place] = False
            stays[place[rows]] = True
        with torch.no_grad():
            encoded = model.model.get_image_features(pixel_values=inputs["pixel_values"])
        encoded.pooler_output = [
            of_image[rows] for of_image, rows in zip(encoded.pooler_output, chosen, strict=True)
        ]
        more = {"mm_encoder_outputs": {"image": encoded}}
    where = stays.nonzero()[None, :, 0]
    call = {
        "input_ids": ids[stays][None],
        "attention_mask": torch.ones_like(where),
        "position_ids": where if positions == "original" else torch.arange(where.shape[1])[None],
        **more,
    }
    with torch.no_grad(), tokenprune_hf.sparse(model, pair.heads) if masked else nullcontext():
        scores = model(**call).logits[0, -1].log_softmax(dim=-1)
    token = max(WORDS, key=lambda word: float(scores[word]))
    return token, float(scores[token])


WAYS: list[tuple[dict[str, Any], Application, bool]] = [
    ({}, "mask", True),
    ({"proportional_attention": False}, "mask", False),
    ({"apply": "drop"}, "drop", True),
    ({"apply": "drop", "proportional_attention": False}, "drop", False),
]
"""What a request asks for, and how transformers applies the selection then."""


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_tokens_are_hidden_and_counted_as_in_transformers(family: str, tmp_path: Path) -> None:
    pair = both(family, tmp_path / "model")
    cases = [Case("titit", (0, 1)), Case("iit", (2, 3)), Case("ttt", ())]
    methods = ("divprune", "visionzip") if family == "llava" else ("divprune",)

    def expected(case: Case, method: str, application: Application, counted: bool) -> Said:
        more: dict[str, Any] = {"apply": application, "proportional_attention": counted}
        return pair.expected(case, lambda model: tokenprune_hf.prune(model, method, 9, **more))

    asked = [
        (
            replace(case, asked={**values, "method": method}),
            expected(case, method, application, counted),
        )
        for values, application, counted in WAYS
        for method in methods
        for case in cases
    ]
    one = [right for case, right in asked if case.kinds == "titit"]
    assert differ(one[0], one[len(methods)]), "counts say something"
    longest = max(pair.hf.inputs(case)["input_ids"].shape[1] for case in cases)
    with engine(
        pair.folder,
        *(methods[0], 9),
        apply="mask",
        proportional_attention=True,
        request_methods=methods[1:],
        limit_mm_per_prompt={"image": 2},
        **{"max_num_seqs": 8, **small(family, longest)},
    ) as llm:
        # Batches of all kinds, in chunks; and one by one, when the cache knows their prefixes.
        for found, (case, right) in zip(
            pair.said(llm, [case for case, _ in asked]), asked, strict=True
        ):
            assert_alike(found, right, case)
        for case, right in asked:
            assert_alike(pair.said(llm, [case])[0], right, case)


@pytest.mark.parametrize("tokens", [72, 512], ids=["chunks-of-whole-blocks", "whole-prompts"])
def test_blocks_are_chosen_as_in_transformers(tokens: int, tmp_path: Path) -> None:
    pair = both("llava", tmp_path / "model")
    blocks = PooledBlocks(keep=0.4, block=8)
    # Nine blocks end inside the second image, and two images are all that vLLM keeps encoded then:
    # it would cut a chunk in front of a third.
    cases = [Case("titit", (0, 1)), Case("iit", (2, 3)), Case("ttt", ())]
    if tokens == 512:
        cases.append(Case("titititit", (4, 5, 6, 7)))

    def sparse(model: Any) -> Any:
        return tokenprune_hf.sparse(model, blocks)

    plain = [pair.expected(case, lambda _: nullcontext()) for case in cases]
    assert differ(pair.expected(cases[0], sparse), plain[0])
    with pair.start(
        masks="pooled:keep=0.4,block=8",
        max_num_batched_tokens=tokens,
        max_model_len=512,
        enable_chunked_prefill=tokens < 512,
    ) as llm:
        for case, unmasked in zip(cases, plain, strict=True):
            assert_alike(pair.said(llm, [case])[0], pair.expected(case, sparse), case)
            (found,) = pair.said(llm, [replace(case, asked={"masks": False})])
            assert_alike(found, unmasked, case)


def test_bfloat16_is_as_near_as_transformers_is(tmp_path: Path) -> None:
    """Of numbers that both engines round: how far off they are is how far off transformers is."""
    pair = both("llava", tmp_path / "model")
    cases = [Case("titit", (0, 1)), Case("titititit", (4, 5, 6, 7)), Case("iit", (2, 3))]

    def firsts(model: Any, dtype: torch.dtype, masked: bool = True) -> list[torch.Tensor]:
        found = []
        for case in cases:
            inputs = pair.hf.inputs(case).to(dtype)
            context = tokenprune_hf.sparse(model, pair.heads) if masked else nullcontext()
            with torch.no_grad(), context:
                found.append(model(**inputs).logits[0, -1].float().log_softmax(dim=-1))
        return found

    exact = firsts(pair.hf.model, torch.float32)
    plain = firsts(pair.hf.model, torch.float32, masked=False)
    with pair.start(dtype="bfloat16", max_num_batched_tokens=20) as llm:
        outputs = llm.generate(
            [request(pair.family, case) for case in cases],
            greedy(1, logprobs=20),
            use_tqdm=False,
        )
    rounded = firsts(pair.hf.model.bfloat16(), torch.bfloat16)

    def distances(others: Sequence[torch.Tensor]) -> list[float]:
        return [float((a - b).square().mean().sqrt()) for a, b in zip(others, exact, strict=True)]

    said = []
    for output in outputs:
        (step,) = output.outputs[0].logprobs
        said.append({token: one.logprob for token, one in step.items()})
    # vLLM rounds at other places than transformers does, so the two are no nearer to each other
    # than either is to float32. Each of the 20 likeliest tokens is within four times the usual
    # error there, which nearly all of a normal distribution is.
    near = 4 * max(distances(rounded))
    for of_case, right in zip(said, exact, strict=True):
        for token, score in of_case.items():
            assert score == pytest.approx(float(right[token]), abs=near)
    assert max(distances(plain)) > near, "rounding hides masks"


def test_ranks_have_the_masks_of_their_own_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    pair = both("llava", tmp_path / "model")
    assert pair.heads.model.key_heads == 1  # which both ranks have
    cases = [Case("titititit", (4, 5, 6, 7)), Case("iit", (2, 3)), Case("ttt", ())]
    with pair.start(tensor_parallel_size=2, **small("llava", 160)) as llm:
        for case, found in zip(cases, pair.said(llm, cases), strict=True):
            assert_alike(found, pair.expected(case), case)


def test_dense_heads_are_left_to_vllm(tmp_path: Path) -> None:
    pair = both("llava", tmp_path / "model", ["dense"])
    cases = [Case("titit", (0, 1)), Case("iit", (2, 3)), Case("ttt", ())]
    with pair.start() as llm:
        masked = pair.said(llm, cases)
        assert llm.collective_rpc("layers_with_masks") == [0]
    with engine(pair.folder, max_num_seqs=8, limit_mm_per_prompt={"image": 4}) as llm:
        assert pair.said(llm, cases) == masked


def test_a_batch_without_tokens_of_images_takes_the_engines_own_path() -> None:
    masks, metadata = Masks.__new__(Masks), object()
    attend: Any = masks._attend
    masks._steps = {id(metadata): {False: _Step([], [0, 1], torch.arange(2))}}
    layer = SimpleNamespace(dense=False)
    given: list[Any] = [object() for _ in range(5)]
    called: list[Any] = []

    def own(*arguments: Any, **named: Any) -> Any:
        called.append((arguments, named))
        return "attended"

    output: Any = object()
    answered = attend(layer, own, *given, metadata, output=output, output_scale=1)
    assert answered == "attended"
    ((arguments, named),) = called
    assert all(one is other for one, other in zip(arguments, (*given, metadata), strict=True))
    assert named == {"output": output, "output_scale": 1}
    with pytest.raises(RuntimeError, match="no masks yet"):
        attend(layer, own, *given, object(), output=output)


@pytest.mark.parametrize("ranks", [1, 2])
def test_another_models_heads_are_refused(
    ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = reference("llava", checkpoints.save("llava", tmp_path / "model")).model
    heads = heads_of(hf, MIXED)
    other = replace(heads, model=replace(heads.model, hidden_size=128))
    with pytest.raises(UnsupportedModelError, match="hidden_size is 128, not 64"):
        Masks(hf, cast(Any, SimpleNamespace(config=hf.config)), other, None)

    class Table(torch.nn.Module):
        """Some rows of a table of embeddings, and behind them what vLLM fills them up with."""

        def __init__(self, first: int, last: int) -> None:
            super().__init__()
            rows = decoder_of(hf).get_input_embeddings().weight.detach()
            self.org_vocab_size = len(rows)
            filled = torch.cat([rows[first:last], torch.full((8, rows.shape[1]), torch.nan)])
            self.weight = torch.nn.Parameter(filled)
            self.shard_indices = SimpleNamespace(
                org_vocab_start_index=first, org_vocab_end_index=last
            )

    monkeypatch.setattr("tokenprune_vllm.masks.VocabParallelEmbedding", Table)
    rows = len(decoder_of(hf).get_input_embeddings().weight)
    for rank in range(ranks):
        table = Table(rank * rows // ranks, (rank + 1) * rows // ranks)
        whole = torch.nn.ModuleList([table])
        for sample, fits in ((heads.model.sample, True), (heads.model.sample[::-1], False)):
            masks = Masks.__new__(Masks)
            masks._model = cast(Any, SimpleNamespace(get_language_model=lambda one=whole: one))
            masks._heads = replace(heads, model=replace(heads.model, sample=sample))
            masks._checked = False
            if fits:
                masks.check_weights()
                continue
            with pytest.raises(UnsupportedModelError, match="its weights are others"):
                masks.check_weights()


def test_what_cannot_be_started_is_refused(tmp_path: Path) -> None:
    pair = both("llava", tmp_path / "model")
    file = pair.folder / "heads.json"
    start = functools.partial(tokenprune_vllm.engine_args, pair.folder)
    with pytest.raises(ConfigError, match="give both, or neither of them and masks"):
        start()
    with pytest.raises(ConfigError, match="method='divprune' and keep=None"):
        start("divprune", masks=file)
    with pytest.raises(ConfigError, match="no method and keep were given"):
        start(masks=file, positions="compact")
    with pytest.raises(InputFileError, match="nowhere"):
        start(masks=tmp_path / "nowhere.json")
    identity = replace(pair.heads.model, model_type="qwen2_vl")
    replace(pair.heads, model=identity).save(tmp_path / "other.json")
    with pytest.raises(UnsupportedModelError, match=r"of type 'qwen2_vl', and .* is 'llava'"):
        start(masks=tmp_path / "other.json")
    made = HeadsFile.of(file)
    pair.heads.save(file.with_name("same.json"))
    assert HeadsFile.of(file.with_name("same.json")).digest == made.digest
    replace(pair.heads, sinks=()).save(file)
    with pytest.raises(InputFileError, match="another file than the one"):
        made.load()


def test_requests_ask_for_masks(tmp_path: Path) -> None:
    file = HeadsFile(str(tmp_path / "heads.json"), "digest")
    pruning = PruningConfig("divprune", 4)
    without = ServerSettings.build(pruning)
    pruned = ServerSettings.build(pruning, masks=file)
    alone = ServerSettings.build(UNPRUNED, {"uniform": {}}, masks=file)

    def ask(settings: ServerSettings, **asked: object) -> Any:
        return settings.request({"tokenprune": asked})

    for settings in (without, pruned, alone):
        config = SimpleNamespace(tokenprune=settings.to_dict())
        assert ServerSettings.from_config(config) == settings
    assert ask(without).masks is None
    assert ask(without, masks=False).masks is None
    assert ask(pruned).masks == ask(alone, masks=True).masks == file
    assert ask(pruned, keep=9, masks=False).masks is None
    assert ask(pruned, off=True).masks == file
    assert not ask(pruned, off=True).prunes
    assert not ask(alone).prunes
    assert ask(alone, method="uniform", keep=3).prunes
    marks = [
        asked.fingerprint()
        for asked in (
            ask(without),
            ask(pruned),
            ask(pruned, off=True),
            ask(pruned, off=True, masks=False),
            ask(ServerSettings.build(pruning, masks=replace(file, digest="another"))),
        )
    ]
    assert len(set(marks)) == len(marks)
    assert ask(pruned, masks=False).fingerprint() == ask(without).fingerprint()
    for settings, asked, says in (
        (without, {"masks": True}, "asks for sparse masks, and this server loaded none"),
        (pruned, {"masks": "yes"}, "masks='yes' .* is not true or false"),
        (pruned, {"off": True, "keep": 3}, "says off and also keep"),
        (alone, {"keep": 3}, "prunes nothing by itself. Name a method; it loads: uniform"),
        (alone, {"method": "divprune", "keep": 3}, "'divprune' .* is not loaded"),
    ):
        with pytest.raises(RequestError, match=says):
            ask(settings, **asked)


def test_requests_ask_how_a_selection_is_applied(tmp_path: Path) -> None:
    pruning = PruningConfig("divprune", 4)
    plain = ServerSettings.build(pruning)
    both_at_once = ServerSettings.build(pruning, application="mask", proportional=True)
    config = SimpleNamespace(tokenprune=both_at_once.to_dict())
    assert ServerSettings.from_config(config) == both_at_once
    assert both_at_once.weighs
    assert not plain.weighs

    def ask(settings: ServerSettings, **asked: object) -> Any:
        return settings.request({"tokenprune": asked})

    marks = [
        ask(both_at_once, **asked).fingerprint()
        for asked in (
            {},
            {"apply": "drop"},
            {"proportional_attention": False},
            {"apply": "drop", "proportional_attention": False},
        )
    ]
    assert len(set(marks)) == len(marks)
    assert both_at_once.request({}).fingerprint() == marks[0]
    assert marks[-1] == ask(plain).fingerprint()  # as of servers that know nothing of it
    assert ask(both_at_once, off=True).fingerprint() == "off"
    for settings, asked, says in (
        (plain, {"apply": "mask"}, "this server drops them.*--apply mask"),
        (plain, {"proportional_attention": True}, "counts none.*--proportional-attention"),
        (both_at_once, {"apply": "masks"}, "Did you mean 'mask'"),
        (both_at_once, {"proportional_attention": 1}, "is not true or false"),
    ):
        with pytest.raises(RequestError, match=says):
            ask(settings, **asked)
    with pytest.raises(ConfigError, match="Use positions='original'"):
        ServerSettings.build(replace(pruning, positions="compact"), application="mask")
    with pytest.raises(ConfigError, match="apply='hide' is not a way"):
        ServerSettings.build(pruning, application=cast(Any, "hide"))
    with pytest.raises(ConfigError, match="no method and keep were given"):
        tokenprune_vllm.engine_args(tmp_path, masks="pooled", apply="mask")


def test_blocks_are_named_in_the_place_of_a_file() -> None:
    assert source_of("pooled") == Pooled.of(PooledBlocks())
    assert source_of("pooled:0.5") == Pooled.of(PooledBlocks(keep=0.5))
    given = PooledBlocks(keep=None, mass=0.9, block=64, together=False)
    assert source_of("pooled:keep=null,mass=0.9,block=64,together=false") == Pooled.of(given)
    made = source_of(given)
    assert made is not None
    assert made.load() == given
    settings = ServerSettings.build(UNPRUNED, masks=made)
    assert ServerSettings.from_config(SimpleNamespace(tokenprune=settings.to_dict())) == settings
    other = ServerSettings.build(UNPRUNED, masks=source_of("pooled:0.5"))
    assert settings.request({}).fingerprint() != other.request({}).fingerprint()
    for name, error, says in (
        ("pooled:kepe=0.5", ConfigError, "Did you mean 'keep'"),
        ("pooled:many", ConfigError, "'many' is no value of keep"),
        ("pooled:", ConfigError, "'pooled:' has nothing behind its colon"),
        ("pooled:0.25,", ConfigError, "nothing behind its colon, or a comma"),
        ("pooled:0.25,keep=0.5", ConfigError, "says keep twice"),
        ("pooled:2", OptionError, "keep=2 is no share"),
        (3, ConfigError, "masks is a int"),
    ):
        with pytest.raises(error, match=says):
            source_of(name)


def test_masks_travel_inside_a_checkpoint(tmp_path: Path) -> None:
    pair = both("llava", tmp_path / "model")
    file = pair.folder / "heads.json"
    alone = export(pair.folder, tmp_path / "alone", UNPRUNED, masks=file)
    pruned = export(
        pair.folder,
        tmp_path / "pruned",
        PruningConfig("divprune", 4),
        masks="pooled:0.5",
        apply="mask",
        proportional_attention=True,
    )
    file.unlink()
    written = {
        folder: SimpleNamespace(**json.loads((folder / "config.json").read_text()))
        for folder in (alone, pruned)
    }
    settings = {folder: ServerSettings.from_config(one) for folder, one in written.items()}
    assert settings[alone].default == UNPRUNED
    masks = settings[alone].masks
    assert masks is not None
    assert masks.load() == pair.heads
    assert settings[pruned].masks == Pooled.of(PooledBlocks(keep=0.5))
    assert settings[pruned].application == "mask"
    assert settings[pruned].proportional
    # `tokenprune serve` takes them over, and what is said beside them.
    assert served(alone) == settings[alone]
    assert served(pruned) == settings[pruned]
    assert served(pruned, "--apply", "drop").application == "drop"
    assert served(alone, "--masks", "pooled").masks == Pooled.of(PooledBlocks())


def served(folder: Path, *more: str) -> ServerSettings:
    """Return the settings of a server that is started on a folder."""
    parser = Parser()
    serve.configure(parser)
    arguments, rest = parser.parse_known_args([str(folder), *more])
    arguments.more = rest
    command = serve.server_command(arguments)
    overrides = json.loads(command[command.index("--hf-overrides") + 1])
    return ServerSettings.from_config(SimpleNamespace(**overrides))


def test_servers_are_started_with_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = both("llava", tmp_path / "model")
    file = str(pair.folder / "heads.json")

    def settings(*more: str) -> Any:
        return served(pair.folder, "--masks", file, *more)

    alone = settings()
    assert alone.default == UNPRUNED
    assert alone.masks == HeadsFile.of(file)
    both_at_once = settings("--method", "divprune", "--keep", "4")
    assert both_at_once.default.keep == 4
    assert both_at_once.masks == alone.masks
    with pytest.raises(ConfigError, match="--keep is missing"):
        settings("--method", "divprune")
    for more in (("--scope", "image"), ("--apply", "mask"), ("--proportional-attention",)):
        with pytest.raises(ConfigError, match="--method and --keep, which"):
            settings(*more)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"cache_config": {"cache_dtype": "fp8"}}, "--kv-cache-dtype fp8"),
    ({"cache_config": {"kv_offloading_size": 1.0}}, "--kv-offloading-size"),
    ({"cache_config": {"kv_sharing_fast_prefill": True}}, "--kv-sharing-fast-prefill"),
    ({"kv_transfer_config": object()}, "--kv-transfer-config"),
    ({"speculative_config": object()}, "--speculative-config"),
    ({"parallel_config": {"pipeline_parallel_size": 2}}, "--pipeline-parallel-size"),
    ({"parallel_config": {"decode_context_parallel_size": 2}}, "--decode-context-parallel-size"),
    ({"parallel_config": {"use_ubatching": True}}, "--enable-dbo"),
    ({"use_v2_model_runner": True}, "second model runner"),
]


@pytest.mark.parametrize(("changes", "says"), REFUSED)
def test_engines_in_which_masks_would_be_wrong_are_refused(
    changes: dict[str, Any], says: str
) -> None:
    parallel = {
        "pipeline_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "use_ubatching": False,
        **changes.get("parallel_config", {}),
    }
    cache = {"cache_dtype": "auto", "kv_offloading_size": None, **changes.get("cache_config", {})}
    usual = {"kv_transfer_config": None, "speculative_config": None, "use_v2_model_runner": False}
    config = SimpleNamespace(
        **{
            **usual,
            **changes,
            "parallel_config": SimpleNamespace(**parallel),
            "cache_config": SimpleNamespace(**cache),
        }
    )
    text = SimpleNamespace()
    family: Any = SimpleNamespace(
        known=True,
        images_see_each_other=False,
        config=SimpleNamespace(get_text_config=lambda: text),
    )
    with pytest.raises(UnsupportedModelError, match=says):
        check_masks(config, family)
    hidden: Any = SimpleNamespace(masks=None, application="mask", proportional=True)
    with pytest.raises(UnsupportedModelError, match=r"without --apply mask and --proportional-a"):
        check_masks(config, family, hidden)
    text.layer_types = ["full_attention", "chunked_attention"]
    family.known = False
    with pytest.raises(UnsupportedModelError, match=r"no known family.*one chunk of the prompt"):
        check_masks(config, family)
    family.images_see_each_other = True  # as Molmo 2's
    with pytest.raises(UnsupportedModelError, match="images see each other in both directions"):
        check_masks(config, family)


# The cache ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "block", "width"),
    [
        (torch.float32, 32, 64),
        (torch.float32, 16, 32),
        (torch.bfloat16, 32, 64),
        (torch.bfloat16, 64, 80),
        (torch.float16, 32, 32),
    ],
    ids=str,
)
def test_keys_and_values_are_read_where_vllm_wrote_them(
    dtype: torch.dtype, block: int, width: int
) -> None:
    torch.manual_seed(0)
    isa = cpu_attn._get_attn_isa(dtype, block, width, "auto")
    cache = torch.zeros(6, 2, block, 2 * width, dtype=dtype)
    key, value = torch.randn(2, 3 * block, 2, width).to(dtype)
    table = torch.tensor([4, 1, 5, 0], dtype=torch.int32)
    slots = (table[:3, None] * block + torch.arange(block)).flatten().long()
    halves = cache.view(6, 2, 2 * block, width).chunk(2, dim=2)
    custom_ops.cpu_attn_reshape_and_cache(
        key, value, *halves, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
    )
    length = 2 * block + 3
    found = keys_and_values(cache, table, length, isa)
    for states, written in zip(found, (key, value), strict=True):
        assert torch.equal(states, written[:length].transpose(0, 1))


def test_an_order_that_is_no_loops_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Axis.of([0, 2, 4, 6, 32, 34, 36, 38]) == Axis((2, 4), (32, 2))
    with pytest.raises(ValueError, match="no loops"):
        Axis.of([0, 1, 2, 5])
    with pytest.raises(ValueError, match="not all lie alike"):
        Order.of(torch.tensor([[0, 1], [3, 2]]))
    monkeypatch.setattr(paged, "_write", lambda *arguments: None)
    with pytest.raises(UnsupportedModelError, match="in a way that tokenprune cannot read"):
        paged.orders("none", 32, 32, torch.float32)


def test_tags_say_where_images_are() -> None:
    is_row = torch.tensor([False, True, True, True, False, True])
    reach = around(is_row)
    assert reach.tolist() == [[0, 0, 1, 2, 0, 0], [0, 3, 2, 1, 0, 1]]
    tags = Tags(5, 4)
    written = edges(reach, torch.arange(10, 16))
    assert written.tolist() == [[0, 0], [11, 14], [11, 14], [11, 14], [0, 0], [15, 16]]
    slots = torch.tensor([12, 13, 14, 15, 4, 5])  # block 3, then block 1
    tags.write(slots, written)
    table = torch.tensor([3, 1, 0], dtype=torch.int32)
    assert tags.images(table, 3) == [ImageSpan(11, 14)]
    assert tags.images(table, 6) == [ImageSpan(11, 14), ImageSpan(15, 16)]
    tags.write(torch.tensor([13, -1]), torch.tensor([[0, 0], [7, 8]]))
    assert tags.images(table, 2) == []
    assert tags.fits(5, 4)
    assert not tags.fits(4, 5)


def test_codes_say_how_often_tokens_count() -> None:
    counts = torch.tensor([1, 0, 1, 2, 300, 0])
    codes = to_codes(counts)
    assert codes.tolist() == [0, 1, 0, 2, 300, 1]
    assert torch.equal(from_codes(codes), counts)
    kept = Codes(5, 4)
    kept.write(torch.tensor([12, 13, 14, 15, 4, -1]), codes)
    table = torch.tensor([3, 1, 0], dtype=torch.int32)
    assert kept.of(table, 6).tolist() == [0, 1, 0, 2, 300, 0]
    kept.write(torch.tensor([13]), torch.tensor([0]))  # another prompt's token now
    assert kept.of(table, 4).tolist() == [0, 0, 0, 2]


def test_layouts_of_a_part_know_sinks_that_count_from_an_images_end() -> None:
    images = [ImageSpan(2, 6), ImageSpan(7, 15)]
    layout = layout_of(images, 13, (0, -1, -4))
    assert layout == PromptLayout(13, (ImageSpan(2, 6), ImageSpan(7, 13)), (2, 5, 7, 11))
    assert layout_of(images, 7, (0, -1)).images == (ImageSpan(2, 6),)
