"""The most memory that a call holds, counted tensor by tensor, for devices that do not tell."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(call: Callable[[], None]) -> int:
    """Return the most bytes that tensors made while `call` runs hold at one time.

    Counted operation by operation, so what a kernel allocates and frees within itself is not seen.
    """
    held = _Held()
    with held:
        call()
    return held.most


class _Held(TorchDispatchMode):
    """Adds up the storages that operations make, until each is freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.most: int = 0
        self._alive: dict[int, weakref.finalize[Any, Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation and count what it made."""
        known = {_address(tensor) for tensor in tree_leaves((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            address = _address(tensor)
            # A view, or a result written in place, holds nothing of its own.
            if address is None or address in known or address in self._alive:
                continue
            storage = tensor.untyped_storage()
            self.now += storage.nbytes()
            self._alive[address] = weakref.finalize(storage, self._free, address, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def _free(self, address: int, size: int) -> None:
        self.now -= size
        del self._alive[address]

    def __exit__(self, *error: Any) -> None:
        """Stop counting."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for watcher in self._alive.values():
            watcher.detach()


def _address(value: Any) -> int | None:
    """Return where a tensor's storage lies; None for an empty one and for no tensor."""
    return value.untyped_storage().data_ptr() or None if isinstance(value, torch.Tensor) else None
