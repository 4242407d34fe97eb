"""Which methods there are: tokenprune's own, and those that installed packages bring.

A package adds one with an entry point, ``my-method = "my_package.selectors:MyMethod"``, in the
group ``tokenprune.selectors``. Nothing is imported before a method is asked for.
"""

from __future__ import annotations

import functools
import importlib
import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from tokenprune.errors import RegistryError, SelectorError, UnknownMethodError, did_you_mean
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


def _entries() -> dict[str, EntryPoint]:
    """Return name -> where the class is, for every method; a name that is taken is refused."""
    return _entries_on(tuple(sys.path))


@functools.lru_cache(maxsize=4)
def _entries_on(_path: tuple[str, ...]) -> dict[str, EntryPoint]:
    """Read the installed packages' entry points, once for each search path: it takes 2 ms."""
    entries = {name: EntryPoint(name, value, GROUP) for name, value in _OWN.items()}
    for entry in entry_points(group=GROUP):
        known = entries.get(entry.name)
        if known is not None and known.value != entry.value:
            raise RegistryError(
                f"two selectors are called {entry.name!r}: {known.value} and {entry.value}. "
                "Rename one in its package's entry points, or uninstall that package."
            )
        entries[entry.name] = entry
    return entries


def _load(entry: EntryPoint) -> type[Selector]:
    module_name, _, class_name = entry.value.partition(":")
    try:
        loaded = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, SelectorError) as error:
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
    return {name: _load(entry) for name, entry in sorted(_entries().items())}


def find(method: str) -> type[Selector]:
    """Return the class of one method.

    Raises
    ------
    UnknownMethodError
        If there is none of that name; the message names the nearest.
    RegistryError
        If it is registered twice or cannot be loaded.
    """
    entries = _entries()
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
