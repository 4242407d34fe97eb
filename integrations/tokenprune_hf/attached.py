"""What changes how a model runs: pruning, trimming or sparse masks, one of them at a time.

Everything an attachment puts on a model hangs on the model's own modules, as objects and bound
methods of the attachment. A copy of the model, or a pickled one, therefore carries a copy of the
attachment that is bound to the copied modules, and `attached(copy)` finds it.
"""

from __future__ import annotations

import inspect
import threading
import types
from collections.abc import Callable
from typing import Any, Protocol, Self

import torch
from torch import nn

from tokenprune.errors import PromptError, TokenPruneError
from tokenprune_hf.engine import check_release
from tokenprune_hf.wrappers import model_inside

_ON_MODEL = "_tokenprune"
"""The attribute of a model in which its attachment is kept."""


class ThreadState(threading.local):
    """Values of the running thread; a subclass names them, with what a new thread begins with.

    A copy begins anew: what runs in a thread runs on the original.
    """

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return type(self)()

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()


class Handler(Protocol):
    """What is called in place of a method of a model."""

    def __call__(
        self, plain: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, Any], /
    ) -> object:
        """Return what the call returns, of which ``plain(*args, **kwargs)`` is the model's own."""


class StandIn:
    """Stands in front of a method of a model until `remove`.

    It is an attribute of the instance, which `model(...)`, `model.forward(...)` and wrappers that
    call either one all go through.

    Parameters
    ----------
    model
        Whose method.
    name
        The method's, ``"generate"`` or ``"forward"``.
    handler
        Called as ``handler(plain, args, kwargs)`` in the place of ``plain(*args, **kwargs)``.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        handler: Handler,
    ) -> None:
        self._model: Any = model
        self._name = name
        self._handler: Handler | None = handler
        # Somebody else's, such as accelerate's forward or a partial of generate.
        self._before: Callable[..., object] | None = model.__dict__.get(name)
        model.__dict__[name] = self

    @property
    def plain(self) -> Callable[..., object]:
        """What `model.<name>` was before."""
        if self._before is not None:
            return self._before
        return types.MethodType(getattr(type(self._model), self._name), self._model)

    @property
    def __wrapped__(self) -> Callable[..., object]:
        """The plain method, from which `inspect.signature` reads the parameters."""
        return self.plain

    # Not to be traced: what a call does first hangs on its data. Modules inside still are.
    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def __call__(self, *args: object, **kwargs: Any) -> object:
        """Call the handler or, after `remove`, the plain method."""
        if self._handler is None:
            return self.plain(*args, **kwargs)
        return self._handler(self.plain, args, kwargs)

    def remove(self) -> None:
        """Put back what was there before, unless somebody stands in front of this by now."""
        self._handler = None
        if self._model.__dict__.get(self._name) is not self:
            return  # theirs stays, and calls that still come through here are plain
        if self._before is None:
            del self._model.__dict__[self._name]
        else:
            self._model.__dict__[self._name] = self._before


class Attachment:
    """Something that changes how a model runs until it is removed: base of all there is.

    A subclass says in `_attach` what it puts on the model, and in `_detach` how that is taken off.
    As a context manager it may be entered again after it was left, and inside itself.

    Attributes
    ----------
    model
        What it is attached to; of a wrapper (PEFT, `torch.compile`) the model inside.
    """

    def __init__(self, model: Any) -> None:
        check_release()
        self.model = model_inside(model)
        self._entered = 0

    @property
    def is_attached(self) -> bool:
        """Whether calls of the model go through this object now."""
        return attached(self.model) is self

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
        self._guard = self.model.register_forward_pre_hook(self._check_module)
        self.model.__dict__[_ON_MODEL] = self

    def remove(self) -> None:
        """Make the model what it was; a second call does nothing."""
        if self.is_attached:
            del self.model.__dict__[_ON_MODEL]
            self._guard.remove()
            self._detach()

    def _check_module(self, module: object, _args: object) -> None:
        """Raise if the model that is called is not the one that this is attached to."""
        if module is not self.model:
            raise PromptError(
                f"this {type(module).__name__} is a replica (DataParallel makes them, and "
                f"copy.copy) of one that is under {type(self).__name__}, and what it would run is "
                "the original. Use copy.deepcopy, or one process for each device."
            )

    def _attach(self) -> None:
        raise NotImplementedError

    def _detach(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        """Return this object, attached anew where an earlier block took it off."""
        if not self.is_attached:
            self.begin()
        self._entered += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        """Make the model what it was, also after an exception, when the outermost block ends."""
        self._entered -= 1
        if self._entered <= 0:
            self._entered = 0
            self.remove()


def attached(model: object) -> Attachment | None:
    """Return what is attached to a model, or to the model inside a wrapper; or None."""
    attachment: Attachment | None = getattr(model_inside(model), "__dict__", {}).get(_ON_MODEL)
    return attachment


def named_arguments(
    module: object, args: tuple[object, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return by name what a call passes to a module's forward."""
    return named_call(module, "forward", args, kwargs)


def named_call(
    model: object, method: str, args: tuple[object, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return by name what a call passes to a method, which keeps its own class's parameters."""
    # By the class: what stands on the instance, such as accelerate's forward, takes anything.
    names = list(inspect.signature(getattr(type(model), method)).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}
