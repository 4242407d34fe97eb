"""The greedy engine: rows and a number to keep in, what an objective takes of them out.

A method says what its rows and weights are and names an objective; `pick` hands them to the torch
version (`tokenprune.greedy.objectives`), which is the definition, or to the kernels
(`tokenprune.greedy.fused`), which take the same tokens on a CUDA device in a few launches and never
wait for it. `fuses` decides which, and nothing else does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenprune import numerics
from tokenprune.greedy import objectives
from tokenprune.greedy.items import Items, TorchItems
from tokenprune.greedy.neighbours import AllCosines, FineRows, ListedCosines
from tokenprune.greedy.rows import ALL_PAIRS, IntegerRows
from tokenprune.numerics import first_equal_row

_ENTRIES = 2**26  # float64 entries held at once: 512 MiB, unless a single item needs more
_TRITON = (3, 6)  # the oldest that the kernels are written for
_ON_CPU: ContextVar[bool] = ContextVar("_ON_CPU", default=False)


Some = tuple[slice, slice]
"""Which items of a batch, and which of their rows: an index into what is [B, N]."""

Choose = Callable[[Items, Some], Tensor]
"""Given some items, and which ones of all they are, return what an objective takes of them."""


def pick(
    embeddings: Tensor,
    keep: int | Sequence[int],
    choose: Choose,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """Choose rows of items, as many items at a time as can go together and memory should hold.

    An item's choice is the one that it has alone. Kernels take items of different sizes in the
    launches of one.

    Parameters
    ----------
    embeddings
        Floating point [B, N, D].
    keep
        K of all items or of each, between 1 and its number of rows. Where an item keeps all of
        them nothing is computed.
    choose
        See `Choose`. What it hands over for each row may be anything behind an item's own rows.
    sizes
        How many rows each item has of its own, if not N.

    Returns
    -------
    Tensor
        LongTensor [B, max K]: each item's own K ascending, and 0 behind them.
    """
    size, total, width = embeddings.shape
    totals = [total] * size if sizes is None else list(sizes)
    keeps = [keep] * size if isinstance(keep, int) else list(keep)
    fused = fuses(embeddings)
    kept = []
    for first, last in _together(totals, keeps, width, fused):
        some = slice(first, last), slice(0, max(totals[first:last]))
        rows, of_each = embeddings[some], keeps[first:last]
        if of_each[0] == totals[first]:
            every = torch.arange(of_each[0], dtype=torch.int64, device=embeddings.device)
            chosen = every.expand(last - first, -1)
        else:
            chosen = choose(_items(rows, of_each, totals[first:last], fused), some)
        if chosen.shape[1] < max(keeps):
            chosen = pad(chosen, (0, max(keeps) - chosen.shape[1]))
        kept.append(chosen)
    return kept[0] if len(kept) == 1 else torch.cat(kept)


def rows_in_parts(embeddings: Tensor) -> Iterator[IntegerRows]:
    """Yield the rows of items as whole numbers, for what is no greedy choice.

    Parameters
    ----------
    embeddings
        Floating point [B, N, D].

    Yields
    ------
    IntegerRows
        Of as many items at a time as memory should hold; they are those of
        `IntegerRows.from_embeddings`, in two launches where kernels run.
    """
    _, total, width = embeddings.shape
    for some in embeddings.split(max(1, _ENTRIES // (2 * total * width))):
        if not fuses(some):
            yield IntegerRows.from_embeddings(some)
            continue
        from tokenprune.greedy.fused import kernels

        rows, scales, squares, inverse = kernels.whole_rows(some.flatten(0, 1))
        shape = some.shape[:2]
        whole = rows.double().view(*shape, -1)
        yield IntegerRows(whole, squares.view(shape), inverse.view(shape), scales.view(shape))


def first_equal_rows(rows: Tensor) -> Tensor:
    """Return LongTensor [B, N], `numerics.first_equal_row` of each item's rows [B, N, C]."""
    if fuses(rows):
        from tokenprune.greedy.fused import kernels

        return kernels.first_equal_rows(rows)
    return torch.stack([first_equal_row(item) for item in rows])


