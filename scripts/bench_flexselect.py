#!/usr/bin/env python
"""First token of a long video: unpruned, and pruned by flexselect and flexselect-lite.

    python scripts/bench_flexselect.py

The model is LLaVA-OneVision's architecture with random weights in float32. Its language model is
Qwen2-7B at an eighth of its width and with 10 of its 28 layers: its proportions are the real one's,
and with 25 tokens a frame so is the share of attention in the work at 512 frames, or a little less.
The trained selector is made here too, with random weights. Four things run in turn:

    unpruned          the language model reads every visual token
    flexselect        selection in sets of frames, then the language model on what is left
    flexselect-lite   the same, the trained selector's decoder in place of the model's layers
    bound             the language model on a prompt that really is that short

A first token is everything after the vision encoder, through `generate`. The encoder's work is the
same for all; its time is printed too, and not counted. Peak memory is measured in a fresh process
for each number, as growth over what was resident before.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from bench_common import CPU, processor, quiet, releases_line, seconds, spread, table_of
from rich.console import Console
from rich.table import Table

import tokenprune_hf
from tokenprune import Selector
from tokenprune.errors import UnsupportedModelError
from tokenprune.families.registry import reference_layer
from tokenprune.registry import build
from tokenprune.selecting import select_many
from tokenprune_hf import Encoded
from tokenprune_hf.lite.model import LiteConfig, LiteModel
from tokenprune_hf.reading import prompt_items
from tokenprune_hf.vision import vision_model

TEXT_BEFORE, TEXT_AFTER, VIDEO_TOKEN = 8, 32, 2
SIDE, PATCH = 40, 4  # pixels: 10 x 10 patches a frame, 5 x 5 tokens after pooling
PER_FRAME = math.ceil(SIDE // PATCH / 2) ** 2
TOWER = {
    "hidden_size": 160,
    "intermediate_size": 640,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}
PRUNED = ("flexselect", "flexselect-lite")
MIB = 2**20


@dataclass(frozen=True)
class Shape:
    """A decoder's shape: layers, width, heads, heads of keys, feed-forward width."""

    layers: int
    width: int
    heads: int
    key_heads: int
    inner: int

    @property
    def per_layer(self) -> int:
        """Numbers in a layer's matrices, which is also its multiplications for each token."""
        keys = self.width * self.key_heads // self.heads
        return self.width * (2 * self.width + 2 * keys + 3 * self.inner)

    def attention_share(self, tokens: int) -> float:
        """Return the multiplications in causal attention over those with the matrices."""
        return tokens * self.width / self.per_layer

    def settings(self) -> dict[str, int]:
        """Return the shape as a Qwen2's config has it."""
        return {
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
        }


REAL, REAL_LITE = Shape(28, 3584, 28, 4, 18944), Shape(24, 896, 14, 2, 4864)
REAL_TOKENS = 107_520  # 512 frames of 210 tokens
LARGE, LITE = Shape(10, 448, 7, 1, 2368), Shape(3, 224, 7, 1, 1216)  # 1/8 and 1/4 of those
QUICK, QUICK_LITE = Shape(10, 64, 4, 2, 336), Shape(3, 32, 2, 1, 168)


@dataclass(frozen=True)
class Job:
    """What one process measures.

    Attributes
    ----------
    quick
        Whether the model is the tiny one.
    frames, keep, threads
        Frames of the video, tokens kept of it, torch threads.
    what
        ``"selection"`` or ``"first token"``.
    variant
        A method, ``"unpruned"`` or ``"bound"``.
    options
        The method's options.
    """

    quick: bool
    frames: int
    keep: int
    threads: int
    what: str
    variant: str
    options: dict[str, Any] = field(default_factory=dict)


def build_model(text: Shape, vision: Mapping[str, int] = TOWER) -> Any:
    """Return the video model, random weights, on torch's default device and in its dtype."""
    make: Any = transformers
    vision_config = make.SiglipVisionConfig(**vision, vision_use_head=False)
    text_config = make.Qwen2Config(
        vocab_size=4096, max_position_embeddings=2**20, **text.settings()
    )
    config = make.LlavaOnevisionConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=VIDEO_TOKEN + 1,
        video_token_id=VIDEO_TOKEN,
    )
    torch.manual_seed(0)
    model = make.LlavaOnevisionForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id = 0
    return model


