"""`tokenprune serve`: vLLM's own OpenAI-compatible server, with images and videos pruned."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from tokenprune.arguments import (
    Parser,
    add_keep,
    add_method,
    add_model,
    add_options,
    add_positions,
    add_scope,
    options_by_method,
    parse_keep,
)
from tokenprune.baselines import resizes
from tokenprune.errors import ConfigError, InputFileError, OptionError, reason_of
from tokenprune.packages import TRANSFORMERS, Package
from tokenprune.providers import model_path
from tokenprune_vllm.packages import VLLM

if TYPE_CHECKING:
    from tokenprune.config import Application, PruningConfig

HELP = "serve a model through vLLM, pruned; arguments it does not know go to `vllm serve`"
EXTRA = "vllm"
TAKES_MORE = True


def needs(arguments: argparse.Namespace) -> tuple[Package, ...]:
    """Return what it imports."""
    return (*VLLM, *TRANSFORMERS)


def configure(parser: Parser) -> None:
    """Add the arguments; all others are vLLM's."""
    add_model(parser, "a folder, a name on the model hub, or bundled; comes first")
    add_pruning(parser)
    parser.add_argument(
        "--allow-request-keep",
        action="store_true",
        help="let a request ask for its own keep, method, no pruning, no masks, tokens dropped and "
        "not hidden, or tokens not counted",
    )


def add_pruning(parser: Parser) -> None:
    """Add the arguments that say how to prune; `serve` and `export` share them."""
    parser.add_argument(
        "--pruning",
        type=Path,
        metavar="FILE",
        help="a PruningConfig as JSON, which calibrate and find-layer write, in place of --method, "
        "--keep, --positions and --scope",
    )
    add_method(parser, "see `tokenprune methods`")
    add_keep(parser)
    add_positions(parser)
    add_scope(parser)
    add_options(parser)
    parser.add_argument(
        "--request-method",
        "--request-methods",
        dest="request_method",
        nargs="+",
        action="extend",
        default=[],
        metavar="METHOD",
        help="methods, beside --method, that a request may ask for; with `resize` among them it "
        "may have its pictures made smaller",
    )
    parser.add_argument(
        "--masks",
        metavar="FILE",
        help="a heads file, which calibrate-heads writes, or pooled:0.25 for a share of blocks "
        "chosen from the data: prompts are read under these sparse masks; without --method and "
        "--keep every token stays",
    )
    parser.add_argument(
        "--apply",
        choices=("drop", "mask"),
        help="what becomes of tokens that are not selected: they leave the prompt (drop, the "
        "default), or stay in it and are hidden (mask)",
    )
    parser.add_argument(
        "--proportional-attention",
        action="store_true",
        help="a kept token counts as often as there are tokens it stands for",
    )


