"""Failures: which are about one question and are recorded, and which are about the whole run.

Whatever a reader, a processor or an engine raises on one image, video or question is recorded with
its reason, and the run goes on. What would meet every further question ends the run instead: a full
disk, a missing package, an engine or a device that is gone.
"""

from __future__ import annotations

import logging
import re

from tokenprune.errors import MissingPackageError, TokenPruneError
from tokenprune_eval.shared.left_out import LOST_DEVICE
from tokenprune_eval.shared.output import OutputError

_LONGEST = 1000
"""Characters of a reason that are kept."""

_logger = logging.getLogger(__name__)


class EngineLostError(TokenPruneError, RuntimeError):
    """The engine can answer no further question."""


def failure_of(error: Exception) -> str:
    """Return why a question has no answer.

    Parameters
    ----------
    error
        What was raised when it was read, prepared or answered.

    Raises
    ------
    TokenPruneError
        If the error is not about that question: the error itself, or `EngineLostError`.
    """
    if isinstance(error, OutputError | MissingPackageError | EngineLostError):
        raise error
    text = " ".join(str(error).split())[:_LONGEST]
    if LOST_DEVICE.search(text):
        raise EngineLostError(
            f"the device has failed and takes no further call ({text}). The answers so far are on "
            "disk: run the same command to continue."
        ) from error
    _logger.debug("a question failed", exc_info=error)
    if isinstance(error, TokenPruneError):
        return str(error)
    if _out_of_memory(error):
        return f"there is not enough memory for it ({text or type(error).__name__})"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _out_of_memory(error: Exception) -> bool:
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError)


def alike(reason: str) -> str:
    """Return a reason without its numbers and names: equal for failures of one kind."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "#", reason)
