"""Every family on vLLM's real engine against the transformers adapter, in float32.

vLLM runs some layers on a CPU in bfloat16 alone. There the engines round differently, and what they
keep and say may differ where two tokens are nearly alike; `Reference.rates` looks at that.

The engine's budget of tokens for each step is smaller than an image, so every image and video is
cut into chunks; its KV cache is so small that requests are preempted; its caches are on, and each
request is asked again when they know it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import vllm
from packaging.version import Version

import tokenprune
import tokenprune_hf
from tests.hf.models import APART
from tests.vllm import checkpoints
from tests.vllm.checkpoints import (
    CALLED_WITH,
    DTYPES,
    FAMILIES,
    TRUSTED,
    VIDEOS,
    VIDEOS_ALONE,
    WORDS,
)
from tests.vllm.engines import answer, engine, greedy, kept
from tokenprune.selection import Selection
from tokenprune_vllm.architectures import PREFIX

tf: Any = transformers  # its auto classes are not typed

# So does transformers' processor of GLM-4V read the tensors that vLLM asks it for.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

METHODS = (
    "cls-attention",
    "zeroth-order",
    "divprune",
    "feature-norm",
    "uniform",
    "random",
    "information",
    "flexselect",
    "relevant-information",
)
KIMI = ("kimi_k25", "kimi_vl")
"""Those whose layers attend to latent states."""
UNREAD = (
    *("gemma3", "gemma3n", "gemma4", "lfm2_vl", "cohere2_vision", "llama4", "molmo2"),
    *("minicpmv4_7", *KIMI),
)
"""Those whose language model no method reads."""
UNWATCHED = ("gemma3n", "gemma4")
"""Those whose towers vLLM takes from transformers: their attention, if any, is not seen."""
# vLLM's kernels for CPUs let no image see what comes behind, in no model, pruned or not: so the
# model of transformers is not told here where images are (`test_images_that_see_both_ways` is).
BOTH_WAYS = tuple(name for name in ("gemma3", "gemma4", "molmo2") if name in FAMILIES)
OTHERS_BOTH_WAYS = ("gemma4_unified", "paligemma")
KEEP = 5
_OPTIONS: dict[str, dict[str, Any]] = {
    # Items are small here: without these, every token would be read.
    "relevant-information": {"candidates": 0.5, "min_candidates": 1}
}
"""Of the methods that are not asked for with their defaults."""
EXACT = [family for family in FAMILIES if DTYPES[family] == "float32"]
ROUNDED = [family for family in FAMILIES if family not in EXACT]


def options_of(family: str, method: str) -> dict[str, Any]:
    """Return a method's options; of rounded rows other candidates are chosen, so all are read."""
    return {} if family in ROUNDED else _OPTIONS.get(method, {})


NEAR = 0.15  # of the logits' standard deviation: what rounding to bfloat16 makes of equal ones
NEARLY = {"minicpmv4_7": 0.25}  # at one of its cases transformers is 0.13 from itself in float32
LONGEST = {
    "llava": 96,
    "llava_onevision": 512,
    "qwen2_5_vl": 128,
    "gemma3": 512,
    "gemma3n": 512,
    "gemma4": 1024,
    "idefics3": 512,
    "cohere2_vision": 512,
    "lfm2_vl": 512,
    "mistral3": 512,
    "llama4": 512,
    "pixtral": 1024,
    "molmo2": 512,
}  # tokens with the answer
# vLLM's layers for latent states read a prompt in one step on a CPU. They are asked for by name:
# others, which some CPUs have, calculate in bfloat16.
LATENT: dict[str, Any] = {
    "max_num_batched_tokens": 256,
    "max_model_len": 256,
    "block_size": 16,
    "num_gpu_blocks_override": 34,
    "attention_config": {"backend": "CPU_MLA"},
}
PREEMPTED = ("llava", "qwen2_5_vl")  # whose cache these prompts overfill, one of each kind of RoPE
STEP = 20  # tokens a step: less than any unpruned image, and than many a pruned one


