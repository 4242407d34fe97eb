"""The objectives, in torch: what each greedy choice is, on any device.

Every number comes out of exact products of whole numbers (`IntegerRows`), elementwise operations
and sums of a fixed order. So a choice is the same in any batch, at any position and on any device;
of equal ones the lowest index is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tokenprune.greedy.rows import ALL_PAIRS, IntegerRows
from tokenprune.numerics import exponential, folded_sum, square_root

_AHEAD = 11  # tokens whose products are computed before it is known that they are taken

BLOCK = 16
"""Tokens taken whose part of a covariance is added up together. A kernel holds so many."""

NOTHING_LEFT = 2.0**-40
"""Variance up to which, without noise, a token is a combination of those taken: about 1e-12.

A power of two, as numbers in a kernel are float32 unless they come out of a tensor.
"""

_CANDIDATES = 12  # tokens whose gain is looked at together by `most_cover_lazily`

Columns = Callable[[Tensor], Tensor]
"""Maps tokens LongTensor [m] to how similar each target is to them, whole numbers [m, M]."""


def farthest(rows: IntegerRows, keep: int, weights: Tensor | None, first: Tensor) -> Tensor:
    """Weighted max-min: always the token of highest weight * distance to those taken.

    A token's distance to those taken is ``1 - max cosine``; it is kept up to date with one
    matrix-vector product a step, O(K * N * D) time and O(N * D) memory. A taken token is never
    taken again. Tokens of weight 0 come after all others, lowest index first.

    Parameters
    ----------
    rows
        Of B items, N tokens each.
    keep
        K, between 1 and N.
    weights
        float32 [B, N], at least 0; None for the same weight everywhere.
    first
        LongTensor [B], the token each item starts with.

    Returns
    -------
    Tensor
        LongTensor [B, K] in the order taken.
    """
    kept = first.new_empty(first.numel(), keep)
    kept[:, 0] = first
    closest = rows.cosines_to(first)
    taken = torch.zeros_like(closest, dtype=torch.bool).scatter_(1, first[:, None], True)
    for step in range(1, keep):
        # A cosine that rounds to above 1 must not put a duplicate behind tokens of weight 0.
        score = (1.0 - closest).clamp_(min=0.0)
        if weights is not None:
            score.mul_(weights).masked_fill_(weights == 0, -1.0)
        # torch.argmax gives the first of equal values.
        pick = score.masked_fill_(taken, -math.inf).argmax(dim=-1)
        kept[:, step] = pick
        taken.scatter_(1, pick[:, None], True)
        if step + 1 < keep:
            # The largest cosine to any taken one is that to the earlier ones or to the last.
            torch.maximum(closest, rows.cosines_to(pick), out=closest)
    return kept


def most_variance(rows: IntegerRows, weighed: Weighed, keep: int) -> Tensor:
    """Log-determinant: always the token with most variance left, given those taken.

    The gain of a token is ``log(1 + variance left / σ²)``, which grows with the variance left, so
    the token of largest variance is the greedy choice. The variances are those of the tokens given
    the ones taken: a pivoted Cholesky factorisation of ``K + σ² I`` has them on its diagonal, and
    adds a row of its factor for each token taken.

    Parameters
    ----------
    rows
        Of B items, N tokens each.
    weighed
        Of `factors_of` or `factors_to`. Where σ² is 0 it is the determinant of K alone, as in
        CDPruner (arXiv 2506.10967), and a token that has next to nothing left (`NOTHING_LEFT`)
        explains nothing.
    keep
        K, between 1 and N.

    Returns
    -------
    Tensor
        LongTensor [B, K] in the order taken.
    """
    factors, variance, level = weighed
    size, total = variance.shape
    taken = torch.zeros_like(variance, dtype=torch.bool)
    item = torch.arange(size, dtype=torch.int64, device=variance.device)
    kept = torch.empty(size, keep, dtype=torch.int64, device=variance.device)
    # The rows of the Cholesky factor that belong to the tokens taken, over all tokens; those that
    # are not there yet add nothing.
    count = -(-keep // BLOCK)
    triangle = torch.zeros(count, BLOCK, size, total, dtype=torch.float64, device=variance.device)
    # Reading all rows for a product is what takes the time. So each reading also makes the products
    # of the tokens that may be next, those of most variance now; it does not change the choice.
    known = kept[:, :0]
    products = triangle.new_empty(size, 0, total)
    for step in range(keep):
        left = variance.masked_fill(taken, -math.inf)
        # torch.argmax gives the first of equal values.
        pick = left.argmax(dim=-1)
        kept[:, step] = pick
        taken.scatter_(1, pick[:, None], True)
        if step + 1 == keep:
            break
        if not bool((known == pick[:, None]).any(dim=1).all()):
            likely = left.topk(min(_AHEAD, total), dim=-1).indices
            known = torch.cat([pick[:, None], likely], dim=1)
            products = rows.products_with(known)
        # Where the pick is among the known ones; argmax of bools is not on every device.
        column = (known == pick[:, None]).byte().argmax(dim=1)
        covariance = products[item, column] * factors * factors[item, pick, None]
        if step:
            earlier = triangle[: -(-step // BLOCK)]
            # Folded, as a matrix product would add in an order that the batch decides; and one
            # block after another, as no kernel holds all of them.
            for block in folded_sum(earlier * earlier[:, :, item, pick, None], dim=1):
                covariance -= block
        spread = variance[item, pick] + level
        spread.masked_fill_((level == 0) & (spread <= NOTHING_LEFT), math.inf)
        triangle[step // BLOCK, step % BLOCK] = covariance / square_root(spread)[:, None]
        variance = (variance - triangle[step // BLOCK, step % BLOCK].square()).clamp_(min=0.0)
    return kept


Weighed = tuple[Tensor, Tensor, Tensor]
"""What rows are multiplied by and their variances then, float64 [B, N], and σ², float64 [B]."""


def factors_of(squared: Tensor, multiple: Tensor, noise: float) -> Weighed:
    """Return what rows are multiplied by and their variances then, float64 [B, N], and σ², [B].

    Parameters
    ----------
    squared
        float64 [B, N], each row's ||embedding||².
    multiple
        float64 [B, N], each token's variance as a multiple of its length.
    noise
        σ² as a multiple of the mean variance.
    """
    # ||row|| ** -0.5 makes squared lengths lengths; 0 where the row is.
    factors = square_root(square_root(squared)).reciprocal()
    factors.masked_fill_(factors.isinf(), 0.0)
    # Variances are squares of what the rows are multiplied by.
    factors *= square_root(multiple)
    variance = squared * factors.square()
    level = folded_sum(variance, dim=1) * (noise / variance.shape[1])
    # All rows are zero: nothing is divided by 0, and ties go to the lowest index.
    return factors, variance, level.masked_fill(level == 0, 1.0) if noise else level


def factors_to(squared: Tensor, variances: Tensor) -> Weighed:
    """Return what gives rows these variances, them, and no noise; see `factors_of`.

    Parameters
    ----------
    squared
        float64 [B, N], each row's ||embedding||².
    variances
        float64 [B, N], at least 0; a row of zeros has none.
    """
    nothing = squared == 0
    inverse = square_root(squared).reciprocal().masked_fill_(nothing, 0.0)
    # As given, bit for bit, so that equal ones tie.
    given = variances.masked_fill(nothing, 0.0)
    return inverse * square_root(variances), given, squared.new_zeros(len(squared))


def most_cover(
    whole: Tensor, keep: int, weights: Tensor | None = None, bonus: Tensor | None = None
) -> Tensor:
    """Facility location: always the token that adds most to how well all targets are covered.

    A target is covered as well as it is similar to the most similar token taken; nothing below 0
    covers. A token's score is ``weight * gain + bonus``, the gain being what it adds. Gains are
    sums of whole numbers, so they are exact in any order. A taken token is never taken again.

    Parameters
    ----------
    whole
        float64 [B, M, N], the similarities of M targets to N tokens, of `whole_similarity`.
        Targets may count differently: their rows are multiplied by what they count before.
    keep
        K, between 1 and N.
    weights
        Floating point [B, N]: what gains are multiplied by; None for 1. Tokens of a weight below 0
        are excluded: they come after all others, lowest index first.
    bonus
        Floating point [B, N], at least 0: what is added to that; None for 0.

    Returns
    -------
    Tensor
        LongTensor [B, K] in the order taken.
    """
    size, targets, total = whole.shape
    score = cover_score(targets, weights, bonus)
    kept = torch.empty(size, keep, dtype=torch.int64, device=whole.device)
    covered = torch.zeros_like(whole[..., :1])
    taken = torch.zeros(size, total, dtype=torch.bool, device=whole.device)
    for step in range(keep):
        gain = (whole - covered).clamp_(min=0.0).sum(dim=1)
        # torch.argmax gives the first of equal values.
        pick = score(gain).masked_fill_(taken, -math.inf).argmax(dim=-1)
        kept[:, step] = pick
        taken.scatter_(1, pick[:, None], True)
        own = whole.gather(2, pick[:, None, None].expand(-1, targets, 1))
        torch.maximum(covered, own, out=covered)
    return kept


def most_cover_lazily(
    gain: Tensor, columns: Columns, keep: int, score: Callable[[Tensor], Tensor]
) -> Tensor:
    """Do as `most_cover` of one item, and look at few of its tokens in each step.

    What a token adds never grows, so what it added when it was looked at last is an upper bound. A
    token whose score now is at least as high as all bounds is the one that looking at all of them
    would take. How many have to be looked at depends on the numbers, so on a GPU the host waits.

    Parameters
    ----------
    gain
        float64 [N], what each token adds to nothing: the sums of its column.
    columns
        See `Columns`.
    keep
        K, between 1 and N.
    score
        Of `cover_score`.

    Returns
    -------
    Tensor
        LongTensor [K] in the order taken.
    """
    kept = torch.empty(keep, dtype=torch.int64, device=gain.device)
    known, bound = gain.clone(), score(gain)
    covered: Tensor | None = None
    for step in range(keep):
        # Whether what is known of a token holds for what is covered now.
        fresh = torch.full_like(known, covered is None, dtype=torch.bool)
        best = bound.argmax()
        while not bool(fresh[best]):
            likely = bound.masked_fill(fresh, -math.inf).topk(min(_CANDIDATES, len(bound))).indices
            # Of many equal bounds the first one is the one to be known.
            looked_at = torch.cat([best[None], likely])
            adds = columns(looked_at)
            if covered is not None:
                adds = (adds - covered).clamp_(min=0.0)
            known[looked_at] = adds.sum(dim=1)
            fresh[looked_at] = True
            bound = score(known).masked_fill_(bound == -math.inf, -math.inf)
            best = bound.argmax()
        kept[step] = best
        bound[best] = -math.inf
        own = columns(best[None])[0]
        covered = own if covered is None else torch.maximum(covered, own)
    return kept


def cover_score(
    targets: int, weights: Tensor | None, bonus: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """Return what maps gains of whole numbers to scores, float64; see `most_cover`.

    Parameters
    ----------
    targets
        M, of all of them.
    weights, bonus
        Floating point [..., N] as the gains, or None.
    """
    weight = None if weights is None else weights.double()
    # In the unit of whole numbers, a power of two: nothing is rounded.
    more = None if bonus is None else bonus.double() * 2.0 ** cover_bits(targets)

    def score(gain: Tensor) -> Tensor:
        weighed = gain if weight is None else gain * weight
        if more is not None:
            weighed = weighed + more
        return weighed.clone() if weight is None else weighed.masked_fill(weight < 0, -1.0)

    return score


def cover_bits(targets: int) -> int:
    """Return how many bits behind the point similarities may have for sums to be exact."""
    return 52 - math.ceil(math.log2(max(targets, 2)))


def whole_similarity(similarity: Tensor, targets: int | None = None) -> Tensor:
    """Return similarities as whole multiples of a power of two, see `cover_bits`; float64.

    What is below 0 counts as 0, and what is above 1 as 1.

    Parameters
    ----------
    similarity
        Floating point [..., M, N].
    targets
        How many targets there are, if not M.
    """
    most = 2.0 ** cover_bits(similarity.shape[-2] if targets is None else targets)
    return similarity.to(torch.float64, copy=True).mul_(most).round_().clamp_(0.0, most)


def suppress(
    rows: IntegerRows,
    scores: Tensor,
    threshold: Tensor,
    keep: int,
    groups: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Suppression: always the token of highest score that is not too similar to one taken.

    Where none is left, those that were too similar follow, highest score first. Of equal scores the
    lowest index is taken.

    Parameters
    ----------
    rows
        Of B items, N tokens each.
    scores
        float32 [B, N], finite.
    threshold
        float32 [B]: tokens whose cosine is above it are too similar.
    keep
        K, between 1 and N.
    groups
        LongTensor [B, N]: only tokens of one group suppress each other. None for one group.

    Returns
    -------
    tuple of Tensor
        LongTensor [B, K] in the order taken, and LongTensor [B], how many of them came before those
        that were too similar.
    """
    size, total = scores.shape
    item = torch.arange(size, dtype=torch.int64, device=scores.device)
    # Where many are taken, all products at once cost less than those of one after the other.
    at_once = 4 * keep > total and total <= ALL_PAIRS
    cosines = rows.cosines_with(rows).float() if at_once else None
    kept = torch.empty(size, keep, dtype=torch.int64, device=scores.device)
    count = torch.zeros(size, dtype=torch.int64, device=scores.device)
    free, rest = scores.clone(), scores.clone()
    for step in range(keep):
        some = free.amax(dim=-1) > -math.inf
        count += some
        # torch.argmax gives the first of equal values.
        pick = torch.where(some[:, None], free, rest).argmax(dim=-1)
        kept[:, step] = pick
        cosine = rows.cosines_to(pick) if cosines is None else cosines[item, pick]
        alike = cosine > threshold[:, None]
        if groups is not None:
            alike &= groups == groups.gather(1, pick[:, None])
        free.masked_fill_(alike, -math.inf).scatter_(1, pick[:, None], -math.inf)
        rest.scatter_(1, pick[:, None], -math.inf)
    return kept, count


