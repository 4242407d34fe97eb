#!/usr/bin/env python
"""What selecting costs and saves on a GPU, in one run of less than six minutes, without a download.

    python scripts/bench_gpu.py
    python scripts/bench_gpu.py --small    the same code with tiny shapes on the CPU: that it runs

All weights are random and are made on the device, in bfloat16. Five sections, the most important
first:

    agreement   the GPU keeps the tokens that the CPU keeps, alone and in a batch
    selection   every method's time beside vision towers: CLIP-L/14-336, SigLIP-so400m/14 and
                Qwen3-VL-8B's, at several numbers of images and tokens
    prefill     prefill and `generate` of a LLaVA with Qwen2-7B's shape: unpruned, pruned, and a
                prompt that really is that short; the encoder and the selection are counted
    video       first token of a long video: unpruned, flexselect, flexselect-lite, really short
    masks       attention under sparse masks, also over the paged cache that vLLM has on a GPU, and
                torch's fused attention

Variants run in turn; a number is the median of the turns after one that warms up. The device is
waited for before and after each run. Peak memory is what a run allocates above what was there.

The run ends after `--seconds`. What did not fit is reported as not measured. The JSON file is
written after every case, so that a run that is ended early loses nothing. The exit code is 1 if a
case failed or the GPU kept other tokens than the CPU. Needs the extra ``demo``.
"""

# ruff: noqa: E402  # the clock starts before the imports, which take seconds

from __future__ import annotations

import time

STARTED = time.perf_counter()

import argparse
import contextlib
import copy
import gc
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import bench_flexselect
import bench_generate
import bench_masks
import bench_masks_paged
import torch
import transformers
from bench_common import (
    Variant,
    device_name,
    in_turn,
    quiet,
    releases,
    seconds,
    table_of,
)
from bench_gpu_results import (
    BLIND,
    PREFILLED,
    RECOMMENDED,
    SECTIONS,
    SHORT,
    UNPRUNED,
    Board,
    Json,
    console,
    end_in_time,
    numbers,
)
from bench_gpu_shapes import FULL, SMALL, Plan, Size, Tower
from bench_selectors import make_projector, make_tokens
from torch import Tensor

import tokenprune_hf
from tokenprune import MLPProjector, Selector, VisualTokens
from tokenprune.budget import tokens_kept
from tokenprune.masks.kernels import Prepared, default_kernel
from tokenprune.registry import build
from tokenprune.selecting import select_many
from tokenprune.tokens import INPUTS
from tokenprune.tower.attention import mean_of_blocks, packed_pictures, whole_pictures
from tokenprune_hf import Encoded
from tokenprune_hf.reading import prompt_items
from tokenprune_hf.vision import vision_model

KEEPS = {"1/9": 1 / 9, "1/4": 1 / 4}
VIDEO_KEEP = 1 / 16
DENSITY = 0.25
ENCODER = "encoder"


def images(count: int) -> str:
    """Return a number of images in words."""
    return "1 image" if count == 1 else f"{count} images"


def cases_of(plan: Plan) -> dict[str, list[str]]:
    """Return the cases of each section, in the order in which they are measured."""
    by_prompt = [
        f"{what}, {images(count)}" for count in plan.prompts for what in ("prefill", "generate")
    ]
    return {
        "agreement": [size.name for size in plan.compared],
        "selection": [
            f"{size.name}, {images(count)}" for count in plan.images for size in plan.sizes
        ],
        "prefill": by_prompt,
        "video": [f"{frames} frames" for frames in plan.frames],
        "masks": [f"{length:,} tokens" for length in plan.lengths],
    }