@dataclass(frozen=True)
class Case:
    """One request, and the pruning that it asks for.

    Attributes
    ----------
    kinds
        See `checkpoints.prompt`.
    pictures
        Numbers of its images, then of its videos.
    asked
        What stands under ``tokenprune`` in mm_processor_kwargs.
    called_with
        What stands beside it, for the engine's own processor.
    """

    kinds: str
    pictures: tuple[int, ...] = (0,)
    asked: dict[str, Any] = field(default_factory=dict)
    called_with: dict[str, Any] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether no token is dropped."""
        keep = self.asked.get("keep", KEEP)
        return bool(self.asked.get("off")) or (isinstance(keep, float) and keep == 1.0)

    def media(self) -> tuple[list[Any], list[Any]]:
        """Return images and videos."""
        sizes = [(48, 32), (30, 70), (64, 40), (100, 24), (40, 40)]
        images = self.kinds.count("i")
        return (
            [checkpoints.image(n, sizes[n % 5]) for n in self.pictures[:images]],
            [checkpoints.video(n, 4 + 2 * (n % 2)) for n in self.pictures[images:]],
        )


def cases(family: str) -> list[Case]:
    """Return requests whose media are all different, so that no cache knows them."""
    found = [
        Case("it", (0,)),
        Case("tit", (1,), {"method": "zeroth-order"}),
        Case("titi", (2, 3), {"method": "divprune", "keep": 0.3}),
        Case("it", (4,), {"method": "feature-norm", "keep": 1}),
        Case("tit", (5,), {"method": "uniform"}),
        Case("tit", (6,), {"method": "random", "keep": 11}),
        Case("tit", (10,), {"method": "flexselect"}),
        Case("titit", (11, 12), {"method": "flexselect", "keep": 7}),
        Case("tit", (14,), {"method": "information"}),
        Case("titit", (15, 16), {"method": "relevant-information", "keep": 7}),
        Case("tit", (7,), {"off": True}),
        Case("tit", (8,), {"keep": 1.0}),
        Case("ttt", ()),
    ]
    if family in VIDEOS:
        found += [
            Case("vt", (0,)),
            Case("tivt", (9, 1), {"method": "divprune", "keep": 0.4}),
            Case("tvtv", (2, 6), {"method": "zeroth-order", "keep": 9}),
            Case("vt", (4,), {"off": True}),
            Case("tvt", (8,), {"method": "flexselect"}),
            Case("vt", (14,), {"method": "information", "keep": 0.4}),
            Case("tvt", (16,), {"method": "relevant-information"}),
            Case("tivtvt", (13, 10, 12), {"method": "flexselect", "keep": 9}),
        ]
    if family == "gemma4":  # which asks how many tokens an image may have
        found += [
            Case("tit", (20,), {"method": "divprune", "keep": 0.3}, {"max_soft_tokens": 140}),
            Case("titi", (21, 22), {"method": "uniform", "keep": 0.1}, {"max_soft_tokens": 280}),
        ]
    if family in APART:  # where transformers takes no call of both kinds, and vLLM one video
        found = [case for case in found if "i" not in case.kinds or "v" not in case.kinds]
        found = [case for case in found if case.kinds.count("v") < 2]
    if family in VIDEOS_ALONE:
        found = [case for case in found if "i" not in case.kinds and case.kinds.count("v") < 2]
    if family == "kimi_k25":  # in transformers, all chunks of a call have as many frames
        found = [
            case
            for case in found
            if not any(number % 2 for number in case.pictures[case.kinds.count("i") :])
        ]
        found.append(Case("tivt", (9, 10), {"method": "divprune", "keep": 0.4}))
    return [case for case in found if case.asked.get("method") in (None, *methods_of(family))]


def methods_of(family: str) -> list[str]:
    """Return the methods that the engine is started with, the default first."""
    methods = tokenprune.methods()
    refused = {"query_attention"} if family in UNREAD else set()
    refused |= {"cls_attention"} if family in UNWATCHED else set()
    return [name for name in METHODS if not refused & set(methods[name].needs)]


def again(family: str) -> list[Case]:
    """Return the first image, and the first video, under many settings."""
    settings: list[dict[str, Any]] = [
        {},
        {"keep": 9},
        {"method": "feature-norm"},
        {"off": True},
        {"method": "feature-norm", "keep": 9},
        {"keep": 0.5},
    ]
    found = [] if family in VIDEOS_ALONE else [Case("it", (0,), asked) for asked in settings]
    if family in VIDEOS:
        found += [Case("vt", (0,), asked) for asked in settings]
    return found


@dataclass
class Reference:
    """The transformers side of one family."""

    family: str
    model: Any
    processor: Any
    positions: Any = "original"
    options: dict[str, Any] = field(default_factory=dict)
    seen: list[torch.Tensor] = field(default_factory=list)
    both_ways: bool = False

    def inputs(self, case: Case) -> Any:
        """Return what the model is called with."""
        images, videos = case.media()
        inputs = checkpoints.hf_inputs(
            self.family, self.processor, case.kinds, images, videos, called_with=case.called_with
        )
        if self.family in (*BOTH_WAYS, *OTHERS_BOTH_WAYS) and not self.both_ways:
            types = inputs.pop("token_type_ids", None)
            inputs.pop("mm_token_type_ids", None)
            if self.family == "paligemma":  # which sees all both ways without
                inputs["token_type_ids"] = torch.ones_like(types)
        return inputs.to(self.model.dtype)

    def _asked(self, case: Case) -> dict[str, Any]:
        """Return the pruning that a case asks for."""
        asked = {"method": methods_of(self.family)[0], "keep": KEEP, **case.asked}
        return {**asked, **options_of(self.family, asked["method"])}

    def first(self, case: Case) -> tuple[int, torch.Tensor]:
        """Return the likeliest first token, and its log-probability among all tokens."""
        asked = self._asked(case)
        if asked.pop("off", False):
            asked["keep"] = 1.0
        with torch.no_grad(), tokenprune_hf.prune(self.model, **asked):
            scores = self.model(**self.inputs(case)).logits[0, -1].log_softmax(dim=-1)
        token = max(WORDS, key=lambda word: float(scores[word]))
        return token, scores[token]

    def ask(self, case: Case) -> tuple[list[int], list[list[int]]]:
        """Return generated tokens, and kept indices of each item."""
        inputs = self.inputs(case)
        length = inputs["input_ids"].shape[1]
        options = {"max_new_tokens": 8, "do_sample": False}
        asked = self._asked(case)
        if asked.pop("off", False) or not case.pictures:
            inputs.pop("video_frames", None)  # the plain model does not know it
            return self.model.generate(**inputs, **options)[0, length:].tolist(), []
        asked |= self.options
        with tokenprune_hf.prune(self.model, **asked, positions=self.positions) as pruning:
            output = self.model.generate(**inputs, **options)
        return output[0, length:].tolist(), [one.kept.tolist() for one in pruning.selections]

    def rates(
        self, case: Case, answered: list[int], chosen: list[list[int]]
    ) -> tuple[list[Selection], float]:
        """Say what is kept here, and how far an answer is from the likeliest one.

        Parameters
        ----------
        case
            What was asked.
        answered
            The tokens of an answer.
        chosen
            Kept indices of each item with which it was given; none where no token was dropped.

        Returns
        -------
        selections
            Of each item.
        distance
            From the likeliest token's logit to that of the token answered, each being given all
            before, in standard deviations of the logits; the largest one.
        """
        images, videos = case.media()
        inputs = checkpoints.hf_inputs(self.family, self.processor, case.kinds, images, videos)
        inputs = inputs.to(self.model.dtype)
        more = torch.tensor([answered[:-1]])
        longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"], more], dim=1)}
        longer["attention_mask"] = torch.ones_like(longer["input_ids"])
        if "mm_token_type_ids" in inputs:
            kinds = [inputs["mm_token_type_ids"], torch.zeros_like(more)]
            longer["mm_token_type_ids"] = torch.cat(kinds, dim=1)
        asked = self._asked(case)
        own: list[Selection] = []
        with torch.no_grad():
            if asked.pop("off", False) or not (images or videos):
                logits = self.model(**longer).logits
            else:
                with tokenprune_hf.prune(self.model, **asked) as pruning:
                    self.model(**inputs)
                    own = list(pruning.selections)
                    known = own
                    if chosen:
                        known = [
                            replace(selection, kept=torch.tensor(indices))
                            for selection, indices in zip(own, chosen, strict=True)
                        ]
                    logits = self.model(**longer, known=known).logits
        rated = logits[0, -len(answered) :, WORDS].float()
        said = rated.gather(1, torch.tensor([[WORDS.index(token)] for token in answered]))
        away = (rated.amax(dim=1) - said[:, 0]) / rated.std(dim=1)
        return own, float(away.max())

    def watch_positions(self) -> None:
        """Note the positions with which the language model is called."""

        def note(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            positions = kwargs["position_ids"]
            self.seen.append(positions[-3:, 0] if positions.ndim == 3 else positions)

        language_model = self.model.model.language_model
        language_model.register_forward_pre_hook(note, with_kwargs=True)


def reference(family: str, folder: Path, **options: Any) -> Reference:
    """Load a checkpoint in transformers, or one with its weights that has a class there."""
    known = {"internvl_chat": "internvl", "kimi_vl": "kimi_k25"}.get(family)
    if known is not None:
        folder = checkpoints.save(known, folder.with_name("in-transformers"))
    model = tf.AutoModelForImageTextToText.from_pretrained(folder, **options).eval()
    if family == "kimi_k25" and Version(transformers.__version__) < Version("5.24"):
        model.model.get_video_features = _chunks_of(model.model)
    return Reference(family, model, checkpoints.hf_processor(family, folder))


def _chunks_of(model: Any) -> Callable[..., Any]:
    """Return `get_video_features` of Kimi-K2.5, which counts tokens by frames before 5.24."""

    def get_video_features(
        pixel_values_videos: torch.Tensor, video_grid_thw: torch.Tensor, **more: Any
    ) -> Any:
        output = model.vision_tower(pixel_values_videos, grid_thw=video_grid_thw, **more)
        rows = model.mm_projector(output.pooler_output).squeeze(1)
        output.pooler_output = rows.split((video_grid_thw[:, 1:].prod(dim=1) // 4).tolist())
        return output

    return get_video_features


def start(family: str, folder: Path, method: str | None = None, **options: Any) -> Any:
    """Start the engine on a family's checkpoint, with the first method that it takes."""
    method = method or methods_of(family)[0]
    limits = {} if family in VIDEOS_ALONE else {"image": 2}
    if family == "gemma3n":
        limits["audio"] = 0
    if family == "kimi_k25":
        limits = {"vision_chunk": 4}
    elif family in VIDEOS:
        limits["video"] = 1 if family in (*APART, *VIDEOS_ALONE) else 2
    settings = {
        "keep": KEEP,
        "request_methods": methods_of(family)[1:],
        # vLLM takes an image without tiles for LFM2-VL's largest, and refuses larger ones.
        "max_num_batched_tokens": 96 if family == "lfm2_vl" else STEP,
        "max_num_seqs": 8,
        # A cache that one or two prompts fill: requests push each other out and come back.
        "max_model_len": LONGEST.get(family, 256),
        "block_size": 32,
        # Sliding layers have blocks of their own.
        "num_gpu_blocks_override": LONGEST.get(family, 256) // 32 * (1 + (family in UNREAD)) + 2,
        "disable_log_stats": False,
        "limit_mm_per_prompt": limits,
        "trust_remote_code": family in TRUSTED,
        "dtype": DTYPES[family],
        "mm_processor_kwargs": CALLED_WITH.get(family),
        **(LATENT if family in KIMI else {}),
        **options,
    }
    if not isinstance(settings["request_methods"], dict):
        settings["request_methods"] = {
            name: options_of(family, name) for name in settings["request_methods"]
        }
    return engine(folder, method, **settings)


