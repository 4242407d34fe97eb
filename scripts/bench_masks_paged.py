"""The kernel for paged caches under masks of heads, for `bench_masks.py` and `bench_gpu.py`.

Keys and values lie as in vLLM: pages of 16 tokens in any order, a token's value behind its key. A
run under masks makes the plan and its lists, unless they were made before.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from bench_common import seconds, spread, table_of
from rich.console import Console
from torch import Tensor

from tokenprune.masks import heads_mask
from tokenprune.masks.paged import PagedChunk, PagedPlan
from tokenprune.masks.patterns import Category

PAGE = 16
TRIED = 1000
"""Tokens of the prompt on which outputs are compared with all pairs."""


class Paged:
    """A prompt's q, k and v, of `bench_masks.Case`, with keys and values in pages."""

    def __init__(self, case: Any) -> None:
        self._case, self._length = case, case.layout.length
        heads, _, self._width = case.query.shape
        key_heads = len(case.key)
        pages = -(-self._length // PAGE)
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(0))
        cache = case.key.new_zeros(pages, key_heads, PAGE, 2 * self._width)
        self._keys, self._values = cache.transpose(1, 2).split(self._width, dim=-1)
        self._table = order.int()[None].to(cache.device)
        place = torch.arange(self._length)
        page, slot = order[place // PAGE].to(cache.device), (place % PAGE).to(cache.device)
        self._keys[page, slot] = case.key.transpose(0, 1)
        self._values[page, slot] = case.value.transpose(0, 1)
        self._query = case.query.transpose(0, 1).contiguous()
        self._output = torch.empty_like(self._query)
        self._group = heads // key_heads

    def plan(self, categories: tuple[Category, ...]) -> PagedPlan:
        """Return a plan with its lists."""
        chunk = PagedChunk(self._case.layout, range(self._length), 0, 0, self._length)
        made = PagedPlan([chunk], self._query.device, self._group, self._width)
        made.lists(categories, None)
        return made

    def attend(self, plan: PagedPlan, categories: tuple[Category, ...]) -> Tensor:
        """Return attention [H, L, d] under a plan that is made already."""
        plan(
            self._output, self._query, self._keys, self._values, self._table, categories, None,
            self._width**-0.5,
        )  # fmt: skip
        return self._output.transpose(0, 1)

    def run(self, density: float) -> Callable[[], Tensor]:
        """Return attention at a density, its plan included."""
        categories = tuple(self._case.categories(density))
        return lambda: self.attend(self.plan(categories), categories)

    def run_prepared(self, density: float) -> Callable[[], Tensor]:
        """Return attention at a density, its plan made before."""
        categories = tuple(self._case.categories(density))
        made = self.plan(categories)
        return lambda: self.attend(made, categories)

    def visited(self, density: float) -> float:
        """Return the share of the blocks below the diagonal that are visited, mean over heads."""
        shares = [
            int(self.plan(tuple(one)).lists(tuple(one), None).visited.sum())
            for one in (self._case.categories(density), ["dense"] * len(self._case.query))
        ]
        return shares[0] / shares[1]


@dataclass
class PagedRuns:
    """Seconds at one length and density, turn by turn, and what was visited."""

    pairs: float
    visited: float
    whole: list[float] = field(default_factory=list)
    ready: list[float] = field(default_factory=list)
    fused: list[float] = field(default_factory=list)


def difference(
    case: Any, densities: list[float], by_matrix: Callable[[Any, Tensor], Tensor]
) -> float:
    """Return how far the kernel is from attention over all pairs in float64."""
    paged, worst = Paged(case), 0.0
    for density in densities:
        categories = case.categories(density)
        pairs = heads_mask(case.layout, categories).matrix().to(case.device)
        found = paged.run(density)().double()
        worst = max(worst, float((found - by_matrix(case, pairs)).abs().max()))
    return worst


def measure(case: Any, densities: list[float], turns: int) -> dict[float, PagedRuns]:
    """Run the kernel and torch's fused attention in turn."""
    paged = Paged(case)
    found = {}
    for density in densities:
        shares = [case.shares[one] for one in case.categories(density)]
        found[density] = PagedRuns(statistics.mean(shares), paged.visited(density))
        paged.run(density)()  # compiles
    seconds(case.dense, case.device)
    for _ in range(turns):
        fused = seconds(case.dense, case.device)
        for density, runs in found.items():
            runs.fused.append(fused)
            runs.whole.append(seconds(paged.run(density), case.device))
            runs.ready.append(seconds(paged.run_prepared(density), case.device))
    return found


def print_paged(console: Console, measured: dict[int, dict[float, PagedRuns]]) -> None:
    """Print the kernel's times by length and density."""
    table = table_of(
        "attention over a paged cache, masks of heads",
        "tokens",
        "asked for",
        "pairs",
        "visited",
        "all, ms",
        "plan made before, ms",
        "fused, ms",
        "x faster than all dense",
    )
    for length, by_density in measured.items():
        dense = next(iter(by_density.values())).whole
        for density, runs in by_density.items():
            ups = [slow / fast for slow, fast in zip(dense, runs.whole, strict=True)]
            table.add_row(
                str(length),
                f"{density:g}",
                f"{runs.pairs:.3f}",
                f"{runs.visited:.3f}",
                *(
                    f"{statistics.median(values) * 1e3:.3f}"
                    for values in (runs.whole, runs.ready, runs.fused)
                ),
                spread(ups),
            )
        table.add_section()
    console.print(table)
    console.print(
        "asked for: density, as a share of pairs. pairs: share of the causal pairs that the masks "
        "let through.\nvisited: share of the blocks of keys that the kernel computes. Times are "
        "medians; all: the\nplan and attention. fused: torch's causal attention, keys not in "
        "pages.\n"
    )
