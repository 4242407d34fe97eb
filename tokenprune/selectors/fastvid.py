"""fastvid: salient tokens of each frame, and centres that the rest of a segment is merged into."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokenprune.errors import OptionError
from tokenprune.greedy.engine import folded_sum
from tokenprune.greedy.rows import IntegerRows
from tokenprune.merging import Merge
from tokenprune.numerics import square_root
from tokenprune.representation import representatives
from tokenprune.selectors.base import ByPlace, Picks
from tokenprune.selectors.cls_attention import ClsAttention
from tokenprune.selectors.in_time import distances_in_time
from tokenprune.selectors.token_vectors import TokenVectors
from tokenprune.tokens import TokenBatch
from tokenprune.transfer import to_device, to_host

SegmentBy = Literal["features", "embeddings", "frame_features"]
SalientBy = Literal["cls_attention", "pooling_attention"]

_ENTRIES = 2**20  # float64 entries of a block of distances: 8 MiB
_CENTRE, _SALIENT, _ORDINARY = range(3)
"""Kinds of tokens, in the order in which they are kept."""


@dataclass(frozen=True)
class FastVid(TokenVectors):
    """Cut a video into segments of alike frames; keep salient tokens, merge the rest into centres.

    With n tokens a frame, T frames and K to keep, a frame has ``b = floor(K / T)`` tokens, of which
    ``c = int(b * context_share)`` are context and ``b - c`` salient:

    1. *Segments.* g_t is frame t's vector. Behind frame t a segment ends if cos(g_t, g_t+1) is
       among the ``segments - 1`` lowest or below `threshold` (`dynamic_segments`).
    2. *Salient.* The b - c tokens of each frame with most attention.
    3. *Context.* Every `anchor_every`-th frame of a segment, counted from its end, is an anchor. In
       a segment of L frames and A anchors each anchor has ``c * L // A`` centres: of its tokens
       that are not salient those of highest ``delta_i * rho_i``, with distances
       ``d_ij = ||z_i - z_j|| / sqrt(D)`` between them, ``rho_i = exp(-mean d²)`` over the
       `neighbours` nearest, i itself among them, and delta_i the distance to the nearest token of
       larger rho, or the largest distance of the frame where there is none.
    4. *Merging.* Each token of the segment that is not salient goes to the centre of highest
       cosine, each centre to itself. With m of them a centre's row becomes ``w z + (1 - w) mean``,
       their mean, and ``w = max(1 / (m + 1), anchor_weight)``. If every frame is an anchor, tokens
       stay in their frame.

    Rows are merged behind the projector; a merged row stands where its centre stood. z are the
    projected tokens. Ties go to the lowest index.

    Source: Shen et al., "FastVID: Dynamic Density Pruning for Fast Video Large Language Models",
    arXiv 2503.11187, and its released code. There a share gives b, and what comes out depends on
    the segments: at most that share. Here exactly `keep` tokens stay, see `counts`. Not taken over
    are the noise of 1e-6 that there decides between tokens of equal density, and, for Qwen2.5-VL,
    the bound ``DySeg_ignore`` of 0.95; its threshold there is 0.84. A centre for which there are
    too few tokens (long segments, small frames) and a budget with c = 0 fail there; here they have
    fewer centres, or none. FastVID keeps a share of 0.10 on LLaVA-OneVision and LLaVA-Video and of
    0.27 on Qwen2.5-VL.

    Parameters
    ----------
    segments
        c of the paper: at least so many segments, where there are as many frames.
    threshold
        tau of the paper.
    context_share
        d of the paper, from 0 to below 1.
    anchor_every
        p of the paper, at least 1.
    neighbours
        k of the paper, at least 1.
    anchor_weight
        alpha of the paper, from 0 to 1.
    segment_by
        Which input a frame's vector comes from. ``"frame_features"``: the output of SigLIP's
        pooling head, as published; no model that adapters prune computes it, so it comes from
        whoever calls the selector API. The others are stand-ins of ours: the mean of the frame's
        ``"features"`` or ``"embeddings"``.
    salient_by
        Which attention says how salient a token is. ``"pooling_attention"``: that of SigLIP's
        pooling head to the tokens of each frame, as published; likewise from the caller. The
        stand-in of ours, ``"cls_attention"``: of the encoder's CLS token, or on an encoder without
        one what each token receives, averaged over heads.
    counts
        How the counts, which depend on the segments, come to exactly `keep`. ``"top-up"``: b is
        rounded down, and the tokens of most attention in the whole video come on top, as salient
        ones. ``"cut"``: b is rounded up, and salient tokens of least attention become ordinary
        ones; where there are too few nevertheless, they are topped up.

    Raises
    ------
    OptionError
        On construction, for a value that cannot be used.
    """

    segments: int = 8
    threshold: float = 0.9
    context_share: float = 0.4
    anchor_every: int = 4
    neighbours: int = 4
    anchor_weight: float = 0.6
    segment_by: SegmentBy = "features"
    salient_by: SalientBy = "cls_attention"
    counts: Literal["top-up", "cut"] = "top-up"

    name: ClassVar[str] = "fastvid"
    summary: ClassVar[str] = (
        "salient tokens, and centres into which alike frames' others are merged"
    )
    paper: ClassVar[str] = "FastVID, arXiv 2503.11187"
    needs: ClassVar[tuple[str, ...]] = ("embeddings", "features", "cls_attention")
    by_place: ClassVar[ByPlace] = "frame"
    for_videos: ClassVar[bool] = True
    merges: ClassVar[Literal["", "features", "embeddings"]] = "embeddings"
    needs_picture: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        # What is looked at is an option, and nobody is asked for what is not looked at.
        inputs = dict.fromkeys((self.vectors_from, self.segment_by, self.salient_by))
        object.__setattr__(self, "needs", tuple(inputs))
        for option, fits, wanted in (
            ("segments", self.segments >= 1, "at least 1 (the paper has 8)"),
            ("context_share", 0 <= self.context_share < 1, "from 0 to below 1 (the paper has 0.4)"),
            ("anchor_every", self.anchor_every >= 1, "at least 1 (the paper has 4)"),
            ("neighbours", self.neighbours >= 1, "at least 1 (the paper has 4)"),
            ("anchor_weight", 0 <= self.anchor_weight <= 1, "from 0 to 1 (the paper has 0.6)"),
        ):
            if not fits:
                raise OptionError(
                    f"option {option}={getattr(self, option)!r} of method {self.name!r} must be "
                    f"{wanted}."
                )

    def select(self, tokens: TokenBatch, keep: int) -> Picks:
        """Return LongTensor [B, K], ascending, the attention [B, N], and a merge for each item."""
        vectors, frames = self.vectors(tokens), tokens.grid[0]
        attention = self._attention(tokens)
        each = -(-keep // frames) if self.counts == "cut" else keep // frames
        context = int(each * self.context_share)
        kinds, ordinary = _split(attention.unflatten(1, (frames, -1)), each - context)
        if not context:
            return Picks(_first(attention, kinds, keep), attention)
        kept, merges = [], []
        for item, segments in enumerate(self._segments(tokens)):
            centres, stands_for = self._context(vectors[item], ordinary[item], segments, context)
            of_item = kinds[item].scatter(0, centres, _CENTRE)[None]
            stays = _first(attention[item, None], of_item, keep)[0]
            kept.append(stays)
            merges.append(self._merge(stays, centres, stands_for))
        return Picks(torch.stack(kept), attention, merges)

    def _attention(self, tokens: TokenBatch) -> Tensor:
        """Return how salient each token is, float32 [B, N]."""
        if self.salient_by == "cls_attention":
            return ClsAttention().score(tokens)
        return tokens.require("pooling_attention").to(torch.float32, copy=True)

    def _segments(self, tokens: TokenBatch) -> list[list[range]]:
        """Return the segments of each item; the host waits for them."""
        if tokens.grid[0] == 1:
            return [[range(1)]] * tokens.size
        vectors = tokens.require(self.segment_by)
        if self.segment_by != "frame_features":
            # A sum in place of the mean: its cosines are the same.
            vectors = folded_sum(vectors.float().unflatten(1, (tokens.grid[0], -1)), dim=2)
        [of_items] = to_host([1.0 - distances_in_time(vectors[:, :, None])[..., 0]])
        return [
            dynamic_segments(of_item, self.segments, self.threshold)
            for of_item in of_items.tolist()
        ]

    def _context(
        self, embeddings: Tensor, ordinary: Tensor, segments: Sequence[range], context: int
    ) -> tuple[Tensor, Tensor]:
        """Choose centres of one item, and the centre that stands for each token.

        Parameters
        ----------
        embeddings
            [N, D].
        ordinary
            LongTensor [T, r]: of each frame the places of the tokens that are not salient.
        segments
            The frames of each.
        context
            Centres of a frame, on average.

        Returns
        -------
        centres
            LongTensor [m].
        stands_for
            LongTensor [N]; salient tokens have one, too.
        """
        per_frame = len(embeddings) // len(ordinary)
        # Counted from a segment's end, and in the order of time again.
        anchors = [segment[:: -self.anchor_every][::-1] for segment in segments]
        every = torch.tensor([frame for own in anchors for frame in own], device="cpu")
        every = to_device(every, embeddings.device)[:, None]
        places = ordinary[every[:, 0]] + every * per_frame
        scores = density_peaks(embeddings[places], self.neighbours)
        places = places.gather(1, scores.sort(dim=1, descending=True, stable=True).indices)
        centres, stands_for = [], []
        for segment, own, best in zip(
            segments, anchors, places.split([len(own) for own in anchors]), strict=True
        ):
            share = context * len(segment) // len(own)  # r at most, as there are no more
            size = per_frame if len(own) == len(segment) else per_frame * len(segment)
            begin, end = segment.start * per_frame, segment.stop * per_frame
            groups = embeddings[begin:end].unflatten(0, (-1, size))
            chosen = best[:, :share].reshape(len(groups), -1).sort(dim=1).values
            starts = torch.arange(begin, end, size, device=embeddings.device)[:, None]
            nearest = representatives(groups, chosen - starts)
            centres.append(chosen.flatten())
            stands_for.append(chosen.gather(1, nearest).flatten())
        return torch.cat(centres), torch.cat(stands_for)

    def _merge(self, kept: Tensor, centres: Tensor, stands_for: Tensor) -> Merge:
        """Return how centres are made of the tokens that are not kept, and of themselves."""
        total = len(stands_for)
        merged = torch.ones_like(stands_for).scatter_(0, kept, 0).scatter_(0, centres, 1)
        # How many there are is known, so that the host need not wait to see which.
        count = total - len(kept) + len(centres)
        of = merged.sort(descending=True, stable=True).indices[:count]
        target = stands_for[of]
        ones = torch.ones(count, dtype=torch.float64, device=of.device)
        members = torch.zeros(total, dtype=torch.float64, device=of.device)
        members = members.scatter_add_(0, target, ones)[target]
        own = (1.0 / (members + 1.0)).clamp(min=self.anchor_weight)
        weight = (1.0 - own) / members + own * (of == target)
        return Merge(torch.searchsorted(kept, target), of, weight.float())


def dynamic_segments(cosines: Sequence[float], segments: int, threshold: float) -> list[range]:
    """Cut a video where frames change: FastVID's dynamic temporal segmentation (section 3.2).

    Parameters
    ----------
    cosines
        T - 1 cosines of each frame's vector to the next one's.
    segments
        The video is cut at the ``segments - 1`` lowest cosines, the first ones of equal ones.
    threshold
        It is also cut wherever the cosine is below this.

    Returns
    -------
    list of range
        The frames of each segment; together all T.
    """
    lowest = sorted(range(len(cosines)), key=cosines.__getitem__)[: segments - 1]
    below = (frame for frame, cosine in enumerate(cosines) if cosine < threshold)
    ends = [frame + 1 for frame in sorted({*lowest, *below})]
    return [range(*pair) for pair in zip([0, *ends], [*ends, len(cosines) + 1], strict=True)]


def density_peaks(rows: Tensor, neighbours: int) -> Tensor:
    """Score rows by how dense it is around them and how far from anything denser they are.

    DPC-KNN (Rodriguez and Laio 2014; Du et al. 2016): ``delta * rho``, see `FastVid`.

    Parameters
    ----------
    rows
        Floating point [B, n, D]; rows of one item are compared with each other.
    neighbours
        How many nearest rows say how dense it is, a row itself among them.

    Returns
    -------
    Tensor
        float64 [B, n].
    """
    at_once = max(1, _ENTRIES // rows.shape[1] ** 2)
    return torch.cat([_density_peaks(some, neighbours) for some in rows.split(at_once)])


def _density_peaks(rows: Tensor, neighbours: int) -> Tensor:
    """Do as `density_peaks` with as many items as fit."""
    size, total, width = rows.shape
    whole = IntegerRows.from_embeddings(rows)
    lengths = whole.squared_norms()
    blocks = torch.arange(total, device=rows.device).split(max(1, _ENTRIES // total))

    @lru_cache(maxsize=1)  # which is all there are, mostly
    def between(block: int) -> Tensor:
        """Return d² of a block of rows to all, float64 [B, m, n], exactly 0 of equal ones."""
        some = blocks[block]
        products = whole.products_with(some.expand(size, -1))
        squares = lengths[:, some, None] + lengths[:, None] - 2.0 * products
        return squares.clamp_(min=0.0) / width

    densities, farthest = [], []
    count = min(neighbours, total)
    for block in range(len(blocks)):
        squares = between(block)
        nearest = squares.topk(count, dim=2, largest=False, sorted=True).values
        densities.append((folded_sum(nearest, dim=2) / -count).exp())
        farthest.append(squares.amax(dim=(1, 2)))
    density = torch.cat(densities, dim=1)
    largest = torch.stack(farthest).amax(dim=0)[:, None]
    away = []
    for block, some in enumerate(blocks):
        denser = density[:, None] > density[:, some, None]
        nearest = between(block).masked_fill(~denser, math.inf).amin(dim=2)
        away.append(torch.where(nearest.isinf(), largest, nearest))
    return square_root(torch.cat(away, dim=1)) * density


def _split(attention: Tensor, salient: int) -> tuple[Tensor, Tensor]:
    """Tell the salient tokens of each frame from the others.

    Parameters
    ----------
    attention
        [B, T, n].
    salient
        How many of a frame are.

    Returns
    -------
    kinds
        LongTensor [B, N], `_SALIENT` or `_ORDINARY`.
    ordinary
        LongTensor [B, T, n - salient], places in the frame, ascending.
    """
    order = attention.sort(dim=2, descending=True, stable=True).indices
    kinds = torch.full_like(order, _ORDINARY).scatter_(2, order[..., :salient], _SALIENT)
    return kinds.flatten(1), order[..., salient:].sort(dim=2).values


def _first(attention: Tensor, kinds: Tensor, keep: int) -> Tensor:
    """Return LongTensor [B, K], ascending: by kind, and of a kind those of most attention."""
    order = attention.sort(dim=1, descending=True, stable=True).indices
    by_kind = kinds.gather(1, order).sort(dim=1, stable=True).indices
    return order.gather(1, by_kind[:, :keep]).sort(dim=1).values
