"""One image or video at the sizes that conditions ask for, for the engines that resize.

A condition that resizes names a budget, and the budget a size. What an engine makes of a medium at
a size is made once for all conditions that come to it, and freed when the last of them is answered.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

from tokenprune.media.sizes import Content
from tokenprune_eval.evaluation.failures import failure_of
from tokenprune_eval.results.records import Condition
from tokenprune_hf.resized import Resized
from tokenprune_hf.resizing import Resizer

Made = TypeVar("Made")
"""What an engine makes of a medium at one size."""


class Sizes(Generic[Made]):
    """A medium at every size.

    Parameters
    ----------
    content
        The image or the video at full size.
    resizer
        Of the model.
    conditions
        Those that resize. One whose budget the medium cannot be made small enough for has its
        reason in `reasons`.
    make
        Makes of a smaller size what the engine reads.

    Attributes
    ----------
    reasons
        Key of a condition -> why it cannot be asked.
    """

    def __init__(
        self,
        content: Content,
        resizer: Resizer,
        conditions: Sequence[Condition],
        make: Callable[[Resized], Made],
    ) -> None:
        self._make = make
        self._resized: dict[str, Resized] = {}
        self._made: dict[Hashable, Made] = {}
        self.reasons: dict[str, str] = {}
        for condition in conditions:
            halfway = condition.pruned_by is not None
            try:
                resized = resizer(content, condition.keep, halfway=halfway)
                self._resized[condition.key] = resized
                self.at(condition)
            except Exception as error:  # a processor may raise anything on a size
                self.fail(condition, failure_of(error))
        self._waiting = set(self._resized)

    def fail(self, condition: Condition, reason: str) -> None:
        """Note why a condition, and every other of its size, cannot be asked."""
        size = self._resized.get(condition.key)
        same = [key for key, one in self._resized.items() if size and one.key == size.key]
        self.reasons |= dict.fromkeys({condition.key, *same}, reason)

    def resized(self, condition: Condition) -> Resized:
        """Return the size of a condition that has no reason against it."""
        return self._resized[condition.key]

    def at(self, condition: Condition) -> Made | None:
        """Return what was made for a condition without a reason; None where it is of full size.

        It is made anew where it was freed.
        """
        resized = self._resized[condition.key]
        if resized.is_full:
            return None
        if resized.key not in self._made:
            self._made[resized.key] = self._make(resized)
        return self._made[resized.key]

    def free(self, condition: Condition) -> None:
        """Forget what was made for a condition, unless one that is still to come is of its size."""
        self._waiting.discard(condition.key)
        size = self._resized.get(condition.key)
        if size and not any(self._resized[key].key == size.key for key in self._waiting):
            self._made.pop(size.key, None)
