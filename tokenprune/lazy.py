"""Public names of a package that are imported when they are first used.

So that ``import`` of the package costs nothing: starting the command must not import torch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any


def lazy_names(
    package: str, homes: Mapping[str, str], has_moved: Collection[str] = ()
) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """Return a package's ``__all__``, ``__getattr__`` and ``__dir__``.

    Parameters
    ----------
    package
        Its name.
    homes
        Public name -> the module inside the package that defines it, without the package's name;
        or a module of the core, ``tokenprune.…``, whose name this package has too.
    has_moved
        Names that are found here no longer and are not listed; see `tokenprune.moved`.

    Returns
    -------
    tuple
        The names, sorted; what imports one of them; and what lists them for `dir`, together with
        the package's modules that are imported already.
    """
    names = sorted(homes)

    def load(name: str) -> Any:
        if name in has_moved:
            from tokenprune.moved import moved

            return moved(f"{package}.{name}")
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = homes[name]
        module = home if home.startswith("tokenprune.") else f"{package}.{home}"
        return getattr(importlib.import_module(module), name)

    def listed() -> list[str]:
        known = vars(sys.modules[package])
        modules = {name for name in known if f"{package}.{name}" in sys.modules}
        return sorted({*names, *modules, *(name for name in known if name.startswith("__"))})

    return names, load, listed