@contextlib.contextmanager
def building(device: torch.device) -> Iterator[None]:
    """Make new tensors and weights on a device, in bfloat16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


# Agreement -------------------------------------------------------------------------------------


def on(device: torch.device, item: VisualTokens, projector: MLPProjector) -> VisualTokens:
    """Return an item on another device, with a projector that is there."""
    moved: Json = {
        name: value.to(device)
        for name in INPUTS
        if isinstance(value := getattr(item, name), Tensor)
    }
    return replace(item, projector=projector, **moved)


def projector_on(device: torch.device, projector: MLPProjector) -> MLPProjector:
    """Return a copy of a projector on another device."""
    layers: Any = copy.deepcopy((projector.first, projector.second))
    first, second = (layer.to(device) for layer in layers)
    return MLPProjector(first, projector.activation, second)


def new_projector(plan: Plan, device: torch.device) -> MLPProjector:
    """Return a projector from the features to the language model."""
    with building(device):
        return make_projector(plan.features, plan.width, plan.width, norm=False)


def make_items(
    plan: Plan, size: Size, count: int, projector: MLPProjector, device: torch.device
) -> list[VisualTokens]:
    """Return items of random tokens on a device."""
    with building(device):
        items = []
        for _ in range(count):
            item = make_tokens(projector, size.rows * size.columns, plan.features)
            question = torch.rand(4, 8, item.total, dtype=torch.float32) / item.total
            items.append(replace(item, grid=(1, size.rows, size.columns), query_attention=question))
    return items


def agreement(board: Board, plan: Plan, device: torch.device) -> None:
    """Compare what is kept of a batch on the device, of its items alone, and on the CPU."""
    methods = [*BLIND, "flexselect", "relevant-information"]
    cpu = torch.device("cpu")
    projector = new_projector(plan, device)
    copied = projector_on(cpu, projector)
    for size in plan.compared:

        def compare(until: float, size: Size = size) -> Json:
            items = make_items(plan, size, max(2, size.crops), projector, device)
            there = [on(cpu, item, copied) for item in items]
            by_method: Json = {}
            for name in methods:
                if time.perf_counter() > until:
                    break
                selector = build(name, {})
                by_method[name] = different(items, there, selector, KEEPS["1/9"])
            print_agreement(size, by_method)
            return {
                "different": by_method,
                "not compared": [name for name in methods if name not in by_method],
                "same": not any(by_method.values()),
            }

        board.run("agreement", size.name, compare)


def different(
    items: Sequence[VisualTokens], there: Sequence[VisualTokens], selector: Selector, keep: float
) -> int:
    """Return how many kept tokens differ: batch and alone on a device, and alone on the CPU.

    Parameters
    ----------
    items, there
        The same tokens on the device and on the CPU.
    selector, keep
        What selects.
    """
    together = select_many(items, selector, keep)
    count = 0
    for index, batched in enumerate(together):
        kept = set(batched.kept.tolist())
        for item in (items[index], there[index]):
            count += len(kept ^ set(select_many([item], selector, keep)[0].kept.tolist())) // 2
    return count


# Selection -------------------------------------------------------------------------------------


def build_tower(tower: Tower) -> Any:
    """Return a tower with random weights."""
    make: Any = transformers
    if tower.kind == "clip":
        return make.CLIPVisionModel(make.CLIPVisionConfig(**tower.settings)).eval()
    if tower.kind == "siglip":
        config = make.SiglipVisionConfig(**tower.settings, vision_use_head=False)
        return make.SiglipVisionModel(config).eval()
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    qwen: Any = Qwen3VLVisionConfig(**tower.settings)
    model: Any = Qwen3VLVisionModel(qwen)
    return model.eval()


def tower_run(tower: Tower, model: Any, size: Size, pictures: int) -> Callable[[], Any]:
    """Return a run of a tower on pictures of `size`'s tokens; made on torch's default device."""
    rows, columns = size.rows * tower.merged, size.columns * tower.merged
    patch = tower.settings["patch_size"]
    if tower.kind == "qwen3-vl":
        patches = torch.randn(
            pictures * rows * columns, 3 * tower.settings["temporal_patch_size"] * patch**2
        )
        grids = torch.tensor([[1, rows, columns]] * pictures)
        return lambda: model(patches, grids)
    pixels = torch.randn(pictures, 3, rows * patch, columns * patch)
    other_size = rows != columns
    return lambda: model(pixels, interpolate_pos_encoding=other_size)


def scoring_run(tower: Tower, size: Size, pictures: int) -> Callable[[], Sequence[Tensor]]:
    """Return what `cls-attention` needs from a tower's q and k: one score [H, N] a picture."""
    sides = size.rows * tower.merged, size.columns * tower.merged
    patches = sides[0] * sides[1]
    width = int(tower.settings["hidden_size"]) // tower.heads
    has_cls, scale = tower.kind == "clip", width**-0.5
    if tower.kind != "qwen3-vl":
        shape = pictures, tower.heads, patches + has_cls, width
        query, key = torch.randn(2, *shape).unbind()
        return lambda: whole_pictures(query, key, scale, has_cls).unbind()
    query, key = torch.randn(2, 1, tower.heads, pictures * patches, width).unbind()

    def scores() -> Sequence[Tensor]:
        packed = packed_pictures(query, key, scale, [patches] * pictures)
        return [mean_of_blocks(one, sides, tower.merged) for one in packed.split(patches, dim=-1)]

    return scores


