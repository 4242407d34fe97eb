"""Facility location over rows: which tokens cover targets best, from cosines of any two kinds.

A method says what its targets are, the tokens themselves or others such as the question's, and how
similarity is made of cosines. Up to `ALL_PAIRS` tokens all similarities are held at once; of longer
items they are made in blocks, and again for the few tokens that are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.greedy import engine, objectives
from tokenprune.greedy.rows import ALL_PAIRS
from tokenprune.numerics import exponential

_ENTRIES = 2**26  # float64 entries held at once: 512 MiB, unless a single item needs more
_BLOCK_ENTRIES = 2**21  # similarities of a long item that are held at once: 16 MiB


@dataclass(frozen=True, eq=False)
class Targets:
    """Rows that tokens cover, and how similar to them a token is.

    Attributes
    ----------
    rows
        Floating point [B, M, D], the targets; the same object as `tokens` where they are the
        tokens. M may be 0.
    tokens
        Floating point [B, N, D], what each token is compared by.
    temperature
        None: a similarity is the cosine. Otherwise it is the softmax of ``cosine / temperature``
        over the tokens, so that what all tokens together are to a target adds up to 1.
    share
        What the similarities to these targets are multiplied by.
    """

    rows: Tensor
    tokens: Tensor
    temperature: float | None = None
    share: float = 1.0


def cover(
    targets: Sequence[Targets],
    keep: int,
    weights: Tensor | None = None,
    bonus: Tensor | None = None,
) -> Tensor:
    """Choose by `objectives.most_cover`, which see, the tokens that cover all targets best.

    O(N * M * D) time, and O(N * M) memory up to `ALL_PAIRS` tokens; of longer items what is held is
    linear in N, and on a GPU the host waits in each step.

    Parameters
    ----------
    targets
        One kind or more, all compared with the same N tokens; at least one has targets.
    keep
        K, between 1 and N.
    weights, bonus
        Floating point [B, N], see `objectives.most_cover`; a bonus is in the unit of similarities.

    Returns
    -------
    Tensor
        LongTensor [B, K], ascending.
    """
    size, total, _ = targets[0].tokens.shape
    if keep == total:
        every = torch.arange(total, dtype=torch.int64, device=targets[0].tokens.device)
        return every.expand(size, -1)
    given = [each for each in targets if each.rows.shape[1]]
    # Similarities are multiplied by the same number wherever they are: the largest share becomes 1,
    # so that none is above 1.
    unit = 1.0 / max(each.share for each in given)
    held = total * sum(4 * each.rows.shape[1] + 2 * each.tokens.shape[2] for each in given)
    at_once = max(1, _ENTRIES // held) if total <= ALL_PAIRS else 1
    kept = []
    for start in range(0, size, at_once):
        some = slice(start, start + at_once)
        parts = [_Part(each, some, unit) for each in given]
        weight, more = (None if each is None else each[some] for each in (weights, bonus))
        if more is not None:
            more = more * unit
        kept.append(_chosen(parts, total, keep, weight, more))
    return kept[0] if len(kept) == 1 else torch.cat(kept)


def _chosen(
    parts: Sequence[_Part], total: int, keep: int, weights: Tensor | None, bonus: Tensor | None
) -> Tensor:
    """Return LongTensor [b, K], ascending, of some items; of one where it is long."""
    targets = sum(part.count for part in parts)
    if total <= ALL_PAIRS:
        return engine.most_cover_of_whole(_whole(parts, targets), keep, weights, bonus)
    step = max(1, _BLOCK_ENTRIES // total)
    gain = parts[0].new_zeros(total)
    for part in parts:
        for start in range(0, part.count, step):
            block = part.similarities(slice(start, start + step))
            gain += objectives.whole_similarity(block, targets)[0].sum(dim=0)

    def columns(picked: Tensor) -> Tensor:
        similar = torch.cat([part.similarities_to(picked) for part in parts], dim=1)
        return objectives.whole_similarity(similar, targets)

    score = objectives.cover_score(
        targets, None if weights is None else weights[0], None if bonus is None else bonus[0]
    )
    return objectives.most_cover_lazily(gain, columns, keep, score).sort().values[None]


def _whole(parts: Sequence[_Part], targets: int) -> Tensor:
    """Return all similarities, float64 [b, M, N], of `objectives.whole_similarity`."""
    if not parts[0].fused:
        similarities = [part.similarities(slice(None)) for part in parts]
        similarity = similarities[0] if len(parts) == 1 else torch.cat(similarities, dim=1)
        return objectives.whole_similarity(similarity)
    whole = parts[0].new_empty(targets)
    first, bits = 0, objectives.cover_bits(targets)
    for part in parts:
        part.write_similarities(whole, first, bits)
        first += part.count
    return whole


class _Part:
    """The targets of one kind of some items, and their similarities.

    Parameters
    ----------
    given
        Of all items.
    some
        Which ones.
    unit
        What shares are multiplied by.
    """

    def __init__(self, given: Targets, some: slice, unit: float) -> None:
        self._tokens = engine.integer_rows(given.tokens[some])
        same = given.rows is given.tokens
        self._targets = self._tokens if same else engine.integer_rows(given.rows[some])
        self._temperature, self._share = given.temperature, given.share * unit
        self.count = given.rows.shape[1]
        self.fused = engine.fuses(given.tokens)
        # Of each block of targets, what makes cosines similarities.
        self._levels: list[tuple[Tensor, Tensor]] = []

    def new_zeros(self, count: int) -> Tensor:
        """Return zeros, float64 [count], where the rows are."""
        return self._tokens.squares.new_zeros(count)

    def new_empty(self, targets: int) -> Tensor:
        """Return float64 [b, M, N] to write all similarities to."""
        size, total = self._tokens.squares.shape
        return self._tokens.squares.new_empty(size, targets, total)

    def similarities(self, targets: slice) -> Tensor:
        """Return float64 [b, m, N], of a range of targets."""
        cosines = self._targets.some(targets).cosines_with(self._tokens)
        if self._temperature is None:
            return cosines.mul_(self._share)
        highest = cosines.amax(dim=-1, keepdim=True)
        raised = exponential(cosines.sub_(highest).div_(self._temperature))
        factor = self._share / engine.folded_sum(raised, -1)[..., None]
        self._levels.append((highest, factor))
        return raised.mul_(factor)

    def write_similarities(self, whole: Tensor, first: int, bits: int) -> None:
        """Write what `similarities` returns of all targets, as whole numbers, in one launch.

        The exponential is the device's, as everywhere; the kernel's may differ from torch's in a
        last bit, which is far below the unit of whole numbers.
        """
        from tokenprune.greedy.fused.relevance import write_similarities

        dots = torch.bmm(self._targets.rows, self._tokens.rows.transpose(1, 2))
        write_similarities(
            dots,
            self._targets.inverse_norms,
            self._tokens.inverse_norms,
            self._temperature,
            self._share,
            bits,
            whole,
            first,
        )

    def similarities_to(self, picked: Tensor) -> Tensor:
        """Return float64 [m, M], of tokens LongTensor [m] of the only item to all targets.

        Bit for bit the columns of what `similarities` returned, which has run over all targets.
        """
        cosines = self._tokens.at(picked[None]).cosines_with(self._targets)[0]
        if self._temperature is None:
            return cosines.mul_(self._share)
        highest, factor = (
            torch.cat([level[which][0, :, 0] for level in self._levels]) for which in (0, 1)
        )
        return exponential(cosines.sub_(highest).div_(self._temperature)).mul_(factor)
