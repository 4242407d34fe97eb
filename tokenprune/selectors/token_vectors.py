"""Where a method takes the vectors that it scores tokens by: before the projector, or after it."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from tokenprune.errors import OptionError, did_you_mean
from tokenprune.selectors.base import Selector
from tokenprune.tokens import TokenBatch

_INPUTS = {"before": "features", "after": "embeddings"}
_TAP = re.compile(r"deepstack-(0|[1-9][0-9]*)")


@dataclass(frozen=True)
class TokenVectors(Selector):
    """Base of the methods that measure one vector of each token, or compare them.

    A subclass reads them with `vectors`. Its class says in `needs` what it looks at by default, and
    where that is ``"before"`` gives `taken` again with that default.

    Parameters
    ----------
    taken
        Where the vectors are taken. ``"before"`` the projector, or the merger that makes one token
        of several patches: the features, those of a merged token's patches side by side.
        ``"after"`` it: the embeddings that the language model reads. ``"deepstack-0"``,
        ``"deepstack-1"`` and so on: at a deepstack tap of the tower, of models that have some
        (Qwen3-VL). What else a method looks at (attention, the question) stays what it is, and so
        do the rows that are kept.

    Raises
    ------
    OptionError
        On construction, for a place that there is not.
    """

    taken: str = field(default="after", kw_only=True)

    stays_needed: ClassVar[tuple[str, ...]] = ()
    """Names out of `needs` that the method looks at wherever its vectors are taken."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.taken not in _INPUTS and not _TAP.fullmatch(self.taken):
            places = (*_INPUTS, "deepstack-0")
            raise OptionError(
                f"option taken={self.taken!r} of method {self.name!r} is no place to take tokens "
                f"at. {did_you_mean(self.taken, places)} That is before or after the projector, or "
                "at a deepstack tap of the vision tower, counted from 0."
            )
        standard = next(one for one in dataclasses.fields(self) if one.name == "taken").default
        ordinary, chosen = _INPUTS[str(standard)], self.vectors_from
        needs = dict.fromkeys(chosen if one == ordinary else one for one in type(self).needs)
        still = (one for one in self.stays_needed if one not in needs)
        object.__setattr__(self, "needs", (*needs, *still))

    @property
    def vectors_from(self) -> str:
        """The input out of `tokenprune.tokens.INPUTS` that has the vectors."""
        return _INPUTS.get(self.taken, "deepstack")

    @property
    def tap(self) -> int | None:
        """The deepstack tap at which they are taken, from 0; None where they are at none."""
        found = _TAP.fullmatch(self.taken)
        return None if found is None else int(found[1])

    def vectors(self, tokens: TokenBatch) -> Tensor:
        """Return the tokens' vectors, floating point [B, N, X].

        Raises
        ------
        TokensError
            If the batch does not have them.
        OptionError
            If there are fewer deepstack taps.
        """
        tensor = tokens.require(self.vectors_from)
        if self.tap is None:
            return tensor
        if self.tap >= tensor.shape[1]:
            raise OptionError(
                f"{tokens.labels[0]}: option taken={self.taken!r} of method {self.name!r} names a "
                f"deepstack tap, and there are {tensor.shape[1]}. Give deepstack-0 to "
                f"deepstack-{tensor.shape[1] - 1}."
            )
        return tensor[:, self.tap].contiguous()