def selection(board: Board, plan: Plan, device: torch.device) -> None:
    """Time every blind method, and the towers, for images of several sizes."""
    with building(device):
        models = {name: build_tower(tower) for name, tower in plan.towers.items()}
    projector = new_projector(plan, device)
    for count in plan.images:
        for size in plan.sizes:

            def measure(until: float, count: int = count, size: Size = size) -> Json:
                items = make_items(plan, size, count * size.crops, projector, device)
                variants: dict[str, Variant] = {}
                with building(device):
                    for name, tower in plan.towers.items():
                        run = tower_run(tower, models[name], size, len(items))
                        variants[name] = Variant(run)
                    scoring = {
                        name: scoring_run(tower, size, len(items))
                        for name, tower in plan.towers.items()
                    }
                for label, keep in KEEPS.items():
                    for method in BLIND:
                        if method != "cls-attention":
                            run = selecting(items, method, keep)
                            variants[f"{method}, {label}"] = Variant(run)
                    for name, scores in scoring.items():
                        run = selecting_by_attention(size, scores, keep)
                        variants[f"cls-attention of {name}, {label}"] = Variant(run)
                found = numbers(in_turn(variants, plan.turns, device, until))
                print_selection(size, count, plan, found)
                return {"items": len(items), "tokens": size.rows * size.columns, "runs": found}

            board.run("selection", f"{size.name}, {images(count)}", measure, least=1)


def selecting(items: Sequence[VisualTokens], method: str, keep: float) -> Callable[[], Any]:
    """Return a selection among items."""
    selector = build(method, {})
    return lambda: select_many(items, selector, keep)


def selecting_by_attention(
    size: Size, scores: Callable[[], Sequence[Tensor]], keep: float
) -> Callable[[], Any]:
    """Return a selection by attention, the attention itself counted."""
    selector = build("cls-attention", {})
    grid = 1, size.rows, size.columns

    def run() -> Any:
        items = [VisualTokens(grid=grid, cls_attention=one) for one in scores()]
        return select_many(items, selector, keep)

    return run


# Prefill and generate --------------------------------------------------------------------------


