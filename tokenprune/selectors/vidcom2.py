"""vidcom2: of each frame of a video, a share by how distinct it is, its most distinct tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.budget import left_by_rate
from tokenprune.errors import OptionError
from tokenprune.greedy.engine import folded_sum
from tokenprune.numerics import square_root
from tokenprune.selectors.base import ByPlace, Picks
from tokenprune.selectors.token_vectors import TokenVectors
from tokenprune.tokens import TokenBatch

_TEMPERATURE = 0.01
_FLOOR = 1e-12  # of a row's length
_WIDTHS = 5  # of the Gaussians that are added up
_ENTRIES = 2**24  # float64 entries of a block: 128 MiB


@dataclass(frozen=True)
class VidCom2(TokenVectors):
    """Share the budget between frames by how distinct each is, and keep the least usual tokens.

    Of the projected tokens the half of the channels that vary least over the video, int(D / 2),
    make rows x, scaled to length 1. With m the mean of all rows and m_t that of frame t,

        g(x, c) = sum over p = -3 .. 1 of exp(-||x - c||² / (2 * 2^p))
        u_ti = g(x_ti, m) + g(x_ti, m_t)            how usual a token is
        f_t = -mean_i g(x_ti, m),  p = softmax((f - max f) / 0.01)
        s_t = min(1, ratio * (1 + p_t - mean p)),   n_t = max(1, round(s_t * n))

    of n tokens of a frame, rounded half to even; the n_t least usual tokens of each frame stay.
    The counts do not add up to the budget: where they are too many, the most usual ones of all
    frames go, and where they are too few, the least usual of all others come. So exactly `keep`
    stay. All of it is in float64: with so low a temperature one frame often has most of the
    softmax, and in float32 rounding decides which.

    Source: Liu et al., "Video Compression Commander: Plug-and-Play Inference Acceleration for Video
    Large Language Models" (VidCom2), arXiv 2505.14454, in the variant of its released code: the
    paper's equations 4 and 8 have plain cosines. Meeting the budget is vLLM's (0.32,
    ``--video-pruning-method vidcom2``), which keeps at least a token of each frame
    (`vidcom2_count`); here `keep` may be less. In the authors' code a frame's count is all there
    is, and on LLaVA-Video the newlines of all rows stay beside it.

    Parameters
    ----------
    ratio
        R, the share of tokens from which the frames' counts come, above 0 and at most 1; the paper
        has 0.25. None: `keep` over N, so that next to nothing is cut off or comes on top.

    Raises
    ------
    OptionError
        On construction, for a ratio that cannot be used.
    """

    ratio: float | None = None

    name: ClassVar[str] = "vidcom2"
    summary: ClassVar[str] = "the least usual tokens of each frame, more of distinct frames"
    paper: ClassVar[str] = "VidCom2, arXiv 2505.14454"
    needs: ClassVar[tuple[str, ...]] = ("embeddings",)
    by_place: ClassVar[ByPlace] = "frame"
    for_videos: ClassVar[bool] = True
    needs_picture: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio is not None and not 0.0 < self.ratio <= 1.0:
            raise OptionError(
                f"option ratio={self.ratio!r} of method {self.name!r} must be above 0 and at most "
                "1 (the paper has 0.25); None for the share that `keep` is."
            )

    def select(self, tokens: TokenBatch, keep: int) -> Picks:
        """Return LongTensor [B, K], ascending, and scores -u, float32 [B, N]."""
        embeddings = self.vectors(tokens)
        ratio = keep / tokens.total if self.ratio is None else self.ratio
        at_once = max(1, _ENTRIES // embeddings[0].numel())
        usual, counts = [], []
        for some in embeddings.split(at_once):
            likeness = _likeness(some, tokens.grid[0])
            usual.append(likeness[..., 0] + likeness[..., 1])
            counts.append(_counts(likeness[..., 0], ratio))
        every = _joined(usual, dim=0)
        return Picks(_least_usual(every, _joined(counts, dim=0), keep), -every.flatten(1).float())


def vidcom2_count(grid: tuple[int, int, int], pruning_rate: float) -> int:
    """Return how many tokens of a video vLLM keeps with VidCom2: a `keep` for the same count.

    ``max(T, int(N (1 - q)))``: a token of each frame at least, and a share that is rounded down,
    where `tokenprune.tokens_kept` rounds half up.

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
    return max(grid[0], left_by_rate(math.prod(grid), pruning_rate))


