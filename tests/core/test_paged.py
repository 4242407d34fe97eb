"""Attention over a paged cache under masks, against all pairs in float64, one prompt at a time.

Triton's interpreter runs the kernel on the CPU, as in `test_kernels`; where there is a GPU, the
kernel that is compiled for it is run, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.core.test_kernels import Run, _process, _type_of
from tests.core.test_kernels import run as run
from tokenprune.errors import LayoutError
from tokenprune.masks import ImageSpan, PromptLayout, category_mask, layer_mask
from tokenprune.masks.paged import Lists, PagedChunk, PagedPlan
from tokenprune.masks.patterns import CATEGORIES, LOCAL, Category

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

MIXED: tuple[Category, ...] = ("intra", "intra+sink", "sink", "dense")


@dataclass
class Prompt:
    """A prompt of which a chunk is read.

    `spans` are its images, `sinks` their places in the prompt.
    """

    length: int
    spans: Sequence[tuple[int, int]]
    first: int = 0
    sinks: Sequence[int] = ()
    bias: Tensor | None = None
    visible: Tensor | None = None

    @property
    def layout(self) -> PromptLayout:
        images = tuple(ImageSpan(*span) for span in self.spans)
        return PromptLayout(self.length, images, tuple(self.sinks))


@dataclass
class Case:
    """A layer, and a batch of chunks whose keys lie in a shuffled cache."""

    prompts: Sequence[Prompt]
    categories: tuple[Category, ...] = MIXED
    key_heads: int = 2
    width: int = 16
    page: int = 16
    dtype: torch.dtype = torch.float32
    window: int | None = None
    both_ways: bool = False
    rows: int = 16
    keys: int = 16
    apart: bool = False
    """Whether keys and values are two tensors, and tokens of a page lie before heads."""
    states: list[tuple[Tensor, Tensor, Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(7)

        def draw(tokens: int, heads: int) -> Tensor:
            return torch.randn(tokens, heads, self.width, generator=generator).to(self.dtype)

        self.states = [
            (
                draw(one.length - one.first, len(self.categories)),
                draw(one.length, self.key_heads),
                draw(one.length, self.key_heads),
            )
            for one in self.prompts
        ]

    @property
    def scale(self) -> float:
        return 0.7 / math.sqrt(self.width)

    def cache(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys and values [pages, page, G, d], and the table; unused places hold NaN."""
        counts = [-(-one.length // self.page) for one in self.prompts]
        pages = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(1))
        # As vLLM has it: heads before tokens, a token's key and value side by side.
        shape = (len(pages), self.key_heads, self.page, 2 * self.width)
        together = torch.full(shape, math.nan, dtype=self.dtype)
        keys, values = together.transpose(1, 2).split(self.width, dim=-1)
        if self.apart:
            keys, values = keys.contiguous(), values.contiguous()
        table = torch.zeros(len(counts) + 1, max(counts) + 2, dtype=torch.int32)
        used = pages.split([*counts, 3])
        for number, (own, (_, key, value)) in enumerate(
            zip(used[:-1], self.states, strict=True), start=1
        ):
            table[number, : len(own)] = own
            for token in range(len(key)):
                keys[own[token // self.page], token % self.page] = key[token]
                values[own[token // self.page], token % self.page] = value[token]
        return keys, values, table

    def chunks(self) -> list[PagedChunk]:
        """Return the chunks; three rows of another request stand before the first."""
        found, row = [], 3
        for number, one in enumerate(self.prompts, start=1):
            queries = range(one.first, one.length)
            found.append(
                PagedChunk(one.layout, queries, row, number, one.length, one.bias, one.visible)
            )
            row += len(queries)
        return found

    def plan(self, device: str = "cpu") -> PagedPlan:
        group = len(self.categories) // self.key_heads
        return PagedPlan(
            self.chunks(), torch.device(device), group, self.width,
            rows=self.rows, keys=self.keys, both_ways=self.both_ways,
        )  # fmt: skip

    def expected(self) -> list[Tensor]:
        """Return each chunk's attention in float64, pair by pair."""
        found = []
        for one, (query, key, value) in zip(self.prompts, self.states, strict=True):
            own = torch.empty(query.shape, dtype=torch.float64)
            for head, category in enumerate(self.categories):
                key_head = head // (len(self.categories) // self.key_heads)
                logits = query[:, head].double() @ key[:, key_head].double().T * self.scale
                if one.bias is not None:
                    logits += one.bias.double()
                seen = torch.tensor(
                    [
                        [self.sees(one, category, at, of) for of in range(one.length)]
                        for at in range(one.first, one.length)
                    ]
                )
                weights = logits.masked_fill(~seen, -math.inf).softmax(dim=1)
                own[:, head] = weights @ value[:, key_head].double()
            found.append(own)
        return found

    def sees(self, prompt: Prompt, category: Category, query: int, key: int) -> bool:
        """Say whether a query sees a key, from the sentences of docs/masks.md."""

        def image(token: int) -> int | None:
            for number, (start, stop) in enumerate(prompt.spans):
                if start <= token < stop:
                    return number
            return None

        same = image(query) is not None and image(query) == image(key)
        model = key <= query and (self.window is None or query - key < self.window)
        model = model or (self.both_ways and same)
        allowed = category == "dense" or image(query) is None or image(key) is None
        if category in ("intra", "intra+sink"):
            allowed = allowed or same
        if category in ("sink", "intra+sink"):
            allowed = allowed or key in prompt.sinks
        if category == "sink":
            allowed = allowed or query - key < LOCAL
        shown = prompt.visible is None or bool(prompt.visible[key]) or key == query
        return model and allowed and shown


def multiply_bfloat16() -> None:
    """Have Triton's interpreter multiply numbers in bfloat16; it takes their bits otherwise."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    own = interpreter.InterpreterBuilder.create_dot
    if hasattr(own, "of_tokenprune"):
        return

    def create_dot(self: Any, a: Any, b: Any, *more: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (
                interpreter.TensorHandle(
                    interpreter._convert_float(one.data, tl.bfloat16, tl.float32, None).view(
                        np.float32
                    ),
                    tl.float32,
                )
                for one in (a, b)
            )
        return own(self, a, b, *more)

    create_dot.of_tokenprune = True  # type: ignore[attr-defined]
    interpreter.InterpreterBuilder.create_dot = create_dot


def attended(case: Case, device: str) -> Tensor:
    """Return the whole batch's output; rows that are not ours are -1."""
    if device == "cpu":
        multiply_bfloat16()
    plan = case.plan(device)
    others = torch.zeros(3, *case.states[0][0].shape[1:], dtype=case.dtype)
    query = torch.cat([others, *(query for query, _, _ in case.states), others[:2]])
    output = torch.full_like(query, -1).to(device)
    keys, values, table = (one.to(device) for one in case.cache())
    plan(output, query.to(device), keys, values, table, case.categories, case.window, case.scale)
    return output.cpu()


LONG = Prompt(150, [(3, 70), (72, 130)], sinks=[0, 3, 5, 72, 129])
IMAGES = Prompt(75, [(0, 20), (21, 41), (41, 60), (64, 70)], first=33, sinks=[0, 21, 59, 69])
TEXT_BEHIND = Prompt(52, [(2, 18)], first=17, sinks=[17])

CASES = {
    "two prompts": Case([LONG, IMAGES], rows=64, keys=32),
    "blocks of 16": Case([IMAGES, replace(TEXT_BEHIND, first=3)]),
    "two images that touch": Case([replace(IMAGES, first=0)], page=32, keys=32),
    "chunks of one token": Case([replace(LONG, first=149), replace(IMAGES, first=50, length=51,
                                 spans=[*IMAGES.spans[:2], (41, 51)], sinks=[0, 21])]),
    "heads of 32": Case([IMAGES, TEXT_BEHIND], width=32, rows=32, keys=32),
    "heads of 24, one key head": Case([IMAGES], width=24, key_heads=1, rows=64),
    "groups of three": Case(
        [IMAGES], categories=("intra", "sink", "intra", "sink", "dense", "sink"), rows=32
    ),
    "a key head for each": Case([replace(LONG, first=90)], key_heads=4, apart=True),
    "one category": Case([LONG], categories=("intra",) * 4, rows=64, keys=32),
    "all dense": Case([replace(IMAGES, first=0)], categories=("dense",) * 2),
    "window": Case([LONG, IMAGES], window=24, rows=64, keys=32),
    "both ways": Case([replace(LONG, first=72), replace(IMAGES, first=21)], both_ways=True),
    "both ways, window": Case([replace(IMAGES, first=0)], both_ways=True, window=9),
    "biases": Case([replace(IMAGES, bias=torch.arange(75).remainder(5).add(1).log()), TEXT_BEHIND]),
    "hidden": Case([replace(IMAGES, visible=torch.arange(75).remainder(3) > 0), TEXT_BEHIND]),
}  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_attention_is_that_of_all_pairs(run: Run, name: str, device: str) -> None:
    check(run, CASES[name], device, 2e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "near"), [(torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
def test_half_precision(run: Run, dtype: torch.dtype, near: float, device: str) -> None:
    check(run, Case([IMAGES, TEXT_BEHIND], width=64, dtype=dtype, rows=32, keys=32), device, near)


def check(run: Run, case: Case, device: str, near: float) -> None:
    found = run(attended, case, device) if device == "cpu" else attended(case, device)
    row = 3
    for expected in case.expected():
        own = found[row : row + len(expected)].double()
        assert torch.isfinite(own).all()
        torch.testing.assert_close(own, expected, rtol=0, atol=near)
        row += len(expected)
    assert (found[:3] == -1).all()
    assert (found[row:] == -1).all()
    assert len(found) == row + 2


def test_a_chunk_is_what_it_is_in_the_whole_prompt(run: Run) -> None:
    whole = Case([replace(LONG, first=0)], rows=64, keys=32)
    chunk = Case([replace(LONG, first=80)], rows=64, keys=32)
    query, *states = whole.states[0]
    chunk.states = [(query[80:], states[0], states[1])]
    torch.testing.assert_close(
        run(attended, chunk, "cpu")[3:-2], run(attended, whole, "cpu")[83:-2], rtol=0, atol=1e-6
    )


# Lists ----------------------------------------------------------------------------------------


def listed(plan: PagedPlan, lists: Lists, head: int, tile: int) -> tuple[set[int], set[int]]:
    """Return the blocks that a key-value head takes whole, and those in which it looks at pairs."""
    number = int(lists.of_head[head])
    order, (whole, some) = lists.order[number, tile].tolist(), lists.counts[number, tile].tolist()
    return set(order[:whole]), set(order[whole : whole + some])


@pytest.mark.parametrize("name", CASES)
def test_lists_have_every_pair_and_whole_blocks_are_whole(name: str) -> None:
    case = CASES[name]
    plan = case.plan()
    lists = plan.lists(case.categories, case.window)
    group = len(case.categories) // case.key_heads
    tiles = plan.tiles.tolist()
    queries = sum(one.length - one.first for one in case.prompts)
    assert sum(tile[2] for tile in tiles) == queries
    for tile, (_, first, count, length, request, _) in enumerate(tiles):
        prompt = case.prompts[request - 1]
        for head in range(case.key_heads):
            whole, some = listed(plan, lists, head, tile)
            assert not whole & some
            assert int(lists.visited[head, tile]) == len(whole | some)
            for block in range(-(-length // case.keys)):
                keys = range(block * case.keys, (block + 1) * case.keys)
                pairs = [
                    key < length and case.sees(prompt, category, query, key)
                    for category in case.categories[head * group : (head + 1) * group]
                    for query in range(first, first + count)
                    for key in keys
                ]
                assert not any(pairs) or block in whole | some, (tile, head, block)
                assert all(pairs) or block not in whole, (tile, head, block)


def test_fewer_blocks_are_visited_where_masks_are_sparser() -> None:
    spans = [(16 + 128 * number, 144 + 128 * number) for number in range(8)]
    prompt = Prompt(1056, spans, sinks=[start for start, _ in spans])
    visited = {}
    for category in CATEGORIES:
        case = Case([prompt], categories=(category,) * 2, key_heads=1, rows=32, keys=16)
        lists = case.plan().lists(case.categories, None)
        visited[category] = int(lists.visited.sum())
        blocks = category_mask(prompt.layout, category, layer_mask(prompt.layout)).cover(16).some
        # Tiles are as large as blocks here: the lists are no longer than what a mask leaves.
        assert visited[category] <= int(blocks.sum())
    assert visited["intra"] < visited["intra+sink"] < visited["dense"]
    assert visited["sink"] < 0.5 * visited["dense"]
    assert visited["dense"] == 66 * 67 // 2
    both = Case([prompt], categories=("intra", "sink"), key_heads=1, rows=32, keys=16)
    union = int(both.plan().lists(both.categories, None).visited.sum())
    assert max(visited["intra"], visited["sink"]) < union < visited["intra"] + visited["sink"]
    apart = replace(both, key_heads=2, rows=16)
    of_heads = apart.plan().lists(apart.categories, None).visited.sum(dim=1).tolist()
    assert of_heads == [visited["intra"], visited["sink"]]


def test_lists_are_made_once() -> None:
    plan = CASES["two prompts"].plan()
    assert plan.lists(MIXED, None) is plan.lists(MIXED, None)
    assert plan.lists(MIXED, None) is not plan.lists(MIXED, 5)


def test_what_is_no_chunk_is_refused() -> None:
    layout = IMAGES.layout
    for queries, length in ((range(5, 5), 75), (range(0, 10, 2), 75), (range(3, 9), 8),
                            (range(70, 80), 80)):  # fmt: skip
        with pytest.raises(LayoutError, match="are no part of a prompt whose layout has 75"):
            PagedChunk(layout, queries, 0, 0, length)
    with pytest.raises(LayoutError, match=r"bias is \[3\] and there are 75 keys"):
        PagedChunk(layout, range(3, 9), 0, 0, 75, bias=torch.zeros(3))
    with pytest.raises(LayoutError, match=r"visible is \[3\] and there are 75 keys"):
        PagedChunk(layout, range(3, 9), 0, 0, 75, visible=torch.ones(3, dtype=torch.bool))
    with pytest.raises(LayoutError, match="5 heads are no whole groups of 2"):
        CASES["two prompts"].plan().lists((*MIXED, "dense"), None)


def test_tensors_of_another_layer_are_refused(run: Run) -> None:
    run(_refused, CASES["two prompts"])


def _refused(case: Case) -> None:
    keys, values, table = case.cache()
    query = torch.zeros(300, 3, 16)
    with pytest.raises(LayoutError, match=r"queries have 3 heads, .* 4 categories"):
        case.plan()(query, query, keys, values, table, MIXED, None, 1.0)


# What the interpreter does not show -----------------------------------------------------------


@pytest.fixture(scope="module")
def compile_there() -> Iterator[Run]:
    """Run a function in a process where Triton compiles."""
    yield from _process("0")


@pytest.mark.parametrize(("capability", "width"), [(80, 128), (90, 256)])
def test_the_kernel_compiles(
    compile_there: Run, capability: int, width: int, tmp_path: Path
) -> None:
    memory, code = compile_there(_compiled, capability, width, str(tmp_path))
    assert "mma" in code
    assert memory <= 99 * 2**10  # what a program may have on the smallest of these GPUs


def _compiled(capability: int, width: int, folder: str) -> tuple[int, str]:
    """Compile the kernel as it is launched; return its shared memory and its PTX."""
    import os

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tokenprune.greedy.fused import kernels

    os.environ["TRITON_CACHE_DIR"] = folder
    found: list[tuple[int, str]] = []

    def note(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        names = ("num_warps", "num_stages", "enable_fp_fusion")
        options = {name: constants.pop(name) for name in names if name in constants}
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        fixed = {one.name: values[one.name] for one in kernel.params if one.is_constexpr}
        signature = {
            one.name: "constexpr" if one.is_constexpr else _type_of(values[one.name])
            for one in kernel.params
        }
        source = ASTSource(fn=kernel, signature=signature, constexprs=fixed)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        found.append((made.metadata.shared, made.asm["ptx"]))

    case = Case([IMAGES], width=width, dtype=torch.bfloat16, window=20, both_ways=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "launch", note)
        plan = PagedPlan(case.chunks(), torch.device("cpu"), 2, width)
        query = torch.zeros(80, 4, width, dtype=torch.bfloat16)
        plan(query, query, *case.cache(), MIXED, 20, 1.0)
    return found[0]
