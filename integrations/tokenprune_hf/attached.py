"""What stands in a model's way now: pruning, trimming or sparse masks, one of them at a time."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from tokenprune.errors import TokenPruneError


class Attachment(Protocol):
    """Something that changes how a model runs, and can be taken off."""

    def remove(self) -> None:
        """Make the model what it was; a second call does nothing."""


_ATTACHED: weakref.WeakKeyDictionary[Any, Attachment] = weakref.WeakKeyDictionary()


def attached(model: Any) -> Attachment | None:
    """Return what is attached to a model, or None."""
    return _ATTACHED.get(model)


def check_free(model: Any) -> None:
    """Raise if something is attached to a model.

    Raises
    ------
    TokenPruneError
        Saying how to take it off.
    """
    running = _ATTACHED.get(model)
    if running is not None:
        raise TokenPruneError(
            f"this {type(model).__name__} is under {type(running).__name__} already. Leave that "
            "block, or call tokenprune_hf.remove(model), before pruning or masking it another way."
        )


def attach(model: Any, running: Attachment) -> None:
    """Remember what is attached to a model that is free."""
    _ATTACHED[model] = running


def detach(model: Any, running: Attachment) -> bool:
    """Forget it, and say whether it was attached."""
    if _ATTACHED.get(model) is not running:
        return False
    del _ATTACHED[model]
    return True
