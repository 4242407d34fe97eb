"""`resize`: the baseline that is no method, named where methods are named."""

from __future__ import annotations

RESIZE = "resize"
"""The picture made smaller, of which all tokens are kept; ``resize+METHOD`` makes it smaller half
of the way and has a method do the rest."""


def resizes(method: str) -> bool:
    """Say whether what is named makes the picture smaller."""
    return method.partition("+")[0] == RESIZE


def behind_resize(method: str) -> str | None:
    """Return the method that prunes the smaller picture, None where all its tokens are kept.

    Parameters
    ----------
    method
        A name that `resizes`.
    """
    return method.partition("+")[2] or None
