"""`tokenprune train-selector`: a small selector that learns how a model ranks visual tokens."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenprune.arguments import Parser, add_model
from tokenprune.errors import ConfigError, InputFileError, reason_of
from tokenprune.media.packages import VIDEO
from tokenprune.packages import Package, check_packages
from tokenprune.providers import model_path
from tokenprune_eval.packages import TABLES
from tokenprune_hf.packages import TRANSFORMERS

if TYPE_CHECKING:
    from tokenprune_hf.lite.model import LiteModel

HELP = "train a small selector that ranks visual tokens as a model's own layer does"
EXTRA = "train"


def needs(arguments: argparse.Namespace) -> tuple[Package, ...]:
    """Return what it imports."""
    return (*TRANSFORMERS, *TABLES, Package("scipy"))


_DECODER = {
    "width": "hidden_size",
    "mlp_width": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
}
"""Argument -> its name in the decoder's config."""


def configure(parser: Parser) -> None:
    """Add the arguments."""
    add_model(
        parser,
        "the checkpoint to learn from: a folder, a name that transformers can find, or bundled",
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help='JSON Lines, {"video": PATH, "question": TEXT} or {"image": PATH, "question": TEXT}; '
        "paths relative to the file",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="where the selector is saved"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="FOLDER",
        help="where the teacher's rankings are kept for the next run (default: OUT/teacher)",
    )
    teacher = parser.add_argument_group("the teacher's ranking")
    teacher.add_argument(
        "--layer",
        type=int,
        help="reference layer (default: the published one, see find-layer)",
    )
    teacher.add_argument("--reduction", choices=("max", "mean"), default="max")
    teacher.add_argument("--frames", type=int, default=64, help="of each video (default: 64)")
    shape = parser.add_argument_group(
        "the selector's decoder (defaults: the shape of the paper's 0.5 B)"
    )
    shape.add_argument("--width", type=int, default=896)
    shape.add_argument("--mlp-width", type=int, default=4864)
    shape.add_argument("--layers", type=int, default=24)
    shape.add_argument("--heads", type=int, default=14)
    shape.add_argument("--kv-heads", type=int, default=2)
    shape.add_argument(
        "--init-from",
        metavar="MODEL",
        help="take shape and weights of the language model of a Qwen2 checkpoint",
    )
    recipe = parser.add_argument_group("training (defaults: the paper's)")
    recipe.add_argument("--loss", choices=("spearman", "l1"), default="spearman")
    recipe.add_argument("--temperature", type=float, default=1e-4, help="of the soft ranks")
    recipe.add_argument("--epochs", type=int, default=1)
    recipe.add_argument("--batch", type=int, default=1, help="examples a step")
    recipe.add_argument("--learning-rate", type=float, default=1e-5)
    recipe.add_argument("--warmup", type=float, default=0.03, help="share of the steps")
    recipe.add_argument("--weight-decay", type=float, default=0.0)
    recipe.add_argument(
        "--held-out", type=float, default=0.1, metavar="SHARE", help="of the files (default: 0.1)"
    )
    recipe.add_argument("--seed", type=int, default=0)


