"""Names and shapes that differ between releases of transformers, found out from the engine itself.

How it wants to be called is said by its own signatures and by what it returns. Its version number
is read for a warning alone, here and nowhere else in this adapter.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from tokenprune.releases import warn_untested


def check_release() -> None:
    """Warn, once per process, if this release of transformers was not tested."""
    import transformers

    warn_untested("transformers", transformers.__version__)


CACHE_NAMES = ("cache", "past_key_values")
"""What forwards call the cache, the newer name first; the older one is being removed."""


# The cache ----------------------------------------------------------------------------------------


def cache_of(given: Mapping[str, Any]) -> Any:
    """Return the cache among a call's arguments, or in what a call returned; None for no cache.

    Parameters
    ----------
    given
        Arguments by name, whatever name the caller took, or an output of transformers.
    """
    # By items: an output warns when it is asked for a name that it no longer has.
    named = dict(given.items())
    return next((named[name] for name in CACHE_NAMES if named.get(name) is not None), None)


def cache_argument(module: object, cache: object) -> dict[str, Any]:
    """Return a cache as the argument of a module's forward, under the name that it has there."""
    kind: Any = type(module)
    return {_cache_name(kind): cache}


@functools.cache
def _cache_name(kind: type) -> str:
    known = inspect.signature(kind.forward).parameters  # type: ignore[attr-defined]
    return next((name for name in CACHE_NAMES if name in known), CACHE_NAMES[-1])


# Encoders -----------------------------------------------------------------------------------------


def encoder_names(function: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments that ``get_image_features`` or its like reads."""
    return [name for name in inspect.signature(function).parameters if name != "kwargs"]


def encoder_arguments(
    function: Callable[..., Any], arguments: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return what a call passes to ``get_image_features`` or its like; None if it has no pixels.

    Parameters
    ----------
    function
        A bound method of the model.
    arguments
        The call's, by name.
    """
    names = encoder_names(function)
    given = {name: arguments[name] for name in names if arguments.get(name) is not None}
    pixels = [name for name in names if name.startswith("pixel_values")]
    passed = [name for name in pixels if name in given]
    if not passed:
        return None
    if pixels[0] not in given:
        # The first one is what the others are called by now (Video-LLaVA).
        given[pixels[0]] = given.pop(passed[0])
    return given


def rows_per_picture(sizes: Sequence[int], pictures: Tensor) -> list[int]:
    """Return how many rows each picture has, if an encoder's entries hold whole pictures.

    For families in which all pictures make equally many rows. Idefics3 and SmolVLM returned one
    entry for each picture, and now return one for each prompt.

    Parameters
    ----------
    sizes
        Rows of each entry that the encoder returned.
    pictures
        The projector's input [P, N, C], of P pictures.
    """
    return [sum(sizes) // len(pictures)] * len(pictures)
