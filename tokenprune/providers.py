"""Checkpoints and trained selectors that installed packages bring, under a name.

A package registers one with an entry point, ``NAME = "module:function"``, in the group
``tokenprune.models`` or ``tokenprune.trained_selectors``. The function has no parameters and
returns a folder, which it may create when it is first called. Every command and function that takes
a model also takes such a name; `model_path` returns the folder for it.
"""

from __future__ import annotations

import os
from importlib.metadata import EntryPoint
from pathlib import Path

from tokenprune.entries import unique_entries
from tokenprune.errors import MissingPackageError, RegistryError

MODELS = "tokenprune.models"
TRAINED_SELECTORS = "tokenprune.trained_selectors"

BUNDLED = "bundled"
"""The name of the model, and of its trained selector, that the evaluation of this distribution
brings. No model on a hub has this name, so no hub is asked for it."""

BUNDLED_SMOLLM2 = "bundled-smollm2"
"""The name of the model with the same vision encoder before a language model that was pretrained on
text, SmolLM2-135M."""

BUNDLED_MODELS = (BUNDLED, BUNDLED_SMOLLM2)
"""Test objects, and no public models."""

_EXTRA = "tokenprune-vlm[demo]"
"""What `BUNDLED_MODELS` need."""

_OWN = {(MODELS, name) for name in BUNDLED_MODELS} | {(TRAINED_SELECTORS, BUNDLED)}


def model_path(name: str | os.PathLike[str]) -> str:
    """Return the folder or hub name that an engine can load for a model's name.

    Parameters
    ----------
    name
        A name that a package brings, such as ``"bundled"``; anything else is a folder or a name on
        the model hub and comes back as it is. ``"./bundled"`` is a folder of one's own.

    Raises
    ------
    MissingPackageError
        If no package brings a bundled model, or a package that it is made from is not installed.
    RegistryError
        If two packages bring one name, or one's function cannot be used.
    """
    return _path(MODELS, "models", os.fspath(name))


def selector_path(path: str | os.PathLike[str]) -> Path:
    """Return the folder of a trained selector; as `model_path`, for selectors."""
    return Path(_path(TRAINED_SELECTORS, "trained selectors", os.fspath(path)))


def _path(group: str, what: str, name: str) -> str:
    entry = unique_entries(group, what).get(name)
    if entry is not None:
        return _made(entry)
    if (group, name) in _OWN:
        raise MissingPackageError(
            f"no installed package brings {name!r}: there is no entry point {name!r} in the group "
            f"{group!r}. Install the extra demo, also for a checkout: pip install '{_EXTRA}'."
        )
    return name


def _made(entry: EntryPoint) -> str:
    try:
        function = entry.load()
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"{entry.name!r} of {entry.value} needs the package {error.name!r}, which is not "
            f"installed. Install what it needs: pip install '{_EXTRA}'."
            if (entry.group, entry.name) in _OWN
            else f"{entry.name!r} of {entry.value} needs the package {error.name!r}, which is not "
            "installed. Install it, or the package that brings this name anew."
        ) from error
    except (ImportError, AttributeError) as error:
        raise RegistryError(
            f"{entry.name!r} cannot be loaded from {entry.value}: {error}. Repair or uninstall the "
            "package that registers it."
        ) from error
    folder = function()
    if not isinstance(folder, str | os.PathLike):
        raise RegistryError(
            f"{entry.value}, registered as {entry.name!r} in {entry.group!r}, must return the path "
            f"of a folder and returned {folder!r}."
        )
    return os.fspath(folder)
