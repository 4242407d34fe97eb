"""Masks against the sentences that define them, written out pair by pair; kernels against sdpa."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.errors import LayoutError
from tokenprune.masks import (
    Blocks,
    Causal,
    Classes,
    ImageSpan,
    Mask,
    PerHead,
    PromptLayout,
    Window,
    attend,
    block_mask,
    category_mask,
    heads_mask,
    image_spans,
    layer_mask,
    visible_keys,
)
from tokenprune.masks.kernels import Kernel, Prepared
from tokenprune.masks.patterns import CATEGORIES, LOCAL, Category

LAYOUT = PromptLayout(
    300,
    (ImageSpan(3, 99), ImageSpan(101, 197, (1, 8, 12)), ImageSpan(197, 290, (3, 1, 31))),
    sinks=(0, 3, 101, 150, 289),
)


def by_words(category: Category, query: int, key: int, layout: PromptLayout = LAYOUT) -> bool:
    """Say what the table in `tokenprune.masks.patterns` says, about one pair."""

    def image(token: int) -> int | None:
        owners = [n for n, one in enumerate(layout.images) if one.start <= token < one.stop]
        return owners[0] if owners else None

    if key > query:
        return False
    if category == "dense" or image(query) is None or image(key) is None:
        return True
    of_sink = key in layout.sinks
    of_own = image(query) == image(key)
    return {
        "sink": of_sink or query - key < LOCAL,
        "intra": of_own,
        "intra+sink": of_own or of_sink,
    }[category]


def brute(category: Category, layout: PromptLayout = LAYOUT) -> Tensor:
    return torch.tensor(
        [
            [by_words(category, query, key, layout) for key in range(layout.length)]
            for query in range(layout.length)
        ]
    )


@pytest.mark.parametrize("category", CATEGORIES)
def test_categories_are_what_they_say(category: Category) -> None:
    assert torch.equal(category_mask(LAYOUT, category).matrix()[0], brute(category))


def masks() -> dict[str, Mask]:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(4, 10, 10, generator=generator) < 0.4
    hidden = torch.rand(300, generator=generator) < 0.7
    table = torch.rand(4, 3, 3, generator=generator) < 0.5
    labels = torch.randint(0, 3, (300,), generator=generator).sort().values
    own = Causal(300) & Window(300, 1)
    return {
        "causal": Causal(300),
        "window": Causal(300) & Window(300, 40),
        "heads": heads_mask(LAYOUT, ["sink", "dense", "intra", "sink"]),
        "one category": heads_mask(LAYOUT, ["intra+sink"] * 4),
        "hidden keys": Causal(300) & visible_keys(hidden),
        "heads and hidden keys": heads_mask(LAYOUT, ["sink", "intra+sink", "intra", "dense"])
        & visible_keys(hidden),
        "blocks": Causal(300) & (Blocks(chosen, 300, 32) | own),
        "classes by head": Causal(300) & (Classes(labels, table) | own),
    }


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("block", [32, 128])
def test_cover_never_contradicts_the_pairs(name: str, block: int) -> None:
    mask = masks()[name]
    if name == "blocks" and block != 32:
        with pytest.raises(LayoutError, match="blocks of 32 were chosen"):
            mask.cover(block)
        return
    matrix, cover = mask.matrix(), mask.cover(block)
    starts = range(0, 300, block)
    found = {"some": 0, "every": 0, "computed": 0}
    for head, (row, first), (column, begin) in itertools.product(
        range(mask.heads), enumerate(starts), enumerate(starts)
    ):
        pairs = matrix[head, first : first + block, begin : begin + block]
        some, every = cover.some[head, row, column], cover.every[head, row, column]
        assert bool(some) or not bool(pairs.any())
        assert not bool(every & some) or bool(pairs.all())
        found["some"] += bool(pairs.any())
        found["every"] += bool(every & some)
        found["computed"] += bool(some)
    assert found["every"] > 0 or name not in ("causal", "heads")
    # Blocks without a pair are skipped, but for a few that two masks hide only together.
    assert found["computed"] <= found["some"] * 1.1 + 1
    causal = len(starts) * (len(starts) + 1) // 2
    assert mask.density(block) == pytest.approx(found["computed"] / causal / mask.heads)


@pytest.mark.parametrize("kernel", ["gathered", "dense", "flex"])
@pytest.mark.parametrize("name", masks())
def test_kernels_equal_attention_with_the_matrix(
    name: str, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = masks()[name]
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(4, 300, 16, generator=generator)
    key, value = torch.randn(2, 2, 300, 16, generator=generator)
    if kernel == "flex":
        # Not compiled, so that no compiler is needed: the block mask is what is tested.
        from torch.nn.attention.flex_attention import flex_attention

        monkeypatch.setattr("tokenprune.masks.kernels._compiled", {"cpu": flex_attention})
    found = attend(query, key, value, mask, scale=0.3, kernel=kernel, block=32)
    wide = [one.repeat_interleave(2, dim=0) for one in (key, value)]
    logits = (query @ wide[0].transpose(1, 2) * 0.3).masked_fill(~mask.matrix(), -torch.inf)
    torch.testing.assert_close(found, logits.softmax(dim=-1) @ wide[1])


CHOICES: list[list[Category]] = [
    ["intra"] * 4,
    ["sink"] * 4,
    ["intra", "dense", "intra+sink", "intra"],
]


@pytest.mark.parametrize("categories", CHOICES)
def test_gathered_computes_few_pairs_that_the_mask_hides(categories: list[Category]) -> None:
    """Delimiters between images make their blocks partial: that must not cost whole blocks."""
    images = tuple(ImageSpan(at + 2, at + 498) for at in range(0, 4000, 500))
    layout = PromptLayout(4000, images, sinks=tuple(range(2, 4000, 500)))
    generator = torch.Generator().manual_seed(2)
    query, key, value = torch.randn(3, 4, 4000, 8, generator=generator)
    mask = heads_mask(layout, categories)
    ready = Prepared(mask, query.device, "gathered")
    allowed = int(mask.matrix().sum()) / mask.heads / (4000 * 4001 / 2)
    # Blocks on the diagonal, and of the window, are computed whole.
    assert allowed <= ready.computed < allowed + 0.07
    if "dense" not in categories:
        assert ready.computed < 0.4 * mask.density()
    dense = attend(query, key, value, mask, kernel="dense")
    torch.testing.assert_close(ready(query, key, value), dense)


PARTS = [range(0, 300), range(0, 97), range(97, 160), range(130, 300), range(255, 256)]


@pytest.mark.parametrize("kernel", ["gathered", "dense"])
@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("queries", PARTS, ids=str)
def test_a_part_of_the_queries_equals_its_rows_of_the_matrix(
    queries: range, name: str, kernel: Kernel
) -> None:
    mask = masks()[name]
    torch.manual_seed(1)
    query = torch.randn(4, len(queries), 16)
    key, value = torch.randn(2, 2, 300, 16)
    ready = Prepared(mask, query.device, kernel, 32, queries)
    pairs = mask.matrix()[:, queries.start : queries.stop]
    wide = [one.repeat_interleave(2, dim=0) for one in (key, value)]
    logits = query @ wide[0].transpose(1, 2) * 16**-0.5
    expected = logits.masked_fill(~pairs, -torch.inf).softmax(dim=-1) @ wide[1]
    torch.testing.assert_close(ready(query, key, value), expected)
    with torch.no_grad():  # where memory is used again
        torch.testing.assert_close(ready(query, key, value), expected)
    causal = sum(position + 1 for position in queries)
    assert ready.computed * causal >= float(pairs.sum()) / len(pairs) - 1e-3
    assert ready.computed <= 300 * len(queries) / causal


def test_a_part_of_the_queries_is_planned_once() -> None:
    mask = masks()["one category"]
    parts = [Prepared(mask, torch.device("cpu"), None, 32, range(40, 80)) for _ in range(2)]
    assert parts[0]._plans[0][0] is parts[1]._plans[0][0]


@pytest.mark.parametrize(
    "queries", [range(0, 0), range(0, 301), range(-1, 5), range(9, 3), range(0, 9, 2)], ids=str
)
def test_queries_that_are_not_of_the_prompt_are_refused(queries: range) -> None:
    with pytest.raises(LayoutError, match=r"with 0 <= start < stop <= 300"):
        Prepared(Causal(300), torch.device("cpu"), "gathered", 32, queries)


def test_what_does_not_fit_a_part_of_the_queries_is_refused() -> None:
    with pytest.raises(LayoutError, match="'flex' computes whole prompts"):
        Prepared(Causal(300), torch.device("cpu"), "flex", 32, range(3, 9))
    ready = Prepared(Causal(300), torch.device("cpu"), "gathered", 32, range(3, 9))
    for queries, keys in ((300, 300), (6, 9)):
        with pytest.raises(LayoutError, match="6 queries and 300 tokens"):
            ready(torch.zeros(1, queries, 16), *torch.zeros(2, 1, keys, 16))


def test_layers_see_a_window_and_their_images_both_ways() -> None:
    images = (ImageSpan(1, 4), ImageSpan(4, 6))
    layout = PromptLayout(8, images)
    for window, both_ways in itertools.product((None, 3), (False, True)):
        found = layer_mask(layout, window, both_ways=both_ways).matrix()[0]
        for query, key in itertools.product(range(8), range(8)):
            seen = key <= query
            if both_ways:
                seen |= any(
                    one.start <= query < one.stop and one.start <= key < one.stop for one in images
                )
            if window is not None:
                seen &= query - key < window
            assert bool(found[query, key]) == seen


def test_heads_of_unlike_blocks_go_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """On many threads heads are computed together: each over keys of its own, filled up."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr("tokenprune.masks.gathered._ALIKE", 2.0)
    generator = torch.Generator().manual_seed(5)
    chosen = torch.rand(6, 10, 10, generator=generator) < 0.5
    itself = Window(300, 1)
    for mask in (
        Causal(300) & (Blocks(chosen, 300, 32) | itself),
        heads_mask(LAYOUT, ["intra", "sink"] * 3) & (Blocks(chosen, 300, 32) | itself),
    ):
        ready = Prepared(mask, torch.device("cpu"), "gathered", 32)
        calls = [parts for plan, _ in ready._plans for parts in plan.calls]
        sizes = [{part.size for part in parts} for parts in calls]
        assert any(len(parts) > 1 for parts in calls)
        assert any(len(one) > 1 for one in sizes)
        query, key, value = torch.randn(3, 6, 300, 8, generator=generator)
        with torch.inference_mode():
            found = ready(query, key[:2], value[:2])
            again = ready(query, key[:2], value[:2])
        wanted = attend(query, key[:2], value[:2], mask, kernel="dense")
        torch.testing.assert_close(found, wanted)
        assert torch.equal(found, again)
        torch.testing.assert_close(ready(query, key[:2], value[:2]), wanted)  # with gradients


