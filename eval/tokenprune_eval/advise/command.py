"""`tokenprune advise`: measure where a request's time goes, and say what pruning can save of it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenprune.arguments import (
    Parser,
    add_methods,
    add_model,
    add_options,
    check_at_least,
    options_by_method,
    parse_keep,
)
from tokenprune.baselines import RESIZE
from tokenprune.errors import ConfigError
from tokenprune.media.packages import VIDEO
from tokenprune.packages import Package
from tokenprune_eval.packages import TABLES, needs_of_model
from tokenprune_hf.packages import TRANSFORMERS

if TYPE_CHECKING:
    import torch

    from tokenprune.selectors.base import Selector

HELP = "measure where the time of a request goes, and what pruning can save of it"
EXTRA = "demo"

METHODS = ("information", "relevant-information", RESIZE)
"""Measured by default: what README recommends, blind and by the question, and the baseline."""

KEEPS = ("0.5", "0.25", "0.125", "0.0625")
IMAGE = "640x480"
FRAMES = 32
NEW_TOKENS = 64
_WIDTH = 110
"""Columns where the output goes to no terminal: the table is as wide."""

_DTYPES = ("float32", "bfloat16", "float16")


def needs(arguments: argparse.Namespace) -> tuple[Package, ...]:
    """Return what it imports."""
    video = VIDEO if arguments.video else ()
    return (*TRANSFORMERS, *TABLES, *video, *needs_of_model(arguments.model))


def configure(parser: Parser) -> None:
    """Add the arguments."""
    # A list of words swallows what comes after it, so the model is shown first.
    parser.usage = f"{parser.prog} MODEL [options]"
    add_model(parser, "a checkpoint of transformers, a folder or a name, or bundled")
    what = parser.add_argument_group("what is compared")
    add_methods(
        what,
        "methods that prune before the language model, and resize, the picture made smaller "
        f"(default: {' '.join(METHODS)})",
    )
    what.add_argument(
        "--keep",
        nargs="+",
        metavar="KEEP",
        help="numbers of tokens, or fractions such as 0.25 or 25%% (default: "
        f"{' '.join(KEEPS)}); the unpruned model is run in any case",
    )
    add_options(what)
    request = parser.add_argument_group("the request")
    request.add_argument(
        "--image",
        nargs="+",
        metavar="SIZE",
        help="pixels such as 640x480 or 448, or a file; several make a prompt with several images "
        f"(default: {IMAGE})",
    )
    request.add_argument(
        "--images", type=int, metavar="N", help="images of that size in a request (default: 1)"
    )
    request.add_argument("--video", type=Path, metavar="FILE", help="a video in place of images")
    request.add_argument(
        "--frames",
        type=int,
        metavar="N",
        help=f"frames read of it, spread evenly (default: {FRAMES})",
    )
    asked = request.add_mutually_exclusive_group()
    asked.add_argument("--question", metavar="TEXT", help="what is asked (default: one sentence)")
    asked.add_argument(
        "--prompt-tokens",
        type=int,
        metavar="N",
        help="text tokens of the prompt, the chat template's included, in place of a question",
    )
    request.add_argument(
        "--new-tokens",
        type=int,
        default=NEW_TOKENS,
        metavar="N",
        help="tokens of an answer; some steps are measured and stand for all "
        f"(default: {NEW_TOKENS})",
    )
    request.add_argument(
        "--batch", type=int, default=1, metavar="N", help="requests read together (default: 1)"
    )
    running = parser.add_argument_group("the measurement")
    running.add_argument("--device", metavar="DEVICE", help="cpu or cuda (default: a GPU if any)")
    running.add_argument("--dtype", choices=_DTYPES, help="default: the checkpoint's")
    running.add_argument(
        "--seconds",
        type=int,
        default=60,
        metavar="N",
        help="no turn begins after so many; loading is not counted (default: 60)",
    )
    running.add_argument(
        "--json", type=Path, metavar="FILE", help="also write everything here, every time included"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure, and print what was found."""
    check_at_least(arguments, images=1, frames=1, prompt_tokens=1, new_tokens=1, batch=1, seconds=1)
    _check_media(arguments)
    keeps = _keeps(arguments.keep or KEEPS)
    names = list(dict.fromkeys(arguments.method or METHODS))
    methods = [name for name in names if name != RESIZE]
    options = options_by_method(arguments.option, methods)
    selectors = {name: _selector(name, options.get(name, {})) for name in methods}

    import rich.console
    import torch

    from tokenprune_eval.advise.costs import Costs
    from tokenprune_eval.advise.measure import measure
    from tokenprune_eval.advise.memory import held_by
    from tokenprune_eval.advise.report import about_of, as_json, show
    from tokenprune_eval.advise.request import QUESTION, media_of, question_of_length
    from tokenprune_eval.shared.machine import machine, versions
    from tokenprune_eval.shared.output import write_whole
    from tokenprune_eval.shared.progress import TerminalProgress
    from tokenprune_hf.loading import load

    device = _device(arguments.device)
    media = media_of(
        arguments.image or (IMAGE,), arguments.images, arguments.video, arguments.frames or FRAMES
    )
    console = rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(width=_WIDTH)
    with TerminalProgress(console) as progress:
        with progress.step("loading the model", 1):
            model, processor = load(arguments.model, device=device, dtype=arguments.dtype)
        question = arguments.question or QUESTION
        if arguments.prompt_tokens is not None:
            question = question_of_length(model, processor, media.content, arguments.prompt_tokens)
        text = f"measuring, up to {arguments.seconds} s"
        with progress.step(text, arguments.seconds) as advance:
            measured = measure(
                model,
                processor,
                media,
                question,
                selectors,
                keeps,
                new_tokens=arguments.new_tokens,
                batch=arguments.batch,
                resize=RESIZE in names,
                required=bool(arguments.method),
                limit=arguments.seconds,
                on_part=_counting(advance),
            )
    costs = Costs(measured.parts)
    held = held_by(model.config, model.dtype.itemsize, str(model.dtype).removeprefix("torch."))
    about = about_of(
        arguments.model,
        model,
        machine(),
        versions(),
        {
            "media": media.name,
            "question": question,
            "visual_tokens": round(measured.parts.full.visual),
            "prompt_tokens": round(measured.parts.full.prompt),
            "new_tokens": arguments.new_tokens,
            "batch": arguments.batch,
        },
        torch.get_num_threads(),
    )
    if arguments.json is not None:
        write_whole(arguments.json, as_json(about, measured, costs, held, options))
    show(console, about, measured, costs, held)
    if arguments.json is not None:
        console.print(str(arguments.json), highlight=False, soft_wrap=True, markup=False)
    return 0


