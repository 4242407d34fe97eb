"""What selectors cost beside a CLIP-L/14-336 tower, how they grow, how the estimators agree.

The tower has 24 layers of width 1024 and random weights, the projector is LLaVA-1.5's shape,
1024 -> 4096 -> 4096 with GELU; everything is float32. The projected tokens are the engine's own
work, which it does with or without pruning, and are not counted. Needs the extra ``demo`` and
scipy.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from bench_common import Variant, in_turn, processor, releases_line, seconds
from bench_generate import CLIP_L
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

import tokenprune
from tokenprune import MLPProjector, VisualTokens
from tokenprune.registry import build
from tokenprune.tokens import stack
from tokenprune.tower.attention import cls_row

clock: Callable[[], float] = time.perf_counter
KEEP = 64
HEADS = 16
SHAPES = {  # name -> (C, H, D, layer norm in front)
    "LLaVA-1.5-7B: 1024 -> 4096 -> 4096": (1024, 4096, 4096, False),
    "InternVL-1B: norm 4096 -> 896 -> 896": (4096, 896, 896, True),
}


def make_projector(width: int, hidden: int, out: int, norm: bool) -> MLPProjector:
    """Return a projector with the weights that torch gives new layers."""
    return MLPProjector(
        nn.Linear(width, hidden),
        nn.GELU(),
        nn.Linear(hidden, out),
        nn.LayerNorm(width) if norm else None,
    )


def make_tokens(projector: MLPProjector, total: int, width: int) -> VisualTokens:
    """Return an item of `total` tokens, N(0, 1) features, in one frame."""
    rows = next(side for side in range(int(total**0.5), 0, -1) if total % side == 0)
    features = torch.randn(total, width)
    return VisualTokens(
        grid=(1, rows, total // rows),
        features=features,
        embeddings=projector(features),
        cls_attention=torch.randn(HEADS, total).softmax(-1),
        received_attention=torch.randn(HEADS, total).softmax(-1),
        middle_attention=torch.randn(HEADS, total).softmax(-1),
        wide_attention=torch.randn(total).softmax(-1),
        keys=torch.randn(HEADS, total, width // HEADS),
        projector=projector,
    )


def cost(console: Console, runs: int) -> None:
    """Print each selector's time as a share of the tower's own."""
    tower = CLIPVisionModel(CLIPVisionConfig(**CLIP_L))
    tower.train(False)
    image = torch.randn(1, 3, 336, 336)
    projector = make_projector(*SHAPES["LLaVA-1.5-7B: 1024 -> 4096 -> 4096"])
    tokens = make_tokens(projector, 576, 1024)
    query, key = torch.randn(2, 1, HEADS, 577, 64).unbind()

    def cls_attention() -> None:
        attention = cls_row(query, key, 64**-0.5)[0, :, 1:]
        seen = VisualTokens(grid=tokens.grid, cls_attention=attention)
        tokenprune.select(seen, "cls-attention", KEEP)

    def by_name(method: str) -> Callable[[], object]:
        return lambda: tokenprune.select(tokens, method, KEEP)

    work: dict[str, Callable[[], object]] = {
        "tower": lambda: tower(pixel_values=image),
        "cls-attention": cls_attention,
        **{
            method: by_name(method)
            for method in (
                "zeroth-order",
                "divprune",
                "information",
                "feature-norm",
                "uniform",
                "random",
            )
        },
    }
    once = seconds(by_name("zeroth-order"), clock=clock)
    times = in_turn({name: Variant(call) for name, call in work.items()}, runs, clock=clock)
    table = Table(title=f"cost: N = 576, keep {KEEP}, float32, median of {runs} alternating runs")
    for heading in ("", "ms", "% of tower", "fastest, ms", "% of tower, fastest"):
        table.add_column(heading, justify="left" if not heading else "right")
    whole, best = times["tower"].median, min(times["tower"].seconds)
    for name, one in times.items():
        middle, fastest = one.median, min(one.seconds)
        table.add_row(
            name,
            f"{middle * 1e3:.2f}",
            f"{middle / whole:.2%}",
            f"{fastest * 1e3:.2f}",
            f"{fastest / best:.2%}",
        )
    console.print(table)
    console.print(
        f"zeroth-order's first call, which computes the model's matrix: {once * 1e3:.0f} ms.\n"
        "cls-attention includes computing the CLS row from q and k.\n"
        "Not counted: the projected tokens, which the engine computes anyway.\n"
    )


def growth(console: Console, runs: int) -> None:
    """Print time against N at a fixed K."""
    counts = (576, 2880, 16384)
    projector = make_projector(*SHAPES["LLaVA-1.5-7B: 1024 -> 4096 -> 4096"])
    spent: dict[tuple[str, int], float] = {}
    for total in counts:
        tokens = make_tokens(projector, total, 1024)
        for method in ("cls-attention", "zeroth-order", "information", "feature-norm", "divprune"):
            if method == "divprune" and total > 2880:
                continue
            tokenprune.select(tokens, method, KEEP)
            times = [
                seconds(lambda: tokenprune.select(tokens, method, KEEP), clock=clock)  # noqa: B023
                for _ in range(runs)
            ]
            spent[method, total] = statistics.median(times)
    table = Table(title=f"growth with N at K = {KEEP}, median of {runs} runs: ms (us a token)")
    table.add_column("")
    for total in counts:
        table.add_column(f"N = {total}", justify="right")
    table.add_column(f"time x{counts[-1] / counts[0]:.1f} tokens", justify="right")
    for method in dict.fromkeys(name for name, _ in spent):
        cells = [
            f"{value * 1e3:.1f} ({value / total * 1e6:.1f})"
            if (value := spent.get((method, total))) is not None
            else "-"
            for total in counts
        ]
        last = spent.get((method, counts[-1]))
        ratio = "-" if last is None else f"x{last / spent[method, counts[0]]:.1f}"
        table.add_row(method, *cells, ratio)
    console.print(table)
    console.print(
        "divprune's first pick compares all pairs, by its definition, so it grows with N * N.\n"
    )


def correlations(console: Console, total: int) -> None:
    """Print how each estimator orders tokens, against finite differences at 4,096 directions."""
    from scipy.stats import spearmanr  # here alone, so that other benchmarks do without scipy

    table = Table(
        title=f"Spearman with finite-difference at 4,096 directions, {total} random tokens"
    )
    for heading in ("projector", "f.-d., 64", "jvp, 64", "frobenius", "std/mean of S"):
        table.add_column(heading, justify="left" if heading == "projector" else "right")
    for name, shape in SHAPES.items():
        tokens = make_tokens(make_projector(*shape), total, shape[0])
        batch = stack([tokens], ("features", "embeddings", "projector"))

        def scores(estimator: str, directions: int, seed: int) -> Tensor:
            options = {"estimator": estimator, "directions": directions, "seed": seed}
            return build("zeroth-order", options).score(batch)[0]  # noqa: B023

        # Directions of another seed, so that no estimator shares its draw with the reference.
        reference = scores("finite-difference", 4096, 12345)
        cells = []
        for estimator, seeds in (("finite-difference", 3), ("jvp", 3), ("frobenius", 1)):
            values = [
                float(spearmanr(scores(estimator, 64, seed).numpy(), reference.numpy()).statistic)
                for seed in range(seeds)
            ]
            cells.append(
                f"{values[0]:.4f}" if seeds == 1 else f"{min(values):.3f} - {max(values):.3f}"
            )
        table.add_row(name, *cells, f"{float(reference.std() / reference.mean()):.2%}")
    console.print(table)
    console.print("f.-d.: finite-difference. 64 directions: lowest and highest of three seeds.")


def main() -> None:
    """Run what is asked for."""
    global clock
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each (default 7)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens for the correlations")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own)")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count this process's processor time on one thread: for a machine busy elsewhere",
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--correlations", action="store_true", help="the correlations alone")
    only.add_argument("--cost", action="store_true", help="cost beside the tower alone")
    only.add_argument("--growth", action="store_true", help="growth with N alone")
    arguments = parser.parse_args()
    if arguments.cpu_time:
        clock, arguments.threads = time.process_time, 1
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    console = Console()
    console.print(
        f"{processor()}, {torch.get_num_threads()} threads, {clock.__name__}\n{releases_line()}\n"
    )
    everything = not (arguments.correlations or arguments.cost or arguments.growth)
    parts: list[Callable[[], None]] = []
    if everything or arguments.cost:
        parts.append(lambda: cost(console, arguments.runs))
    if everything or arguments.growth:
        parts.append(lambda: growth(console, min(arguments.runs, 3)))
    if everything or arguments.correlations:
        parts.append(lambda: correlations(console, arguments.tokens))
    with torch.inference_mode():
        for index, part in enumerate(parts):
            if index:
                console.print("\n")  # where scripts/update_docs.py takes parts apart
            part()


if __name__ == "__main__":
    main()
