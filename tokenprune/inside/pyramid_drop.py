"""pyramid-drop: the same share of the tokens leaves at each of three depths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokenprune.inside.base import InsideMethod, Stage, layers_of, rounded


@dataclass(frozen=True)
class PyramidDrop(InsideMethod):
    """Leave out the same share of tokens after a quarter, a half and three quarters of the layers.

    In front of a stage's layer ``s_i = mean over heads of softmax(q kᵀ / sqrt(d))_i``, with q of
    the prompt's last token and k of all that is left of the prompt. Both come from the projections
    of the layer itself, to which the tokens that leave are not shown any more. The highest s stay.
    Ties go to the lowest index.

    With N tokens, K to keep and S stages ``N (K / N)^(i / S)`` stay behind the i-th stage, rounded
    half up: K = N/8 gives N/2, N/4 and N/8, which are the paper's.

    Source: Xing et al., "PyramidDrop", CVPR 2025, arXiv 2410.17247, and its released code. Two
    things differ. There what is left is numbered anew after each stage; here tokens keep the
    positions of the full prompt, as with every method of tokenprune. There all visual tokens of
    an image are one set, its crops included; here each image, video or crop has `keep` tokens of
    its own.

    Parameters
    ----------
    layers
        The first layer behind each stage: from 0 (``"8,16,24"``), or as fractions of the depth.
    """

    layers: str = "0.25,0.5,0.75"

    name: ClassVar[str] = "pyramid-drop"
    summary: ClassVar[str] = "attention of the prompt's last token, in stages along the depth"
    paper: ClassVar[str] = "PyramidDrop, arXiv 2410.17247"

    def __post_init__(self) -> None:
        super().__post_init__()
        layers_of(self.name, "layers", self.layers)

    def stages(self, depth: int) -> tuple[Stage, ...]:
        """Return the stages; each is ranked in its own layer."""
        layers = layers_of(self.name, "layers", self.layers, depth)
        return self._stages_behind(layers, depth, ranked=0)

    def counts(self, total: int, keep: int) -> tuple[int, ...]:
        """Return what stays behind each stage, a geometric sequence that ends in `keep`."""
        stages = len(layers_of(self.name, "layers", self.layers))
        shares = (number / stages for number in range(1, stages))
        return (*(rounded(total * (keep / total) ** share) for share in shares), keep)