class Asked:
    """A LLaVA that is asked about some images, in a full prompt and in one that really is short.

    Parameters
    ----------
    model
        The LLaVA.
    images
        How many.
    """

    def __init__(self, model: Any, images: int) -> None:
        vision = model.config.vision_config
        self.model, self.images = model, images
        self.tokens = (vision.image_size // vision.patch_size) ** 2
        self.keep = tokens_kept(KEEPS["1/9"], self.tokens)
        self.full, self.short = (
            {
                name: value.to(model.device)
                for name, value in bench_generate.prompt(images * tokens).items()
            }
            for tokens in (self.tokens, self.keep)
        )
        side = vision.image_size
        self.pixels = torch.randn(images, 3, side, side, device=model.device, dtype=model.dtype)
        self.encoded = tokenprune_hf.encode(model, pixel_values=self.pixels)

    def rows(self) -> list[Tensor]:
        """Encode; return the rows [N, D] of each image."""
        output = self.model.get_image_features(self.pixels, return_dict=True)
        return list(output.pooler_output)

    def encoded_rows(self) -> list[Tensor]:
        """Return the rows of each image that were encoded before."""
        return list(self.encoded.modalities["image"].rows.split(self.tokens))

    def unpruned(self, call: Callable[..., Any]) -> Callable[[], Any]:
        """Return a call with the full prompt, encoding counted."""
        return lambda: call(**self.full, pixel_values=self.pixels)

    def really_short(
        self, call: Callable[..., Any], rows: Callable[[], list[Tensor]]
    ) -> Callable[[], Any]:
        """Return a call with the short prompt and the first rows of each image."""
        return lambda: self._call_with(call, self.short, [one[: self.keep] for one in rows()])

    def unpruned_encoded(self, call: Callable[..., Any]) -> Callable[[], Any]:
        """Return a call with the full prompt and rows that were encoded before."""
        return lambda: self._call_with(call, self.full, self.encoded_rows())

    def pruned(self, call: Callable[..., Any], selector: Selector, encoded: bool) -> Variant:
        """Return a call that is pruned; entering the block is not counted."""
        media = {"encoded": self.encoded} if encoded else {"pixel_values": self.pixels}
        return Variant(
            lambda: call(**self.full, **media),
            lambda: tokenprune_hf.prune(self.model, selector, self.keep),
        )

    def selection(self, selector: Selector) -> Variant:
        """Return the selection alone, reading the question included."""
        vision = vision_model(self.model)

        def run() -> Any:
            items = prompt_items(vision, self.full, self.encoded, selector.needs)
            return select_many(items["image"], selector, self.keep)

        return Variant(run)

    def _call_with(self, call: Callable[..., Any], prompt: Json, rows: list[Tensor]) -> Any:
        make: Any = transformers
        output = make.modeling_outputs.BaseModelOutputWithPooling(pooler_output=rows)
        return call(**prompt, mm_encoder_outputs={"image": output})


def prefill(board: Board, plan: Plan, device: torch.device) -> None:
    """Time prefill and `generate` of a LLaVA with a 7B language model."""
    with building(device):
        model = bench_generate.build_model(plan.vision, plan.text.settings())
    model.generation_config.eos_token_id = None  # random weights may end an answer early
    model.generation_config.pad_token_id = 0
    selectors = {name: build(name, {}) for name in PREFILLED}

    def first(**inputs: Any) -> Any:
        return model(**inputs, logits_to_keep=1)

    def answer(**inputs: Any) -> Any:
        return model.generate(**inputs, max_new_tokens=plan.answer, do_sample=False)

    for count in plan.prompts:

        def measure_prefill(until: float, count: int = count) -> Json:
            asked = Asked(model, count)
            variants = {
                ENCODER: Variant(asked.rows),
                UNPRUNED: Variant(asked.unpruned(first)),
                SHORT: Variant(asked.really_short(first, asked.rows)),
                f"{UNPRUNED}, encoded before": Variant(asked.unpruned_encoded(first)),
                f"{SHORT}, encoded before": Variant(asked.really_short(first, asked.encoded_rows)),
            }
            for name, selector in selectors.items():
                variants[name] = asked.pruned(first, selector, encoded=False)
                variants[f"{name}, encoded before"] = asked.pruned(first, selector, encoded=True)
                variants[f"{name}, selecting"] = asked.selection(selector)
            return finished(f"prefill, {images(count)}", asked, variants, until)

        def measure_answer(until: float, count: int = count) -> Json:
            asked = Asked(model, count)
            variants = {
                UNPRUNED: Variant(asked.unpruned(answer)),
                SHORT: Variant(asked.really_short(answer, asked.rows)),
            }
            for name in RECOMMENDED:
                variants[name] = asked.pruned(answer, selectors[name], encoded=False)
            title = f"generate {plan.answer} tokens, {images(count)}"
            return finished(title, asked, variants, until)

        def finished(
            title: str, asked: Asked, variants: Mapping[str, Variant], until: float
        ) -> Json:
            found = numbers(in_turn(variants, plan.turns, device, until))
            shape = f"{asked.images} x {asked.tokens} visual tokens, {asked.keep} kept of each"
            print_runs(f"{title}: {shape}", found)
            return {
                "images": asked.images,
                "tokens": asked.tokens,
                "kept": asked.keep,
                "runs": found,
            }

        board.run("prefill", f"prefill, {images(count)}", measure_prefill, least=3)
        board.run("prefill", f"generate, {images(count)}", measure_answer, least=5)


# Video -----------------------------------------------------------------------------------------


def video(board: Board, plan: Plan, device: torch.device) -> None:
    """Time the first token of a video, and the selection in it alone."""
    with building(device):
        model = bench_flexselect.build_model(plan.text, plan.video_tower)
    with tempfile.TemporaryDirectory() as folder:
        with building(device):
            bench_flexselect.save_selector(model, Path(folder), plan.lite)
        shared = {"frames_per_set": plan.frames_per_set}
        selectors = {
            "flexselect": build("flexselect", shared),
            "flexselect-lite": build("flexselect-lite", {**shared, "path": folder}),
        }
        for place, frames in enumerate(plan.frames):

            def measure(until: float, frames: int = frames, place: int = place) -> Json:
                bench_flexselect.encode(model, 1)
                found_rows: list[Encoded] = []
                encoding = seconds(
                    lambda: found_rows.append(bench_flexselect.encode(model, frames)), device
                )
                encoded = found_rows[0]
                tokens = len(encoded.modalities["video"].rows) - 1  # one is no frame's
                keep = tokens_kept(VIDEO_KEEP, tokens)
                variants = {
                    UNPRUNED: Variant(bench_flexselect.plain(model, encoded, None)),
                    SHORT: Variant(bench_flexselect.plain(model, encoded, keep)),
                }
                for name, selector in selectors.items():
                    run = bench_flexselect.pruned(model, encoded, selector, keep)
                    alone = bench_flexselect.selection(model, encoded, selector, keep)
                    variants[name] = Variant(run)
                    variants[f"{name}, selecting"] = Variant(alone)
                # The shorter video's runs have warmed up what the longer one's need.
                found = numbers(in_turn(variants, 3, device, until, warm_up=not place))
                title = f"first token, {frames} frames, {tokens:,} visual tokens, {keep:,} kept"
                print_runs(f"{title}; encoder, not counted: {encoding * 1e3:.0f} ms", found)
                return {
                    "tokens": tokens,
                    "kept": keep,
                    "encoder_ms": round(encoding * 1e3, 2),
                    "runs": found,
                }

            board.run("video", f"{frames} frames", measure, least=2 if place == 0 else 10)


# Masks -----------------------------------------------------------------------------------------


def masks(board: Board, plan: Plan, device: torch.device) -> None:
    """Time attention under sparse masks, with and without making the mask, and fused attention."""
    settings = argparse.Namespace(
        heads=plan.heads,
        key_heads=plan.key_heads,
        dim=plan.dim,
        device=device,
        dtype=torch.bfloat16,
    )
    keeps: dict[float, float] = {}
    for length in plan.lengths:

        def measure(until: float, length: int = length) -> Json:
            case = bench_masks.Case(settings, length, plan.mask_images, keeps)
            keeps[DENSITY] = case.keep(DENSITY)  # the longer prompt's density is a little lower
            variants = {"fused": Variant(case.dense)}
            pairs = {}
            for kind in bench_masks.KINDS:
                mask = case.mask(kind, DENSITY)
                ready = Prepared(mask, device)
                pairs[kind] = round(ready.computed, 4)
                variants[f"{kind}, mask made before"] = Variant(prepared_run(case, ready))
                variants[f"{kind}, mask counted"] = Variant(mask_run(case, kind, device))
            more: Json = {}
            if device.type == "cuda":  # elsewhere Triton has no compiler
                small = bench_masks.Case(settings, bench_masks_paged.TRIED, plan.mask_images)
                away = bench_masks_paged.difference(small, [1.0, DENSITY], bench_masks.by_matrix)
                paged = bench_masks_paged.Paged(case)
                more["paged"] = {"difference": away, "visited": paged.visited(DENSITY)}
                for density in (1.0, DENSITY):
                    name = f"paged, heads of density {density:g}"
                    variants[f"{name}, plan made before"] = Variant(paged.run_prepared(density))
                    variants[f"{name}, plan counted"] = Variant(paged.run(density))
            found = numbers(in_turn(variants, plan.turns, device, until))
            kernel = default_kernel(device)
            title = f"attention over {length:,} tokens, kernel {kernel}, density {DENSITY:g}"
            print_runs(title, found)
            if more:
                console.print(
                    f"paged: {more['paged']['visited']:.3f} of the blocks visited; furthest from "
                    f"float64 at {bench_masks_paged.TRIED} tokens: "
                    f"{more['paged']['difference']:.1e}"
                )
            return {"kernel": kernel, "pairs": pairs, "runs": found, **more}

        # Kernels are compiled at the first length; half a minute is not rare.
        board.run("masks", f"{length:,} tokens", measure, least=3)


def prepared_run(case: bench_masks.Case, ready: Prepared) -> Callable[[], Any]:
    """Return attention under a mask that is made ready already."""
    return lambda: ready(case.query, case.key, case.value)


def mask_run(case: bench_masks.Case, kind: str, device: torch.device) -> Callable[[], Any]:
    """Return attention, making its mask and making it ready included."""
    return lambda: Prepared(case.mask(kind, DENSITY), device)(case.query, case.key, case.value)


# Printing --------------------------------------------------------------------------------------


def print_agreement(size: Size, by_method: Mapping[str, int]) -> None:
    """Print how many kept tokens differ."""
    found = ", ".join(f"{name} {count}" for name, count in by_method.items())
    console.print(f"kept tokens that differ from the CPU's, {size.name}: {found}")


def print_selection(size: Size, count: int, plan: Plan, found: Json) -> None:
    """Print a case's times, and their shares of the towers."""
    title = f"selection, {images(count)}, {size.name}: ms, and % of a tower at {' / '.join(KEEPS)}"
    headings = [*(f"{label}, ms" for label in KEEPS), *plan.towers]
    table = table_of(title, "", *headings, words=[""])
    towers = {name: found[name]["ms"] for name in plan.towers}
    table.add_row("tower", *("" for _ in KEEPS), *(f"{ms:.2f} ms" for ms in towers.values()))
    rows = dict.fromkeys(name.rpartition(", ")[0] for name in found if name not in plan.towers)
    for row in rows:
        times = [found[f"{row}, {label}"]["ms"] for label in KEEPS]
        shares = [
            " / ".join(f"{time_ / whole:.1%}" for time_ in times)
            if row.partition(" of ")[2] in ("", tower)
            else ""
            for tower, whole in towers.items()
        ]
        table.add_row(row, *(f"{time_:.3f}" for time_ in times), *shares)
    console.print(table)


def print_runs(title: str, found: Json) -> None:
    """Print times and peaks, by variant."""
    table = table_of(title, "", "ms", "low", "high", "turns", "peak, MiB", words=[""])
    for name, one in found.items():
        peak = "not measured" if one["peak_mib"] is None else f"{one['peak_mib']:.0f}"
        times = (f"{one[which]:.2f}" for which in ("ms", "low", "high"))
        table.add_row(name, *times, str(one["turns"]), peak)
    console.print(table)


def about(plan: Plan, device: torch.device, small: bool) -> Json:
    """Return what is measured on what, and print it."""
    found = {**releases(), "tokenprune": version("tokenprune-vlm")}
    with contextlib.suppress(PackageNotFoundError):
        found["triton"] = version("triton")
    machine: Json = {"device": device_name(device), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine["memory_gib"] = round(properties.total_memory / 2**30, 1)
        machine["multiprocessors"] = properties.multi_processor_count
        machine["CUDA"] = torch.version.cuda
    shapes = {
        "towers": {name: dict(tower.settings) for name, tower in plan.towers.items()},
        "tokens": f"features {plan.features}, embeddings {plan.width}",
        "language model": vars(plan.text),
        "trained selector": vars(plan.lite),
        "prompt": f"{bench_generate.TEXT_BEFORE} + {bench_generate.TEXT_AFTER} tokens of text",
        "attention": f"{plan.heads} heads on {plan.key_heads}, {plan.dim} wide",
    }
    for line in (machine, found, shapes):
        console.print(", ".join(f"{name} {value}" for name, value in line.items()))
    console.print("bfloat16, random weights\n")
    return {
        "small": small,
        "machine": machine,
        "releases": found,
        "shapes": shapes,
        "dtype": "bfloat16",
    }


# Running ---------------------------------------------------------------------------------------

RUNS: dict[str, Callable[[Board, Plan, torch.device], None]] = {
    "agreement": agreement,
    "selection": selection,
    "prefill": prefill,
    "video": video,
    "masks": masks,
}


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=340, help="the whole run (default 340)")
    parser.add_argument("--out", type=Path, default=Path("bench_gpu.json"), help="JSON file")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), help="some sections alone")
    parser.add_argument("--small", action="store_true", help="tiny, on the CPU: that it runs")
    parser.add_argument("--device", help="default: cuda, and with --small cpu")
    arguments = parser.parse_args()

    device = torch.device(arguments.device or ("cpu" if arguments.small else "cuda"))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here. --small runs the same code on the CPU.")
    plan = SMALL if arguments.small else FULL
    quiet()
    torch.manual_seed(0)
    cases = cases_of(plan)
    cases = {name: cases[name] for name in SECTIONS if name in (arguments.only or SECTIONS)}
    description = about(plan, device, arguments.small)
    board = Board.of(arguments.out, description, STARTED, arguments.seconds, cases)
    timer = end_in_time(board)
    with torch.inference_mode():
        for section in cases:
            if time.perf_counter() < board.until(section):
                try:
                    RUNS[section](board, plan, device)
                except Exception as error:  # such as weights that do not fit into memory
                    board.fail(section, error)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    timer.cancel()
    return board.finish()


if __name__ == "__main__":
    sys.exit(main())
