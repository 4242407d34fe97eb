"""Selection: which visual tokens of one image or video stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.merging import Merge, merged_rows


@dataclass(frozen=True, eq=False)
class Selection:
    """Which visual tokens of one image or video stay.

    Attributes
    ----------
    kept
        LongTensor [K], the indices of the tokens that stay, ascending.
    total
        N, how many tokens there were.
    grid
        (frames, rows, columns) of the tokens; their product is N.
    is_picture
        Whether neighbours in the grid are neighbours in a picture or video. If not, the grid is
        usually (1, 1, N), and it cannot be drawn.
    scores
        float32 [N], higher means more worth keeping, or None where the method has no score per
        token. A method that also weighs tokens against each other (diversity) does not keep
        simply the highest.
    represented
        LongTensor [K], how many tokens each kept one stands for, itself included; they add up to
        N. None where that was not asked for.
    merge
        Which tokens are added to which kept ones, or None where kept rows stay as they are; see
        `rows`.
    """

    kept: Tensor
    total: int
    grid: tuple[int, int, int]
    scores: Tensor | None = None
    represented: Tensor | None = None
    is_picture: bool = True
    merge: Merge | None = None

    def __len__(self) -> int:
        """Return K, how many tokens stay."""
        return self.kept.numel()

    def rows(
        self,
        embeddings: Tensor,
        features: Tensor | None = None,
        projector: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Return what the language model reads in the place of all tokens.

        Parameters
        ----------
        embeddings
            [N, D], the projector's output.
        features, projector
            [N, C] and what maps [..., C] to [..., D]; only for a method that adds up features.

        Returns
        -------
        Tensor
            [K, D]: rows of the kept tokens, those of a method that merges added up.

        Raises
        ------
        TokensError
            If features are added up and were not passed.
        """
        if self.merge is None:
            return embeddings[self.kept]
        return merged_rows(self.merge, self.kept, embeddings, features, projector)

    @property
    def mask(self) -> Tensor:
        """BoolTensor [N], True where the token stays."""
        mask = torch.zeros(self.total, dtype=torch.bool, device=self.kept.device)
        mask[self.kept] = True
        return mask

    @property
    def grid_mask(self) -> Tensor:
        """BoolTensor [frames, rows, columns], True where the token stays."""
        return self.mask.view(self.grid)

    @property
    def grid_scores(self) -> Tensor | None:
        """float32 [frames, rows, columns], or None where there are no scores."""
        return None if self.scores is None else self.scores.view(self.grid)

    def __repr__(self) -> str:
        note = "" if self.is_picture else ", no picture"
        note += "" if self.merge is None else ", merged"
        return f"Selection(kept {len(self)} of {self.total}, grid={self.grid}{note})"
