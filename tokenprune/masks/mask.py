"""Masks: which keys each query of a prompt may attend to, per head, without a matrix of all pairs.

A mask answers two questions: is a single pair allowed (`allowed`), and for a block of pairs, may
any of them be allowed and are all of them (`cover`)? The second gives the blocks that a kernel
computes, and the density; the first gives what it hides inside a block. Masks compose with ``&``
and ``|``. All of them describe ``[H, L, L]`` of one prompt of L tokens.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.errors import LayoutError

BLOCK = 128
"""Queries, and keys, of a block, where nothing else is said."""


@dataclass(frozen=True)
class Cover:
    """What is known of each block of pairs.

    Attributes
    ----------
    some
        BoolTensor [H or 1, blocks, blocks], False where surely no pair of the block is allowed.
    every
        BoolTensor of the same shape, True where surely every pair is.
    """

    some: Tensor
    every: Tensor


class Mask(ABC):
    """Which of the pairs (query, key) of a prompt are computed.

    Attributes
    ----------
    length
        L, tokens of the prompt.
    heads
        H, or 1 where all heads are alike.
    """

    length: int
    heads: int

    @abstractmethod
    def allowed(self, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Return BoolTensor, whether this query may attend to this key in this head.

        Parameters
        ----------
        head, query, key
            LongTensors of shapes that broadcast. With `heads` 1, `head` does not matter.
        """

    @abstractmethod
    def cover(self, block: int = BLOCK) -> Cover:
        """Return what is known of each block of `block` queries and `block` keys."""

    def to(self, device: torch.device) -> Mask:
        """Return the same mask with its tensors on a device."""
        return self

    def __and__(self, other: Mask) -> Mask:
        """Return the mask of the pairs that both allow."""
        return Combined(self, other, operator.and_)

    def __or__(self, other: Mask) -> Mask:
        """Return the mask of the pairs that one of them allows."""
        return Combined(self, other, operator.or_)

    def matrix(self) -> Tensor:
        """Return BoolTensor [H or 1, L, L]; for tests and pictures, not for long prompts."""
        position = torch.arange(self.length)
        head = torch.arange(self.heads)
        allowed = self.allowed(head[:, None, None], position[:, None], position[None, :])
        return allowed.expand(self.heads, self.length, self.length)

    def density(self, block: int = BLOCK) -> float:
        """Return the share of the causal blocks that is computed, the mean over heads."""
        some = self.cover(block).some
        causal = torch.ones_like(some[0]).tril()
        return float((some & causal).sum() / (causal.sum() * len(some)))


