"""Which family a model belongs to, and whether a method can serve it."""

from __future__ import annotations

from typing import Any

from tokenprune.errors import UnsupportedModelError
from tokenprune.families.base import Family as Layout
from tokenprune.families.registry import FAMILIES
from tokenprune.selectors.base import Selector
from tokenprune_hf.families.base import PROVIDED, Family
from tokenprune_hf.wrappers import model_inside


def supported_models() -> dict[str, type[Layout]]:
    """Return `config.model_type` -> family, for every model that can be pruned."""
    return {name: family for name, family in FAMILIES.items() if family.in_transformers}


def family_of(model: Any) -> Family:
    """Return the family of a model of transformers, or of the one inside a wrapper.

    Raises
    ------
    UnsupportedModelError
        If it is no model with a language model head and `generate`, or of no known family.
    """
    from transformers import PreTrainedModel

    known = supported_models()
    model = model_inside(model)
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    # Whatever else has a config and generates may run something else than its own modules.
    whole = isinstance(model, PreTrainedModel) and hasattr(model, "generate")
    if model_type is None or not whole:
        raise UnsupportedModelError(
            f"{type(model).__name__} is no vision-language model of transformers with `generate`. "
            "Pass the whole model, for example what "
            "AutoModelForImageTextToText.from_pretrained returned."
        )
    if model_type not in known:
        raise UnsupportedModelError(
            f"{type(model).__name__} (model_type {model_type!r}) cannot be pruned. Supported: "
            f"{', '.join(sorted(known))}."
        )
    return Family(model, known[model_type](config))


def check_method(selector: Selector, model: Any) -> None:
    """Raise unless this adapter can give the method what it needs, and the method can serve it.

    Raises
    ------
    UnsupportedModelError
        Naming what is missing.
    OptionError
        If an option asks for what this model's projector does not allow.
    """
    missing = [name for name in selector.needs if name not in PROVIDED]
    if missing:
        raise UnsupportedModelError(
            f"method {selector.name!r} needs {', '.join(missing)}, which tokenprune_hf does not "
            f"gather from {type(model).__name__}. It gathers: {', '.join(PROVIDED)}."
        )
    selector.check_model(model.config)
    if "projector" in selector.needs:
        selector.check_projector(family_of(model).projector("image"))
