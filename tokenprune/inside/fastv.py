"""fastv: what the prompt's last token attends to in an early layer stays, the rest leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokenprune.inside.base import InsideMethod, Stage


@dataclass(frozen=True)
class FastV(InsideMethod):
    """Leave out, in front of one layer, what the last token attended to least in the layer before.

    ``s_i = mean over heads of softmax(q kᵀ / sqrt(d))_i`` with q of the prompt's last token and k
    of the whole prompt, both of the layer in front. The highest s stay; they and the text keep the
    positions that they have in the full prompt. Ties go to the lowest index.

    Source: Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024, arXiv 2403.06764,
    and its released code, whose K is `layer` and whose R is the share that leaves. There all
    visual tokens of a prompt are one set. Here each image, video or crop has `keep` tokens of its
    own, so that a budget means the same for every method; with one item in the prompt the two are
    the same.

    Parameters
    ----------
    layer
        K: the first layer without the tokens that left, from 0; at least 1.
    """

    layer: int = 2

    name: ClassVar[str] = "fastv"
    summary: ClassVar[str] = "attention of the prompt's last token in an early layer"
    paper: ClassVar[str] = "FastV, arXiv 2403.06764"

    def stages(self, depth: int) -> tuple[Stage, ...]:
        """Return the one stage; it is ranked in the layer in front of it."""
        return self._stages_behind([self.layer], depth, ranked=1)

    def counts(self, total: int, keep: int) -> tuple[int, ...]:
        """Return `keep`."""
        return (keep,)
