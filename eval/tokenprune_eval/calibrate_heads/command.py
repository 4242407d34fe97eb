"""`tokenprune calibrate-heads`: which sparse mask each head of a model can do with, as a file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tokenprune.arguments import Parser, add_model, check_at_least
from tokenprune.packages import Package
from tokenprune_eval.packages import TABLES, needs_of_model
from tokenprune_hf.packages import TRANSFORMERS

if TYPE_CHECKING:
    from tokenprune_eval.calibrate_heads.measure import HeadCoverage

HELP = "find the sparse mask each head of a model can do with, for prompts of several images"
EXTRA = "train"


def needs(arguments: argparse.Namespace) -> tuple[Package, ...]:
    """Return what it imports."""
    return (*TRANSFORMERS, *TABLES, *needs_of_model(arguments.model))


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
    check_at_least(arguments, images=2, prompts=1, seed=0, block=1)

    import rich.console
    import torch

    from tokenprune.masks.coverage import thresholds
    from tokenprune_eval.calibrate_heads.measure import find_sinks, measure_heads
    from tokenprune_eval.calibrate_heads.prompts import QUESTION, check_pictures, read_prompts
    from tokenprune_eval.calibrate_heads.report import print_report
    from tokenprune_eval.shared.left_out import LeftOut
    from tokenprune_eval.shared.output import OutputError, prepare_folder
    from tokenprune_eval.shared.progress import TerminalProgress
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
    print_report(console, measured, heads, given.get("alpha"), arguments.out)
    return 0
