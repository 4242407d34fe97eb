"""What was worked out once for a layout, a size or a model, as long as there is room for it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Remembered(Generic[K, V]):
    """The values of the keys that were asked for last; threads may share one.

    Parameters
    ----------
    most
        How many are kept: a server that runs for long meets any number of sizes.
    """

    def __init__(self, most: int = 64) -> None:
        self._most = most
        self._values: OrderedDict[K, V] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return how many are remembered."""
        return len(self._values)

    def get(self, key: K) -> V | None:
        """Return the value of a key; None where it is not known, or no longer."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: K, value: V) -> V:
        """Remember the value of a key, and return it."""
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            while len(self._values) > self._most:
                self._values.popitem(last=False)
        return value

    def made(self, key: K, make: Callable[[], V]) -> V:
        """Return the value of a key, made where it is not known; threads may make it twice."""
        known = self.get(key)
        return self.put(key, make()) if known is None else known

    def __getstate__(self) -> dict[str, int]:
        """Leave out what is remembered: it may be of a model that is not copied along."""
        return {"_most": self._most}

    def __setstate__(self, state: dict[str, int]) -> None:
        """Begin anew."""
        Remembered.__init__(self, state["_most"])