def run(arguments: argparse.Namespace) -> int:
    """Start the server in the place of this process."""
    command = server_command(arguments)
    print(f"tokenprune: {level_of(arguments)}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os.execv(command[0], command)


def level_of(arguments: argparse.Namespace) -> str:
    """Say how well the model is supported, in a sentence."""
    from tokenprune_vllm.engine import read_config
    from tokenprune_vllm.lookup import architecture_of

    revision = _value(arguments.more, "--revision")
    config = read_config(model_path(arguments.model), revision)
    return architecture_of(config, arguments.model).level


def server_command(arguments: argparse.Namespace) -> list[str]:
    """Return the command line of vLLM's server.

    Raises
    ------
    ConfigError, UnsupportedModelError and others
        For whatever cannot be served pruned, before anything is started.
    """
    from tokenprune_vllm.engine import (
        TOWER_LORA,
        check_model_impl,
        check_plugin,
        kept_apart,
        merge,
        pruning_overrides,
        read_config,
    )
    from tokenprune_vllm.lookup import brings_code
    from tokenprune_vllm.settings import KEY, ServerSettings, source_of

    check_plugin()
    overrides, more = _take_overrides(arguments.more)
    check_model_impl(_value(more, "--model-impl"))
    if arguments.request_method and not arguments.allow_request_keep:
        raise ConfigError("--request-method needs --allow-request-keep: requests ask for nothing.")
    trusts = "--trust-request-mm-kwargs" in more
    model = model_path(arguments.model)
    config = read_config(model, _value(more, "--revision"))
    given = (arguments.pruning, arguments.method, arguments.keep)
    masks = source_of(arguments.masks)
    application: Application = arguments.apply or "drop"
    proportional: bool = arguments.proportional_attention
    if given == (None, None, None) and KEY in config:
        # An exported checkpoint says itself how to prune.
        own = ServerSettings.from_config(SimpleNamespace(**{KEY: config[KEY]}))
        pruning, methods = own.default, dict(config[KEY].get("request_methods", {}))
        for name, options in _request_methods(arguments, pruning).items():
            methods[name] = options or methods.get(name, {})
        masks = own.masks if masks is None else masks
        application = arguments.apply or own.application
        proportional = proportional or own.proportional
    else:
        pruning, methods = pruning_of(arguments)
    ours = pruning_overrides(
        config,
        arguments.model,
        pruning,
        methods,
        only_tokenprune=arguments.allow_request_keep and not trusts,
        masks=masks,
        application=application,
        proportional=proportional,
    )
    if not _has(more, "--trust-remote-code") and brings_code(config):
        raise ConfigError(
            f"the config of {arguments.model} is read by Python code that comes with its weights, "
            "which vLLM runs only when it is told to trust it. Read that code; if you trust it, "
            "add --trust-remote-code."
        )
    if arguments.allow_request_keep and not trusts:
        more.append("--trust-request-mm-kwargs")
    tower_lora = f"--{TOWER_LORA.replace('_', '-')}"
    if kept_apart(ours, _has(more, "--enable-lora"), _has(more, tower_lora)):
        more.append(tower_lora)
    if model != arguments.model and _value(more, "--served-model-name") is None:
        # Requests name the model as the user did, and not by the folder behind it.
        more += ["--served-model-name", arguments.model]
    more += ["--hf-overrides", json.dumps(merge(overrides, ours))]
    return [*_server(), *_model(model), *more]


def pruning_of(arguments: argparse.Namespace) -> tuple[PruningConfig, dict[str, dict[str, Any]]]:
    """Return what `add_pruning`'s arguments say: the default, and what requests may name.

    Returns
    -------
    tuple
        The default, and method -> options of each of ``--request-method``.

    Raises
    ------
    ConfigError
        If method or budget is missing and there are no masks either, or both they and a file are
        given.
    InputFileError
        If the file cannot be read.
    OptionError, UnknownMethodError
        As `options_by_method`.
    """
    from tokenprune.config import PruningConfig
    from tokenprune_vllm.settings import UNPRUNED, check_default

    alone = (arguments.pruning, arguments.method, arguments.keep) == (None, None, None)
    if alone and arguments.masks is not None:
        hides = arguments.apply is not None or arguments.proportional_attention
        if hides or arguments.scope != "item":
            raise ConfigError(
                "--apply, --proportional-attention and --scope are about the tokens of --method "
                "and --keep, which are missing. Give these, or --masks alone."
            )
        return UNPRUNED, _request_methods(arguments, UNPRUNED)
    if arguments.pruning is not None:
        if arguments.method or arguments.keep:
            raise ConfigError(
                f"--pruning {arguments.pruning} says how to prune, and --method and --keep say it "
                "again. Give one or the other."
            )
        try:
            text = arguments.pruning.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputFileError(
                f"--pruning {arguments.pruning} cannot be read: {reason_of(error)}."
            ) from None
        pruning = PruningConfig.from_json(text)
        return pruning, _request_methods(arguments, pruning)
    for name in ("method", "keep"):
        if getattr(arguments, name) is None:
            raise ConfigError(
                f"--{name} is missing. Say how to prune, for example --method cls-attention "
                "--keep 64. For an unpruned server use vLLM's own command."
            )
    check_default(arguments.method)
    named = [name for name in arguments.request_method if not resizes(name)]
    options = options_by_method(arguments.option, [arguments.method, *named])
    pruning = PruningConfig(
        arguments.method,
        parse_keep(arguments.keep),
        arguments.positions,
        options.get(arguments.method, {}),
        arguments.scope,
    )
    return pruning, {name: options.get(name, {}) for name in arguments.request_method}


def _request_methods(
    arguments: argparse.Namespace, pruning: PruningConfig
) -> dict[str, dict[str, Any]]:
    """Return method -> options of ``--request-method``, beside a default that is written down.

    Raises
    ------
    ConfigError
        If an option is not for one of these: the default has its own.
    """
    names = [name for name in arguments.request_method if name != pruning.method]
    try:
        options = options_by_method(arguments.option, [one for one in names if not resizes(one)])
    except OptionError as error:
        raise ConfigError(
            f"how {pruning.method} prunes is written down with its options, so --option is for the "
            f"methods of --request-method alone: {error}"
        ) from None
    return {name: options.get(name, {}) for name in names}


def _take_overrides(more: Sequence[str]) -> tuple[dict[str, object], list[str]]:
    """Take the user's own --hf-overrides out of vLLM's arguments."""
    rest: list[str] = []
    found: dict[str, object] = {}
    left = iter(more)
    for argument in left:
        name, equals, text = argument.partition("=")
        option, dot, _ = name.replace("_", "-").partition(".")
        # vLLM also takes the beginning of an option's name for the whole.
        is_overrides = option.startswith("--hf-o") and "--hf-overrides".startswith(option)
        if is_overrides and dot:
            # vLLM puts these into a second --hf-overrides, which would take the place of ours.
            raise ConfigError(
                f"{argument}: overrides are given here as one JSON object, "
                "--hf-overrides '{...}', so that tokenprune's own can be added to it."
            )
        if not is_overrides:
            rest.append(argument)
            continue
        text = text if equals else next(left, "")
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"--hf-overrides {text!r} is not JSON: {reason_of(error)}."
            ) from error
        if not isinstance(values, dict):
            raise ConfigError(f"--hf-overrides {text} is not a JSON object.")
        found.update(values)
    return found, rest


def _value(more: Sequence[str], name: str) -> str | None:
    """Return the value of one of vLLM's arguments, which it also takes with underscores."""
    for argument, following in zip(more, [*more[1:], ""], strict=False):
        given, equals, value = argument.partition("=")
        if given.replace("_", "-") == name:
            return value if equals else following
    return None


def _has(more: Sequence[str], name: str) -> bool:
    """Say whether one of vLLM's arguments, which it also takes with underscores, is given."""
    return any(argument.partition("=")[0].replace("_", "-") == name for argument in more)


def _has_own_command() -> bool:
    """Say whether `vllm serve` runs: it asks for a distribution called vllm.

    The CPU build's distribution has another name.
    """
    try:
        version("vllm")
    except PackageNotFoundError:
        return False
    return True


def _server() -> list[str]:
    if _has_own_command():
        return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
    # What `vllm serve` comes to; the module behind it has no command of its own in every version.
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]


def _model(model: str) -> list[str]:
    return [model] if _has_own_command() else ["--model", model]