def request(family: str, case: Case) -> dict[str, Any]:
    """Return a case as vLLM takes it."""
    images, videos = case.media()
    made = checkpoints.vllm_request(family, case.kinds, images, videos)
    if case.asked:
        made["mm_processor_kwargs"] = {"tokenprune": case.asked, **case.called_with}
    return made


@dataclass
class Pair:
    """One family in both engines."""

    family: str
    llm: Any
    hf: Reference

    def request(self, case: Case) -> dict[str, Any]:
        """Return a case as vLLM takes it."""
        return request(self.family, case)


@pytest.fixture(scope="module", params=EXACT)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    family = request.param
    folder = checkpoints.save(family, tmp_path_factory.mktemp(family) / "model")
    with start(family, folder) as llm:
        if family in (*KIMI, "lfm2_vl"):
            llm.collective_rpc("put_heads_together")
        yield Pair(family, llm, reference(family, folder))


def test_the_same_tokens_are_kept_and_generated(
    pair: Pair, record_property: Callable[[str, object], None]
) -> None:
    config = pair.llm.llm_engine.vllm_config.model_config.hf_config
    record_property("vllm", config.architectures[0].removeprefix(PREFIX))
    record_property("release", vllm.__version__)
    kept(pair.llm)
    for case in cases(pair.family):
        tokens, indices = pair.hf.ask(case)
        (answered,) = answer(pair.llm, [pair.request(case)], greedy(words=WORDS))
        chosen = [segment for item in kept(pair.llm) for segment in item]
        if case.whole:
            assert chosen == [], case
        else:
            assert chosen == indices, case
        assert answered == tokens, case
    if pair.family in APART:  # what vLLM takes in one prompt, transformers is asked in two
        asked = {"method": "divprune", "keep": 0.4}
        expected = [
            indices
            for case in (Case("tit", (20,), asked), Case("tvt", (21,), asked))
            for indices in pair.hf.ask(case)[1]
        ]
        answer(pair.llm, [pair.request(Case("tivt", (20, 21), asked))], greedy(words=WORDS))
        assert [segment for item in kept(pair.llm) for segment in item] == expected