def save_selector(model: Any, folder: Path, decoder: Shape) -> None:
    """Write a trained selector's folder, with random weights."""
    config = LiteConfig(
        features=model.config.vision_config.hidden_size,
        model_type=model.config.model_type,
        vocab_size=model.config.text_config.vocab_size,
        decoder=decoder.settings(),
        trained={"random": True},
    )
    torch.manual_seed(1)
    LiteModel(config).save(folder)


def prompt(visual: int, device: torch.device = CPU) -> dict[str, torch.Tensor]:
    """Return input_ids and attention_mask [1, L] with `visual` placeholders in one run."""
    words = torch.arange(100, 100 + TEXT_BEFORE + TEXT_AFTER)
    video = torch.full((visual,), VIDEO_TOKEN)
    ids = torch.cat([words[:TEXT_BEFORE], video, words[TEXT_BEFORE:]])[None].to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def encode(model: Any, frames: int) -> Encoded:
    """Run the vision encoder on frames of noise."""
    side = model.config.vision_config.image_size
    generator = torch.Generator(model.device).manual_seed(frames)
    pixels = torch.randn(
        1, frames, 3, side, side, generator=generator, device=model.device, dtype=model.dtype
    )
    return tokenprune_hf.encode(model, needs=("features",), pixel_values_videos=pixels)


def plain(model: Any, encoded: Encoded, tokens: int | None) -> Callable[[], Any]:
    """Return a first token of the unpruned model, on the first `tokens` rows or on all."""
    rows = encoded.modalities["video"].rows
    if tokens is not None:
        rows = torch.cat([rows[:tokens], rows[-1:]])  # the last one is no frame's, and always stays
    inputs = prompt(len(rows), model.device)

    def run() -> Any:
        seen = transformers.modeling_outputs.BaseModelOutputWithPooling(pooler_output=rows[None])
        return model.generate(
            **inputs, mm_encoder_outputs={"video": seen}, max_new_tokens=1, do_sample=False
        )

    return run


def pruned(model: Any, encoded: Encoded, selector: Selector, keep: int) -> Callable[[], Any]:
    """Return a first token of the pruned model."""
    inputs = prompt(len(encoded.modalities["video"].rows), model.device)

    def run() -> Any:
        with tokenprune_hf.prune(model, selector, keep):
            return model.generate(**inputs, encoded=encoded, max_new_tokens=1, do_sample=False)

    return run


def selection(model: Any, encoded: Encoded, selector: Selector, keep: int) -> Callable[[], Any]:
    """Return the selection alone, as `prune` does it before it shortens the prompt."""
    inputs = prompt(len(encoded.modalities["video"].rows), model.device)
    vision = vision_model(model)

    def run() -> Any:
        items = prompt_items(vision, inputs, encoded, selector.needs)
        return select_many(items["video"], selector, keep)

    return run


# Memory ----------------------------------------------------------------------------------------


def resident(which: str) -> int:
    """Return this process's VmRSS, or VmHWM, its highest value since `forget_peak`, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{which}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"the system does not say {which}")


def forget_peak() -> int:
    """Give freed memory back, start the peak anew and return what is resident now."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak_can_be_measured() -> bool:
    """Try whether the peak sees 64 MiB that come and go, and forgets them."""
    try:
        before = forget_peak()
        torch.ones(16 * MIB)
        seen = resident("VmHWM") - before
        left = resident("VmHWM") - forget_peak()
        forgotten = resident("VmHWM") - before
    except OSError:
        return False
    return seen > 60 * MIB and left > 60 * MIB and forgotten < 4 * MIB


def _peak(job: Job) -> int:
    """In a fresh process: return by how much one run raises resident memory at most."""
    torch.set_num_threads(job.threads)
    quiet()
    model = build_model(QUICK if job.quick else LARGE)

    def work(frames: int, keep: int) -> Callable[[], Any]:
        encoded = encode(model, frames)
        if job.variant in ("unpruned", "bound"):
            return plain(model, encoded, None if job.variant == "unpruned" else keep)
        chosen = build(job.variant, job.options)
        what = selection if job.what == "selection" else pruned
        return what(model, encoded, chosen, keep)

    with torch.inference_mode():
        work(2, PER_FRAME)()  # what is loaded and set up at first use does not count
        run = work(job.frames, job.keep)
        before = forget_peak()
        run()
        return resident("VmHWM") - before


