"""What holds for every registered method, whoever wrote it."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tokenprune
from tests.hf.lites import saved
from tokenprune import MLPProjector, Selection, VisualTokens
from tokenprune.errors import TokensError
from tokenprune.registry import build
from tokenprune.selecting import select_many
from tokenprune.selectors.base import Selector
from tokenprune.tokens import TokenBatch

METHODS = list(tokenprune.methods())
LOOKING = [name for name, method in tokenprune.methods().items() if method.needs]
PLACELESS = [name for name in LOOKING if name != "flexselect-lite"]
"""Methods to which a token's place says nothing; a decoder counts positions."""
OF_TIME = ("information", "relevant-information")
"""Methods that look at what stood at the same place a frame before."""
GRIDS = [(1, 1, 1), (1, 3, 5), (2, 4, 9), (1, 23, 25)]
C, D, HEADS = 13, 17, 16


def make_projector() -> MLPProjector:
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    first, second, norm = nn.Linear(C, 29), nn.Linear(29, D), nn.LayerNorm(C)
    torch.random.set_rng_state(torch_state)
    return MLPProjector(first.requires_grad_(False), nn.GELU(), second.requires_grad_(False), norm)


PROJECTOR = make_projector()
QUESTION = torch.tensor([3, 1, 4, 1, 5])


@functools.cache
def lite_folder() -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory()
    saved(Path(folder.name), C, 10, "llava")
    return folder


def options_of(method: str) -> dict[str, Any]:
    """Return the options without which a method cannot be had."""
    return {"path": lite_folder().name} if method == "flexselect-lite" else {}


def choose(tokens: VisualTokens, method: str, keep: Any, **options: Any) -> Selection:
    return tokenprune.select(tokens, method, keep, **options_of(method), **options)


def item(
    grid: tuple[int, int, int],
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    source: Tensor | None = None,
    label: str = "the item",
    projector: Callable[[Tensor], Tensor] = PROJECTOR,
) -> VisualTokens:
    """Make an item with every input; `source` [N] says which token each one is a copy of."""
    generator = torch.Generator().manual_seed(seed)
    total = grid[0] * grid[1] * grid[2]
    copies = torch.arange(total) if source is None else source
    features = torch.randn(total, C, generator=generator)[copies]
    embeddings = torch.randn(total, D, generator=generator)[copies]
    attention = torch.rand(HEADS, total, generator=generator)[:, copies]
    question = torch.rand(HEADS, 3, total, generator=generator)[..., copies]
    return VisualTokens(
        grid=grid,
        features=features.to(dtype),
        embeddings=embeddings.to(dtype),
        cls_attention=attention.to(dtype),
        projector=projector,
        query_attention=question.to(dtype),
        question=QUESTION,
        label=label,
    )