def test_caches_never_mix_budgets_or_methods(pair: Pair) -> None:
    asked = again(pair.family)
    expected = [pair.hf.ask(case)[0] for case in asked]
    order = list(range(len(asked))) * 3
    random.Random(0).shuffle(order)
    for index in order:
        (answered,) = answer(pair.llm, [pair.request(asked[index])], greedy(words=WORDS))
        assert answered == expected[index], asked[index]


def test_a_mixed_batch_equals_its_single_requests(pair: Pair) -> None:
    every = [*cases(pair.family), *again(pair.family)]
    expected = [pair.hf.ask(case)[0] for case in every]
    order = list(range(len(every)))
    for together in (False, True):
        pair.llm.reset_prefix_cache()
        pair.llm.llm_engine.reset_encoder_cache()
        if together:
            pair.llm.collective_rpc("encode_together")
        random.Random(together).shuffle(order)
        requests = [pair.request(every[index]) for index in order]
        answered = answer(pair.llm, requests, greedy(words=WORDS))
        for index, tokens in zip(order, answered, strict=True):
            assert tokens == expected[index], every[index]
    counted = {metric.name: metric for metric in pair.llm.get_metrics()}
    if pair.family in PREEMPTED:
        assert counted["vllm:num_preemptions"].value > 0, "the cache was meant to be too small"
    held = pair.llm.collective_rpc("memory")[0]
    assert held["requests"] <= 8, "requests that ended are still held"