def peak(job: Job) -> float:
    """Return MiB: what `_peak` finds in a process of its own."""
    # For glibc's malloc in the new process: freed blocks of this many bytes go back at once, so
    # that the peak is what is in use. Left alone it holds on to a varying amount of freed memory.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**17)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (job,)) / MIB


# Measuring -------------------------------------------------------------------------------------


@dataclass
class Times:
    """Seconds of each run, by frames and variant; runs of one index were done in one turn."""

    first: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    alone: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    encoder: dict[int, float] = field(default_factory=dict)

    def speed_ups(self, frames: int, variant: str) -> list[float]:
        """Return how much faster than unpruned, turn by turn."""
        runs = self.first[frames]
        return [slow / fast for slow, fast in zip(runs["unpruned"], runs[variant], strict=True)]


def measure_times(
    model: Any, selectors: dict[str, Selector], more: Selector | None, plan: argparse.Namespace
) -> Times:
    """Run everything in turn."""
    times = Times()
    for place, frames in enumerate(plan.frames):
        start = time.perf_counter()
        encoded, keep = encode(model, frames), kept(frames, plan.keep)
        times.encoder[frames] = time.perf_counter() - start
        first: dict[str, Callable[[], Any]] = {
            "unpruned": plain(model, encoded, None),
            **{name: pruned(model, encoded, one, keep) for name, one in selectors.items()},
            "bound": plain(model, encoded, keep),
        }
        alone = {name: selection(model, encoded, one, keep) for name, one in selectors.items()}
        if more is not None and frames == plan.frames[-1]:
            alone["more"] = selection(model, encoded, more, keep)
        times.first[frames] = {name: [] for name in first}
        times.alone[frames] = {name: [] for name in alone}
        # The very first turn warms up.
        for turn in range(plan.repeats + (place == 0)):
            for found, runs in ((times.first, first), (times.alone, alone)):
                for name, run in runs.items():
                    took = seconds(run)
                    if turn or place:
                        found[frames][name].append(took)
    return times


def kept(frames: int, keep: float) -> int:
    """Return how many of a video's tokens are kept."""
    return max(1, math.floor(keep * frames * PER_FRAME + 0.5))


def exponent(frames: Sequence[int], values: Sequence[float]) -> float:
    """Return p of the best fit values = c * frames ** p."""
    if len(set(frames)) < 2:
        return math.nan
    logs = [math.log(count) for count in frames], [math.log(value) for value in values]
    return float(statistics.linear_regression(*logs).slope)


# Printing --------------------------------------------------------------------------------------


def print_setting(console: Console, model: Any, plan: argparse.Namespace) -> None:
    """Say what is measured on what, and how like the real one it is."""
    large, lite = (QUICK, QUICK_LITE) if plan.quick else (LARGE, LITE)
    layers = large.layers
    console.print(
        f"{processor()}, {torch.get_num_threads()} threads, {releases_line()}, float32\n"
        f"Language model: {layers} layers of width {large.width}, {large.heads} heads on "
        f"{large.key_heads}, feed-forward {large.inner}, random weights.\n"
        f"Trained selector: {lite.layers} layers of width {lite.width}, {lite.heads} heads on "
        f"{lite.key_heads}, feed-forward {lite.inner}, random weights.\n"
        f"Prompt: {PER_FRAME} visual tokens a frame, {TEXT_BEFORE} + {TEXT_AFTER} of text. "
        f"Kept: {plan.keep:g} of the visual ones. Sets of {plan.frames_per_set} frames.\n"
        f"Reference layer {plan.layer}, counted from 0: {plan.layer} of {layers} layers run "
        f"({plan.layer / layers:.0%}).\n"
        f"Runs in turn, median of {plan.repeats}. A first token is everything after the vision "
        "encoder.\n"
    )
    table = table_of(
        f"proportions at {plan.frames[-1]} frames here, and with Qwen2-7B and 0.5B at 512",
        "",
        "here",
        "real",
        words=[""],
    )
    tokens = plan.frames[-1] * PER_FRAME
    table.add_row("visual tokens", f"{tokens:,}", f"{REAL_TOKENS:,}")
    table.add_row(
        "causal attention / products with matrices",
        f"{large.attention_share(tokens):.2f}",
        f"{REAL.attention_share(REAL_TOKENS):.2f}",
    )
    table.add_row(
        "the same as tokens / (12 x width)",
        f"{tokens / 12 / large.width:.2f}",
        f"{REAL_TOKENS / 12 / REAL.width:.2f}",
    )
    table.add_row(
        "weights that flexselect-lite runs / the model's layers",
        *(
            f"{(small.layers - 1) * small.per_layer / (big.layers * big.per_layer):.1%}"
            for small, big in ((lite, large), (REAL_LITE, REAL))
        ),
    )
    console.print(table)


