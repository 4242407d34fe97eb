"""random: keep tokens blindly. The baseline every method has to beat."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokenprune.errors import OptionError
from tokenprune.selectors.base import ByPlace, Selector
from tokenprune.tokens import TokenBatch
from tokenprune.transfer import to_device


@dataclass(frozen=True)
class Random(Selector):
    """Score tokens with one permutation drawn from `seed` and N alone.

    The same item gets the same selection in any batch and on any engine, so every item of N
    tokens keeps the same places; draw again with another seed to average over placements.

    Parameters
    ----------
    seed
        Seed of the method's own generator, between 0 and 2**63 - 1.

    Raises
    ------
    OptionError
        On construction, for another seed.
    """

    seed: int = 0

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "nothing: a fixed random draw (baseline)"
    needs: ClassVar[tuple[str, ...]] = ()
    by_place: ClassVar[ByPlace] = "place"
    takes_sizes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.seed < 2**63:
            raise OptionError(
                f"option seed={self.seed} of method {self.name!r} must be between 0 and 2**63 - 1."
            )

    def score(self, tokens: TokenBatch) -> Tensor:
        """Return float32 [B, N]: for every item of N tokens the same permutation of 0 .. N-1."""
        if tokens.grids is None:
            # A copy, so that whoever is given the scores may change them.
            order = _order(self.seed, tokens.total).clone()
            return to_device(order, tokens.device).expand(tokens.size, -1)
        rows = [_order(self.seed, size) for size in tokens.sizes]
        return to_device(pad_sequence(rows, batch_first=True), tokens.device)


@functools.lru_cache(maxsize=64)
def _order(seed: int, total: int) -> Tensor:
    """Return float32 [total] on the CPU, a permutation drawn from `seed`."""
    # The device is named because a default device may be set, which draws otherwise or fails.
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randperm(total, generator=generator, device="cpu").float()
