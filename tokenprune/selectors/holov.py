"""holov: runs of the image share the budget by attention, each keeps its best (HoloV)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokenprune.errors import OptionError
from tokenprune.greedy.engine import folded_sum, rows_in_parts
from tokenprune.greedy.rows import IntegerRows
from tokenprune.merging import Merge
from tokenprune.numerics import square_root
from tokenprune.selectors.base import ByPlace, Picks, top_k
from tokenprune.selectors.cls_attention import mean_over_heads
from tokenprune.selectors.token_vectors import TokenVectors
from tokenprune.tokens import TokenBatch
from tokenprune.transfer import to_device

_ENTRIES = 2**22  # float64 cosines that exist at one time: 32 MiB


@dataclass(frozen=True)
class HoloV(TokenVectors):
    """Quotas of P runs of the flattened tokens, and in each run the tokens of highest attention.

    With a the CLS token's attention, the mean over heads, and S the cosines of the embeddings of a
    run of n tokens, with norms + 1e-6 and zeros on the diagonal:

        mean_i = sum_j S_ij / (n - 1),   v_i = sum_j (S_ij - mean_i)² / (n - 1), j = i included
        a token's score is 1000 a_i + beta v_i mean(1000 a) / (mean(v) + 1e-6), means of the run
        a run's score is the mean of its tokens' scores; a run of one token has the score a_i
        w = score / (sum of all runs' scores + 1e-6), and a run's share floor(K w), and one more for
        the runs of highest w until K is spent.

    The first N mod P runs have one token more. A run keeps the tokens of highest a. The term with v
    cancels but for the 1e-6, since scaled to the run's mean attention its mean is that: so the
    share of a run goes by its mean attention, and the method does not look for diverse tokens.

    Source: HoloV, NeurIPS 2025, and its released code. There a run that is given more tokens than
    it has loses what is over, and rows of zeros stand for it: that is ``exact=False``, with the
    rows of zeros at the first places that are free. With ``exact=True``, which is ours, what is
    over goes to the run of highest w that has room, then to the next. Rows are in the order of the
    image, and not in that of attention within a run.

    Parameters
    ----------
    chunks
        P, no more than N; None for what the authors take for Qwen2.5-VL,
        ``max(1, int(1024 / 576 * N / K))``, which is the 16 that they take for 64 of the 576 tokens
        of LLaVA-1.5.
    beta
        How much the variance counts; see above.
    exact
        Whether all K tokens are tokens of the image.
    """

    name: ClassVar[str] = "holov"
    summary: ClassVar[str] = "CLS attention within runs that share the budget by attention"
    paper: ClassVar[str] = "HoloV, NeurIPS 2025"
    needs: ClassVar[tuple[str, ...]] = ("embeddings", "cls_attention")
    by_place: ClassVar[ByPlace] = "place"
    merges: ClassVar[Literal["", "features", "embeddings"]] = "embeddings"

    chunks: int | None = None
    beta: float = 0.09
    exact: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunks is not None and self.chunks < 1:
            raise OptionError(
                f"option chunks={self.chunks} of method {self.name!r} must be at least 1, or None; "
                "the authors have 16 for LLaVA-1.5."
            )
        if self.beta < 0:
            raise OptionError(
                f"option beta={self.beta!r} of method {self.name!r} must be at least 0; the "
                "authors have 0.09."
            )

    def select(self, tokens: TokenBatch, keep: int) -> Picks:
        """Return LongTensor [B, K], ascending, and attention as scores."""
        scores = mean_over_heads(tokens.require("cls_attention"))
        wanted = self.chunks or max(1, int(1024 / 576 * tokens.total / keep))
        runs = _Runs.of(tokens.total, min(wanted, tokens.total), tokens.device)
        attention = runs.values(scores.double())
        parts = rows_in_parts(self.vectors(tokens))
        variance = torch.cat([runs.variance(rows) for rows in parts])
        quota = _quotas(runs.scores(attention, variance, self.beta), runs.sizes, keep, self.exact)
        chosen = runs.highest(scores, quota)
        # Tokens that are chosen come first, in order, and then the first ones that are not.
        kept = top_k(chosen, keep)
        if self.exact:
            return Picks(kept, scores)
        own = torch.arange(keep, device=kept.device)
        weight = chosen.gather(1, kept)
        return Picks(kept, scores, [Merge(own, *each) for each in zip(kept, weight, strict=True)])


@dataclass(frozen=True, eq=False)
class _Runs:
    """P runs of N tokens.

    Attributes
    ----------
    tokens
        LongTensor [P, L], each run's; behind a shorter one's own its first again.
    behind
        BoolTensor [P, L], which of them are not the run's own.
    sizes
        LongTensor [P].
    """

    tokens: Tensor
    behind: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, total: int, count: int, device: torch.device) -> _Runs:
        """Split `total` tokens into `count` runs."""
        short, longer = divmod(total, count)
        run = torch.arange(count, device="cpu")
        sizes = short + (run < longer).long()
        starts = (sizes.cumsum(0) - sizes)[:, None]
        place = torch.arange(short + (longer > 0), device="cpu")
        behind = place >= sizes[:, None]
        tokens = starts + place.masked_fill(behind, 0)
        return cls(*(to_device(each, device) for each in (tokens, behind, sizes)))

    def values(self, values: Tensor) -> Tensor:
        """Return values [B, N] as [B, P, L], with 0 behind a run's own."""
        return values[:, self.tokens].masked_fill_(self.behind, 0.0)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of each run of float64 [B, P, L], 0 behind a run's own: [B, P]."""
        # Folded, zeros behind the numbers add nothing and change no order.
        return folded_sum(values, dim=2) / self.sizes

    def variance(self, rows: IntegerRows) -> Tensor:
        """Return v of each token, float64 [B, P, L]; see `HoloV`."""
        norms = square_root(rows.squared_norms())
        scale = self.values(rows.scales / (norms + 1e-6))  # so that padding has cosines of 0
        whole = rows.rows[:, self.tokens]
        others = (self.sizes - 1).clamp(min=1)[:, None]
        size, count, length = scale.shape
        step = max(1, _ENTRIES // (size * count * length))
        found = []
        for start in range(0, length, step):
            here = slice(start, start + step)
            cosines = whole[:, :, here] @ whole.transpose(2, 3)
            cosines *= scale[:, :, here, None] * scale[:, :, None]
            cosines.diagonal(start, dim1=2, dim2=3).zero_()
            mean = folded_sum(cosines, dim=3) / others
            apart = (cosines - mean[..., None]).square_().masked_fill_(self.behind[:, None], 0.0)
            found.append(folded_sum(apart, dim=3) / others)
        return torch.cat(found, dim=2).masked_fill_(self.behind, 0.0)

    def scores(self, attention: Tensor, variance: Tensor, beta: float) -> Tensor:
        """Return each run's score, float64 [B, P], from float64 [B, P, L]; see `HoloV`."""
        thousandfold = 1000.0 * attention
        scale = self.mean(thousandfold.abs()) / (self.mean(variance) + 1e-6)
        of_token = thousandfold + beta * (variance * scale[..., None])
        return torch.where(self.sizes == 1, attention[..., 0], self.mean(of_token))

    def highest(self, scores: Tensor, quota: Tensor) -> Tensor:
        """Return float32 [B, N], 1 for the tokens of highest score of each run, else 0.

        Parameters
        ----------
        scores
            float32 [B, N].
        quota
            LongTensor [B, P], how many of each run.
        """
        of_runs = scores[:, self.tokens].masked_fill_(self.behind, -torch.inf)
        order = of_runs.sort(dim=2, descending=True, stable=True).indices
        rank = torch.arange(order.shape[2], device=order.device)
        is_high = (rank < quota[..., None]).float()
        by_place = torch.zeros_like(is_high).scatter_(2, order, is_high)
        # What is behind a run's own is its first token once more, with 0.
        everywhere = self.tokens.flatten().expand(len(scores), -1)
        found = torch.zeros_like(scores)
        return found.scatter_reduce_(1, everywhere, by_place.flatten(1), "amax")


def _quotas(scores: Tensor, sizes: Tensor, keep: int, exact: bool) -> Tensor:
    """Return how many tokens each run keeps, LongTensor [B, P].

    Parameters
    ----------
    scores
        float64 [B, P], of runs.
    sizes
        LongTensor [P].
    keep
        K.
    exact
        Whether what is over goes to runs that have room, so that all are K.
    """
    weight = scores / (folded_sum(scores, dim=1)[:, None] + 1e-6)
    share = (keep * weight).floor().long()
    order = weight.sort(dim=1, descending=True, stable=True).indices
    rank = torch.arange(len(sizes), device=order.device).expand_as(order)
    left = keep - share.sum(dim=1, keepdim=True)
    share = share.scatter_add(1, order, (rank < left).long()).minimum(sizes)
    if not exact:
        return share
    over = keep - share.sum(dim=1, keepdim=True)
    room = (sizes - share).gather(1, order)
    before = room.cumsum(dim=1) - room
    return share.scatter_add(1, order, (over - before).clamp(min=0).minimum(room))
