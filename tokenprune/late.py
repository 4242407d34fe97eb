"""Looks at the device that a selection takes once it is made, in place of a wait on the way.

Whatever a method could know only by waiting for a GPU, it assumes; what tells whether it held is on
its way to the host meanwhile, and is looked at when the selection is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Look = Callable[[], None]
"""Raises if what was assumed did not hold."""

_LOOKS: ContextVar[list[Look] | None] = ContextVar("_LOOKS", default=None)


@contextmanager
def looking_later() -> Iterator[list[Look]]:
    """Collect looks of the block, for the caller to take before anything of it is handed on."""
    looks: list[Look] = []
    token = _LOOKS.set(looks)
    try:
        yield looks
    finally:
        _LOOKS.reset(token)


def look(taken: Look) -> None:
    """Take a look later, where somebody will; now, where nobody will."""
    looks = _LOOKS.get()
    if looks is None:
        taken()
    else:
        looks.append(taken)
