"""`tokenprune export MODEL OUT`: the command line of `tokenprune_vllm.export`."""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenprune.arguments import Parser, add_model
from tokenprune.packages import TRANSFORMERS, Package
from tokenprune_vllm.serve import add_pruning, pruning_of

HELP = "write a checkpoint that `vllm serve` serves pruned with no further flag"
EXTRA = "vllm"


def needs(arguments: argparse.Namespace) -> tuple[Package, ...]:
    """Return what it imports; vLLM itself is needed where the checkpoint is served."""
    return TRANSFORMERS


def configure(parser: Parser) -> None:
    """Add the arguments."""
    add_model(parser, "a folder, a name on the model hub, or bundled")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to make")
    add_pruning(parser)
    parser.add_argument(
        "--copy", action="store_true", help="copy the weights, also where they could be linked"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the folder and say how to serve it."""
    from tokenprune_vllm.export import export

    pruning, request_methods = pruning_of(arguments)
    out = export(
        arguments.model,
        arguments.out,
        pruning,
        request_methods=request_methods,
        masks=arguments.masks,
        apply=arguments.apply or "drop",
        proportional_attention=arguments.proportional_attention,
        copy=arguments.copy,
    )
    print(f"{out}: serve it with `vllm serve {out}`, or with `tokenprune serve {out}`.")
    return 0
