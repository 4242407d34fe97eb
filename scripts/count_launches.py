"""How many kernels a selection launches and how often it waits for the device, without a GPU.

Three tables: every method on the items of a batch; one pruned forward of tiny models in
transformers; one encoder batch in vLLM's worker. `tokenprune.launches` counts: tensors say that
they are on a GPU and are computed on the CPU, so no time is measured. Each is counted on the
second call, when what is worked out once per model is there. Run it from a checkout; it needs the
extras ``hf`` and ``demo``, and vLLM for the last table.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import tokenprune
from tokenprune import MLPProjector, VisualTokens
from tokenprune.errors import SelectorError
from tokenprune.launches import Counted, Frame, Launch, counting, on_device
from tokenprune.registry import build
from tokenprune.selecting import select_many

ROOT = Path(__file__).parents[1]
WIDTH, HEADS = 1024, 16
"""Of a CLIP-L tower, and of embeddings; a sum over rows of twice the width is one launch more."""
SHAPES = {576: ((1, 24, 24), (16, 64, 256)), 1200: ((1, 30, 40), (16, 133, 256))}
"""N -> grid and budgets."""
MODELS = {"llava": ("ti", "titi"), "qwen2_5_vl": ("ti", "titi")}
"""Tiny model -> prompts of one call: an image, and two of them."""
IN_MODELS = ("cls-attention", "divprune", "zeroth-order", "information", "relevant-information")
IMAGES = {
    "1": [(1, 8, 8)],
    "4": [(1, 8, 8)] * 4,
    "4, sizes differ": [(1, 8, 8), (1, 6, 10), (1, 4, 5), (1, 7, 7)],
}
"""What is encoded together -> frames, rows and columns of each image."""
IN_WORKER = ("feature-norm", "divprune", "zeroth-order", "information")


def in_greedy(frame: Frame) -> bool:
    """Say whether a frame is the part of a method that picks one token after the other."""
    return frame.module.startswith("tokenprune.greedy") or frame.function in (
        "pick_diverse",
        "pick_informative",
    )


def is_ours(launch: Launch) -> bool:
    """Say whether the project's own code launches it, and not the engine."""
    return launch.made_by("tokenprune", "tokenprune_hf", "tokenprune_vllm")


def twice(call: Callable[[], object], run_kernels: bool = False) -> Counted:
    """Return what the second of two calls launches.

    Triton kernels are counted and not run unless that is asked for: an interpreter takes its time.
    """
    for _ in range(2):
        # Kernels that do not run choose nothing, which is found at the end of a call.
        with torch.no_grad(), counting(run_kernels) as counted, suppress(SelectorError):
            call()
    return counted


def methods() -> Iterator[str]:
    """Yield the methods that need no trained selector."""
    return (name for name in tokenprune.methods() if name != "flexselect-lite")