def scaled(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scale scores to weights from 0 to 1, as ZOO-Prune does (arXiv 2509.24837).

    Parameters
    ----------
    scores
        float32 [B, N].

    Returns
    -------
    tuple of Tensor
        float32 [B, N], ``(s - min) / (max - min + 1e-8)``, or 1 everywhere where all are equal; and
        LongTensor [B], the first of largest weight.
    """
    if fuses(scores):
        from tokenprune.greedy.fused import kernels

        return kernels.scaled(scores)
    lowest, highest = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
    weights = ((scores - lowest) / (highest - lowest + 1e-8)).masked_fill(lowest == highest, 1)
    return weights, weights.argmax(dim=-1)


def _together(
    totals: Sequence[int], keeps: Sequence[int], width: int, fused: bool
) -> Iterator[tuple[int, int]]:
    """Yield the first of items that go together, and the first behind them."""

    def kind(item: int) -> tuple[int, ...]:
        alike = totals[item], keeps[item]
        any_size = fused and totals[item] <= ALL_PAIRS and keeps[item] < totals[item]
        return () if any_size else alike

    for _, alike in groupby(range(len(totals)), kind):
        items = list(alike)
        # About how many float64 entries choosing from an item holds.
        longest = max(totals[item] for item in items)
        entries = longest * (2 * width + max(keeps[item] for item in items))
        if fused and longest <= ALL_PAIRS:
            entries += longest * longest
        at_once = max(1, _ENTRIES // entries)
        for start in range(items[0], items[-1] + 1, at_once):
            yield start, min(start + at_once, items[-1] + 1)


def _items(rows: Tensor, keeps: Sequence[int], totals: Sequence[int], fused: bool) -> Items:
    if not fused:
        return TorchItems(rows, keeps[0])
    # Imports Triton, which is not everywhere.
    from tokenprune.greedy.fused.items import FusedItems, LongItems

    if max(totals) > ALL_PAIRS:
        return LongItems(rows, keeps[0])
    return FusedItems(rows, keeps, totals)


def integer_rows(embeddings: Tensor) -> IntegerRows:
    """Return `IntegerRows.from_embeddings`, in two launches where kernels run."""
    if not fuses(embeddings):
        return IntegerRows.from_embeddings(embeddings)
    from tokenprune.greedy.fused import kernels

    size = embeddings.shape[:2]
    rows, scales, squares, inverse = kernels.whole_rows(embeddings.flatten(0, 1))
    return IntegerRows(
        rows.view(embeddings.shape).double(),
        squares.view(size),
        inverse.view(size),
        scales.view(size),
    )


def most_cover(
    similarity: Tensor, keep: int, weights: Tensor | None = None, bonus: Tensor | None = None
) -> Tensor:
    """Choose by `objectives.most_cover`, which see.

    Parameters
    ----------
    similarity
        Floating point [B, M, N], of M targets to N tokens; what is below 0 counts as 0, and what
        is above 1 as 1.
    keep, weights, bonus
        See there.

    Returns
    -------
    Tensor
        LongTensor [B, K], ascending.
    """
    return most_cover_of_whole(objectives.whole_similarity(similarity), keep, weights, bonus)


def most_cover_of_whole(
    whole: Tensor, keep: int, weights: Tensor | None = None, bonus: Tensor | None = None
) -> Tensor:
    """Choose as `most_cover` from similarities of `objectives.whole_similarity` [B, M, N]."""
    targets = whole.shape[1]
    if fuses(whole):
        from tokenprune.greedy.fused import kernels

        weight, more = (
            None if each is None else each.to(whole.device, torch.float64).contiguous()
            for each in (weights, bonus)
        )
        if more is not None:
            more = more * 2.0 ** objectives.cover_bits(targets)
        return kernels.most_cover(whole, keep, weight, more)
    if whole.device.type != "cpu":
        return objectives.most_cover(whole, keep, weights, bonus).sort(dim=-1).values
    # There it costs nothing to find out how few tokens have to be looked at.
    kept = []
    for item, columns in enumerate(whole.transpose(1, 2).contiguous()):
        weight, more = (None if each is None else each[item] for each in (weights, bonus))
        score = objectives.cover_score(targets, weight, more)
        kept.append(
            objectives.most_cover_lazily(columns.sum(dim=1), columns.__getitem__, keep, score)
        )
    return torch.stack(kept).sort(dim=-1).values


def most_volume(embeddings: Tensor, variances: Tensor, keep: int) -> Tensor:
    """Log-determinant of given variances: choose by `objectives.most_variance` without noise.

    Parameters
    ----------
    embeddings
        Floating point [B, N, D], whose cosines are the correlations.
    variances
        float64 [B, N], at least 0: the diagonal of ``K_ij = cos_ij * sqrt(v_i v_j)``. A token whose
        embedding is zero has none.
    keep
        K, between 1 and N.

    Returns
    -------
    Tensor
        LongTensor [B, K], ascending.
    """

    def choose(items: Items, some: Some) -> Tensor:
        return items.most_volume(variances[some])

    return pick(embeddings, keep, choose)


def suppress(
    embeddings: Tensor, scores: Tensor, threshold: Tensor, keep: int, groups: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose by `objectives.suppress`, which see, from rows [B, N, D]; also with ``keep=N``.

    Returns
    -------
    tuple of Tensor
        LongTensor [B, K] in the order taken, and LongTensor [B], how many came before those that
        were too similar.
    """
    size, total, width = embeddings.shape
    fused = fuses(embeddings)
    orders, counts = [], []
    for first, last in _together([total] * size, [keep] * size, width, fused):
        some = slice(first, last)
        items = _items(embeddings[some], [keep] * (last - first), [total] * (last - first), fused)
        order, count = items.suppress(
            scores[some], threshold[some], None if groups is None else groups[some]
        )
        orders.append(order)
        counts.append(count)
    return torch.cat(orders), torch.cat(counts)


def relevance(similar: Tensor, divisor: float, least: float) -> tuple[Tensor, Tensor]:
    """Scale what tokens are to a question, for each item, from about 0 to 1.

    Parameters
    ----------
    similar
        float64 [B, N].
    divisor
        What it is divided by before; not 0.
    least
        What is added to the difference from the lowest, so that none is 0.

    Returns
    -------
    tuple of Tensor
        ``r = (s - min s + least) / (max s - min s)``, or 1 everywhere where all are equal, float32
        [B, N]; and its square, float64 [B, N], of the number that was not rounded.
    """
    if fuses(similar):
        from tokenprune.greedy.fused import relevance as kernels

        return kernels.relevance(similar, divisor, least)
    values = similar / divisor
    lowest, highest = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    scaled_to = (values - lowest + least) / (highest - lowest)
    scaled_to.masked_fill_(lowest == highest, 1.0)
    return scaled_to.to(torch.float32), scaled_to.square()


def pivots(norms: Tensor, total: int, of_image: int, of_text: int) -> tuple[Tensor, Tensor]:
    """Return the rows of largest norm of an image's and of its question's, each largest first.

    Parameters
    ----------
    norms
        float64 [B, N + M], the image's rows and those of the question behind them.
    total
        N.
    of_image, of_text
        How many of each, at most N and M.

    Returns
    -------
    tuple of Tensor
        LongTensor [B, of_image + of_text], counted among the N + M, of equal ones the first; and
        float32 [B, N + M], 0 for those and 1 for the others.
    """
    if fuses(norms):
        from tokenprune.greedy.fused import relevance as kernels

        return kernels.pivots(norms, total, of_image, of_text)
    image, text = (
        part.sort(dim=-1, descending=True, stable=True).indices
        for part in (norms[:, :total], norms[:, total:])
    )
    places = torch.cat([image[:, :of_image], text[:, :of_text] + total], dim=1)
    return places, torch.ones_like(norms, dtype=torch.float32).scatter_(1, places, 0.0)


def take_in_turns(ranked: Tensor, free: Tensor, keep: int, left: int, each: int | None) -> Tensor:
    """Let pivots take tokens in turn: each one, of those that are free, what it ranks first.

    Parameters
    ----------
    ranked
        LongTensor [B, P, N], for each pivot all tokens, those that it takes first in front.
    free
        float32 [B, N or more], 0 for a token that is taken already; it is changed.
    keep
        K, of which those are a part.
    left
        How many the pivots take.
    each
        How many each of them takes; the last one takes what is left. None for equal shares, the
        first ones one more.

    Returns
    -------
    Tensor
        LongTensor [B, K], all taken ones, ascending.
    """
    if fuses(free):
        from tokenprune.greedy.fused import relevance as kernels

        return kernels.take_in_turns(ranked, free, keep, left, each)
    for number, places in enumerate(ranked.unbind(1)):
        others = ranked.shape[1] - 1 - number
        share = -(-left // (others + 1)) if each is None or not others else min(each, left)
        left -= share
        still = free.gather(1, places)
        # The first `share` free ones are taken.
        free.scatter_(1, places, still.masked_fill(still.cumsum(dim=1) <= share, 0.0))
    # Taken ones come first, in their order: the sort is stable.
    return free[:, : ranked.shape[2]].sort(dim=-1, stable=True).indices[:, :keep]


def thin_out(embeddings: Tensor, order: Tensor, fixed: int, keep: int, per_round: int) -> Tensor:
    """Choose by `objectives.thin_out`; of all cosines in torch, some launches for each round.

    A single program for an item would take longer than those: a round compares many pairs.

    Parameters
    ----------
    embeddings
        Floating point [B, N, D].
    order
        LongTensor [B, N], all tokens of each item.
    fixed
        The first so many of an order stay in any case, and are not compared.
    keep
        K, at least `fixed`.
    per_round
        How many go in a round, at least 1.

    Returns
    -------
    Tensor
        LongTensor [B, K], ascending.
    """
    _, total, width = embeddings.shape
    # Lists of neighbours are of one item, as their lengths are.
    at_once = max(1, _ENTRIES // (total * (4 * width + 2 * total))) if total <= ALL_PAIRS else 1
    kept = []
    for some, of_items in zip(embeddings.split(at_once), order.split(at_once), strict=True):
        rows = FineRows.from_embeddings(some)
        nearest = AllCosines(rows) if total <= ALL_PAIRS else ListedCosines(rows)
        rest = objectives.thin_out(nearest, of_items[:, fixed:], keep - fixed, per_round)
        kept.append(torch.cat([of_items[:, :fixed], rest], dim=1))
    return torch.cat(kept).sort(dim=-1).values


def folded_sum(values: Tensor, dim: int) -> Tensor:
    """Return `numerics.folded_sum`, in one launch where kernels run."""
    if fuses(values):
        from tokenprune.greedy.fused import kernels

        # Shorter numbers are rounded at every addition by torch, and not by a kernel.
        exact = values.dtype in (torch.float32, torch.float64)
        if exact and values.shape[dim] <= kernels.FOLDED:
            return kernels.folded_sum(values, dim)
    return numerics.folded_sum(values, dim)


def fuses(embeddings: Tensor) -> bool:
    """Say whether kernels choose from these rows: on a GPU where Triton runs."""
    device = embeddings.device
    return _kernels_run(device) if device.type == "cuda" else _ON_CPU.get()


@contextmanager
def fused_on_cpu() -> Iterator[None]:
    """Let kernels choose from rows of the CPU as well, inside the block.

    For tests, under Triton's interpreter (``TRITON_INTERPRET=1`` before Triton is imported).
    """
    token = _ON_CPU.set(True)
    try:
        yield
    finally:
        _ON_CPU.reset(token)


@cache
def _kernels_run(device: torch.device) -> bool:
    """Say whether Triton is there, knows the GPU, and runs a kernel on it."""
    try:
        known = tuple(map(int, version("triton").split(".")[:2])) >= _TRITON
    except PackageNotFoundError:
        return False
    if not known or torch.version.hip is not None:
        return False
    # Without a GPU nothing is asked: then launches are counted, see `tokenprune.launches`.
    if torch.cuda.is_initialized() and torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        from tokenprune.greedy.fused import items, kernels

        kernels.try_out(device)
        # Once a process, and where there is a GPU: the first call waits for it.
        if torch.cuda.is_initialized() and not items.chooses_alike(device):
            raise RuntimeError(f"Triton {version('triton')} chose other tokens than torch there.")
    except NotImplementedError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        warnings.warn(
            f"Triton is installed, but not used on {device}: {reason} Tokens are chosen by "
            "torch's own operations instead, which is slower and chooses the same. Triton needs a "
            "C compiler (gcc) and a folder that it can write to (TRITON_CACHE_DIR).",
            UserWarning,
            stacklevel=2,
        )
        return False
    return True
