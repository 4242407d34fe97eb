"""The one exception of the bundled model and its question sets."""

from __future__ import annotations

from tokenprune.errors import TokenPruneError


class BundledModelError(TokenPruneError, RuntimeError):
    """The bundled model or one of its question sets cannot be put together.

    The message says what is missing or wrong and what to install or do.
    """