def _counting(advance: Callable[[int], None]) -> Callable[[], None]:
    """Return what tells a progress bar the whole seconds that have gone by at each call."""
    started, told = time.monotonic(), 0

    def count() -> None:
        nonlocal told
        passed = int(time.monotonic() - started)
        advance(passed - told)
        told = passed

    return count


def _check_media(arguments: argparse.Namespace) -> None:
    """Raise for arguments that do not go together."""
    if arguments.video is not None and (arguments.image or arguments.images):
        raise ConfigError(
            "a request has images or a video here. Give --video, or --image and --images."
        )
    if arguments.video is None and arguments.frames is not None:
        raise ConfigError(
            f"--frames {arguments.frames} are of a video, and none is given. Add --video FILE, or "
            "leave --frames out."
        )


def _keeps(given: Sequence[str]) -> list[int | float]:
    """Return budgets, each once, the largest share first as given."""
    from tokenprune.budget import keeps_all

    keeps = [keep for text in given if not keeps_all(keep := parse_keep(text))]
    if not keeps:
        raise ConfigError(
            f"--keep {' '.join(given)} keeps every token, which is the unpruned model. Give a "
            "budget below 1.0, such as 0.25."
        )
    return list(dict.fromkeys(keeps))


def _selector(name: str, options: dict[str, Any]) -> Selector:
    """Return a method that prunes before the language model.

    Raises
    ------
    ConfigError
        If tokens leave inside it, or the method is another kind of thing.
    """
    from tokenprune.config import PruningConfig
    from tokenprune.selectors.base import Selector

    built = PruningConfig(name, 1.0, options=options).built()
    if not isinstance(built, Selector):
        raise ConfigError(
            f"--method {name} has tokens leave inside the language model, whose layers then read "
            "different numbers of them, and advise times it at one number. Measure it with "
            "`tokenprune eval`, or give a method that prunes before (see `tokenprune methods`)."
        )
    return built


def _device(name: str | None) -> torch.device | None:
    """Return the device of that name; None for the one that models are loaded to.

    Raises
    ------
    ConfigError
        If there is no such device.
    """
    import torch

    if name is None:
        return None
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for a GPU
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"--device {name} cannot be used here ({reason}). Give cpu, or cuda where there is a "
            "GPU of NVIDIA."
        ) from None
    return device
