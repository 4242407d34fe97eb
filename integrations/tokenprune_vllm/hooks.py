"""A check that vLLM still has what this plugin overrides.

Pruning is done in methods that vLLM's own classes have and call. Were one of them renamed in a
later version, ours would be there still and never be called: the server would run unpruned.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenprune.errors import UnsupportedModelError


def check_overridden(made: type, mixin: type, names: Sequence[str]) -> None:
    """Raise unless the engine's own classes have the methods that `mixin` overrides.

    Parameters
    ----------
    made
        A class of `mixin` and one of vLLM's.
    mixin
        Ours.
    names
        The methods.

    Raises
    ------
    UnsupportedModelError
        Naming those that are gone.
    """
    behind = made.__mro__[made.__mro__.index(mixin) + 1 :]
    gone = [name for name in names if not any(name in vars(base) for base in behind)]
    if gone:
        from importlib.metadata import version

        from vllm import __version__

        raise UnsupportedModelError(
            f"vLLM {__version__} has no {', '.join(gone)} for {made.__name__} to override, so "
            f"tokenprune {version('tokenprune-vlm')} cannot prune in it. Install a version of vLLM "
            "that `tokenprune docs serving` names, or a newer tokenprune."
        )
