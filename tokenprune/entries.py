"""Entry points of installed packages, where every name may be taken once."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points

from tokenprune.errors import RegistryError


def unique_entries(
    group: str, what: str, built_in: Mapping[str, str] | None = None
) -> dict[str, EntryPoint]:
    """Return name -> entry point, for a group in which each name must mean one thing.

    Parameters
    ----------
    group
        Of entry points.
    what
        What they are called in an error, for example ``"selectors"``.
    built_in
        Name -> ``"module:attribute"``, those of this distribution that need no entry point.

    Raises
    ------
    RegistryError
        If two packages register one name for different things.
    """
    return dict(_read(group, what, tuple((built_in or {}).items()), tuple(sys.path)))


@functools.lru_cache(maxsize=16)
def _read(
    group: str, what: str, built_in: tuple[tuple[str, str], ...], _path: tuple[str, ...]
) -> dict[str, EntryPoint]:
    """Read the entry points, once for each search path: it takes 2 ms."""
    entries = {name: EntryPoint(name, value, group) for name, value in built_in}
    for entry in entry_points(group=group):
        known = entries.get(entry.name)
        if known is not None and known.value != entry.value:
            raise RegistryError(
                f"two {what} are called {entry.name!r}: {known.value} and {entry.value}. "
                "Rename one in its package's entry points, or uninstall that package."
            )
        entries[entry.name] = entry
    return entries
