"""Attention under the categories of heads, over a paged cache, on a GPU: what is computed of it.

An engine that serves keeps keys and values in pages, and reads prompts in chunks. A plan says for
the chunks of one batch which blocks of keys each tile of queries visits: lists, one for each set of
categories that the query heads of a key-value head have together. The kernel
(`tokenprune.masks.paged_kernels`) goes through them, and looks at pairs in those blocks in which
not all are allowed. Everything is made on the device, and nothing waits for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.errors import LayoutError
from tokenprune.masks.layout import PromptLayout
from tokenprune.masks.patterns import DENSE, INTRA, LOCAL, NEAR, SEES, SINK, Category, labels_of
from tokenprune.transfer import to_device


@dataclass(frozen=True, eq=False)
class PagedChunk:
    """A part of a prompt that is read now, whose keys and those before them are in the cache.

    Attributes
    ----------
    layout
        Of the prompt up to the part's end, or beyond.
    queries
        Positions of the part's tokens.
    row
        Where the first of them stands in the batch.
    request
        Row of the table of pages.
    length
        How many keys there are; those behind the last query are seen by images that see
        themselves both ways.
    bias
        float32 [length], added to the logits of each key: log n of one that stands for n tokens.
        None for 0.
    visible
        BoolTensor [length], keys that others than themselves see. None for all.
    """

    layout: PromptLayout
    queries: range
    row: int
    request: int
    length: int
    bias: Tensor | None = None
    visible: Tensor | None = None

    def __post_init__(self) -> None:
        queries, length = self.queries, self.length
        inside = 0 <= queries.start < queries.stop <= length <= self.layout.length
        if queries.step != 1 or not inside:
            raise LayoutError(
                f"queries={queries} and length={length} are no part of a prompt whose layout has "
                f"{self.layout.length} tokens. Give range(start, stop) with 0 <= start < stop <= "
                "length."
            )
        for name, given in (("bias", self.bias), ("visible", self.visible)):
            if given is not None and given.shape != (length,):
                raise LayoutError(
                    f"{name} is {list(given.shape)} and there are {length} keys. Give one number "
                    "for each."
                )


@dataclass(frozen=True, eq=False)
class Lists:
    """Which blocks of keys are visited.

    Attributes
    ----------
    order
        IntTensor [S, T, columns], numbers of blocks: those all of whose pairs are allowed, those in
        which some are, then the others.
    counts
        IntTensor [S, T, 2], how many of the first and of the second kind.
    of_head
        IntTensor [G], the list of each key-value head.
    kinds
        IntTensor [H], what an image token of each query head sees.
    """

    order: Tensor
    counts: Tensor
    of_head: Tensor
    kinds: Tensor

    @property
    def visited(self) -> Tensor:
        """LongTensor [G, T], how many blocks each key-value head visits for each tile."""
        return self.counts.sum(dim=2)[self.of_head.long()]


@dataclass(frozen=True, eq=False)
class _Summary:
    """What is known of tokens side by side, n times; those behind the prompt's end do not count.

    Attributes
    ----------
    first, last
        LongTensors [n], positions; `last` may be behind the end.
    full
        BoolTensor [n], whether none is behind the end.
    text_any, text_all, sink_any, sink_all
        BoolTensors [n]; `sink_all` says that all are sinks of images or text.
    low, high
        LongTensors [n], the numbers of the first and the last image with a token there, from 1;
        `low` is above `high` where there is none.
    shown_any, shown_all
        BoolTensors [n], whether any, or each, is seen by others than itself.
    """

    first: Tensor
    last: Tensor
    full: Tensor
    text_any: Tensor
    text_all: Tensor
    sink_any: Tensor
    sink_all: Tensor
    low: Tensor
    high: Tensor
    shown_any: Tensor
    shown_all: Tensor

    @classmethod
    def of(cls, labels: Tensor, start: int, size: int) -> _Summary:
        """Summarise labels [m] of the tokens from position `start` on, `size` at a time."""
        count = -(-len(labels) // size)
        shape = (count, size)
        padded = labels.new_zeros(count * size)
        padded[: len(labels)] = labels
        there = torch.arange(count * size, device=labels.device) < len(labels)
        hidden = (padded < 0).view(shape)
        label = torch.where(padded < 0, -1 - padded, padded).view(shape)
        inside = there.view(shape)
        text, sink = label == 0, (label > 0) & (label % 2 == 0)
        image = (label + 1) // 2
        first = start + size * torch.arange(count, device=labels.device)
        return cls(
            first=first,
            last=first + size - 1,
            full=inside.all(1),
            text_any=(text & inside).any(1),
            text_all=(text | ~inside).all(1),
            sink_any=(sink & inside).any(1),
            sink_all=(sink | text).all(1),
            low=torch.where(image > 0, image, 2**31).amin(1),
            high=image.amax(1),
            shown_any=(~hidden & inside).any(1),
            shown_all=~hidden.any(1),
        )


class PagedPlan:
    """What is computed for the chunks of one batch that are read under masks.

    Lists are made when the first layer asks for them, and kept for the next ones.

    Parameters
    ----------
    chunks
        One for each prompt that has a mask.
    device
        Where attention is computed.
    group
        Query heads of a key-value head.
    width
        d, of a head.
    rows, keys
        Rows of a tile, one for each query and head of the group, and keys of a block: powers of two
        from 16 on. None for what fits the width.
    both_ways
        Whether tokens of an image see all of it (Gemma 3), also outside of a window.
    """

    def __init__(
        self,
        chunks: Sequence[PagedChunk],
        device: torch.device,
        group: int,
        width: int,
        *,
        rows: int | None = None,
        keys: int | None = None,
        both_ways: bool = False,
    ) -> None:
        self.chunks, self.both_ways = tuple(chunks), both_ways
        self._device, self._group = device, group
        padded = 1 << (group - 1).bit_length()
        self.rows = max(rows or (128 if width <= 128 else 64), padded)
        self.keys = keys or (64 if width <= 128 else 32)
        self.queries = self.rows // padded
        self._hides = any(chunk.visible is not None for chunk in chunks)
        labels = [_labels(chunk) for chunk in chunks]
        offsets = list(itertools.accumulate(map(len, labels), initial=0))
        tiles = [
            (
                chunk.row + start - chunk.queries.start,
                start,
                min(self.queries, chunk.queries.stop - start),
                chunk.length,
                chunk.request,
                offset,
            )
            for chunk, offset in zip(chunks, offsets[:-1], strict=True)
            for start in range(chunk.queries.start, chunk.queries.stop, self.queries)
        ]
        self._tiles = to_device(torch.tensor(tiles, dtype=torch.int32, device="cpu"), device)
        self._labels = to_device(torch.cat(labels).int(), device)
        self._bias: Tensor | None = None
        if any(chunk.bias is not None for chunk in chunks):
            biases = [
                torch.zeros(chunk.length, device="cpu") if chunk.bias is None else chunk.bias
                for chunk in chunks
            ]
            self._bias = torch.cat([to_device(bias.float(), device) for bias in biases])
        self._summaries = [
            (
                _Summary.of(own[chunk.queries.start : chunk.queries.stop], chunk.queries.start,
                            self.queries),
                _Summary.of(own, 0, self.keys),
            )
            for chunk, own in zip(
                chunks, self._labels.long().split(list(map(len, labels))), strict=True
            )
        ]  # fmt: skip
        self._lists: dict[tuple[tuple[Category, ...], int | None], Lists] = {}

    @property
    def tiles(self) -> Tensor:
        """IntTensor [T, 6].

        Of each tile: row of its first query in the batch, that query's position, how many queries,
        keys of its prompt, row of its table of pages, where its prompt's labels begin.
        """
        return self._tiles

    def lists(self, categories: tuple[Category, ...], window: int | None) -> Lists:
        """Return the blocks that a layer visits.

        Parameters
        ----------
        categories
            Of its query heads.
        window
            How many tokens up to itself a query sees, itself included; None for all.

        Raises
        ------
        LayoutError
            If the heads are no whole groups.
        """
        if (categories, window) not in self._lists:
            self._lists[categories, window] = self._make(categories, window)
        return self._lists[categories, window]

    def _make(self, categories: tuple[Category, ...], window: int | None) -> Lists:
        if len(categories) % self._group:
            raise LayoutError(
                f"{len(categories)} heads are no whole groups of {self._group}. Make the plan for "
                "the layer's query heads of a key-value head."
            )
        sets = [
            frozenset(categories[at : at + self._group])
            for at in range(0, len(categories), self._group)
        ]
        different = list(dict.fromkeys(sets))
        columns = max(len(keys.first) for _, keys in self._summaries)
        parts = []
        for queries, keys in self._summaries:
            covers = {
                one: _cover(queries, keys, one, window, self.both_ways) for one in set(categories)
            }
            stages = []
            for one in different:
                # A block is visited if any head of the group sees a pair of it, and needs no look
                # at pairs if all of them see all.
                some = torch.stack([covers[category][0] for category in one]).any(0)
                every = torch.stack([covers[category][1] for category in one]).all(0)
                stages.append(some.to(torch.uint8) + (some & every).to(torch.uint8))
            stage = torch.stack(stages)
            missing = columns - stage.shape[2]
            parts.append(F.pad(stage, (0, missing)) if missing else stage)
        stage = torch.cat(parts, dim=1)
        order = stage.sort(dim=2, descending=True, stable=True).indices.int()
        counts = torch.stack([(stage == 2).sum(2), (stage == 1).sum(2)], dim=2).int()
        of_head = torch.tensor([different.index(one) for one in sets], device="cpu").int()
        kinds = torch.tensor([SEES[one] for one in categories], device="cpu").int()
        return Lists(
            order, counts, to_device(of_head, self._device), to_device(kinds, self._device)
        )

    def __call__(
        self,
        output: Tensor,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        table: Tensor,
        categories: tuple[Category, ...],
        window: int | None,
        scale: float,
    ) -> None:
        """Write the chunks' attention.

        Parameters
        ----------
        output
            [n, H, d]; rows of other requests of the batch stay as they are.
        query
            [n, H, d], of the whole batch.
        keys, values
            [pages, page, G, d], of any strides but for d, which lies together. Those of the chunks
            themselves are written already.
        table
            IntTensor [requests, pages of a request], which pages hold a request's keys.
        categories, window
            See `lists`.
        scale
            Factor on q kᵀ.
        """
        from tokenprune.masks import paged_kernels

        lists = self.lists(categories, window)
        heads = keys.shape[2] * self._group
        if not query.shape[1] == output.shape[1] == len(categories) == heads:
            raise LayoutError(
                f"queries have {query.shape[1]} heads, the output {output.shape[1]}, keys "
                f"{keys.shape[2]} for groups of {self._group}, and {len(categories)} categories "
                "were given. Give all of one layer."
            )
        paged_kernels.attend(
            output,
            query,
            keys,
            values,
            table,
            (self._labels, self._bias, self._hides),
            (self._tiles, lists.order, lists.counts, lists.of_head, lists.kinds),
            self.rows,
            self.keys,
            scale,
            window,
            self.both_ways,
        )


def _labels(chunk: PagedChunk) -> Tensor:
    """Return a number for each key, LongTensor [length]: `labels_of`; -1 - that if hidden."""
    labels = labels_of(chunk.layout)[: chunk.length]
    return labels if chunk.visible is None else torch.where(chunk.visible, labels, -1 - labels)


def _cover(
    queries: _Summary, keys: _Summary, category: Category, window: int | None, both_ways: bool
) -> tuple[Tensor, Tensor]:
    """Return BoolTensors [tiles, blocks]: may any pair be allowed, and surely all.

    What is not known is looked at pair by pair, which takes time and changes nothing.
    """
    first, last = queries.first[:, None], queries.last[:, None]
    sees = SEES[category]
    share = (queries.low[:, None] <= keys.high) & (keys.low <= queries.high[:, None])
    # Of both together there is one image, or none, beside text.
    one_image = queries.high[:, None].maximum(keys.high) <= queries.low[:, None].minimum(keys.low)
    some = queries.text_any[:, None] | keys.text_any
    every = queries.text_all[:, None] | keys.text_all
    if sees & INTRA:
        some, every = some | share, every | one_image
    if sees & SINK:
        some, every = some | keys.sink_any, every | keys.sink_all
    if sees & NEAR:
        some, every = some | (first - keys.last < LOCAL), every | (last - keys.first < LOCAL)
    if sees & DENSE:
        some, every = torch.ones_like(some), torch.ones_like(every)
    own_some, own_every = keys.first <= last, keys.last <= first
    if window is not None:
        own_some = own_some & (first - keys.last < window)
        own_every = own_every & (last - keys.first < window)
    if both_ways:
        own_some = own_some | share
        no_text = ~queries.text_any[:, None] & ~keys.text_any
        own_every = own_every | (no_text & one_image)
    itself = (keys.first <= last) & (first <= keys.last)
    some = some & own_some & (keys.shown_any | itself)
    every = every & own_every & keys.full & keys.shown_all
    return some, every
