"""`engine_args`: what to hand to `vllm.LLM`, `AsyncLLM` or `vllm serve` so that it prunes."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from tokenprune.budget import Keep
from tokenprune.config import Application, Positions, PruningConfig
from tokenprune.errors import ConfigError, InputFileError, UnsupportedModelError, reason_of
from tokenprune.families.registry import FAMILIES
from tokenprune.providers import model_path
from tokenprune.registry import build
from tokenprune.scope import Scope
from tokenprune_vllm.lookup import architecture_of
from tokenprune_vllm.settings import (
    KEY,
    MARK,
    UNPRUNED,
    HeadsFile,
    ServerSettings,
    Source,
    check_default,
    source_of,
)

if TYPE_CHECKING:
    from tokenprune.masks import PooledBlocks

TOWER_LORA = "enable_tower_connector_lora"
"""vLLM's argument for adapters of towers."""

_USUAL = ("item", "original", "drop", False)
"""Scope, positions and what becomes of tokens, where nothing is said of them."""

_GROUP, _PLUGIN = "vllm.general_plugins", "tokenprune"


def engine_args(
    model: str | os.PathLike[str],
    method: str | None = None,
    keep: Keep | None = None,
    *,
    masks: str | os.PathLike[str] | PooledBlocks | None = None,
    positions: Positions = "original",
    apply: Application = "drop",
    proportional_attention: bool = False,
    options: Mapping[str, Any] | None = None,
    scope: Scope = "item",
    request_methods: Sequence[str] | Mapping[str, Mapping[str, Any]] = (),
    **engine: Any,
) -> dict[str, Any]:
    """Return keyword arguments for `vllm.LLM` or `vllm.AsyncEngineArgs` under which it prunes.

    Parameters
    ----------
    model
        A folder, a name on the model hub, or ``"bundled"``.
    method
        A name out of `tokenprune.methods()`.
    keep
        A number of tokens (int) or a fraction (float) of each image or video. `method` and `keep`
        may be left out where there are `masks`: then every token stays.
    masks
        A heads file that ``tokenprune calibrate-heads`` wrote, or `tokenprune.masks.PooledBlocks`
        (also as ``"pooled:0.25"``): prompts are read under these sparse masks, as with
        `tokenprune_hf.sparse`.
    positions
        ``"original"``: each kept token keeps the position it has in the full image, and the text
        after it its own. ``"compact"``: the shorter prompt is numbered without gaps.
    apply
        ``"drop"``: tokens that are not selected leave the prompt. ``"mask"``: they stay, and no
        token sees them; see `tokenprune_hf.prune`.
    proportional_attention
        Whether a kept token counts as many times as the tokens that it stands for; see
        `tokenprune_hf.prune`.
    options
        The method's own options.
    scope
        ``"item"``: each crop of an image has a budget and a set of kept tokens of its own.
        ``"image"``: all crops of an image have them together; see `tokenprune.PruningConfig`.
    request_methods
        Methods, beside `method`, that a request may name; a mapping gives their options. With
        ``"resize"`` among them a request may have its pictures made smaller.
    **engine
        vLLM's own arguments; `hf_overrides` among them is merged with ours.

    Returns
    -------
    dict
        For ``vllm.LLM(**engine_args(...))``.

    Raises
    ------
    UnsupportedModelError
        If the model or the method cannot be served pruned.
    ConfigError, BudgetError, UnknownMethodError, OptionError
        For settings that cannot be used, and where vLLM would not load the plugin.
    InputFileError
        If the model has no config.json that can be read, or the heads file cannot be read.
    """
    check_model_impl(engine.get("model_impl"))
    if method is not None:
        check_default(method)
    path = model_path(model)
    pruning = UNPRUNED
    if method is not None and keep is not None:
        pruning = PruningConfig(method, keep, positions, dict(options or {}), scope)
    elif masks is None or (method, keep) != (None, None):
        raise ConfigError(
            f"method={method!r} and keep={keep!r}: give both, or neither of them and masks, with "
            "which every token stays."
        )
    elif options or (scope, positions, apply, proportional_attention) != _USUAL:
        raise ConfigError(
            "options, scope, positions, apply and proportional_attention say how to prune, and no "
            "method and keep were given. Give these, or leave out the others."
        )
    overrides = pruning_overrides(
        read_config(path, engine.get("revision")),
        str(model),
        pruning,
        request_methods,
        masks=source_of(masks),
        application=apply,
        proportional=proportional_attention,
    )
    check_plugin()
    given = engine.pop("hf_overrides", None)
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(
            "hf_overrides must be a dict here: tokenprune adds its own keys to it, which it cannot "
            f"do to a {type(given).__name__}."
        )
    if kept_apart(overrides, bool(engine.get("enable_lora")), bool(engine.get(TOWER_LORA))):
        engine[TOWER_LORA] = True
    return {"model": path, **engine, "hf_overrides": merge(given or {}, overrides)}


