"""Names that have moved to another room: the old place warns and hands on what stands in the new.

Which name is where now stands once, in the entry points of the group ``tokenprune.moved``::

    "tokenprune_hf.dominance" = "tokenprune_eval.dominance"
    "tokenprune_hf.measure_dominance" = "tokenprune_eval.dominance:measure_dominance"

Entry points and no imports, because the new home may lie above the old one, and imports point from
the evaluation to the adapters to the selectors only.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from tokenprune.entries import unique_entries
from tokenprune.errors import RegistryError

GROUP = "tokenprune.moved"
WHAT = "names that have moved"


def moved(old: str, stacklevel: int = 2) -> Any:
    """Return what is called `old` no longer, and warn.

    Parameters
    ----------
    old
        A module, or a name in one, by its full old name.
    stacklevel
        As for `warnings.warn`, counted from the caller of this function: whose code is told.

    Raises
    ------
    RegistryError
        If the installed entry points do not say where it is.
    """
    entry = unique_entries(GROUP, WHAT).get(old)
    if entry is None:
        raise RegistryError(
            f"{old} has moved, and the installed entry points do not say where to. They are of "
            "another version than this code: install this distribution again, also from a "
            "checkout: pip install tokenprune-vlm"
        )
    new = entry.value.replace(":", ".")
    warnings.warn(
        f"{old} is {new} now. Use that name; the old one will go.",
        DeprecationWarning,
        stacklevel=stacklevel + 1,
    )
    return entry.load()


def moved_names(old: str) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a module that has moved as a whole.

    Parameters
    ----------
    old
        The module's name, ``__name__``.
    """

    def load(name: str) -> Any:
        # Python looks for such names in every module: nobody asked for what was here.
        if name.startswith("__"):
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        # A name may have gone elsewhere than its module.
        if f"{old}.{name}" in unique_entries(GROUP, WHAT):
            return moved(f"{old}.{name}")
        return getattr(moved(old), name)

    return load
