"""What stands in a model's way now: pruning, trimming or sparse masks, one of them at a time."""

from __future__ import annotations

import inspect
import weakref
from types import TracebackType
from typing import Any, Self

from tokenprune.errors import TokenPruneError
from tokenprune_hf.engine import check_release


class Attachment:
    """Something that changes how a model runs until it is removed: base of all there is.

    A subclass says in `_attach` what it puts on the model, and in `_detach` how that is taken off.

    Attributes
    ----------
    model
        What it is attached to.
    """

    def __init__(self, model: Any) -> None:
        check_release()
        self.model = model

    def begin(self) -> None:
        """Attach it to its model.

        Raises
        ------
        TokenPruneError
            If something is attached already; the message says how to take it off.
        """
        running = attached(self.model)
        if running is not None:
            raise TokenPruneError(
                f"this {type(self.model).__name__} is under {type(running).__name__} already. "
                "Leave that block, or call tokenprune_hf.remove(model), before pruning or masking "
                "it another way."
            )
        self._attach()
        _ATTACHED[self.model] = self

    def remove(self) -> None:
        """Make the model what it was; a second call does nothing."""
        if attached(self.model) is self:
            del _ATTACHED[self.model]
            self._detach()

    def _attach(self) -> None:
        raise NotImplementedError

    def _detach(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        """Return this object; it is attached already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Make the model what it was, also after an exception."""
        self.remove()


_ATTACHED: weakref.WeakKeyDictionary[Any, Attachment] = weakref.WeakKeyDictionary()


def attached(model: Any) -> Attachment | None:
    """Return what is attached to a model, or None."""
    return _ATTACHED.get(model)


def named_arguments(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return by name what a hook on a module's forward was told that the call passes."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}
