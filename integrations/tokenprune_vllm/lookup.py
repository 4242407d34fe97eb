"""Which of our architectures a model has: one of a family, or one for whatever vLLM runs.

About those of no family vLLM is asked, which is imported here then; its own class says what it
takes, and `tokenprune_vllm.models` puts pruning in front of it as of any other.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from tokenprune.errors import UnsupportedModelError
from tokenprune.families.any import rope_sections
from tokenprune_vllm.architectures import ARCHITECTURES, PREFIX, Architecture

_PLUGINS = "vllm.general_plugins"

_EXPERTS = ("num_experts", "moe_num_experts", "num_local_experts", "n_routed_experts")
"""What configs call the number of experts of a layer."""


def architecture_of(config: dict[str, Any], model: str) -> Architecture:
    """Return our architecture for a model's config.json.

    Parameters
    ----------
    config
        The config as plain JSON types.
    model
        What to call the model in an error.

    Raises
    ------
    UnsupportedModelError
        If there is none.
    """
    names = [str(name).removeprefix(PREFIX) for name in config.get("architectures") or []]
    if not names:
        raise UnsupportedModelError(
            f"the config.json of {model} names no architecture, so vLLM does not know its class. "
            "Add architectures to it."
        )
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    return _of_no_family(names, config, model)


def _of_no_family(names: Sequence[str], config: dict[str, Any], model: str) -> Architecture:
    """Return our architecture for one that is in no family.

    Parameters
    ----------
    names
        vLLM's names, out of the model's config.
    config
        The config as plain JSON types.
    model
        What to call the model in an error.

    Raises
    ------
    UnsupportedModelError
        If vLLM is not there to be asked, does not know it, or it takes no images.
    """
    called = f"{model} has the architecture {', '.join(names)}"
    if config.get("is_encoder_decoder"):
        raise UnsupportedModelError(
            f"{called}, which has an encoder for its text, where visual tokens cannot be dropped. "
            "Serve it with vLLM alone."
        )
    try:
        registry = _registry()
    except ImportError as error:
        raise UnsupportedModelError(
            f"{called}, which is of no family that tokenprune knows, and vLLM cannot be asked "
            f"about it: {error}. Install vLLM."
        ) from error
    found = [name for name in names if name in registry.models]
    if not found and _in_transformers(names, config):
        found = [_through_transformers(config)]
    if not found:
        raise UnsupportedModelError(
            f"{called}, which the installed vLLM does not know. Install a release of vLLM that "
            "does, or the plugin that brings it. `tokenprune models` lists what was tested."
        )
    register_every()  # this process may have loaded our plugin before the one that brought it
    info = registry.models[found[0]].inspect_model_cls()
    if info is None or not info.supports_multimodal or info.supports_multimodal_raw_input_only:
        raise UnsupportedModelError(
            f"{called}, which reads no images or videos as tokens, so there is nothing to prune. "
            "Serve it with vLLM alone."
        )
    axes = {len(section) for section in rope_sections(config)}
    if axes - {3}:
        raise UnsupportedModelError(
            f"{called}, whose positions have {max(axes)} axes; in vLLM tokenprune keeps those with "
            "one axis or three. Prune the model in transformers, or serve it with vLLM alone."
        )
    return Architecture(PREFIX + found[0], mrope=None, family=False)


def brings_code(config: dict[str, Any]) -> bool:
    """Say whether a model's config is read by a Python file that comes with its weights.

    vLLM runs such a file only where it was told to trust it.

    Parameters
    ----------
    config
        The config as plain JSON types.
    """
    if "AutoConfig" not in (config.get("auto_map") or {}):
        return False
    from transformers import CONFIG_MAPPING
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    kind = config.get("model_type")
    return kind not in CONFIG_MAPPING and kind not in _CONFIG_REGISTRY


def register_every() -> None:
    """Make our names known in this process for all that vLLM may run with images, and plugins too.

    Harmless when called again.
    """
    from vllm.model_executor.models import registry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    own = {
        name
        for name, (_, class_name) in registry._VLLM_MODELS.items()
        if name not in registry._MULTIMODAL_MODELS and "MultiModal" not in class_name
    }
    known = _registry()
    for name in [name for name in known.models if name not in own]:
        architecture = Architecture(PREFIX + name)
        if name.startswith(PREFIX) or architecture.name in known.models:
            continue
        known.register_model(architecture.name, architecture.home)
        if name in MODELS_CONFIG_MAP:  # settings that vLLM changes for some, by their name
            MODELS_CONFIG_MAP[architecture.name] = MODELS_CONFIG_MAP[name]


def _in_transformers(names: Sequence[str], config: dict[str, Any]) -> bool:
    """Say whether vLLM can run a class of transformers, or the checkpoint's own, in its place."""
    import transformers

    if any(name.startswith("AutoModel") for name in config.get("auto_map") or {}):
        return True
    # Those that can be handed rows: others read images in a way of their own (cross-attention).
    found = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    takes = [inspect.signature(model.forward).parameters for model in found]
    return "model_type" in config and any("mm_encoder_outputs" in taken for taken in takes)


def _through_transformers(config: dict[str, Any]) -> str:
    """Return vLLM's name for a model that runs by its class of transformers."""
    known = dict(config)
    if not config.get("auto_map"):
        from transformers import AutoConfig

        # With the defaults that a config.json leaves out.
        read = AutoConfig.for_model(known.pop("model_type"), **known)
        known = read.get_text_config().to_dict()
    parts = [known, *(part for part in known.values() if isinstance(part, dict))]
    experts = any(int(part.get(name) or 0) for part in parts for name in _EXPERTS)
    return f"TransformersMultiModal{'MoE' if experts else ''}ForCausalLM"


def _registry() -> Any:
    """Return vLLM's registry of models, with what other plugins bring."""
    from vllm import ModelRegistry
    from vllm.plugins import load_plugins_by_group

    # vLLM calls plugins in no order, and says that each may be called more than once.
    for name, register in load_plugins_by_group(_PLUGINS).items():
        if name != "tokenprune":
            register()
    return ModelRegistry
