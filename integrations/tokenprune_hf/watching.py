"""Watching what a module is given and returns, in one thread.

Other threads may run the same module meanwhile. What they do is not seen here, and hooks of theirs
that come and go while this thread runs the module do not disturb it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tokenprune.tower.plain_weights import only_watches


@contextmanager
def watch_input(
    module: nn.Module, see: Callable[[tuple[Any, ...], dict[str, Any]], object]
) -> Iterator[None]:
    """Call ``see(args, kwargs)`` before each run of a module in this thread.

    Parameters
    ----------
    module
        What is watched until the block ends.
    see
        Gets the arguments of the module's forward.
    """
    thread = threading.get_ident()

    # torch passes kwargs by a table that is not updated together with the table of hooks, so that
    # another thread may find the hook and not that it takes them: hence the default.
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: Any = None) -> None:
        if threading.get_ident() == thread:
            see(args, kwargs)

    handle = module.register_forward_pre_hook(only_watches(hook), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def watch_output(module: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Call ``see(output)`` after each run of a module in this thread, until the block ends."""
    thread = threading.get_ident()

    def hook(_module: nn.Module, _args: object, output: Tensor) -> None:
        if threading.get_ident() == thread:
            see(output)

    handle = module.register_forward_hook(only_watches(hook))
    try:
        yield
    finally:
        handle.remove()