def test_gathered_has_gradients_and_keeps_the_dtype() -> None:
    mask = masks()["heads and hidden keys"]
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(3, 4, 300, 8, generator=generator)
    kernels: list[Kernel] = ["gathered", "dense"]
    found = []
    for kernel in kernels:
        leaf = states.clone().requires_grad_()
        output = attend(leaf[0], leaf[1], leaf[2], mask, kernel=kernel, block=32)
        output.square().sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(found[0], found[1])
    with torch.no_grad():
        exact = attend(states[0], states[1], states[2], mask, kernel="gathered", block=32)
        short = states.bfloat16()
        rounded = attend(short[0], short[1], short[2], mask, kernel="gathered", block=32)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=0.05, rtol=0.05)


def test_a_query_without_a_key_is_refused() -> None:
    states = torch.zeros(4, 10, 8)
    nothing = Causal(10) & Blocks(torch.zeros(1, 3, 3, dtype=torch.bool), 10, 4)
    with pytest.raises(LayoutError, match="query 0 of head 0 may attend to no key"):
        attend(states, states, states, nothing, kernel="gathered", block=4)


def test_the_block_mask_is_the_one_that_torch_makes_of_the_matrix() -> None:
    mask = masks()["heads and hidden keys"]
    dense = block_mask(mask, block=32).to_dense()[0]
    padded = F.pad(mask.matrix(), (0, 20, 0, 20)).view(4, 10, 32, 10, 32)
    assert torch.equal(dense.bool(), mask.cover(32).some)
    assert bool((padded.any(dim=4).any(dim=2) <= dense.bool()).all())