def print_first(console: Console, times: Times, plan: argparse.Namespace) -> None:
    """Print the time to the first token."""
    table = table_of(
        "first token",
        "frames",
        "variant",
        "tokens",
        "seconds",
        "x faster than unpruned",
        "of bound",
        words=["frames", "variant"],
    )
    for frames, runs in times.first.items():
        bound = statistics.median(runs["bound"])
        for name, values in runs.items():
            visual = frames * PER_FRAME if name == "unpruned" else kept(frames, plan.keep)
            table.add_row(
                str(frames),
                name,
                str(visual + 1 + TEXT_BEFORE + TEXT_AFTER),
                f"{statistics.median(values):.3f}",
                spread(times.speed_ups(frames, name), 1),
                f"{bound / statistics.median(values):.0%}",
            )
        table.add_section()
    console.print(table)
    console.print(
        "In brackets: lowest and highest of the turns, each a ratio of two runs of one turn.\n"
        "The vision encoder, the same for all and not counted: "
        + ", ".join(f"{spent:.2f} s for {frames}" for frames, spent in times.encoder.items())
        + " frames.\n"
    )


def print_alone(console: Console, times: Times, plan: argparse.Namespace) -> None:
    """Print the time of the selection."""
    table = table_of(
        "selection alone",
        "method",
        "frames",
        "seconds",
        "ms a frame",
        "share of first token",
        words=["method"],
    )
    for name in PRUNED:
        for frames, runs in times.alone.items():
            middle = statistics.median(runs[name])
            whole = statistics.median(times.first[frames][name])
            table.add_row(
                name,
                str(frames),
                spread(runs[name], 3),
                f"{middle / frames * 1e3:.2f}",
                f"{middle / whole:.0%}",
            )
        table.add_section()
    console.print(table)
    for name in PRUNED:
        values = [statistics.median(runs[name]) for runs in times.alone.values()]
        if len(values) > 1:
            line = statistics.linear_regression(plan.frames, values)
            off = max(
                abs(value - line.intercept - line.slope * frames) / value
                for frames, value in zip(plan.frames, values, strict=True)
            )
            console.print(
                f"{name}: {line.intercept:.3f} s + {line.slope * 1e3:.2f} ms a frame, at most "
                f"{off:.0%} off; grows as frames ** {exponent(plan.frames, values):.2f}"
            )
    last = times.alone[plan.frames[-1]]
    if "more" in last:
        pairs = [one / four for one, four in zip(last["flexselect"], last["more"], strict=True)]
        console.print(
            f"flexselect, {plan.frames[-1]} frames, 4 sets per pass: {spread(last['more'], 3)} s, "
            f"x{spread(pairs, 2)} as fast as 1"
        )
    console.print()


def print_peaks(
    console: Console, peaks: dict[tuple[str, str, int], float], plan: argparse.Namespace
) -> None:
    """Print the memory."""
    table = table_of(
        "peak memory, MiB above what was resident before",
        "",
        *(f"{frames} frames" for frames in plan.frames),
        words=[""],
    )
    rows = dict.fromkeys((what, variant) for what, variant, _ in peaks)
    for what, variant in rows:
        cells = [peaks.get((what, variant, frames)) for frames in plan.frames]
        table.add_row(
            f"{what}, {variant}", *("-" if cell is None else f"{cell:.0f}" for cell in cells)
        )
    console.print(table)
    console.print(
        "Each number is from a process of its own, after a first run on two frames. The allocator\n"
        "is told to give freed blocks back at once, so that the peak is what is in use.\n"
    )