def _likeness(embeddings: Tensor, frames: int) -> Tensor:
    """Return g(x, m) and g(x, m_t) of embeddings [B, N, D], float64 [B, T, n, 2]."""
    quiet = _quiet_channels(embeddings)
    by_frame = embeddings.unflatten(1, (frames, -1))
    step = max(1, _ENTRIES // by_frame[:, 0].numel())
    units = [_unit_rows(some, quiet) for some in by_frame.split(step, dim=1)]
    own = _joined([folded_sum(some, dim=2) / some.shape[2] for some in units])[:, :, None]
    of_all = folded_sum(own, dim=1)[:, None] / frames
    blocks = zip(units, own.split(step, dim=1), strict=True)
    return _joined([_gaussians(some, of_all, of_frames) for some, of_frames in blocks])


def _joined(blocks: list[Tensor], dim: int = 1) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=dim)


def _quiet_channels(embeddings: Tensor) -> Tensor:
    """Return the half of the channels of least variance, LongTensor [B, max(1, D // 2)]."""
    size, total, width = embeddings.shape
    variances = []
    for some in embeddings.split(max(1, _ENTRIES // (size * total)), dim=2):
        values = some.double()
        mean = folded_sum(values, dim=1) / total
        variances.append(folded_sum((values - mean[:, None]).square(), dim=1) / total)
    variance = _joined(variances)
    return variance.sort(dim=1, stable=True).indices[:, : max(1, width // 2)]


def _unit_rows(by_frame: Tensor, channels: Tensor) -> Tensor:
    """Return these channels of rows [B, t, n, D], scaled to length 1, float64 [B, t, n, D / 2]."""
    wanted = channels[:, None, None].expand(*by_frame.shape[:3], -1)
    rows = by_frame.gather(3, wanted).double()
    lengths = square_root(folded_sum(rows.square(), dim=3))
    return rows / lengths.clamp(min=_FLOOR)[..., None]


def _gaussians(rows: Tensor, *centres: Tensor) -> Tensor:
    """Return g of rows [B, t, n, C] and each centre, which broadcasts, float64 [B, t, n, c]."""
    squared = [folded_sum((rows - centre).square(), dim=3) for centre in centres]
    # 1 / (2 * 2^p) for p from -3 on: 4, 2, 1 ...
    factors = 8.0 * 0.5 ** torch.arange(1, _WIDTHS + 1, dtype=torch.float64, device=rows.device)
    return folded_sum((torch.stack(squared, dim=3)[..., None] * -factors).exp(), dim=4)


def _counts(to_all: Tensor, ratio: float) -> Tensor:
    """Return how many tokens of each frame stay before the budget is met, LongTensor [B, T]."""
    frames, per_frame = to_all.shape[1:]
    distinct = folded_sum(to_all, dim=2) / -per_frame
    powers = ((distinct - distinct.amax(dim=1, keepdim=True)) / _TEMPERATURE).exp()
    share = powers / folded_sum(powers, dim=1)[:, None]  # 1 / T on average
    rate = (ratio * (1.0 - 1.0 / frames + share)).clamp(max=1.0)
    return (rate * per_frame).round().clamp(min=1.0).long()  # half to even


def _least_usual(usual: Tensor, counts: Tensor, keep: int) -> Tensor:
    """Return LongTensor [B, K], ascending: of each frame so many, cut or filled up to `keep`.

    Parameters
    ----------
    usual
        float64 [B, T, n].
    counts
        LongTensor [B, T].
    keep
        K, between 1 and N.
    """
    per_frame = usual.shape[2]
    order = usual.sort(dim=2, stable=True).indices
    first = torch.arange(per_frame, device=usual.device) < counts[..., None]
    others = torch.ones_like(first).scatter_(2, order, ~first).flatten(1)
    # Those of the frames' counts come before all others, each kind by how usual it is.
    by_usual = usual.flatten(1).sort(dim=1, stable=True).indices
    by_kind = others.gather(1, by_usual).byte().sort(dim=1, stable=True).indices
    return by_usual.gather(1, by_kind[:, :keep]).sort(dim=1).values