def run(arguments: argparse.Namespace) -> int:
    """Rank, train, save."""
    from rich.console import Console

    from tokenprune.selectors.flexselect import FlexSelect
    from tokenprune_eval.shared.left_out import LeftOut
    from tokenprune_eval.shared.progress import TerminalProgress
    from tokenprune_eval.train.data import rank, read_data
    from tokenprune_eval.train.training import Recipe, split, train
    from tokenprune_hf.loading import load

    recipe = Recipe(
        **{
            name: getattr(arguments, name)
            for name in (
                "loss",
                "temperature",
                "epochs",
                "batch",
                "learning_rate",
                "warmup",
                "weight_decay",
                "seed",
            )
        }
    )
    teacher = FlexSelect(layer=arguments.layer, reduction=arguments.reduction)
    asked = read_data(arguments.data)
    if any(one.kind == "video" for one in asked):
        check_packages(VIDEO, EXTRA, "reading the videos")
    if arguments.out.exists() and not arguments.out.is_dir():
        raise InputFileError(f"--out {arguments.out} is a file; give a folder.")
    console = Console()
    model, processor = load(arguments.model)
    cache = arguments.cache or arguments.out / "teacher"
    with (
        TerminalProgress(console) as progress,
        progress.step("teacher's rankings", len(asked)) as advance,
    ):
        files = rank(
            model,
            processor,
            asked,
            cache,
            teacher,
            arguments.frames,
            lambda: advance(1),
            LeftOut(progress.say),
        )
    learnt, held_out = split(files, arguments.held_out, recipe.seed)
    features, _, _ = learnt[0].tensors()
    student = _build(arguments, model.config, features.shape[1], recipe, len(learnt))
    student.to(model.device)
    parameters = sum(value.numel() for value in student.parameters())
    del model
    console.print(
        f"selector of {parameters:,} parameters; {len(learnt):,} examples to learn from, "
        f"{len(held_out):,} held out"
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    steps = recipe.steps(len(learnt))
    with (
        (arguments.out / "training.jsonl").open("w", encoding="utf-8") as log,
        TerminalProgress(console) as progress,
        progress.step("training", steps) as advance,
    ):

        def say(news: dict[str, Any]) -> None:
            seconds = round(time.monotonic() - started, 1)
            if "agreement" in news:
                progress.say(f"epoch {news['epoch']}, {seconds:.0f} s: {news['agreement']}")
                news = {**news, "agreement": asdict(news["agreement"])}
            else:
                advance(1, f"training, loss {news['loss']:.4f}")
            log.write(json.dumps({**news, "seconds": seconds}) + "\n")

        best = train(student, learnt, held_out, recipe, arguments.out, say)
    console.print(f"held-out files: {best}")
    console.print(
        f"{arguments.out}: --method flexselect-lite --option path={arguments.out}", soft_wrap=True
    )
    return 0


def _build(
    arguments: argparse.Namespace, config: Any, features: int, recipe: Any, examples: int
) -> LiteModel:
    """Return an untrained selector of the shape asked for."""
    import torch

    from tokenprune_hf.lite.model import LiteConfig, LiteModel

    decoder: dict[str, Any] = {name: getattr(arguments, own) for own, name in _DECODER.items()}
    for name, value in decoder.items():
        if value < 1:
            raise ConfigError(f"the decoder's {name}={value} must be at least 1.")
    if arguments.width % arguments.heads or arguments.heads % arguments.kv_heads:
        raise ConfigError(
            f"--width {arguments.width} must be a multiple of --heads {arguments.heads}, and that "
            f"one of --kv-heads {arguments.kv_heads}."
        )
    fill: Callable[[LiteModel], None] | None = None
    if arguments.init_from:
        decoder, fill = _from_checkpoint(arguments.init_from)
    torch.manual_seed(recipe.seed)
    student = LiteModel(
        LiteConfig(
            features=features,
            model_type=config.model_type,
            vocab_size=config.get_text_config().vocab_size,
            decoder=decoder,
            reduction=arguments.reduction,
            trained={
                **asdict(recipe),
                "layer": arguments.layer,
                "frames": arguments.frames,
                "examples": examples,
            },
        )
    )
    if fill is not None:
        fill(student)
    return student


def _from_checkpoint(name: str) -> tuple[dict[str, Any], Callable[[LiteModel], None]]:
    """Return the decoder's settings in a Qwen2 checkpoint, and what copies its weights.

    The word embeddings are copied where the vocabulary is the same, and learnt anew where not.
    """
    import transformers

    make: Any = transformers
    try:
        found = make.AutoModel.from_pretrained(model_path(name), dtype="float32")
    except Exception as error:  # what is wrong with a checkpoint can show in any way
        raise InputFileError(f"--init-from {name} cannot be loaded ({reason_of(error)}).") from None
    source = getattr(found, "language_model", found)
    if source.config.model_type != "qwen2":
        raise ConfigError(
            f"--init-from {name} holds a language model of the type {source.config.model_type!r}; "
            "the selector's decoder is a Qwen2. Leave it out to train from random weights."
        )
    left_out = {"vocab_size", "tie_word_embeddings", "dtype", "_name_or_path", "architectures"}
    settings = source.config.to_diff_dict()
    decoder = {name: settings[name] for name in settings if name not in left_out}
    for own in _DECODER.values():
        decoder[own] = getattr(source.config, own)

    def fill(student: LiteModel) -> None:
        state = source.state_dict()
        words = "embed_tokens.weight"
        if state[words].shape != student.decoder.state_dict()[words].shape:
            del state[words]
        student.decoder.load_state_dict(state, strict=False)

    return decoder, fill
