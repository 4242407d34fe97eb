"""Merge: rows of kept tokens that are made of several tokens, and how they are made.

A method that merges says which tokens are added to which kept one, with what weights, and whether
in front of the projector or behind it. The engines' adapters make the rows: the count of rows, and
where each stands, are those of the kept tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tokenprune.errors import TokensError
from tokenprune.numerics import full_precision

Space = Literal["features", "embeddings"]
"""What is added up: the projector's input, or what the language model reads."""

_ENTRIES = 2**24  # float32 entries of weights that exist at one time (64 MiB)


@dataclass(frozen=True, eq=False)
class Merge:
    """Which tokens are added to which kept ones, with what weights.

    The row of the kept token k becomes the sum of ``weight * x[of]`` over all entries with
    ``into == k``, its own token only if it is among them. A kept token without an entry keeps its
    row as it is.

    Attributes
    ----------
    into
        LongTensor [M], which of the K kept tokens, from 0.
    of
        LongTensor [M], which of the N tokens.
    weight
        float32 [M].
    space
        Where they are added: ``"features"``, whose sums are sent through the projector, or
        ``"embeddings"``.
    """

    into: Tensor
    of: Tensor
    weight: Tensor
    space: Space = "embeddings"

    def to(self, device: torch.device) -> Merge:
        """Return the same on a device."""
        moved = {name: getattr(self, name).to(device) for name in ("into", "of", "weight")}
        return replace(self, **moved)

    def sums(self, values: Tensor, kept: Tensor) -> Tensor:
        """Return rows [K, X] of `values` [N, X], float32: those of kept tokens, merged ones added.

        Parameters
        ----------
        values
            Floating point [N, X].
        kept
            LongTensor [K].
        """
        values = values.float()
        merge, step = self.to(values.device), max(1, _ENTRIES // max(1, len(values)))
        if len(kept) <= step:
            added = merge._added(values, len(kept))
        else:
            added = torch.cat(
                [
                    merge._between(start, start + step)._added(values, min(step, len(kept) - start))
                    for start in range(0, len(kept), step)
                ]
            )
        return torch.where(merge.is_merged(len(kept))[:, None], added, values[kept])

    def _between(self, start: int, stop: int) -> Merge:
        """Return the entries of kept tokens from `start` on up to `stop`, counted from there."""
        here = (self.into >= start) & (self.into < stop)
        return Merge(self.into[here] - start, self.of[here], self.weight[here], self.space)

    def _added(self, values: Tensor, keep: int) -> Tensor:
        """Return the sums of K kept tokens, [K, X]; 0 where there is no entry."""
        weights = values.new_zeros(keep, len(values))
        weights.index_put_((self.into, self.of), self.weight, accumulate=True)
        # One product for each item, which is of the same shape in any batch.
        with full_precision(values.device):
            return weights @ values

    def is_merged(self, keep: int) -> Tensor:
        """Return BoolTensor [K], which kept tokens have a row made of several."""
        mask = torch.zeros(keep, dtype=torch.bool, device=self.into.device)
        mask[self.into] = True
        return mask


def merged_rows(
    merge: Merge,
    kept: Tensor,
    embeddings: Tensor,
    features: Tensor | None = None,
    projector: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return what the language model reads of one item, [K, D] in the dtype of `embeddings`.

    Parameters
    ----------
    merge, kept
        See `tokenprune.Selection`.
    embeddings
        [N, D], the projector's output.
    features, projector
        [N, C] and what maps [..., C] to [..., D]; needed where rows are added in front of it.

    Raises
    ------
    TokensError
        If they are needed and missing.
    """
    kept = kept.to(embeddings.device)
    merge, rows = merge.to(embeddings.device), embeddings[kept]
    if merge.space == "embeddings":
        made = merge.sums(embeddings, kept)
    else:
        if features is None or projector is None:
            raise TokensError(
                "this selection adds up features in front of the projector. Pass features and "
                "projector, which VisualTokens(features=..., projector=...) had."
            )
        made = projector(merge.sums(features, kept).to(features.dtype))
    return torch.where(merge.is_merged(len(kept))[:, None], made.to(rows.dtype), rows)