def drawn_item(grid: tuple[int, int, int], seed: int, projector: MLPProjector) -> VisualTokens:
    """Return a random item with everything that methods look at."""
    generator = torch.Generator().manual_seed(seed)
    total = grid[0] * grid[1] * grid[2]

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return VisualTokens(
        grid=grid,
        features=drawn(total, WIDTH),
        embeddings=drawn(total, WIDTH),
        cls_attention=drawn(HEADS, total).softmax(-1),
        query_attention=drawn(HEADS, 8, total).softmax(-1),
        question=torch.arange(8),
        question_embeddings=drawn(8, WIDTH),
        received_attention=drawn(HEADS, total).softmax(-1),
        middle_attention=drawn(HEADS, total).softmax(-1),
        wide_attention=drawn(total).softmax(-1),
        keys=drawn(HEADS, total, WIDTH // HEADS),
        image_embeddings=drawn(total, WIDTH),
        text_embeddings=drawn(1, WIDTH),
        frame_features=drawn(grid[0], WIDTH),
        pooling_attention=drawn(total).softmax(-1),
        projector=projector,
    )


def make_item(grid: tuple[int, int, int], seed: int, projector: MLPProjector) -> VisualTokens:
    """Return a random item on the device."""
    item: VisualTokens = on_device(drawn_item(grid, seed, projector))
    return item


def count_methods(console: Console, names: Sequence[str], shapes: Sequence[int]) -> None:
    """Print what each method launches for one image and for a batch of 4."""
    table = Table(title=f"methods: width {WIDTH}, float32, second call")
    for heading in ("method", "N", "K", "images", "kernels, greedy", "kernels", "waits"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    layers = nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)
    first, activation, second = (layer.eval() for layer in layers)
    projector = MLPProjector(first, activation, second)
    for name in names:
        for total in shapes:
            grid, budgets = SHAPES[total]
            items = [make_item(grid, seed, projector) for seed in range(4)]
            for keep in budgets:
                for images in (1, 4):
                    counted = twice(
                        lambda: select_many(items[:images], build(name, {}), keep)  # noqa: B023
                    )
                    greedy = counted.where(lambda launch: launch.inside(in_greedy))
                    numbers = (total, keep, images, greedy.kernels, counted.kernels, counted.waits)
                    table.add_row(name, *map(str, numbers))
        table.add_section()
    console.print(table)


def count_models(console: Console, names: Sequence[str], places: bool) -> None:
    """Print what one pruned forward of tiny models in transformers launches."""
    sys.path.insert(0, str(ROOT))
    import transformers

    import tokenprune_hf
    from tests.hf.models import TINY, prompt

    table = Table(title=f"transformers {transformers.__version__}: one forward, keep 0.25")
    for heading in (
        *("model", "method", "images", "ours: kernels", "ours: waits"),
        *("all: kernels", "all: waits", "unpruned: kernels", "unpruned: waits"),
    ):
        table.add_column(heading, justify="left" if heading in ("model", "method") else "right")
    waiting: list[str] = []
    for model_name, prompts in MODELS.items():
        tiny = TINY[model_name]
        model = on_device(tiny.model())
        for text in prompts:
            inputs = on_device(prompt(tiny, [text]))
            plain = twice(lambda: model(**inputs), run_kernels=True)  # noqa: B023
            for name in names:
                with tokenprune_hf.prune(model, name, keep=0.25):
                    counted = twice(lambda: model(**inputs), run_kernels=True)  # noqa: B023
                own = counted.where(is_ours)
                numbers = (own.kernels, own.waits, counted.kernels, counted.waits)
                cells = (text.count("i"), *numbers, plain.kernels, plain.waits)
                table.add_row(model_name, name, *map(str, cells))
                waiting += _places(f"{model_name}, {name}, {text.count('i')} images", own)
        table.add_section()
    console.print(table)
    if places:
        console.print("\n".join(waiting), highlight=False)


def count_worker(console: Console, names: Sequence[str], places: bool) -> None:
    """Print what one encoder batch launches in vLLM's worker, behind vLLM's own encoder.

    No engine is started: a projector on random features stands for the model, so methods that look
    at the tower's attention, or that read the question, are not counted here.
    """
    try:
        import vllm
    except ImportError:
        console.print("vLLM is not installed: its worker was not counted.")
        return
    sys.path.insert(0, str(ROOT))
    from tests.vllm.worker_calls import worker_call

    table = Table(
        title=f"vLLM {vllm.__version__}: one encoder batch of Qwen2-VL in the worker, K 8"
    )
    for heading in ("method", "images", "ours: kernels", "ours: waits"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    from tokenprune_vllm import metrics

    folder = tempfile.TemporaryDirectory()  # where the worker writes its times
    os.environ[metrics.DIRECTORY] = folder.name
    waiting: list[str] = []
    for name in names:
        for images, grids in IMAGES.items():
            own = twice(worker_call(name, grids), run_kernels=True).where(is_ours)
            table.add_row(name, *map(str, (images, own.kernels, own.waits)))
            waiting += _places(f"vLLM, {name}, {images}", own)
    console.print(table)
    if places:
        console.print("\n".join(waiting), highlight=False)


def _places(what: str, counted: Counted) -> list[str]:
    return [f"{what}:", *(f"  {count:3}  {place}" for place, count in counted.waiting())]


def main() -> None:
    """Count what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--methods", nargs="*", help="these methods alone")
    parser.add_argument("--tokens", nargs="*", type=int, choices=SHAPES, help="these N alone")
    parser.add_argument("--places", action="store_true", help="where the adapters wait, by line")
    parser.add_argument(
        "--only", nargs="*", choices=("methods", "transformers", "vllm"), help="these tables alone"
    )
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    from tokenprune_eval.shared.machine import machine, versions

    console = Console(width=144)
    console.print(", ".join(f"{name} {value}" for name, value in machine().items()))
    console.print(", ".join(f"{name} {value}" for name, value in versions().items()), "\n")
    wanted = arguments.methods or list(methods())
    tables = arguments.only or ("methods", "transformers", "vllm")
    if "methods" in tables:
        count_methods(console, wanted, arguments.tokens or list(SHAPES))
    if "transformers" in tables:
        count_models(console, [name for name in IN_MODELS if name in wanted], arguments.places)
    if "vllm" in tables:
        count_worker(console, [name for name in IN_WORKER if name in wanted], arguments.places)


if __name__ == "__main__":
    main()
