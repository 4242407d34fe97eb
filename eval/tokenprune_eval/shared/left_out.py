"""One odd item of many: whatever is raised on it is a reason to leave it out, and ends nothing.

`LeftOut` notes these reasons for a measurement over videos, pictures or questions, so that the
others are measured all the same. What would meet every further item ends the measurement instead: a
missing package, a full disk, a model that cannot be measured at all, a device that is gone.
"""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from tokenprune.errors import (
    MissingPackageError,
    OptionError,
    OutputError,
    TokenPruneError,
    UnsupportedModelError,
    reason_of,
)

LOST_DEVICE = re.compile(r"(CUDA|HIP) error|CUBLAS_STATUS|CUDNN_STATUS_INTERNAL|device-side assert")
"""What torch says when the device answers no further call of this process."""

NOT_THE_ITEM = (MissingPackageError, OptionError, OutputError, UnsupportedModelError)
"""What the next video, picture or question would meet too."""

_logger = logging.getLogger(__name__)


class NothingLeftError(TokenPruneError, RuntimeError):
    """Every item was left out."""


class LeftOut:
    """What is left out of a measurement, and why.

    Parameters
    ----------
    say
        Told of each item when it is left out.
    ends
        Errors that end the measurement, since the next item would meet them too.

    Attributes
    ----------
    reasons
        Name of an item -> why it was left out.
    """

    def __init__(
        self, say: Callable[[str], None], ends: tuple[type[Exception], ...] = NOT_THE_ITEM
    ) -> None:
        self._say = say
        self._ends = ends
        self.reasons: dict[str, str] = {}

    @contextmanager
    def around(self, name: str) -> Iterator[None]:
        """Run a block about one item; if it fails, the item is noted and the block ends.

        Raises
        ------
        TokenPruneError
            For what is not about that item, see `failure_of`.
        """
        reason = None
        try:
            yield
        except Exception as error:  # readers, processors and models may raise anything
            # Readers of files name the file themselves.
            reason = failure_of(error, self._ends).removeprefix(f"{name}: ")
        if reason is not None:
            free_memory()
            self.reasons[name] = reason
            self._say(f"{name} is left out: {reason}")

    def check(self, noun: str, left: int) -> None:
        """Make sure that something is left.

        Parameters
        ----------
        noun
            What an item is called.
        left
            How many are left.

        Raises
        ------
        NothingLeftError
            With the first reason.
        """
        if left > 0:
            return
        name, reason = next(iter(self.reasons.items()), ("", ""))
        end = "" if reason.endswith((".", "!", "?")) else "."
        example = f", for example {name}: {reason}{end}" if name else "."
        raise NothingLeftError(f"no {noun} can be used{example}")


def around(left_out: LeftOut | None, name: str) -> AbstractContextManager[None]:
    """Return `LeftOut.around`, or without a `LeftOut` what lets every error pass."""
    return nullcontext() if left_out is None else left_out.around(name)


def failure_of(error: Exception, ends: tuple[type[Exception], ...] = NOT_THE_ITEM) -> str:
    """Return why one item fails.

    Raises
    ------
    Exception
        The error itself if it is not about that item: one of `ends`, or a device that is gone.
    """
    if isinstance(error, ends):
        raise error
    said = reason_of(error)
    if LOST_DEVICE.search(said):
        raise error
    _logger.debug("an item is left out", exc_info=error)
    if isinstance(error, TokenPruneError):
        return str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return f"there is not enough memory for it ({said})."
    kind = type(error).__name__
    return f"{kind}." if said == kind else f"{kind}: {said}."


def free_memory() -> None:
    """Give back what a failed call held, so that a smaller one finds room.

    To be called outside of the ``except`` clause: the error holds the tensors of the call.
    """
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
