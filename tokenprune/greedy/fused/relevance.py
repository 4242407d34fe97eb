"""Kernels in front of and beside the objectives: similarities, relevance, and turns of pivots."""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenprune.greedy.fused import kernels
from tokenprune.greedy.fused.kernels import _ROUNDED, CHUNK, _better, _folded, _write_ascending


def _bits(value: float) -> int:
    """Return a number's bits: a float would be handed over as float32."""
    [bits] = struct.unpack("q", struct.pack("d", value))
    return int(bits)


@triton.jit(do_not_specialize=["temperature", "share"])
def _similarities(
    dots, of_targets, of_tokens, whole, first, rows, targets, total, temperature, share, most,
    SOFT: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Write how similar the tokens of an item are to one of its targets, as whole numbers."""
    target, item = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    line = item * targets + target
    place = tl.arange(0, SIZE)
    inside = place < total
    norms = tl.load(of_targets + line) * tl.load(of_tokens + item * total + place, inside, 0.0)
    value = tl.load(dots + line * total + place, inside, 0.0) * norms
    factor = share.to(tl.float64, bitcast=True)
    if SOFT:
        # No NaN, of which there is no largest.
        highest = tl.max(tl.where(inside & (value == value), value, float("-inf")), axis=0)
        raised = tl.exp((value - highest) / temperature.to(tl.float64, bitcast=True))
        value = tl.where(inside, raised, 0.0)
        factor = factor / _folded(value, SIZE)
    # To the nearest whole number, halves to the even one.
    value = (value * factor + _ROUNDED) - _ROUNDED
    value = tl.minimum(tl.maximum(value, 0.0), most)
    tl.store(whole + (item * rows + first + target) * total + place, value, inside)


def write_similarities(
    dots: Tensor,
    of_targets: Tensor,
    of_tokens: Tensor,
    temperature: float | None,
    share: float,
    bits: int,
    whole: Tensor,
    first: int,
) -> None:
    """Write similarities of one kind of targets, as `covering` says, times a power of two.

    Parameters
    ----------
    dots
        float64 [B, M, N], exact products of targets and tokens.
    of_targets, of_tokens
        float64 [B, M] and [B, N], their inverse norms.
    temperature, share
        See `covering.Targets`.
    bits
        Of `objectives.cover_bits`.
    whole
        float64 [B, R, N], written to from row `first` on.
    first
        Where these targets begin.
    """
    size, targets, total = dots.shape
    most = 2.0**bits
    kernels.launch(
        _similarities, (targets, size), dots, of_targets, of_tokens, whole, first, whole.shape[1],
        targets, total, _bits(temperature or 1.0), _bits(share * most), most,
        SOFT=temperature is not None, SIZE=triton.next_power_of_2(total), num_warps=8,
    )  # fmt: skip


@triton.jit(do_not_specialize=["divisor", "least"])
def _relevance(similar, scores, variances, total, divisor, least, CHUNK: tl.constexpr):
    """Write an item's relevance, scaled, and its square."""
    item = tl.program_id(0).to(tl.int64)
    similar, scores = similar + item * total, scores + item * total
    variances += item * total
    count = tl.full((CHUNK,), 0.0, tl.float64) + divisor.to(tl.float64, bitcast=True)
    low = tl.full((), float("inf"), tl.float64)
    high = tl.full((), float("-inf"), tl.float64)
    for start in range(0, total, CHUNK):
        place = start + tl.arange(0, CHUNK)
        inside = place < total
        value = tl.load(similar + place, inside, 0.0) / count
        known = inside & (value == value)  # no NaN
        low = tl.minimum(low, tl.min(tl.where(known, value, float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.where(known, value, float("-inf")), 0))
    for start in range(0, total, CHUNK):
        place = start + tl.arange(0, CHUNK)
        inside = place < total
        value = tl.load(similar + place, inside, 0.0) / count
        value = (value - low + least.to(tl.float64, bitcast=True)) / (high - low)
        value = tl.where(low == high, 1.0, value)
        tl.store(scores + place, value.to(tl.float32), inside)
        tl.store(variances + place, value * value, inside)


def relevance(
    similar: Tensor, divisor: float, least: float, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Do as `engine.relevance`; another `chunk` of tokens looked at together changes nothing."""
    given = similar.contiguous()
    scores = torch.empty(given.shape, dtype=torch.float32, device=given.device)
    variances = torch.empty_like(given)
    kernels.launch(
        _relevance, (len(given),), given, scores, variances, given.shape[1], _bits(divisor),
        _bits(least), CHUNK=chunk,
    )  # fmt: skip
    return scores, variances


@triton.jit
def _largest_few(norms, places, free, begin, count, into, CHUNK: tl.constexpr):
    """Write where the largest of `count` norms from `begin` on are; they are no longer free."""
    for number in range(0, into):
        best = tl.full((), float("-inf"), tl.float64)
        pick = tl.full((), 0, tl.int32)
        for start in range(0, count, CHUNK):
            place = start + tl.arange(0, CHUNK)
            inside = place < count
            there = tl.load(free + begin + place, inside, 0.0) > 0.0
            value = tl.load(norms + begin + place, inside & there, float("-inf"))
            best, pick = _better(best, pick, value, start)
        pick = tl.minimum(pick, count - 1)
        tl.store(places + number, (begin + pick).to(tl.int64))
        tl.store(free + begin + pick, 0.0)
        tl.debug_barrier()


@triton.jit
def _pivots(norms, free, places, total, asked, of_image, of_text, CHUNK: tl.constexpr):
    """Write the pivots of an item: tokens of largest norm, then the question's; see `pivots`."""
    item = tl.program_id(0).to(tl.int64)
    rows = total + asked
    norms, free = norms + item * rows, free + item * rows
    places += item * (of_image + of_text)
    for start in range(0, rows, CHUNK):
        place = start + tl.arange(0, CHUNK)
        tl.store(free + place, tl.full((CHUNK,), 1.0, tl.float32), place < rows)
    tl.debug_barrier()
    _largest_few(norms, places, free, 0, total, of_image, CHUNK)
    _largest_few(norms, places + of_image, free, total, asked, of_text, CHUNK)


def pivots(
    norms: Tensor, total: int, of_image: int, of_text: int, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Return the rows of largest norm, largest first, of an image's and of its question's.

    Parameters
    ----------
    norms
        float64 [B, N + M].
    total
        N.
    of_image, of_text
        How many of each, at most N and M.
    chunk
        Tokens looked at together; another number changes no result.

    Returns
    -------
    tuple of Tensor
        LongTensor [B, of_image + of_text]; and float32 [B, N + M], 0 for those and 1 elsewhere.
    """
    size, rows = norms.shape
    free = torch.empty(size, rows, dtype=torch.float32, device=norms.device)
    places = torch.empty(size, of_image + of_text, dtype=torch.int64, device=norms.device)
    kernels.launch(
        _pivots, (size,), norms.contiguous(), free, places, total, rows - total, of_image, of_text,
        CHUNK=chunk,
    )  # fmt: skip
    return places, free


@triton.jit
def _take_in_turns(ranked, free, kept, rows, pivots, total, keep, left, each, CHUNK: tl.constexpr):
    """Take tokens of an item for one pivot after the other, those that it ranks first."""
    item = tl.program_id(0).to(tl.int64)
    ranked, free = ranked + item * pivots * total, free + item * rows
    for pivot in range(0, pivots):
        others = pivots - 1 - pivot
        share = (left + others) // (others + 1)
        share = tl.where((each > 0) & (others > 0), tl.minimum(each, left), share)
        left -= share
        count = tl.full((), 0, tl.int32)
        for start in range(0, total, CHUNK):
            place = start + tl.arange(0, CHUNK)
            inside = place < total
            token = tl.load(ranked + pivot * total + place, inside, 0)
            still = (tl.load(free + token, inside, 0.0) > 0.0).to(tl.int32)
            gone = (still > 0) & (count + tl.cumsum(still, 0) <= share)
            tl.store(free + token, tl.zeros((CHUNK,), tl.float32), gone & inside)
            count += tl.sum(still, axis=0)
        tl.debug_barrier()  # what was written is read by all next
    _write_ascending(free, 0.0, kept + item * keep, total, keep, CHUNK)


def take_in_turns(
    ranked: Tensor, free: Tensor, keep: int, left: int, each: int | None, chunk: int = CHUNK
) -> Tensor:
    """Do as `engine.take_in_turns`.

    Parameters
    ----------
    ranked
        LongTensor [B, P, N].
    free
        float32 [B, N or more], 0 for a token that is taken; it is changed.
    keep, left, each
        See there.
    chunk
        Tokens looked at together; another number changes no result.
    """
    size, pivots, total = ranked.shape
    kept = torch.empty(size, keep, dtype=torch.int64, device=ranked.device)
    kernels.launch(
        _take_in_turns, (size,), ranked.contiguous(), free, kept, free.shape[1], pivots, total,
        keep, left, each or 0, CHUNK=chunk,
    )  # fmt: skip
    return kept
