"""Masks on vLLM's backends for GPUs, as far as they run without one.

Batches are described by the backends' own classes, made by hand on the CPU, and go through the code
that a server runs: what is known of images in the cache, metadata of the other requests, and the
kernel, which Triton's interpreter runs. vLLM's own attention is pair by pair here. What it says is
compared with each prompt alone. Nothing here has run on a GPU.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.core.test_kernels import Run, _process
from tests.core.test_paged import Case, Prompt, multiply_bfloat16
from tokenprune.errors import UnsupportedModelError
from tokenprune.masks.heads import layout_with_sinks
from tokenprune.masks.layout import ImageSpan
from tokenprune.masks.patterns import Category

MIXED: tuple[Category, ...] = ("intra", "intra+sink", "sink", "dense")
SINKS = (0, -2)
PAGE, WIDTH, KEY_HEADS, PAGES = 16, 32, 2, 24
BACKENDS = ("FLASH_ATTN", "TRITON_ATTN")


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Run a function in the process of the interpreter."""
    yield from _process("1")


@dataclass
class Read:
    """What is read of a prompt in one batch: its tokens from `first` up to `stop`."""

    name: str
    first: int
    stop: int
    masked: bool = True
    weighed: bool = True


@dataclass
class Served:
    """Prompts by name: their images and length, and the pages of their cache."""

    prompts: dict[str, tuple[int, list[tuple[int, int]], list[int]]] = field(
        default_factory=lambda: {
            "images": (90, [(2, 40), (41, 80)], [7, 3, 11, 5, 20, 1]),
            "text": (21, [], [9, 2]),
            # The first two pages are those of "images", as after a hit in the prefix cache.
            "alike": (60, [(2, 40), (41, 50)], [7, 3, 14, 6]),
            # One that is not masked.
            "plain": (60, [(2, 40), (41, 50)], [15, 16, 17, 18]),
            # Pages that "text" has left.
            "new": (30, [(5, 25)], [2, 9]),
        }
    )
    window: int | None = None
    dtype: torch.dtype = torch.float32
    # How often a prompt's tokens count, 0 for those that are hidden; None for once each.
    hides: bool = False
    counts: bool = False

    def counted(self, name: str) -> Tensor:
        """Return how often each token of a prompt counts; equal beginnings count alike."""
        length, spans, _ = self.prompts[name]
        result = torch.ones(length, dtype=torch.int64)
        for start, stop in spans:
            places = torch.arange(start, stop)
            if self.counts:
                result[start:stop] = 1 + places % 4
            if self.hides:
                result[start:stop] *= places % 3 > 0
        return result

    def case(self, one: Read) -> Case:
        """Return what is computed of a prompt, on its own."""
        length, spans, _ = self.prompts[one.name]
        cut = [(start, min(stop, one.stop)) for start, stop in spans if start < one.stop]
        images = tuple(ImageSpan(*span) for span in spans)
        sinks = layout_with_sinks(length, images, SINKS).sinks
        prompt = Prompt(one.stop, cut, one.first, [sink for sink in sinks if sink < one.stop])
        if one.weighed:
            counts = self.counted(one.name)[: one.stop]
            prompt.bias, prompt.visible = counts.clamp(min=1).log(), counts > 0
        categories = MIXED if one.masked else ("dense",) * 4
        case = Case([prompt], categories, KEY_HEADS, WIDTH, dtype=self.dtype, window=self.window)
        query, key, value = self.states(one.name)
        case.states = [(query[one.first : one.stop], key[: one.stop], value[: one.stop])]
        return case

    def states(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v of a whole prompt; equal beginnings have equal keys."""
        length, seed = self.prompts[name][0], 3 if name in ("images", "alike", "plain") else 4
        generator = torch.Generator().manual_seed(seed)
        keys = torch.randn(2, 96, KEY_HEADS, WIDTH, generator=generator).to(self.dtype)
        query = torch.randn(96, len(MIXED), WIDTH, generator=generator).to(self.dtype)
        return query[:length], keys[0, :length], keys[1, :length]


BATCHES = [
    [Read("images", 0, 33), Read("text", 0, 20)],
    [Read("text", 20, 21), Read("images", 33, 78)],
    [Read("alike", 32, 60), Read("images", 78, 90)],
    [Read("images", 89, 90)],
    [Read("new", 0, 30), Read("plain", 0, 60, masked=False), Read("images", 0, 90)],
]
"""Steps of a server: chunks, text beside images, a decode, a hit that ends inside an image."""


def served(backend: str, setting: Served, batches: Sequence[Sequence[Read]]) -> list[Any]:
    """Return each batch's outputs, and the tokens that vLLM's own attention was given."""
    from tokenprune_vllm import gpu_masks, masks
    from tokenprune_vllm.positions import RowNumbers
    from tokenprune_vllm.tags import around

    multiply_bfloat16()
    cache = torch.full((PAGES, KEY_HEADS, PAGE, 2 * WIDTH), math.nan, dtype=setting.dtype)
    if backend == "FLASH_ATTN":  # which has tokens before heads in memory
        cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
    scale = Case([Prompt(1, [])], ("dense",) * 4, KEY_HEADS, WIDTH).scale
    impl = SimpleNamespace(
        num_heads=4, num_kv_heads=KEY_HEADS, head_size=WIDTH, scale=scale,
    )  # fmt: skip
    attention = attention_of(backend)
    attention.impl, attention.kv_cache = impl, cache
    layer = masks._Layer("one", attention, MIXED, setting.window, gpu_masks.on_gpu(attention))
    ours = masks.Masks.__new__(masks.Masks)
    ours._layers, ours._steps, ours._metadata, ours._tags = [layer], {}, [], {}
    ours._chunks, ours._checked = OrderedDict(), True
    ours._sinks, ours._block = SINKS, 16
    ours._codes, ours._weighs, ours._pooled = {}, setting.hides or setting.counts, None
    ours.reach = RowNumbers(3, 256, torch.device("cpu"))
    given: list[int] = []
    own = functools.partial(plain, given, setting.window, scale)
    found = []
    for batch in batches:
        query: list[Tensor] = []
        key: list[Tensor] = []
        value: list[Tensor] = []
        slots = []
        for one in batch:
            states = setting.states(one.name)
            for rows, of_prompt in zip((query, key, value), states, strict=True):
                rows.append(of_prompt[one.first : one.stop])
            pages = torch.tensor(setting.prompts[one.name][2])
            places = torch.arange(one.first, one.stop)
            slots.append(pages[places // PAGE] * PAGE + places % PAGE)
        slot = torch.cat(slots)
        keys, values = gpu_masks.caches(cache, WIDTH)
        keys[slot // PAGE, slot % PAGE] = torch.cat(key)
        values[slot // PAGE, slot % PAGE] = torch.cat(value)
        write_reach(ours.reach, setting, batch, around)
        metadata = described(backend, setting, batch, slot)
        context = SimpleNamespace(attn_metadata={"one": metadata}, slot_mapping={"one": slot})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(masks, "get_forward_context", lambda context=context: context)
            ours.begin()
        output = torch.full((len(slot) + 3, 4, WIDTH), -1.0, dtype=setting.dtype)
        padded = [torch.cat([*rows, rows[0].new_zeros(3, *rows[0].shape[1:])])
                  for rows in (query, key, value)]  # fmt: skip
        given.clear()
        answer = ours._attend(
            layer, own, attention, padded[0], padded[1], padded[2], cache, metadata, output=output
        )
        assert answer is output
        assert (output[len(slot) :] == -1).all()
        counts = [one.stop - one.first for one in batch]
        found.append((output[: len(slot)].split(counts), list(given)))
    return found


def attention_of(backend: str, **more: Any) -> Any:
    """Return what a layer is, as far as it is looked at."""
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

    known = {"FLASH_ATTN": FlashAttentionBackend, "TRITON_ATTN": TritonAttentionBackend}
    named = type(backend, (), {"get_name": staticmethod(lambda: backend)})
    return SimpleNamespace(
        attn_backend=known.get(backend, named), kv_cache_dtype="auto", impl=SimpleNamespace(),
        **more,
    )  # fmt: skip


def write_reach(reach: Any, setting: Served, batch: Sequence[Read], around: Any) -> None:
    """Write what comes with the rows of images of a batch."""
    from tokenprune_vllm.tags import to_codes

    numbers, is_row = [], []
    for one in batch:
        length, spans, _ = setting.prompts[one.name]
        of_image = torch.zeros(length, dtype=torch.bool)
        for start, stop in spans:
            of_image[start:stop] = True
        of_image, columns = of_image[one.first : one.stop], around(of_image)
        codes = to_codes(setting.counted(one.name))[one.first : one.stop] * one.weighed
        columns = torch.cat([columns[:, one.first : one.stop] * one.masked, codes[None]])
        numbers.append(columns[:, of_image])
        is_row.append(of_image)
    rows = torch.cat(is_row)
    if bool(rows.any()):
        reach.write(torch.cat(numbers, dim=1), rows, len(rows))
    else:
        reach.write(None, None, len(rows))


def described(backend: str, setting: Served, batch: Sequence[Read], slots: Tensor) -> Any:
    """Return the backend's metadata of a batch."""
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata
    from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadata

    counts = torch.tensor([one.stop - one.first for one in batch])
    table = torch.zeros(len(batch), 8, dtype=torch.int32)
    for row, one in zip(table, batch, strict=True):
        pages = setting.prompts[one.name][2]
        row[: len(pages)] = torch.tensor(pages)
    lengths = torch.tensor([one.stop for one in batch], dtype=torch.int32)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
    common: dict[str, Any] = {
        "num_actual_tokens": len(slots),
        "max_query_len": int(counts.max()),
        "query_start_loc": starts,
        "max_seq_len": int(lengths.max()),
        "seq_lens": lengths,
        "block_table": table,
        "slot_mapping": torch.cat([slots, torch.full((3,), -1)]),
        "causal": True,
    }
    if backend == "FLASH_ATTN":
        return FlashAttentionMetadata(**common, scheduler_metadata=torch.zeros(5))
    scratch = torch.zeros(1)
    return TritonAttentionMetadata(
        **common, seq_threshold_3D=1, num_par_softmax_segments=1, softmax_segm_output=scratch,
        softmax_segm_max=scratch, softmax_segm_expsum=scratch,
    )  # fmt: skip


def plain(
    given: list[int], window: int | None, scale: float, module: Any, query: Tensor, key: Tensor,
    value: Tensor, cache: Tensor, metadata: Any, output: Tensor,
) -> Tensor:  # fmt: skip
    """Stand in for vLLM's attention: all that metadata says, pair by pair."""
    assert len(query) >= metadata.num_actual_tokens
    starts = metadata.query_start_loc.tolist()
    assert starts[-1] == metadata.num_actual_tokens
    assert metadata.max_query_len == max(b - a for a, b in itertools.pairwise(starts))
    for number, length in enumerate(metadata.seq_lens.tolist()):
        rows = slice(starts[number], starts[number + 1])
        states = cache[metadata.block_table[number].long()].transpose(1, 2).flatten(0, 1)[:length]
        keys, values = states.double().split(WIDTH, dim=-1)
        at = torch.arange(length - (rows.stop - rows.start), length)[:, None]
        of = torch.arange(length)
        seen = (of <= at) & (at - of < (window or length))
        for head in range(4):
            logits = query[rows, head].double() @ keys[:, head // 2].T * scale
            weights = logits.masked_fill(~seen, -math.inf).softmax(dim=1)
            output[rows, head] = (weights @ values[:, head // 2]).to(output.dtype)
    given.append(metadata.num_actual_tokens)
    return output


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_servers_batches_are_what_each_prompt_is_alone(run: Run, backend: str) -> None:
    setting = Served(window=40 if backend == "TRITON_ATTN" else None)
    given = compare(run, backend, setting, BATCHES, 3e-6)
    # vLLM's attention has text and requests without masks, and nothing of the others.
    assert given == [[20], [1], [], [1], [60]]


def test_batches_in_bfloat16(run: Run) -> None:
    compare(run, "FLASH_ATTN", Served(dtype=torch.bfloat16), BATCHES[:2], 2e-2)


@pytest.mark.parametrize("kind", ["hides", "counts", "both"])
def test_keys_that_are_hidden_or_count_several_times(run: Run, kind: str) -> None:
    setting = Served(hides=kind != "counts", counts=kind != "hides")
    batches = [
        *BATCHES[:4],
        # Beside each other: under masks alone, weighed alone, both, and vLLM's.
        [Read("new", 0, 30, weighed=False), Read("plain", 0, 59, masked=False),
         Read("images", 0, 90)],
        [Read("text", 0, 9), Read("plain", 59, 60, masked=False)],
    ]  # fmt: skip
    given = compare(run, "FLASH_ATTN", setting, batches, 3e-6)
    # A step behind a prompt with such keys is ours, too.
    assert given == [[20], [1], [], [], [], [9]]


def compare(
    run: Run, backend: str, setting: Served, batches: Sequence[Sequence[Read]], near: float
) -> list[list[int]]:
    answers = run(served, backend, setting, batches)
    for batch, (outputs, _) in zip(batches, answers, strict=True):
        for one, output in zip(batch, outputs, strict=True):
            (expected,) = setting.case(one).expected()
            torch.testing.assert_close(output.double(), expected, rtol=0, atol=near)
    return [given for _, given in answers]


def test_metadata_of_some_requests() -> None:
    setting = Served()
    batch = [Read("images", 0, 33), Read("text", 0, 20), Read("new", 3, 9), Read("alike", 0, 5)]
    slots = torch.arange(64)
    ranges = torch.arange(4 * 2 * 2).view(4, 2, 2)
    triton = described("TRITON_ATTN", setting, batch, slots)
    triton.mm_prefix_range = {0: [(2, 39)], 2: [(5, 24)], 3: [(2, 39)]}
    triton.mm_prefix_range_tensor = ranges
    flash = described("FLASH_ATTN", setting, batch, slots)
    flash.mm_prefix_query_range_tensor = torch.arange(64 * 2).view(64, 2)
    from tokenprune_vllm.gpu_masks import both_ways, of_requests

    starts = triton.query_start_loc.tolist()
    for metadata in (triton, flash):
        found = of_requests(metadata, [1, 3], starts)
        assert type(found) is type(metadata)
        assert found.num_actual_tokens == 25
        assert found.max_query_len == 20
        assert found.query_start_loc.tolist() == [0, 20, 25]
        assert found.query_start_loc.dtype == torch.int32
        assert found.seq_lens.tolist() == [20, 5]
        assert torch.equal(found.block_table, metadata.block_table[[1, 3]])
        assert found.slot_mapping.tolist() == [*range(33, 53), *range(59, 64)]
        assert found.scheduler_metadata is None
        assert both_ways(found)
    assert of_requests(triton, [2, 3], starts).mm_prefix_range == {0: [(5, 24)], 1: [(2, 39)]}
    assert torch.equal(of_requests(triton, [2], starts).mm_prefix_range_tensor, ranges[2:3])
    rows = of_requests(flash, [2], starts).mm_prefix_query_range_tensor
    assert rows.tolist() == [[2 * row, 2 * row + 1] for row in range(53, 59)]
    assert not both_ways(described("FLASH_ATTN", setting, batch, slots))


def test_metadata_of_another_shape_is_refused() -> None:
    from dataclasses import make_dataclass

    from tokenprune_vllm.gpu_masks import of_requests

    known = described("FLASH_ATTN", Served(), BATCHES[0], torch.arange(53))
    names = ["seq_lens", "block_table", "slot_mapping"]
    other = make_dataclass("Other", names)(*(getattr(known, name) for name in names))
    with pytest.raises(UnsupportedModelError, match="Other has no max_query_len"):
        of_requests(other, [1], [0, 33, 53])


def test_layers_of_other_backends_are_refused() -> None:
    from tokenprune_vllm.gpu_masks import on_gpu

    assert not on_gpu(attention_of("CPU_ATTN"))
    assert all(on_gpu(attention_of(name)) for name in BACKENDS)
    for name in ("FLASHINFER", "FLEX_ATTENTION", "FLASH_ATTN_DIFFKV"):
        with pytest.raises(UnsupportedModelError, match=f"this server chose {name}"):
            on_gpu(attention_of(name))
    named = attention_of("FLASH_ATTN")
    named.attn_backend = type("Mine", (), {"get_name": staticmethod(lambda: "FLASH_ATTN")})
    with pytest.raises(UnsupportedModelError, match="this server chose FLASH_ATTN, which keeps"):
        on_gpu(named)
    layer = attention_of("TRITON_ATTN", mm_prefix_clamp_sliding_window=True)
    with pytest.raises(UnsupportedModelError, match="both ways inside of a window"):
        on_gpu(layer)
    layer = attention_of("TRITON_ATTN")
    layer.impl.chunk_lookback = 1
    with pytest.raises(UnsupportedModelError, match="some chunks of the prompt"):
        on_gpu(layer)
    layer = attention_of("FLASH_ATTN")
    layer.kv_cache_dtype = "fp8"
    with pytest.raises(UnsupportedModelError, match="kept as fp8, which this checkpoint asks for"):
        on_gpu(layer)


@pytest.mark.parametrize(
    ("mode", "after"),
    [
        ("FULL_AND_PIECEWISE", "PIECEWISE"),
        ("PIECEWISE", "PIECEWISE"),
        ("NONE", "NONE"),
        ("FULL", None),
        ("FULL_DECODE_ONLY", None),
    ],
)
def test_graphs_of_whole_batches_are_turned_off_or_refused(mode: str, after: str | None) -> None:
    from vllm.config.compilation import CUDAGraphMode

    from tokenprune_vllm.gpu_masks import refused

    compilation = SimpleNamespace(
        cudagraph_mode=CUDAGraphMode[mode], pass_config=SimpleNamespace(fuse_attn_quant=False)
    )
    config = SimpleNamespace(
        compilation_config=compilation, model_config=SimpleNamespace(rswa_window=None)
    )
    said = [setting for applies, setting in refused(config) if applies]
    if after is None:
        assert len(said) == 1
        assert f"cudagraph_mode {mode} (give --compilation-config" in said[0]
    else:
        assert not said
        assert compilation.cudagraph_mode.name == after
    compilation.pass_config.fuse_attn_quant = True
    config.model_config.rswa_window = 128
    said = [setting for applies, setting in refused(config) if applies]
    assert any("fuse_attn_quant" in setting for setting in said)
    assert any("window of their own" in setting for setting in said)
