"""evs: keep a video's first frame, then the tokens that changed since the frame before (EVS)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenprune.budget import left_by_rate
from tokenprune.selectors.base import ByPlace
from tokenprune.selectors.in_time import distances_in_time
from tokenprune.selectors.token_vectors import TokenVectors
from tokenprune.tokens import TokenBatch

_FIRST = 255.0  # above every change, which is 2 at most


@dataclass(frozen=True)
class Evs(TokenVectors):
    """Score each token of a video by how much it changed since the frame before.

        s[0, p] = 255,  s[t, p] = 1 - cos(z[t, p], z[t-1, p])

    z being the projected tokens (behind the merger), t the frame and p the place in it. The highest
    scores of the whole video are kept; the lowest index wins a tie.

    Source: "Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference"
    (EVS), arXiv 2510.14624, as in vLLM 0.32 (``--video-pruning-method evs``). There the first frame
    is kept whole whatever the budget (`evs_count`), and images are not pruned. Here exactly `keep`
    tokens stay: a budget below the tokens of a frame, and any budget of an image, keeps the first
    ones of the first frame. Embeddings that were never changed tie here exactly; there rounding
    decides. Deep features are not looked at.
    """

    name: ClassVar[str] = "evs"
    summary: ClassVar[str] = "a video's first frame, then what changed since the frame before"
    paper: ClassVar[str] = "EVS, arXiv 2510.14624"
    needs: ClassVar[tuple[str, ...]] = ("embeddings",)
    by_place: ClassVar[ByPlace] = "frame"
    for_videos: ClassVar[bool] = True
    needs_picture: ClassVar[bool] = True

    def score(self, tokens: TokenBatch) -> Tensor:
        """Return float32 [B, N]: 255 in the first frame, then 1 - cosine, from 0 to 2."""
        embeddings = self.vectors(tokens)
        frames, rows, columns = tokens.grid
        if frames == 1:
            return embeddings.new_full(embeddings.shape[:2], _FIRST, dtype=torch.float32)
        changes = distances_in_time(embeddings.unflatten(1, (frames, -1))).flatten(1)
        return pad(changes.float(), (rows * columns, 0), value=_FIRST)


def evs_count(grid: tuple[int, int, int], pruning_rate: float) -> int:
    """Return how many tokens of a video vLLM keeps with EVS: a `keep` for the same count.

    ``max(R W, int(N (1 - q)))``: whole frames at least, and a share that is rounded down, where
    `tokenprune.tokens_kept` rounds half up.

    Parameters
    ----------
    grid
        (T, R, W): frames, rows, columns of the video's tokens.
    pruning_rate
        q, the share of tokens that is dropped, from 0 to below 1: ``--video-pruning-rate``.

    Raises
    ------
    BudgetError
        If the rate is no such number.
    """
    _, rows, columns = grid
    return max(rows * columns, left_by_rate(math.prod(grid), pruning_rate))