@pytest.mark.parametrize("family", ROUNDED)
def test_what_is_rounded_is_kept_and_generated_nearly_alike(family: str, tmp_path: Path) -> None:
    folder = checkpoints.save(family, tmp_path / "model")
    hf = reference(family, folder)
    asked = cases(family)
    asked += [case for case in again(family) if case not in asked]
    near = NEARLY.get(family, NEAR)
    chosen: dict[int, list[list[int]]] = {}
    with start(family, folder) as llm:
        kept(llm)
        for index, case in enumerate(asked):
            (answered,) = answer(llm, [request(family, case)], greedy(words=WORDS))
            chosen[index] = [segment for item in kept(llm) for segment in item]
            own, away = hf.rates(case, answered, chosen[index])
            assert away < near, case
            if case.whole:
                assert chosen[index] == [], case
                continue
            for indices, selection in zip(chosen[index], own, strict=True):
                others = set(indices) - set(selection.kept.tolist())
                exact = case.asked.get("method") in ("uniform", "random")
                assert len(others) <= (0 if exact else max(1, 0.25 * len(indices))), case
                assert len(indices) == len(selection), case
        # In one batch, when every cache knows every image.
        order = list(range(len(asked)))
        random.Random(0).shuffle(order)
        requests = [request(family, asked[index]) for index in order]
        answers = answer(llm, requests, greedy(words=WORDS))
    for index, answered in zip(order, answers, strict=True):
        assert hf.rates(asked[index], answered, chosen[index])[1] < near, asked[index]
    # Had other tokens been kept it would show: with them these answers are far off.
    far = []
    for index, answered in zip(order, answers, strict=True):
        if chosen[index]:
            totals = [one.total for one in hf.rates(asked[index], answered, [])[0]]
            moved = [
                sorted((token + 3) % total for token in of_item)
                for of_item, total in zip(chosen[index], totals, strict=True)
            ]
            far.append(hf.rates(asked[index], answered, moved)[1])
    assert sum(away > near for away in far) > len(far) / 3, far


