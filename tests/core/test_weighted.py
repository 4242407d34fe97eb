"""Keys that count several times or not at all, against a matrix with their logarithms in it."""

from __future__ import annotations

import pytest
import torch

from tokenprune.masks import ImageSpan, PooledBlocks, Prepared, PromptLayout, heads_mask
from tokenprune.masks.pooled import pool
from tokenprune.masks.weighted import HIDDEN, log_counts, weighted

LAYOUT = PromptLayout(40, (ImageSpan(3, 17), ImageSpan(20, 36)), sinks=(3,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("first", [0, 13])
def test_logarithms_are_added_under_any_mask(dtype: torch.dtype, first: int) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(heads, 40, 16).to(dtype) for heads in (4, 2, 2))
    counts = torch.ones(40, dtype=torch.int64)
    counts[5:12], counts[20:24], counts[30] = 0, 7, 300
    mask = heads_mask(LAYOUT, ["intra", "sink", "dense", "intra+sink"])
    scale = 0.3
    queries = range(first, 40)
    wide = weighted(query[:, first:], key, value, log_counts(counts), scale)
    found = Prepared(mask, torch.device("cpu"), block=8, queries=queries)(*wide, scale)[..., :16]
    times = key.double().repeat_interleave(2, dim=0), value.double().repeat_interleave(2, dim=0)
    logits = query.double() @ times[0].mT * scale + counts.double().log()
    # What is hidden is seen by nothing but, where nothing else is, by what is hidden itself.
    shown = torch.tensor([place for place in queries if counts[place]])
    logits = logits.masked_fill(~mask.matrix(), -torch.inf)
    expected = (logits.softmax(dim=-1) @ times[1])[:, shown]
    near = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    torch.testing.assert_close(found[:, shown - first].double(), expected, rtol=near, atol=near)
    assert bool(found.isfinite().all())


def test_what_counts_nothing_is_hidden() -> None:
    assert log_counts(torch.tensor([0, 1, 2])).tolist() == pytest.approx([HIDDEN, 0.0, 0.6931472])


def test_blocks_of_a_part_are_those_of_the_whole_prompt() -> None:
    torch.manual_seed(1)
    query, key = torch.randn(4, 40, 16), torch.randn(2, 40, 16)
    blocks = PooledBlocks(keep=0.5, block=8)
    whole = blocks.mask(query, key, LAYOUT).matrix()
    for first in (8, 24):
        part = blocks.mask(query[:, first:], key, LAYOUT, first=first).matrix()
        assert torch.equal(part[:, first:], whole[:, first:])
    averages = pool(query[:, 13:], 8, first=13)
    assert averages.shape == (4, 5, 16)
    assert not averages[:, 0].any()
    torch.testing.assert_close(averages[:, 1], query[:, 13:16].mean(dim=1))
    torch.testing.assert_close(averages[:, 2:], pool(query, 8)[:, 2:])
    torch.testing.assert_close(pool(query[:, 13:15], 8, 13)[:, 1], query[:, 13:15].mean(dim=1))