def blocks_in(length: int, block: int) -> int:
    """Return how many blocks `length` tokens take, the last one perhaps not full."""
    return -(-length // block)


def _edges(length: int, block: int) -> tuple[Tensor, Tensor]:
    """Return the first and the last token of each block."""
    first = torch.arange(0, length, block)
    return first, (first + block).clamp(max=length) - 1


@dataclass(frozen=True)
class Causal(Mask):
    """A query attends to itself and what stands before it.

    Parameters
    ----------
    length
        L.
    """

    length: int
    heads: int = 1

    def allowed(self, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """See `Mask.allowed`."""
        return key <= query

    def cover(self, block: int = BLOCK) -> Cover:
        """See `Mask.cover`."""
        first, last = _edges(self.length, block)
        # Rows are blocks of queries. The last query sees most, and the first one least.
        return Cover((first <= last[:, None])[None], (last <= first[:, None])[None])


@dataclass(frozen=True)
class Window(Mask):
    """A query attends to the last tokens only, and to all behind it; ``& Causal`` hides those.

    Parameters
    ----------
    length
        L.
    width
        How many tokens up to itself a query sees, itself included.
    """

    length: int
    width: int
    heads: int = 1

    def allowed(self, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """See `Mask.allowed`."""
        return query - key < self.width

    def cover(self, block: int = BLOCK) -> Cover:
        """See `Mask.cover`."""
        first, last = _edges(self.length, block)
        # The nearest pair of a block decides whether any is allowed, the furthest whether all are.
        some = first[:, None] - last < self.width
        every = last[:, None] - first < self.width
        return Cover(some[None], every[None])


@dataclass(frozen=True, eq=False)
class Classes(Mask):
    """Tokens are sorted into classes, and a table says which class attends to which.

    Parameters
    ----------
    labels
        LongTensor [L], each token's class.
    table
        BoolTensor [H or 1, C, C]: may a query of class c attend to a key of class k?
    """

    labels: Tensor
    table: Tensor

    @property
    def length(self) -> int:  # type: ignore[override]
        """L."""
        return len(self.labels)

    @property
    def heads(self) -> int:  # type: ignore[override]
        """H, or 1."""
        return len(self.table)

    def allowed(self, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """See `Mask.allowed`."""
        if self.heads == 1:
            return self.table[0][self.labels[query], self.labels[key]]
        return self.table[head, self.labels[query], self.labels[key]]

    def to(self, device: torch.device) -> Classes:
        """See `Mask.to`."""
        return Classes(self.labels.to(device), self.table.to(device))

    def cover(self, block: int = BLOCK) -> Cover:
        """See `Mask.cover`."""
        count = blocks_in(self.length, block)
        # Which classes a block has. Products count pairs of classes that both blocks have, and that
        # the table allows, or forbids: some pair is where one is allowed, every where none is not.
        present = torch.zeros(count, self.table.shape[-1])
        present[torch.arange(self.length) // block, self.labels] = 1.0
        some = present @ self.table.float() @ present.T > 0
        every = present @ (~self.table).float() @ present.T == 0
        return Cover(some, every)


@dataclass(frozen=True, eq=False)
class Blocks(Mask):
    """Whole blocks, chosen one by one.

    Parameters
    ----------
    chosen
        BoolTensor [H or 1, blocks, blocks].
    length
        L.
    block
        Queries, and keys, of a block.
    """

    chosen: Tensor
    length: int
    block: int = BLOCK

    def __post_init__(self) -> None:
        count = blocks_in(self.length, self.block)
        if self.chosen.ndim != 3 or self.chosen.shape[1:] != (count, count):
            raise LayoutError(
                f"chosen is {list(self.chosen.shape)}; {self.length} tokens in blocks of "
                f"{self.block} need [heads, {count}, {count}]."
            )

    @property
    def heads(self) -> int:  # type: ignore[override]
        """H, or 1."""
        return len(self.chosen)

    def allowed(self, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """See `Mask.allowed`."""
        if self.heads == 1:
            return self.chosen[0][query // self.block, key // self.block]
        return self.chosen[head, query // self.block, key // self.block]

    def to(self, device: torch.device) -> Blocks:
        """See `Mask.to`."""
        return Blocks(self.chosen.to(device), self.length, self.block)

    def cover(self, block: int = BLOCK) -> Cover:
        """See `Mask.cover`; known for blocks of its own size only.

        Raises
        ------
        LayoutError
            For another size.
        """
        if block != self.block:
            raise LayoutError(
                f"blocks of {self.block} were chosen, and blocks of {block} are asked for. Choose "
                f"and compute with the same size."
            )
        return Cover(self.chosen, self.chosen)


@dataclass(frozen=True, eq=False)
class PerHead(Mask):
    """Each head has one of a few masks.

    Parameters
    ----------
    choices
        Masks that are the same for all heads.
    of_head
        LongTensor [H], which of the choices each head has.
    """

    choices: Sequence[Mask]
    of_head: Tensor

    def __post_init__(self) -> None:
        lengths = {mask.length for mask in self.choices}
        if len(lengths) != 1 or any(mask.heads != 1 for mask in self.choices):
            raise LayoutError(
                f"the masks to choose from are for prompts of {sorted(lengths)} tokens and "
                f"{[mask.heads for mask in self.choices]} heads. Give masks of one length that are "
                "the same for all heads."
            )
        if int(self.of_head.min()) < 0 or int(self.of_head.max()) >= len(self.choices):
            raise LayoutError(
                f"heads have the masks {self.of_head.unique().tolist()} out of "
                f"{len(self.choices)}: count from 0."
            )

    @property
    def length(self) -> int:  # type: ignore[override]
        """L."""
        return self.choices[0].length

    @property
    def heads(self) -> int:  # type: ignore[override]
        """H."""
        return len(self.of_head)

    def allowed(self, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """See `Mask.allowed`."""
        choice = self.of_head[head]
        # Each mask is asked about all pairs: there are few masks, and few pairs at a time.
        allowed = self.choices[0].allowed(head, query, key) & (choice == 0)
        for number, mask in enumerate(self.choices[1:], start=1):
            allowed = allowed | (mask.allowed(head, query, key) & (choice == number))
        return allowed

    def to(self, device: torch.device) -> PerHead:
        """See `Mask.to`."""
        return PerHead([mask.to(device) for mask in self.choices], self.of_head.to(device))

    def cover(self, block: int = BLOCK) -> Cover:
        """See `Mask.cover`."""
        covers = [mask.cover(block) for mask in self.choices]
        some = torch.cat([cover.some for cover in covers])
        every = torch.cat([cover.every for cover in covers])
        return Cover(some[self.of_head], every[self.of_head])


class Combined(Mask):
    """Two masks of one prompt; a pair is allowed by both, or by one of them.

    Parameters
    ----------
    one, other
        Of one length, each of the model's heads or of 1.
    combine
        ``operator.and_`` or ``operator.or_``, for their answers.

    Raises
    ------
    LayoutError
        If they are of two prompts or models.
    """

    def __init__(self, one: Mask, other: Mask, combine: Callable[[Tensor, Tensor], Tensor]) -> None:
        heads = {one.heads, other.heads} - {1}
        if one.length != other.length or len(heads) > 1:
            raise LayoutError(
                f"a mask of {one.heads} heads and {one.length} tokens cannot be combined with one "
                f"of {other.heads} heads and {other.length} tokens. Make both for one prompt, each "
                "for all heads of the model or for 1."
            )
        self.one, self.other, self.combine = one, other, combine
        self.length = one.length
        self.heads = max(one.heads, other.heads)

    def to(self, device: torch.device) -> Mask:
        """See `Mask.to`."""
        return Combined(self.one.to(device), self.other.to(device), self.combine)

    def allowed(self, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """See `Mask.allowed`."""
        return self.combine(
            self.one.allowed(head, query, key), self.other.allowed(head, query, key)
        )

    def cover(self, block: int = BLOCK) -> Cover:
        """See `Mask.cover`."""
        # What a cover leaves open stays open. With `and`, `some` may say more than there is: each
        # mask may allow other pairs of a block. With `or`, `every` may say less: together they may
        # allow every pair. Neither makes a kernel wrong, it only computes more than it has to.
        one, other = self.one.cover(block), self.other.cover(block)
        return Cover(self.combine(one.some, other.some), self.combine(one.every, other.every))


def visible_keys(keys: Tensor) -> Mask:
    """Return the mask in which some keys are seen by all queries, and the others by themselves.

    That a hidden token still attends to itself leaves no query without a key.

    Parameters
    ----------
    keys
        BoolTensor [L].
    """
    table = torch.tensor([[[False, True], [False, True]]], device=keys.device)
    itself = Causal(len(keys)) & Window(len(keys), 1)
    return Classes(keys.long(), table) | itself