@pytest.mark.parametrize("family", BOTH_WAYS)
def test_images_that_see_both_ways(family: str, tmp_path: Path) -> None:
    """vLLM tells its kernels where images are in the pruned prompt, each run of kept tokens one."""
    folder = checkpoints.save(family, tmp_path / "model")
    hf = reference(family, folder)
    # One token that is kept alone sees itself either way.
    asked = [case for case in cases(family) if case.pictures and case.asked.get("keep") != 1]
    if family == "molmo2":  # in transformers pictures see each other too, in vLLM they do not
        asked = [case for case in asked if case.kinds.count("i") == 1 and "v" not in case.kinds]
    one_way = [hf.first(case) for case in asked]
    (folder / "generation_config.json").unlink()  # vLLM's Gemma 4 suppresses logits by it
    hf.both_ways = True
    both_ways = [hf.first(case) for case in asked]
    assert all((a[1] - b[1]).abs() > 3e-5 for a, b in zip(one_way, both_ways, strict=True))
    with start(
        family,
        folder,
        max_num_batched_tokens=4096,
        enable_prefix_caching=False,
        disable_chunked_mm_input=True,
    ) as llm:
        llm.collective_rpc("see_both_ways")
        for case, (token, expected) in zip(asked, both_ways, strict=True):
            made = [request(family, case)]
            (output,) = llm.generate(made, greedy(1, [token], logprobs=0), use_tqdm=False)
            found = output.outputs[0].logprobs[0][token].logprob
            assert found == pytest.approx(float(expected), abs=1e-5), case


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_compact_positions(family: str, tmp_path: Path) -> None:
    folder = checkpoints.save(family, tmp_path / "model")
    hf = reference(family, folder)
    hf.positions = "compact"
    with start(family, folder, positions="compact") as llm:
        for case in cases(family):
            if case.whole:
                continue  # nothing is renumbered in a whole prompt in transformers
            tokens, _ = hf.ask(case)
            (answered,) = answer(llm, [request(family, case)], greedy(words=WORDS))
            assert answered == tokens, case


ROPES: dict[str, dict[str, Any]] = {
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {"factor": 16.0, "original_max_position_embeddings": 128},
}


@pytest.mark.parametrize("rope", ["llama3", "yarn"])
def test_scaled_rotary_embeddings_and_rows_of_the_callers_own(rope: str, tmp_path: Path) -> None:
    scaled = {"rope_type": rope, "rope_theta": 10000.0, **ROPES[rope]}
    folder = checkpoints.save("llava", tmp_path / "model", text_config={"rope_parameters": scaled})
    hf = reference("llava", folder)
    with start("llava", folder, enable_mm_embeds=True) as llm:
        for case in cases("llava"):
            tokens, _ = hf.ask(case)
            (answered,) = answer(llm, [request("llava", case)], greedy(words=WORDS))
            assert answered == tokens, case
        # Rows that the caller brings are read whole, whatever the server's budget.
        case = Case("tit", (40,), {"off": True})
        tokens, _ = hf.ask(case)
        images, _ = case.media()
        inputs = checkpoints.hf_inputs("llava", hf.processor, "tit", images)
        with torch.no_grad():
            rows = hf.model.model.get_image_features(
                inputs["pixel_values"], return_dict=True
            ).pooler_output
        own = {**request("llava", Case("tit", (40,))), "multi_modal_data": {"image": rows[0][None]}}
        (answered,) = answer(llm, [own], greedy(words=WORDS))
        assert answered == tokens


@pytest.mark.parametrize("most", [70, 140, 280])
def test_grids_and_budgets_follow_the_tokens_that_a_call_asks_for(
    most: int, tmp_path: Path
) -> None:
    """Gemma 4's processor fills so many tokens as the shape of an image lets it."""
    hf = reference("gemma4", checkpoints.save("gemma4", tmp_path / "model"))
    inputs = hf.inputs(Case("tit", (1,), called_with={"max_soft_tokens": most}))
    with torch.no_grad(), tokenprune_hf.prune(hf.model, "uniform", 0.2) as pruning:
        hf.model(**inputs)
    (selection,) = pruning.selections
    image = checkpoints.image(1, (30, 70))
    # The largest sides, in tokens of 8 x 8 pixels, whose product is no more.
    scale = (most / (image.width * image.height)) ** 0.5
    rows, columns = int(image.height * scale), int(image.width * scale)
    assert selection.grid == (1, rows, columns)
    assert len(selection.kept) == round(0.2 * rows * columns)
    assert int((inputs["input_ids"] == hf.model.config.image_token_id).sum()) == rows * columns
