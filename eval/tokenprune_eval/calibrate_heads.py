"""`tokenprune calibrate-heads`: which sparse mask each head of a model can do with, as a file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenprune.arguments import Parser, add_model
from tokenprune.errors import ConfigError, reason_of
from tokenprune.packages import Package
from tokenprune_eval.packages import TABLES, needs_of_model
from tokenprune_hf.packages import TRANSFORMERS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from tokenprune.masks.heads import HeadCategories
    from tokenprune.masks.sinks import Sinks
    from tokenprune_hf.calibrate_heads import HeadCoverage

HELP = "find the sparse mask each head of a model can do with, for prompts of several images"
EXTRA = "train"


def needs(arguments: argparse.Namespace) -> tuple[Package, ...]:
    """Return what it imports."""
    return (*TRANSFORMERS, *TABLES, *needs_of_model(arguments.model))


_ALPHAS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
"""What else --alpha might have been."""


def configure(parser: Parser) -> None:
    """Add the arguments."""
    # A list of files swallows what comes after it, so the model is shown first.
    parser.usage = f"{parser.prog} MODEL --data DATA [DATA ...] --out FILE [options]"
    add_model(parser, "a checkpoint of transformers, a folder or a name, or bundled")
    parser.add_argument(
        "--data",
        nargs="+",
        action="extend",
        type=Path,
        required=True,
        metavar="DATA",
        help='a file with lines of {"images": [paths relative to the file], "question": text}, or '
        "a folder of pictures; all are opened before anything is run, and a prompt that cannot be "
        "used is left out",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="where the heads are written, JSON"
    )
    parser.add_argument(
        "--images",
        type=int,
        default=4,
        metavar="N",
        help="pictures of each prompt that is made from a folder (default: 4)",
    )
    parser.add_argument(
        "--prompts", type=int, default=32, metavar="N", help="the most prompts (default: 32)"
    )
    parser.add_argument(
        "--question", metavar="TEXT", help="asked about a folder's pictures (default: a plain one)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    parser.add_argument(
        "--block",
        type=int,
        default=128,
        metavar="N",
        help="queries, and keys, that are computed or skipped together, for the density "
        "(default: 128)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the model (default: the checkpoint's); coverages are float32 in any case",
    )
    limits = parser.add_argument_group(
        "thresholds", "BlindSight publishes none: these are reconstructions, and their defaults too"
    )
    limits.add_argument(
        "--alpha",
        nargs="+",
        type=float,
        metavar="SHARE",
        help="of the attention a mask must hold; two: at the first and the last layer, linear in "
        "between (default: 0.9)",
    )
    limits.add_argument(
        "--dense",
        type=float,
        metavar="SHARE",
        help="a head that no mask serves on more than this share of the prompts is dense "
        "(default: 0.25)",
    )
    for name in ("sink", "intra"):
        limits.add_argument(
            f"--{name}",
            type=float,
            metavar="SHARE",
            help=f"a head is {name} from this share of the prompts on (default: 0.75)",
        )


def run(arguments: argparse.Namespace) -> int:
    """Find, measure, choose, write the file and print the tables."""
    for name, least in (("images", 2), ("prompts", 1), ("seed", 0), ("block", 1)):
        value = getattr(arguments, name)
        if value < least:
            raise ConfigError(f"--{name} {value} is too small. Give at least {least}.")

    import rich.console
    import torch

    from tokenprune.masks.coverage import thresholds
    from tokenprune_eval.shared.output import OutputError, prepare_folder
    from tokenprune_eval.shared.progress import TerminalProgress
    from tokenprune_hf.calibrate_heads import (
        QUESTION,
        check_pictures,
        find_sinks,
        measure_heads,
        read_prompts,
    )
    from tokenprune_hf.failures import LeftOut
    from tokenprune_hf.layout import identity_of
    from tokenprune_hf.loading import load

    names = ("alpha", "dense", "sink", "intra")
    given = {name: getattr(arguments, name) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    thresholds(1, **given)  # whatever is wrong with them is said now
    if arguments.out.is_dir():
        raise OutputError(f"{arguments.out} is a folder; give --out a file, such as heads.json.")
    prepare_folder(arguments.out.parent)
    prompts = read_prompts(
        arguments.data,
        arguments.images,
        arguments.prompts,
        question=QUESTION if arguments.question is None else arguments.question,
        seed=arguments.seed,
    )
    console = rich.console.Console()
    if len(prompts) < arguments.prompts:
        console.print(f"there is data for {len(prompts)} of {arguments.prompts} prompts")
    pictures = len({file for prompt in prompts for file in prompt.images})
    done = 0
    with TerminalProgress(console) as progress:
        left_out = LeftOut(progress.say)
        with progress.step("opening the pictures", pictures) as advance:
            prompts = check_pictures(prompts, lambda: advance(1), left_out)
            left_out.check("prompt", len(prompts))
        with progress.step("loading the model", 1):
            model, processor = load(arguments.model)
            if arguments.dtype is not None:
                model = model.to(getattr(torch, arguments.dtype))
        limits = thresholds(identity_of(model).layers, **given)
        with progress.step(f"looking for sinks, {len(prompts)} prompts", len(prompts)) as advance:
            sinks = find_sinks(
                model, processor, prompts, on_prompt=lambda: advance(1), left_out=left_out
            )
        prompts = [one for one in prompts if one.name not in left_out.reasons]
        left_out.check("prompt", len(prompts))
        try:
            with progress.step(f"measuring, {len(prompts)} prompts", len(prompts)) as advance:

                def keep_prompt(measured: HeadCoverage) -> None:
                    nonlocal done
                    with _writing(arguments.out):
                        measured.choose(limits).save(arguments.out)
                    done = len(measured.prompts)
                    advance(1)

                measured = measure_heads(
                    model,
                    processor,
                    prompts,
                    sinks,
                    block=arguments.block,
                    on_prompt=keep_prompt,
                    left_out=left_out,
                )
        except KeyboardInterrupt:
            if done:
                print(
                    f"\nthe heads by {done} of {len(prompts)} prompts are in {arguments.out}",
                    file=sys.stderr,
                )
            raise
    heads = measured.choose(limits)
    _report(console, measured, heads, given.get("alpha"), arguments.out)
    return 0


@contextmanager
def _writing(file: Path) -> Iterator[None]:
    from tokenprune_eval.shared.output import OutputError

    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{file} cannot be written: {reason_of(error)}. Make room, or give another place."
        ) from None


# What is printed --------------------------------------------------------------------------------


def _report(
    console: Console,
    measured: HeadCoverage,
    heads: HeadCategories,
    alpha: Sequence[float] | None,
    file: Path,
) -> None:
    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    say("")
    console.print(_layers(heads))
    say("")
    console.print(_sweep(measured, heads, alpha))
    say("")
    for line in _about_sinks(heads, measured.sinks):
        say(line)
    say(f"attention held, the median over heads: {_held(measured)}")
    say(
        f"density: {_percent(heads.density)} % of the causal blocks of {heads.block} are computed, "
        f"the mean over {heads.prompts} prompts"
    )
    if all(bool((one.density >= one.density[:, -1:]).all()) for one in measured.prompts):
        say(
            f"no mask skips a block of {heads.block} in these prompts, whatever --alpha is: give "
            "larger or more images, or a smaller --block"
        )
    elif heads.counts()["dense"] == heads.model.heads * heads.model.layers:
        say("all heads are dense, so nothing is skipped: a lower --alpha takes more masks")
    say(f"the heads are in {file}; use them with: tokenprune_hf.sparse(model, {str(file)!r})")


def _held(measured: HeadCoverage) -> str:
    import torch

    from tokenprune.masks.patterns import CATEGORIES

    heads = torch.stack([one.held for one in measured.prompts]).mean(dim=0).flatten(0, 1)
    middle = heads.quantile(0.5, dim=0).tolist()[:-1]
    named = zip(CATEGORIES[:-1], middle, strict=True)
    return ", ".join(f"{name} {_percent(share)} %" for name, share in named)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        collapse_padding=True,
        pad_edge=False,
        show_edge=False,
    )
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _layers(heads: HeadCategories) -> Table:
    from collections import Counter

    from tokenprune.masks.patterns import CATEGORIES

    table = _table("heads of each category", "layer", "alpha", *CATEGORIES)
    shares = heads.thresholds.alpha
    for number, (layer, share) in enumerate(zip(heads.categories, shares, strict=True)):
        found: Any = Counter(layer)
        cells = (str(found[name]) if found[name] else "" for name in CATEGORIES)
        table.add_row(str(number), f"{share:.3g}", *cells)
    table.add_section()
    table.add_row("all", "", *(str(count) for count in heads.counts().values()), style="bold")
    return table


def _sweep(measured: HeadCoverage, heads: HeadCategories, alpha: Sequence[float] | None) -> Table:
    """Return what other alphas would have given; the measurement is the same."""
    from dataclasses import replace

    from tokenprune.masks.patterns import CATEGORIES

    table = _table("other alphas, from the same measurement", "alpha", "density, %", *CATEGORIES)
    table.add_column("", no_wrap=True)
    own = f"{heads.thresholds.alpha[0]:.3g}"
    if alpha is not None and len(set(alpha)) > 1:
        own = f"{alpha[0]:.3g} to {alpha[-1]:.3g}"
    layers = heads.model.layers
    rows = [
        (share, f"{share:.3g}", measured.choose(replace(heads.thresholds, alpha=(share,) * layers)))
        for share in _ALPHAS
        if f"{share:.3g}" != own
    ]
    rows.append((sum(heads.thresholds.alpha) / layers, own, heads))
    for _, name, one in sorted(rows, key=lambda row: row[0]):
        cells = (name, _percent(one.density), *map(str, one.counts().values()))
        if one is heads:
            table.add_row(*cells, "chosen", style="bold green")
        else:
            table.add_row(*cells)
    return table


def _about_sinks(heads: HeadCategories, sinks: Sinks) -> Iterator[str]:
    """Yield what was found, and what could not be looked for."""
    if heads.sinks:
        places = (f"{one}" if one < 0 else f"+{one}" for one in heads.sinks)
        yield f"sinks in an image (+0 its first token, -1 its last): {', '.join(places)}"
    else:
        yield "sinks in an image: no place is one in half of the images"
    if not sinks.attended_in:
        yield "attention by later images could not be compared: images of 10 tokens or fewer"
    if not sinks.can_be_massive:
        yield (
            f"massive activations could not be looked for: hidden states of {sinks.width} numbers "
            f"cannot be {sinks.tau:g} times their root mean square"
        )
    elif not sinks.dimensions:
        yield "massive activations: none, in the first token and at the ends of images"
    elif not sinks.tokens:
        yield f"massive activations: dimensions {_list(sinks.dimensions)}; none inside images"
    else:
        share = _percent(sinks.covered / sinks.tokens)
        yield (
            f"massive activations: dimensions {_list(sinks.dimensions)}; {sinks.tokens} tokens of "
            f"{sinks.images} images, {share} % of them at these places"
        )


def _list(numbers: Sequence[int], most: int = 8) -> str:
    shown = ", ".join(map(str, numbers[:most]))
    return shown if len(numbers) <= most else f"{shown} and {len(numbers) - most} more"