def measure_peaks(
    plan: argparse.Namespace, options: dict[str, dict[str, Any]]
) -> dict[tuple[str, str, int], float]:
    """Return MiB for each selection and each first token."""

    def measure(what: str, variant: str, frames: int, own: dict[str, Any]) -> float:
        keep = kept(frames, plan.keep)
        return peak(Job(plan.quick, frames, keep, plan.threads, what, variant, own))

    wanted = [("selection", name) for name in PRUNED]
    wanted += [("first token", name) for name in ("unpruned", *PRUNED, "bound")]
    if plan.quick:
        wanted = wanted[:3]
    peaks = {
        (what, variant, frames): measure(what, variant, frames, options.get(variant, {}))
        for what, variant in wanted
        for frames in plan.frames
    }
    if plan.sets_at_once:
        own = {**options["flexselect"], "sets_per_pass": 4}
        name, last = "flexselect, 4 sets per pass", plan.frames[-1]
        peaks["selection", name, last] = measure("selection", "flexselect", last, own)
    return peaks


def print_claims(
    console: Console,
    times: Times,
    peaks: dict[tuple[str, str, int], float],
    plan: argparse.Namespace,
) -> None:
    """Print each claim with what was measured."""
    last = plan.frames[-1]
    claims: list[tuple[str, str, bool]] = []
    for name in PRUNED:
        values = [statistics.median(runs[name]) for runs in times.alone.values()]
        if len(values) > 1:
            power = exponent(plan.frames, values)
            claims.append(
                (
                    f"{name}: selection time grows no faster than frames ** 1.1",
                    f"{power:.2f}",
                    power <= 1.1,
                )
            )
        whole = [frames for frames in plan.frames if frames >= plan.frames_per_set]
        if peaks and len(whole) > 1:
            found = [peaks["selection", name, frames] for frames in whole]
            claims.append(
                (
                    f"{name}: the selection's peak memory from {whole[0]} to {whole[-1]} frames "
                    "stays within x1.25",
                    f"x{max(found) / min(found):.2f}",
                    max(found) <= 1.25 * min(found),
                )
            )
    for name, least in (("flexselect-lite", 8.0), ("flexselect", 2.5)):
        ratio = statistics.median(times.speed_ups(last, name))
        claims.append(
            (
                f"{name}: first token at {last} frames at least {least:g} times faster",
                spread(times.speed_ups(last, name), 1),
                ratio >= least,
            )
        )
    table = Table(title="claims", title_justify="left", show_lines=True)
    for heading in ("claim", "measured", ""):
        table.add_column(heading)
    for claim, value, holds in claims:
        table.add_row(claim, value, "holds" if holds else "does not hold")
    console.print(table)
    if plan.quick:
        console.print("--quick shows that the script runs; at its sizes the claims say nothing.")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--frames", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, in turn")
    parser.add_argument("--keep", type=float, default=1 / 16, help="fraction of tokens kept")
    parser.add_argument("--layer", type=int, help="reference layer (default: at 70 %% depth)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own)")
    parser.add_argument("--no-memory", action="store_true", help="measure times alone")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    plan = parser.parse_args()

    if plan.quick:
        plan.frames = [8, 32]
    plan.frames = sorted(set(plan.frames))
    plan.frames_per_set = 8 if plan.quick else 64
    plan.sets_at_once = plan.frames[-1] >= 4 * plan.frames_per_set
    if plan.threads:
        torch.set_num_threads(plan.threads)
    plan.threads = torch.get_num_threads()
    quiet()
    console = Console(width=100, highlight=False)
    model = build_model(QUICK if plan.quick else LARGE)
    text = model.config.text_config
    try:
        plan.layer = reference_layer(
            model.config.model_type, text.num_hidden_layers, text.hidden_size, plan.layer
        )
    except UnsupportedModelError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        save_selector(model, Path(folder), QUICK_LITE if plan.quick else LITE)
        shared = {"frames_per_set": plan.frames_per_set}
        options: dict[str, dict[str, Any]] = {
            "flexselect": {**shared, "layer": plan.layer},
            "flexselect-lite": {**shared, "path": folder},
        }
        selectors = {name: build(name, own) for name, own in options.items()}
        more = None
        if plan.sets_at_once:
            more = build("flexselect", {**options["flexselect"], "sets_per_pass": 4})
        print_setting(console, model, plan)
        times = measure_times(model, selectors, more, plan)
        print_first(console, times, plan)
        print_alone(console, times, plan)
        peaks = {}
        if plan.no_memory:
            console.print("Peak memory was not asked for.\n")
        elif not peak_can_be_measured():
            console.print("Peak memory cannot be measured on this system.\n")
        else:
            peaks = measure_peaks(plan, options)
            print_peaks(console, peaks, plan)
    print_claims(console, times, peaks, plan)


if __name__ == "__main__":
    main()