def test_a_prompt_with_one_image_or_none_is_whole_where_it_must_be() -> None:
    one = PromptLayout(50, (ImageSpan(4, 40),))
    assert torch.equal(category_mask(one, "intra").matrix(), Causal(50).matrix())
    text = PromptLayout(50)
    for category in CATEGORIES:
        assert torch.equal(category_mask(text, category).matrix(), Causal(50).matrix())
        assert category_mask(text, category).density(16) == 1.0


def test_runs_of_image_tokens_are_found() -> None:
    assert image_spans([False, True, True, False, True]) == [ImageSpan(1, 3), ImageSpan(4, 5)]
    assert image_spans([True, True]) == [ImageSpan(0, 2)]
    assert image_spans([False]) == []


@pytest.mark.parametrize(
    ("length", "images", "sinks", "message"),
    [
        (9, [(2, 5), (4, 8)], [], "images 1 and 2 overlap or are out of order"),
        (9, [(4, 8), (0, 2)], [], "images 1 and 2 overlap or are out of order"),
        (9, [(4, 10)], [], "image 1 has the tokens 4 to 10 of a prompt of 9"),
        (9, [(4, 4)], [], "holds at least one token"),
        (9, [], [9], "sink 9 is no token of a prompt of 9"),
        (0, [], [], "a prompt of 0 tokens"),
    ],
)
def test_layouts_that_cannot_be_are_refused(
    length: int, images: list[tuple[int, int]], sinks: list[int], message: str
) -> None:
    with pytest.raises(LayoutError, match=message):
        PromptLayout(length, tuple(ImageSpan(*one) for one in images), tuple(sinks))
    with pytest.raises(LayoutError, match=r"has 4 tokens and the grid \(1, 2, 3\)"):
        PromptLayout(9, (ImageSpan(0, 4, (1, 2, 3)),))


def test_masks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(LayoutError, match="cannot be combined"):
        Causal(5) & Causal(6)
    with pytest.raises(LayoutError, match="masks of one length"):
        PerHead([Causal(5), Causal(6)], torch.tensor([0, 1]))
    with pytest.raises(LayoutError, match="count from 0"):
        PerHead([Causal(5), Causal(5)], torch.tensor([0, 2]))
    with pytest.raises(LayoutError, match=r"need \[heads, 3, 3\]"):
        Blocks(torch.ones(1, 2, 2, dtype=torch.bool), 300, 128)
    states = torch.zeros(4, 10, 8)
    with pytest.raises(LayoutError, match="a mask of 1 heads, 11 queries and 11 tokens was given"):
        attend(states, states, states, Causal(11))