def same(one: Selection, other: Selection) -> bool:
    return torch.equal(one.kept, other.kept) and (
        (one.scores is None and other.scores is None)
        or (
            one.scores is not None
            and other.scores is not None
            and torch.equal(one.scores, other.scores)
        )
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("method", METHODS)
def test_exactly_keep_ascending_and_twice_the_same(
    method: str, grid: tuple[int, int, int], dtype: torch.dtype
) -> None:
    tokens = item(grid, dtype=dtype)
    total = tokens.total
    for keep in {1, max(1, total // 7), max(1, total - 1), total, total + 5, 0.3}:
        selection = choose(tokens, method, keep)
        kept = selection.kept
        assert kept.dtype == torch.int64
        assert len(kept) == tokenprune.tokens_kept(keep, total)
        assert bool((kept.diff() > 0).all())
        assert 0 <= int(kept[0]) <= int(kept[-1]) < total
        assert selection.grid == grid
        assert torch.equal(selection.grid_mask.flatten().nonzero()[:, 0], kept)
        if selection.scores is not None:
            assert selection.scores.dtype == torch.float32
            assert selection.scores.shape == (total,)
            assert selection.grid_scores is not None
        assert same(choose(tokens, method, keep), selection)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_mixed_sizes_equals_single_items(method: str, dtype: torch.dtype) -> None:
    items = [item(GRIDS[index % 4], seed=index, dtype=dtype) for index in (3, 1, 7, 0, 2, 5, 11)]
    selector = build(method, options_of(method))
    for keep in (0.2, 5, 1.0):
        together = select_many(items, selector, keep)
        for tokens, selection in zip(items, together, strict=True):
            assert same(select_many([tokens], selector, keep)[0], selection)
    assert select_many([], selector, 5) == []


@pytest.mark.parametrize("method", METHODS)
def test_what_is_known_of_another_budget_changes_nothing(method: str) -> None:
    items = [item(GRIDS[index % 4], seed=index) for index in (3, 1, 7, 2)]
    selector = build(method, options_of(method))
    known = select_many(items, selector, 0.5)
    for keep in (1, 0.2, 0.5, 1.0):
        again = select_many(items, selector, keep, known=[known[0], None, *known[2:]])
        for one, other in zip(again, select_many(items, selector, keep), strict=True):
            assert same(one, other)
    with pytest.raises(TokensError, match=r"selections of .* and the items have .* in their order"):
        select_many(items[1:], selector, 0.5, known=known[:-1])


def test_what_comes_twice_or_is_known_is_not_scored_again() -> None:
    seen: list[int] = []

    class Counting(Selector):
        name, needs = "counting", ("embeddings",)

        def score(self, tokens: TokenBatch) -> Tensor:
            seen.append(tokens.size)
            return tokens.require("embeddings").sum(dim=-1)

    one, other = item((1, 3, 5), seed=1), item((1, 3, 5), seed=2)
    selections = select_many([one, other, one, one], Counting(), 4)
    assert seen == [2]
    assert same(selections[2], selections[0])
    assert not same(selections[1], selections[0])
    select_many([one, other], Counting(), 6, known=selections[:2])
    assert select_many([one], Counting(), 4, known=selections[:1])[0] is selections[0]
    assert seen == [2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", PLACELESS)
def test_of_equal_tokens_the_first_is_kept(method: str, dtype: torch.dtype) -> None:
    for seed, grid in ((0, (1, 23, 25)), (1, (1, 7, 11)), (2, (3, 2, 19))):
        if grid[0] > 1 and method in OF_TIME:
            continue  # a copy in a later frame may have changed more
        total = grid[0] * grid[1] * grid[2]
        draws = torch.randint(
            0, total // 3, (total,), generator=torch.Generator().manual_seed(seed)
        )
        tokens = item(grid, seed=seed, dtype=dtype, source=draws)
        for keep in (1, total // 6, total // 2, total - 1):
            mask = choose(tokens, method, keep).mask
            for token in draws.unique():
                kept = mask[draws == token]
                assert bool((kept.int().diff() <= 0).all()), "a later copy was kept before"


@pytest.mark.parametrize("method", PLACELESS)
def test_of_tokens_all_equal_the_first_are_kept(method: str) -> None:
    for total in (1, 2, 7, 33, 577):
        source = torch.zeros(total, dtype=torch.int64)
        tokens = item((1, 1, total), source=source)
        for keep in {1, min(5, total), total}:
            assert choose(tokens, method, keep).kept.tolist() == list(range(keep))


@pytest.mark.parametrize("method", PLACELESS)
def test_tokens_of_zeros(method: str) -> None:
    zeros = VisualTokens(
        grid=(1, 2, 3),
        features=torch.zeros(6, C),
        embeddings=torch.zeros(6, D),
        cls_attention=torch.zeros(HEADS, 6),
        projector=PROJECTOR,
        query_attention=torch.zeros(HEADS, 3, 6),
    )
    assert choose(zeros, method, 4).kept.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", LOOKING)
def test_what_is_not_finite_is_named(method: str, value: float) -> None:
    whole = ("projector", "question")
    tensors = [name for name in tokenprune.methods()[method].needs if name not in whole]
    for name in tensors:
        bad = item((1, 3, 5), seed=4, label="image 2")
        tensor: Tensor = getattr(bad, name)
        tensor[..., 1, 3] = value
        items = [item((1, 3, 5), label="image 1"), bad, item((1, 3, 5), label="image 3")]
        with pytest.raises(TokensError, match=rf"^image 2: {name} holds \d+ NaN"):
            select_many(items, build(method, options_of(method)), 4)


@pytest.mark.parametrize("method", LOOKING)
def test_what_is_missing_is_named(method: str) -> None:
    needs = tokenprune.methods()[method].needs
    with pytest.raises(TokensError, match=rf"image 7: this method needs {needs[0]}"):
        choose(VisualTokens((1, 1, 2), label="image 7"), method, 1)


def strange_surroundings() -> Iterator[Any]:
    yield torch.inference_mode()
    yield torch.enable_grad()
    yield torch.autocast("cpu", dtype=torch.bfloat16)
    yield torch.device("meta")  # a default device other than the tokens' own


@pytest.mark.parametrize("method", METHODS)
def test_surroundings_change_nothing(method: str) -> None:
    grid = (1, 23, 25)
    expected = choose(item(grid), method, 40)
    for surroundings in strange_surroundings():
        tokens = item(grid)
        with surroundings:
            assert same(choose(tokens, method, 40), expected)
    with torch.inference_mode():  # everything made in it, weights too
        tokens = item(grid, projector=make_projector())
        assert same(choose(tokens, method, 40), expected)
    torch.set_default_dtype(torch.float64)
    try:
        assert same(choose(item_like(expected, grid), method, 40), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def item_like(expected: Selection, grid: tuple[int, int, int]) -> VisualTokens:
    """Make the usual item although another default dtype is set."""
    torch.set_default_dtype(torch.float32)
    tokens = item(grid)
    torch.set_default_dtype(torch.float64)
    return tokens


@pytest.mark.parametrize("method", METHODS)
def test_strides_and_gradients_change_nothing(method: str) -> None:
    grid = (1, 23, 25)
    plain = item(grid)
    strided: dict[str, Any] = {
        name: tensor.transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_()
        for name in ("features", "embeddings", "cls_attention", "query_attention")
        if isinstance(tensor := getattr(plain, name), Tensor)
    }
    moved = VisualTokens(grid, projector=PROJECTOR, question=QUESTION, **strided)
    selection = choose(moved, method, 40)
    assert same(selection, choose(plain, method, 40))
    assert selection.scores is None or not selection.scores.requires_grad


@pytest.mark.parametrize("method", METHODS)
def test_the_global_generator_and_the_input_are_left_alone(method: str) -> None:
    tokens, before = item((1, 5, 7)), item((1, 5, 7))
    state = torch.random.get_rng_state()
    selector = tokenprune.methods()[method]
    variants: list[dict[str, Any]] = [{}]
    if method == "zeroth-order":
        variants += [{"estimator": "jvp"}, {"estimator": "finite-difference"}]
    for options in variants:
        choose(tokens, method, 9, **options)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name in (*selector.needs, "features"):
        if name != "projector":
            assert torch.equal(getattr(tokens, name), getattr(before, name))


class Largest(TorchDispatchMode):
    """Record the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                # What it holds in memory: an expanded view holds no more than its source.
                self.elements = max(
                    self.elements, value.untyped_storage().nbytes() // value.element_size()
                )
        return result


@pytest.mark.parametrize("method", ["divprune", "information", "zeroth-order"])
def test_memory_is_linear_in_tokens(method: str) -> None:
    total = 3000
    tokens = item((1, 50, 60))
    with Largest() as largest:
        choose(tokens, method, 12)
    assert total * D <= largest.elements <= total * 64 < total * total // 40


if torch.cuda.is_available():  # collected only where it can run

    @pytest.mark.parametrize("method", METHODS)
    def test_cuda_selects_what_the_cpu_selects(method: str) -> None:
        projector = make_projector()
        on_cuda = MLPProjector(
            nn.Linear(C, 29).cuda(), nn.GELU(), nn.Linear(29, D).cuda(), nn.LayerNorm(C).cuda()
        )
        for layer, source in ((on_cuda.first, projector.first), (on_cuda.second, projector.second)):
            assert isinstance(layer, nn.Linear)
            assert isinstance(source, nn.Linear)
            layer.load_state_dict(source.state_dict())
        cpu = item((1, 23, 25))
        moved: dict[str, Any] = {
            name: tensor.cuda()
            for name in ("features", "embeddings", "cls_attention", "query_attention", "question")
            if isinstance(tensor := getattr(cpu, name), Tensor)
        }
        selection = choose(VisualTokens(cpu.grid, projector=on_cuda, **moved), method, 40)
        assert selection.kept.is_cuda
        assert selection.kept.tolist() == choose(cpu, method, 40).kept.tolist()
