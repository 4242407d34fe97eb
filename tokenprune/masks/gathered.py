"""The kernel ``"gathered"``: torch's fused attention over those keys that a block of queries sees.

A mask becomes a plan once (`plan_of`): parts, each of some queries and the keys that any of them
sees. A call then gathers keys, computes the parts and puts the results in their places (`Plan`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.errors import LayoutError
from tokenprune.masks.mask import (
    Blocks,
    Causal,
    Classes,
    Combined,
    Mask,
    PerHead,
    Window,
    blocks_in,
)


@dataclass(frozen=True, eq=False)
class _Part:
    """Queries that go through the kernel together, and the keys that any of them sees.

    Attributes
    ----------
    heads
        Which heads; they see the same.
    queries
        Their places among the plan's queries, a slice where they follow each other.
    count
        How many queries.
    columns, single
        LongTensors: key blocks that all queries see, and positions of single keys that all see.
    mixed, bias
        Positions of the keys that some of the queries see, ascending, and float32 [count, mixed], 0
        or -inf.
    size
        How many keys.
    run
        First key and one behind the last, where they follow each other, the mixed ones last.
    """

    heads: list[int]
    queries: slice | Tensor
    count: int
    columns: Tensor
    single: Tensor
    mixed: Tensor
    bias: Tensor | None
    size: int
    run: tuple[int, int] | None


@dataclass(frozen=True, eq=False)
class _Row:
    """What the heads see of one block of queries.

    A *pattern* is what a head has in all blocks of keys, and the heads that have it. A *piece* is
    a block of keys of which some pairs are allowed, as one or more patterns have it.

    Attributes
    ----------
    queries
        LongTensor [Q], their positions.
    patterns
        LongTensor [P, blocks], codes; see `Plan.__init__`.
    heads
        P LongTensors, the heads of each pattern.
    pattern_of, piece_of
        LongTensors [m], for each piece that a pattern has: the pattern and the piece.
    weight
        LongTensor [n], how many heads have each piece.
    keys
        LongTensor [n, K], positions of each piece's keys.
    allowed
        BoolTensor [n, K, Q], which pairs are.
    """

    queries: Tensor
    patterns: Tensor
    heads: list[Tensor]
    pattern_of: Tensor
    piece_of: Tensor
    weight: Tensor
    keys: Tensor
    allowed: Tensor


class Plan:
    """What is computed for a mask, found once: `_Part`s, and heads that are plainly causal.

    Pairs of a block are computed only where `Mask.cover` leaves them open, and once for all heads
    that are alike there. Keys of such blocks are taken one by one: a text token between two images
    is one key and not a block. Queries of a block that see far more than the others, such as that
    text token's, make a part of their own.

    Parameters
    ----------
    mask
        Of one prompt.
    block
        Queries, and keys, of a block.
    device
        Where attention is computed.
    queries
        Positions of the queries that are computed, all L where it is left out. Keys are all L.

    Raises
    ------
    LayoutError
        If a query may attend to no key, or is none of the prompt's.
    """

    def __init__(
        self, mask: Mask, block: int, device: torch.device, queries: range | None = None
    ) -> None:
        self._length, self._heads = mask.length, mask.heads
        self._block, self._device = block, device
        self._queries = queries_in(queries, mask.length)
        cover, heads, length = mask.cover(block), mask.heads, mask.length
        # The code of a head in a block of pairs: -1 none is allowed, 0 all are, and above 0 some
        # are. Heads of the same code above 0 in a block allow the same pairs in it.
        codes = torch.where(cover.every, 0, 1 + _kinds(mask)).where(cover.some, -1)
        codes = codes.expand(heads, -1, -1)
        # Torch's causal attention begins with the first key: a later part of the queries cannot
        # use it.
        whole = self._queries == range(length)
        self._causal = self._causal_heads(mask, codes) if whole else []
        others = [head for head in range(heads) if head not in self._causal]
        self.calls = list(self._make(mask, codes, others)) if others else []
        self.pairs = sum(
            len(part.heads) * part.count * part.size for parts in self.calls for part in parts
        )
        self.pairs += len(self._causal) * (length * (length + 1) // 2)
        self._inside = torch.arange(block, device=device)
        # Layers and parts ask for the same folds again; to build their indices takes longer than
        # to use them.
        self._known: dict[tuple[int, ...], list[_Fold]] = {}

    def _causal_heads(self, mask: Mask, codes: Tensor) -> list[int]:
        """Return the heads in which just the causal pairs are allowed."""
        count = codes.shape[-1]
        below = torch.ones(count, count, dtype=torch.bool).tril(-1)
        # All pairs in blocks below the diagonal, and none above it.
        candidates = ((codes == 0) | ~below).all(dim=-1).all(dim=-1)
        candidates &= ((codes == -1) | below | torch.eye(count, dtype=torch.bool)).all(-1).all(-1)
        # What codes cannot tell are the blocks on the diagonal, where causal is "some pairs". There
        # the pairs themselves are compared.
        causal_elsewhere = candidates.nonzero()[:, 0]
        if not len(causal_elsewhere):
            return []
        length = self._length
        query = torch.arange(count * self._block).view(1, count, self._block, 1)
        key = query.transpose(2, 3)
        inside = (query < length) & (key < length)
        last = length - 1
        head = causal_elsewhere[:, None, None, None]
        # One head of those that are alike everywhere is enough.
        _, kind_of = torch.unique(codes[causal_elsewhere].flatten(1), dim=0, return_inverse=True)
        result: list[int] = []
        for kind in range(int(kind_of.max()) + 1):
            members = (kind_of == kind).nonzero()[:, 0]
            pairs = mask.allowed(head[members[:1]], query.clamp(max=last), key.clamp(max=last))
            if bool((pairs.eq(key <= query) | ~inside).all()):
                result += causal_elsewhere[members].tolist()
        return sorted(result)

    def _make(self, mask: Mask, codes: Tensor, heads: list[int]) -> Iterator[list[_Part]]:
        """Yield the parts of each call of the kernel, block of queries by block of queries."""
        # Memory is that of the pairs of one row of blocks: all of them would be H * L * L bytes.
        first, last = self._queries[0] // self._block, self._queries[-1] // self._block
        for number in range(first, last + 1):
            row = self._row(mask, codes[:, number], torch.tensor(heads), number)
            for chosen in _split(row.allowed, row.weight, _CALL * len(row.heads)):
                yield from _calls(self._parts(row, chosen), self._device)

    def _row(self, mask: Mask, codes: Tensor, heads: Tensor, number: int) -> _Row:
        """Return what heads see of one block of queries.

        Parameters
        ----------
        mask
            Of all heads.
        codes
            LongTensor [H, blocks]; see `__init__`.
        heads
            LongTensor, the heads that are not plainly causal.
        number
            Of the block of queries.
        """
        block, length = self._block, self._length
        asked = self._queries
        queries = torch.arange(
            max(number * block, asked.start), min(number * block + block, asked.stop)
        )
        # Heads that have the same in all blocks of keys go through the kernel together.
        patterns, pattern_of_head = torch.unique(codes[heads], dim=0, return_inverse=True)
        members = [heads[pattern_of_head == pattern] for pattern in range(len(patterns))]
        pattern_of, column = (patterns > 0).nonzero().unbind(1)
        # Column and code as one number, which is ordered as the pair is: codes are below the base.
        base = int(codes.max()) + 1
        piece, piece_of = torch.unique(
            column * base + patterns[pattern_of, column], return_inverse=True
        )
        columns = piece // base
        # Heads of one code allow the same pairs: the first that has it answers for all of them.
        example = torch.empty_like(piece)
        example[piece_of] = torch.stack([alike[0] for alike in members])[pattern_of]
        sizes = torch.tensor([len(alike) for alike in members])
        weight = torch.zeros_like(piece).index_add_(0, piece_of, sizes[pattern_of])
        positions = columns[:, None] * block + torch.arange(block)
        # The last block may reach behind the prompt: the mask is asked for a token that is there,
        # and its answer does not count.
        keys = positions.clamp(max=length - 1)
        allowed = _pairs(mask, example, queries, keys).expand(len(piece), block, len(queries))
        if len(piece) and int(positions.max()) >= length:
            allowed = allowed & (positions < length)[:, :, None]
        return _Row(queries, patterns, members, pattern_of, piece_of, weight, keys, allowed)

    def _parts(self, row: _Row, chosen: Tensor) -> list[_Part]:
        """Return a part for each pattern of a row.

        Parameters
        ----------
        row
            A block of queries.
        chosen
            LongTensor, which of its queries the parts are of.
        """
        some, every = _seen(row.allowed, chosen)
        # Keys that no query of the part sees are left out; those that all see need no bias.
        mixed = some & ~every
        has_mixed = mixed.any(dim=1)
        # Patterns may differ only in blocks that all queries see. Their biases are the same then.
        biases: dict[tuple[int, ...], tuple[Tensor, Tensor | None]] = {}
        parts = []
        for number, heads in enumerate(row.heads):
            pieces = row.piece_of[row.pattern_of == number]
            biased = pieces[has_mixed[pieces]]
            name = tuple(biased.tolist())
            if name not in biases:
                biases[name] = self._bias(
                    row.allowed[biased][..., chosen], mixed[biased], row.keys[biased]
                )
            part = self._part(
                heads.tolist(),
                row.queries[chosen],
                (row.patterns[number] == 0).nonzero()[:, 0],
                row.keys[pieces][every[pieces]],
                *biases[name],
            )
            parts.append(part)
        return parts

    def _bias(self, pairs: Tensor, mixed: Tensor, keys: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the keys of some blocks that not all queries see, and what hides them."""
        if not len(pairs):
            return torch.empty(0, dtype=torch.int64), None
        seen = pairs[mixed].T
        bias = torch.zeros(seen.shape).masked_fill_(~seen, -math.inf)
        return keys[mixed], bias.to(self._device)

    def _part(
        self,
        heads: list[int],
        queries: Tensor,
        columns: Tensor,
        single: Tensor,
        mixed: Tensor,
        bias: Tensor | None,
    ) -> _Part:
        """Return a part; see its attributes, and `_parts`."""
        block, length = self._block, self._length
        # The first and last key of each whole block, and the single keys: no key lies outside.
        ends = torch.cat([columns * block, (columns * block + block).clamp(max=length) - 1, single])
        size = len(columns) * block + len(single) + len(mixed)
        if len(columns) and int(columns[-1]) == length // block:
            size -= block - length % block  # the last block is not full
        if not size:
            raise LayoutError(
                f"query {int(queries[0])} of head {heads[0]} may attend to no key. Allow every "
                "query at least one, itself for example."
            )
        # Keys that follow each other are a slice, of which no copy is made. The mixed ones have to
        # be the last of them, as the bias is that of the last keys.
        both = torch.cat([ends, mixed])
        low, high = int(both.min()), int(both.max()) + 1
        last = not len(ends) or not len(mixed) or int(mixed.min()) > int(ends.max())
        # No key is there twice, so they follow each other if they are as many as their range.
        run = (low, high) if last and high - low == size else None
        queries = queries - self._queries.start
        start, count = int(queries[0]), len(queries)
        follows = int(queries[-1]) - start + 1 == count  # they ascend
        device = self._device
        return _Part(
            heads,
            slice(start, start + count) if follows else queries.to(device),
            count,
            columns.to(device),
            single.to(device),
            mixed.to(device),
            bias,
            size,
            run,
        )

    def __call__(self, work: Work, heads: list[int]) -> None:
        """Compute some heads' attention.

        Parameters
        ----------
        work
            Of all heads.
        heads
            Those that a mask of one head stands for; ignored for a mask of more.
        """
        query, key, value, scale = work.query, work.key, work.value, work.scale
        shared = self._heads == 1
        if self._causal:
            for fold in self._folds(heads if shared else self._causal, len(query), len(key)):
                work.output[fold.heads] = F.scaled_dot_product_attention(
                    query[fold.heads][None],
                    key[fold.keys][None],
                    value[fold.keys][None],
                    is_causal=True,
                    scale=scale,
                    enable_gqa=fold.times > 1,
                )[0]
        for parts in self.calls:
            if len(parts) > 1:
                self._side_by_side(work, parts)
                continue
            part = parts[0]
            keys = part.mixed if part.run else self._keys(part)
            for fold in self._folds(heads if shared else part.heads, len(query), len(key)):
                at = _at(fold.heads, part.queries)
                # The queries of all heads that share a key head, one after the other.
                shape = (fold.count, fold.times * part.count, query.shape[-1])
                if part.run is not None:
                    run = slice(*part.run)
                    keys_values = key[fold.keys, run], value[fold.keys, run]
                else:
                    keys_values = work.gather(fold.first_rows + keys)
                with work.hide(part, fold.times) as bias:
                    attended = fused(query[at].reshape(shape), *keys_values, bias, scale)
                work.output[at] = attended.reshape(-1, part.count, value.shape[-1])

    def _side_by_side(self, work: Work, parts: list[_Part]) -> None:
        """Compute heads that see about as many keys, but others, in one call of the kernel."""
        query, groups = work.query, len(work.key)
        heads = [(head, part) for part in parts for head in part.heads]
        longest = max(part.size for part in parts)
        # Keys stand at the end of a row, those of the bias last, as `hide_each` has them.
        index = torch.empty(len(heads), longest, dtype=torch.int64, device=self._device)
        known = {part: self._keys(part) for part in parts}
        for row, (head, part) in zip(index, heads, strict=True):
            torch.add(
                known[part], head * groups // len(query) * self._length, out=row[-part.size :]
            )
            row[: -part.size] = row[-part.size]  # what fills the row is hidden below
        at = _at(self._index([head for head, _ in heads]), parts[0].queries)
        with work.hide_each([part for _, part in heads], longest) as bias:
            work.output[at] = fused(query[at], *work.gather(index), bias, work.scale)

    def _keys(self, part: _Part) -> Tensor:
        """Return LongTensor, the places of a part's keys, those of its bias last."""
        whole = (part.columns[:, None] * self._block + self._inside).flatten()
        return torch.cat([whole[whole < self._length], part.single, part.mixed])

    def _folds(self, heads: list[int], all_heads: int, groups: int) -> list[_Fold]:
        """Return heads sorted by how many of them share a key head."""
        name = (*heads, all_heads, groups)
        if name not in self._known:
            of_key: dict[int, list[int]] = {}
            for head in heads:
                of_key.setdefault(head * groups // all_heads, []).append(head)
            self._known[name] = []
            # A fold is a rectangle: key heads, and as many heads for each of them.
            for times in sorted({len(sharing) for sharing in of_key.values()}):
                keys = [key for key, sharing in of_key.items() if len(sharing) == times]
                folded = [head for key in keys for head in of_key[key]]
                starts = torch.tensor(keys, device=self._device) * self._length
                self._known[name].append(
                    _Fold(self._index(folded), self._index(keys), len(keys), times, starts[:, None])
                )
        return self._known[name]

    def _index(self, numbers: list[int]) -> slice | Tensor:
        """Return a slice, of which no copy is made, where the numbers follow each other."""
        if numbers == list(range(numbers[0], numbers[-1] + 1)):
            return slice(numbers[0], numbers[-1] + 1)
        return torch.tensor(numbers, device=self._device)


@dataclass(frozen=True, eq=False)
class _Fold:
    """Heads of which equally many, `times`, share each of `count` key heads, side by side.

    `first_rows` is LongTensor [count, 1]: where a key head begins in keys of [G * L, d].
    """

    heads: slice | Tensor
    keys: slice | Tensor
    count: int
    times: int
    first_rows: Tensor


class Work:
    """One call: q, k and v of all heads, and where the result goes.

    Parameters
    ----------
    query
        [H, Q, d], of the plan's queries.
    key, value
        [G, L, d].
    scale
        Factor on q kᵀ.
    output
        [H, Q, d], is written.
    """

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, output: Tensor
    ) -> None:
        self.query, self.key, self.value = query, key, value
        self.scale, self.output = scale, output
        # [G * L, d], so that one index picks rows of any head.
        self.rows = [states.contiguous().flatten(0, 1) for states in (key, value)]
        # Zeros are as many as the keys, and the same for every part: they are made once.
        self._zeros = query.new_zeros(0, key.shape[1])
        self._rooms: dict[str, Tensor] = {}
        # A kernel that keeps its bias for the way back, or wants it aligned, gets one of its own.
        self._reuse = query.device.type == "cpu" and not torch.is_grad_enabled()

    def gather(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [n, K, d] of LongTensor [n, K], rows among those of all heads.

        They are valid until the next call.
        """
        index, gathered = rows.flatten(), []
        for source, name in zip(self.rows, ("key", "value"), strict=True):
            if self._reuse:
                # Fresh memory of this size costs more than what is written to it.
                shape = (len(index), source.shape[1])
                picked = torch.index_select(source, 0, index, out=self._room(name, shape))
            else:
                picked = source.index_select(0, index)
            gathered.append(picked.unflatten(0, rows.shape))
        return gathered[0], gathered[1]

    def _room(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return memory that was used before, zeros at first."""
        size = math.prod(shape)
        if name not in self._rooms or len(self._rooms[name]) < size:
            self._rooms[name] = self.query.new_zeros(size)
        return self._rooms[name][:size].view(shape)

    @contextmanager
    def hide_each(self, parts: list[_Part], longest: int) -> Iterator[Tensor]:
        """Yield the bias [1, heads, queries, keys] of parts, also of what fills up their keys."""
        shape = (len(parts), parts[0].count, longest)
        bias = self._room("bias", shape) if self._reuse else self.query.new_zeros(shape)
        edges = [(longest - part.size, longest - len(part.mixed)) for part in parts]
        for of_head, part, (first, end) in zip(bias, parts, edges, strict=True):
            of_head[:, :first] = -math.inf
            if part.bias is not None:
                of_head[:, end:] = part.bias
        yield bias[None]
        if self._reuse:
            # Invariant: between calls, memory for a bias is zeros. Only what was written is wiped.
            for of_head, (first, end) in zip(bias, edges, strict=True):
                of_head[:, :first].zero_()
                of_head[:, end:].zero_()

    @contextmanager
    def hide(self, part: _Part, times: int) -> Iterator[Tensor | None]:
        """Yield a part's bias [times * queries, keys]: zeros, and its mixed keys' at the end.

        It is None where nothing is hidden.
        """
        if part.bias is None:
            yield None
            return
        rows, length = times * part.count, self._zeros.shape[1]
        if not self._reuse:
            bias = self.query.new_zeros(rows, part.size)
        else:
            if rows > len(self._zeros):
                self._zeros = self.query.new_zeros(rows, length)
            # The last columns, so that parts of all sizes share one matrix of zeros.
            bias = self._zeros[:rows, length - part.size :]
        end = bias[:, part.size - len(part.mixed) :]
        end.unflatten(0, (times, part.count)).copy_(part.bias)
        yield bias
        if self._reuse:
            end.zero_()  # the invariant of `hide_each`


_ALIKE = 1.1
"""Heads go through the kernel side by side if the longest keys are at most so many times longer."""

_TASK = 32
"""Torch's fused attention on the CPU gives a thread so many queries of a head at a time."""


def _calls(parts: list[_Part], device: torch.device) -> Iterator[list[_Part]]:
    """Put parts of the same queries together until a call of the kernel has work for all threads.

    Not more of them: keys of a head or two stay in the processor's cache.
    """
    tasks = 4 * torch.get_num_threads() if device.type == "cpu" else 1024
    call: list[_Part] = []
    heads = 0
    # By size, as keys are filled up to the longest of a call.
    for part in sorted(parts, key=lambda part: part.size):
        enough = heads * blocks_in(part.count, _TASK) >= tasks
        if call and (enough or part.size > _ALIKE * call[0].size):
            yield call
            call, heads = [], 0
        call.append(part)
        heads += len(part.heads)
    yield call


def _at(heads: slice | Tensor, queries: slice | Tensor) -> Any:
    """Return the index of all pairs of a head and a query."""
    if isinstance(heads, Tensor) and isinstance(queries, Tensor):
        return heads[:, None], queries
    return heads, queries


_Made = tuple[int, torch.device, range | None]
"""What a plan of a mask was made for: block, device and queries."""

# Weak, so that a plan lives as long as its mask: a prompt's masks are gone with the prompt.
_plans: WeakKeyDictionary[Mask, dict[_Made, Plan]] = WeakKeyDictionary()


def plan_of(mask: Mask, block: int, device: torch.device, queries: range | None = None) -> Plan:
    """Return a mask's plan, the one made before if there is one: layers may share masks."""
    plans = _plans.setdefault(mask, {})
    if (block, device, queries) not in plans:
        plans[block, device, queries] = Plan(mask, block, device, queries)
    return plans[block, device, queries]


def queries_in(queries: range | None, length: int) -> range:
    """Return which queries of a prompt are computed: `queries`, or all.

    Raises
    ------
    LayoutError
        If there is none, one is left out between others, or one is none of the prompt's.
    """
    if queries is None:
        return range(length)
    if queries.step != 1 or not 0 <= queries.start < queries.stop <= length:
        raise LayoutError(
            f"queries={queries} are not some that follow each other in a prompt of {length} "
            f"tokens. Give range(start, stop) with 0 <= start < stop <= {length}."
        )
    return queries


def shared_masks(mask: Mask) -> list[tuple[Mask, list[int] | None]]:
    """Return the masks that heads of a mask share, and whose they are; None for all heads."""
    if not isinstance(mask, PerHead):
        return [(mask, None)]
    heads = [
        (mask.of_head == number).nonzero()[:, 0].tolist() for number in range(len(mask.choices))
    ]
    return [
        (choice, of_heads) for choice, of_heads in zip(mask.choices, heads, strict=True) if of_heads
    ]


_CALL = 2**15
"""How many pairs take about as long as one more call of the kernel."""


def _seen(allowed: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Return BoolTensors [n, K], whether any of some queries may see a key, and whether all.

    Parameters
    ----------
    allowed
        BoolTensor [n, K, Q].
    queries
        LongTensor, some of the Q, each once.
    """
    if len(queries) < allowed.shape[2]:
        allowed = allowed[..., queries]
    # The largest and the smallest byte are `any` and `all`: torch has vector instructions for
    # bytes and none for bools, which takes 17 times as long.
    flags = allowed.contiguous().view(torch.uint8)
    return flags.amax(dim=-1).bool(), flags.amin(dim=-1).bool()


def _split(allowed: Tensor, weight: Tensor, least: int) -> list[Tensor]:
    """Cut queries into sets that see about as many keys each.

    A set is computed with all keys that any of its queries sees. It is cut where the numbers of
    keys differ most, if that saves `least` pairs or more.

    Parameters
    ----------
    allowed
        BoolTensor [n, K, Q], which of the queries may see the keys of n pieces.
    weight
        LongTensor [n], how often each piece counts.
    least
        See above.
    """
    everyone = torch.arange(allowed.shape[2])

    def cost(queries: Tensor) -> int:
        return len(queries) * int(_seen(allowed, queries)[0].sum(dim=1) @ weight)

    def cut(queries: Tensor, whole: int) -> list[Tensor]:
        if whole < least:  # as in most rows: nothing has to be counted
            return [queries]
        counts = keys_seen()[queries]
        if whole - int(counts.sum()) < least:  # not even one set for each query would save it
            return [queries]
        order = counts.argsort(stable=True)
        after = int(counts[order].diff().argmax()) + 1
        low, high = (queries[half.sort().values] for half in order.tensor_split([after]))
        costs = cost(low), cost(high)
        if whole - sum(costs) < least:
            return [queries]
        return cut(low, costs[0]) + cut(high, costs[1])

    @cache  # asked for by few rows, and then by each cut
    def keys_seen() -> Tensor:
        """LongTensor [Q], how many keys each query sees, of all heads together."""
        return weight @ allowed.sum(dim=1, dtype=torch.int32).long()

    if len(everyone) == 1 or not len(weight):
        return [everyone]
    return cut(everyone, cost(everyone))


def _pairs(mask: Mask, head: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Return what `Mask.allowed` does for n blocks of pairs, only sooner.

    Parameters
    ----------
    mask
        Of any number of heads.
    head
        LongTensor [n], the head of each block.
    queries
        LongTensor [Q], ascending, all in one block.
    keys
        LongTensor [n, K], ascending, those of each block.

    Returns
    -------
    Tensor
        BoolTensor that broadcasts to [n, K, Q].
    """
    match mask:
        case Combined():
            return mask.combine(
                _pairs(mask.one, head, queries, keys), _pairs(mask.other, head, queries, keys)
            )
        case Causal() | Window():
            # Their edge is a straight line: where opposite corners are alike the block is.
            # The corners: first query with last key, and last query with first key.
            corner = mask.allowed(head, queries[0], keys[:, -1])
            cut = corner != mask.allowed(head, queries[-1], keys[:, 0])
            if not bool(cut.any()):
                return corner[:, None, None]
            result = corner[:, None, None].repeat(1, keys.shape[1], len(queries))
            result[cut] = mask.allowed(head[cut, None, None], queries, keys[cut, :, None])
            return result
        case Blocks():
            # A block is allowed as a whole, so its first pair is enough.
            return mask.allowed(head[:, None, None], queries[:1], keys[:, :1, None])
        case PerHead():
            choice = mask.of_head[head]
            result = torch.empty(*keys.shape, len(queries), dtype=torch.bool)
            for number in choice.unique().tolist():
                having = choice == number
                result[having] = _pairs(mask.choices[number], head[having], queries, keys[having])
            return result
        case Classes(heads=1):
            seen_by = mask.table[0, mask.labels[queries]].T.contiguous()  # [C, Q]
            return seen_by[mask.labels[keys]]
    return mask.allowed(head[:, None, None], queries, keys[:, :, None])


def _kinds(mask: Mask) -> Tensor:
    """Return LongTensor that broadcasts to [H, blocks, blocks], equal where heads are alike.

    Two heads with the same number in a block allow the same pairs in it.
    """
    if isinstance(mask, Combined):
        one, other = _kinds(mask.one), _kinds(mask.other)
        # Both numbers as one. Heads that differ in it may still allow the same: time, no error.
        combined: Tensor = one * (other.max() + 1) + other
        return combined
    if isinstance(mask, Blocks):
        return mask.chosen.long()
    if isinstance(mask, PerHead):
        return mask.of_head[:, None, None]
    if isinstance(mask, Classes):
        tables: Tensor = torch.unique(mask.table.flatten(1), dim=0, return_inverse=True)[1]
        return tables[:, None, None]
    return torch.arange(mask.heads)[:, None, None]


def fused(query: Tensor, key: Tensor, value: Tensor, pairs: Tensor | None, scale: float) -> Tensor:
    """Torch's own attention of [H, Q, d] to [G, K, d], over `pairs` [1, H or 1, Q, K] or all."""
    return F.scaled_dot_product_attention(
        query[None], key[None], value[None], pairs, scale=scale, enable_gqa=len(query) != len(key)
    )[0]
