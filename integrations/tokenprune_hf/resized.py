"""A picture or video made smaller: what `tokenprune_hf.resize` returns and `ask` takes.

Making the picture smaller is the baseline of all pruning: the language model reads as few tokens,
and the encoder has less to do besides.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenprune.media.sizes import Content


@dataclass(frozen=True, eq=False)
class Resized:
    """A picture or video for which the model reads fewer tokens.

    Attributes
    ----------
    content
        The picture or the frames to pass on, smaller where that is how they become fewer.
    tokens, of_tokens
        Visual tokens now, and at full size; rows that no method drops (newlines) do not count.
    keep
        What is left to keep of each item by a method: ``1.0``, everything, unless `resize` was
        called with `halfway`.
    placeholders
        Placeholders of the medium in the prompt; more than `tokens` where rows are structure.
    arguments
        What the processor is called with besides, for its ``images_kwargs``.
    attributes
        What the processor has to say of itself meanwhile.
    key
        Names the size; media of one size and one key become alike.
    """

    content: Content
    tokens: int
    of_tokens: int
    keep: int | float = 1.0
    placeholders: int = 0
    arguments: Mapping[str, Any] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    key: Hashable = None

    @property
    def is_full(self) -> bool:
        """Whether the medium is as it was."""
        return self.tokens == self.of_tokens

    def processor(self, processor: Any) -> Any:
        """Return a processor that says `attributes` of itself; the given one stays as it is."""
        if not self.attributes:
            return processor
        changed = copy.copy(processor)
        for name, value in self.attributes.items():
            setattr(changed, name, value)
        return changed
