"""Which methods there are: tokenprune's own, and those that installed packages bring.

A package adds one with an entry point, ``my-method = "my_package.selectors:MyMethod"``, in the
group ``tokenprune.selectors``. Nothing is imported before a method is asked for.
"""

from __future__ import annotations

import importlib
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any

from tokenprune.entries import unique_entries
from tokenprune.errors import RegistryError, UnknownMethodError, did_you_mean

if TYPE_CHECKING:
    from tokenprune.selectors.base import Selector

GROUP = "tokenprune.selectors"

_OWN = {
    "cls-attention": "tokenprune.selectors.cls_attention:ClsAttention",
    "divprune": "tokenprune.selectors.divprune:DivPrune",
    "feature-norm": "tokenprune.selectors.feature_norm:FeatureNorm",
    "flexselect": "tokenprune.selectors.flexselect:FlexSelect",
    "information": "tokenprune.selectors.information:Information",
    "random": "tokenprune.selectors.random:Random",
    "relevant-information": "tokenprune.selectors.information:RelevantInformation",
    "uniform": "tokenprune.selectors.uniform:Uniform",
    "zeroth-order": "tokenprune.selectors.zeroth_order:ZerothOrder",
}

NO_SELECTORS = {
    "trimmed-attention": "trims the cross-attention of Llama-3.2-Vision and selects no tokens of a "
    "prompt: only tokenprune_hf.prune and apply take it, with such a model",
}
"""Methods that are no selectors: name -> what they do, and who takes them."""


def registered() -> dict[str, EntryPoint]:
    """Return name -> where the class is, for every method; a name that is taken is refused."""
    return unique_entries(GROUP, "selectors", _OWN)


def _load(entry: EntryPoint) -> type[Selector]:
    # Here, because it imports torch.
    from tokenprune.selectors.base import Selector

    module_name, _, class_name = entry.value.partition(":")
    try:
        loaded = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise RegistryError(
            f"the selector {entry.name!r} cannot be loaded from {entry.value}: {error}. "
            "Repair or uninstall the package that registers it."
        ) from error
    if not (isinstance(loaded, type) and issubclass(loaded, Selector)):
        raise RegistryError(
            f"the selector {entry.name!r} points to {entry.value}, which is no subclass of "
            "tokenprune.Selector."
        )
    if loaded.name != entry.name:
        raise RegistryError(
            f"the selector registered as {entry.name!r} calls itself {loaded.name!r}. The entry "
            "point's name and the class's `name` must be the same."
        )
    return loaded


def methods() -> dict[str, type[Selector]]:
    """Return every method: name -> its class, whose `needs`, `paper` and fields describe it.

    Raises
    ------
    RegistryError
        If two packages register one name, or one cannot be loaded.
    """
    return {name: _load(entry) for name, entry in sorted(registered().items())}


def find(method: str) -> type[Selector]:
    """Return the class of one method.

    Raises
    ------
    UnknownMethodError
        If there is none of that name; the message names the nearest.
    RegistryError
        If it is registered twice or cannot be loaded.
    """
    entries = registered()
    if method in NO_SELECTORS:
        raise UnknownMethodError(f"method {method!r} {NO_SELECTORS[method]}.")
    if method not in entries:
        raise UnknownMethodError(
            f"there is no method {method!r}. {did_you_mean(str(method), entries)}"
        )
    return _load(entries[method])


def build(method: str, options: dict[str, Any]) -> Selector:
    """Return the method with these options; both are checked.

    Raises
    ------
    UnknownMethodError
        If there is no such method.
    OptionError
        If it has no such option, or the option cannot take that value.
    """
    return find(method).from_options(options)