def soft_suppress(rows: IntegerRows, scores: Tensor, sharpness: float, keep: int) -> Tensor:
    """Soft suppression: always the token of highest score, and those like it lose of theirs.

    Taking a token i of score s_i takes ``exp(-sharpness (1 - cos_ij)²) s_i`` from every other
    token's score, which does not fall below 0. Of equal scores the lowest index is taken.

    Parameters
    ----------
    rows
        Of B items, N tokens each.
    scores
        float32 [B, N], at least 0.
    sharpness
        At least 0; a high one spares all but the most similar tokens.
    keep
        K, between 1 and N.

    Returns
    -------
    Tensor
        LongTensor [B, K] in the order taken.
    """
    left = scores.double()
    kept = torch.empty(len(scores), keep, dtype=torch.int64, device=scores.device)
    taken = torch.zeros_like(left, dtype=torch.bool)
    for step in range(keep):
        # torch.argmax gives the first of equal values.
        pick = left.masked_fill(taken, -math.inf).argmax(dim=-1)
        kept[:, step] = pick
        taken.scatter_(1, pick[:, None], True)
        if step + 1 < keep:
            apart = 1.0 - rows.cosines_to(pick).double()
            # Rounded to float32, as the last bits of an exponential depend on who computes it.
            share = exponential(-sharpness * apart.square()).float()
            left = (left - share * left.gather(1, pick[:, None])).clamp_(min=0.0)
    return kept


