"""What stands in the place of a selector where tokens leave inside the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tokenprune.selectors.base import Picks, Selector
from tokenprune.tokens import TokenBatch


@dataclass(frozen=True)
class Everything(Selector):
    """Keeps all tokens of the prompt, and looks at nothing."""

    name: ClassVar[str] = "everything"
    summary: ClassVar[str] = "all tokens (no method)"
    needs: ClassVar[tuple[str, ...]] = ()

    def select(self, tokens: TokenBatch, keep: int) -> Picks:
        """Return the first `keep` tokens, which are all there are."""
        return Picks(torch.arange(keep, device=tokens.device).expand(tokens.size, -1))