def kept_apart(overrides: Mapping[str, Any], lora: bool, tower: bool) -> bool:
    """Say whether vLLM has to keep images of requests with other LoRA adapters apart.

    It does so by its option for adapters of towers, which no pruned model has: see
    `tokenprune_vllm.adapters`.

    Parameters
    ----------
    overrides
        What `pruning_overrides` returned.
    lora, tower
        Whether adapters are asked for, and also for the tower.

    Raises
    ------
    UnsupportedModelError
        If they are asked for the tower.
    """
    if tower:
        raise UnsupportedModelError(
            "tokenprune does not work together with --enable-tower-connector-lora: adapters are "
            "those of the language model. Leave that out, or serve the model without tokenprune."
        )
    return lora and bool(ServerSettings.from_config(SimpleNamespace(**overrides)).readers)


def pruning_overrides(
    config: dict[str, Any],
    model: str,
    pruning: PruningConfig,
    request_methods: Sequence[str] | Mapping[str, Mapping[str, Any]] = (),
    only_tokenprune: bool = False,
    masks: Source | None = None,
    application: Application = "drop",
    proportional: bool = False,
) -> dict[str, Any]:
    """Return what has to stand in a model's config so that vLLM serves it pruned.

    Parameters
    ----------
    config
        The model's config.json.
    model
        What to call it in an error.
    pruning
        The server's default.
    request_methods
        Methods that a request may name, beside the default's.
    only_tokenprune, masks, application, proportional
        See `ServerSettings`.

    Raises
    ------
    UnsupportedModelError
        If the model or a method cannot be served pruned, or the masks are another model's.
    ConfigError
        As `ServerSettings.build`.
    """
    architecture = architecture_of(config, model)
    if not isinstance(request_methods, Mapping):
        request_methods = {name: {} for name in request_methods}
    settings = ServerSettings.build(
        pruning, request_methods, only_tokenprune, masks, application, proportional
    )
    if isinstance(masks, HeadsFile):
        _check_masks(masks, config, model)
    for name, options in settings.methods.items():
        needs = build(name, options).needs  # raises where there is none of that name
        if config.get("model_type") in FAMILIES:
            FAMILIES[config["model_type"]].check_attends(name, needs)
    overrides: dict[str, Any] = {"architectures": [architecture.name], KEY: settings.to_dict()}
    if pruning.positions == "original" and not architecture.mrope:
        # vLLM asks a model for the positions of its prompts only if the config has M-RoPE in it.
        # The text config is left alone: the rotary embedding itself stays what it is.
        overrides["mrope_section"] = list(MARK)
    elif not architecture.mrope and "mrope_section" in config:
        overrides["mrope_section"] = None  # left by an export with original positions
    return overrides


def _check_masks(masks: HeadsFile, config: Mapping[str, Any], model: str) -> None:
    """Raise if a heads file is of a model of another type; the worker compares all there is.

    Raises
    ------
    UnsupportedModelError
        Naming both types.
    """
    given, own = masks.load().model.model_type, config.get("model_type")
    if given != own:
        raise UnsupportedModelError(
            f"the heads of {masks.path} are those of a model of type {given!r}, and {model} is "
            f"{own!r}. Calibrate this model: tokenprune calibrate-heads."
        )


def read_config(model: str | os.PathLike[str], revision: str | None = None) -> dict[str, Any]:
    """Return a model's config.json.

    Raises
    ------
    InputFileError
        If there is none, or it cannot be read.
    """
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(os.fspath(model), revision=revision)
    except (OSError, ValueError) as error:
        raise InputFileError(
            f"{model} has no config.json that can be read: {reason_of(error)}."
        ) from error
    return dict(config)


def check_plugin() -> None:
    """Raise unless vLLM will load the plugin in its processes.

    Raises
    ------
    ConfigError
        Saying why it would not.
    """
    if not entry_points(group=_GROUP, name=_PLUGIN):
        raise ConfigError(
            f"the package tokenprune-vlm is not installed so that vLLM finds it: there is no entry "
            f"point {_PLUGIN!r} in the group {_GROUP!r}. Install it with pip, also for a checkout: "
            "pip install -e '.[vllm]'."
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and _PLUGIN not in allowed.split(","):
        raise ConfigError(
            f"VLLM_PLUGINS={allowed!r} keeps vLLM from loading the plugin. Add {_PLUGIN!r} to it, "
            "or unset it."
        )


def check_model_impl(asked: str | None) -> None:
    """Raise if vLLM is told to run another class than ours, which would run unpruned.

    Parameters
    ----------
    asked
        vLLM's ``--model-impl``.

    Raises
    ------
    ConfigError
        Saying what to do instead.
    """
    if asked not in (None, "auto", "vllm"):
        raise ConfigError(
            f"--model-impl {asked} makes vLLM run another class than the one that prunes, and the "
            "server would run unpruned. Leave it out: models for which vLLM has no class of its "
            "own run by that of transformers anyway."
        )


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `over` put on top, dicts inside dicts merged alike."""
    merged = copy.deepcopy(dict(base))
    for name, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(name), Mapping) and name != KEY:
            merged[name] = merge(merged[name], value)
        else:
            merged[name] = value
    return merged