NearestCosine = Callable[[Tensor, Tensor], Tensor]
"""Given tokens [B, m] and others [B, n], return each token's largest cosine to one of the others,
float64 [B, m]."""


def thin_out(nearest: NearestCosine, order: Tensor, keep: int, per_round: int) -> Tensor:
    """Bipartite thinning: tokens that are most like another one go, a few in each round.

    A round splits the tokens by their place in the order, even places and odd ones. The
    `per_round` tokens at even places with the largest cosine to a token at an odd place go. The
    others at even places, most similar first, are followed by those at odd places: that is the
    order of the next round. Of equal cosines the earlier place comes first.

    Parameters
    ----------
    nearest
        See `NearestCosine`.
    order
        LongTensor [B, R], the tokens in their order at first.
    keep
        How many are left, between 0 and R.
    per_round
        How many go in a round, at least 1.

    Returns
    -------
    Tensor
        LongTensor [B, keep], in their order at last.
    """
    if not keep:
        return order[:, :0]
    while (count := order.shape[1]) > keep:
        evens, odds = order[:, 0::2], order[:, 1::2]
        drop = min(per_round, count - keep, evens.shape[1])
        most = nearest(evens, odds).sort(dim=1, descending=True, stable=True).indices
        order = torch.cat([evens.gather(1, most[:, drop:]), odds], dim=1)
    return order
