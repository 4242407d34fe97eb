"""Which image each token in vLLM's paged cache belongs to, beside the cache.

A prompt may come in chunks, begin with blocks that another request left, or be read anew after a
preemption. So it is not remembered by request where its images are, but by the places of the cache:
whoever finds a token's keys there finds its tag, and whoever writes new keys writes a new one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenprune.masks.heads import layout_with_sinks
from tokenprune.masks.layout import ImageSpan, PromptLayout, image_spans
from tokenprune.transfer import to_device


def around(is_row: Tensor) -> Tensor:
    """Return how far each image token's image reaches before and behind it.

    Parameters
    ----------
    is_row
        BoolTensor [n], where the region of an item in a prompt has image tokens. Those between
        which no text stands are an image.

    Returns
    -------
    Tensor
        LongTensor [2, n]: tokens of the image before this one, and from this one on, itself
        counted. Both are 0 for text.
    """
    result = torch.zeros(2, len(is_row), dtype=torch.int64, device="cpu")
    for span in image_spans(is_row):
        inside = torch.arange(len(span), device="cpu")
        result[0, span.start : span.stop] = inside
        result[1, span.start : span.stop] = len(span) - inside
    return result


def edges(reach: Tensor, positions: Tensor) -> Tensor:
    """Return each token's tag.

    Parameters
    ----------
    reach
        LongTensor [2, n], what `around` returned for each token.
    positions
        LongTensor [n], where it stands in its prompt.

    Returns
    -------
    Tensor
        LongTensor [n, 2]: first token of its image and one behind the last; 0 and 0 for text.
    """
    tags = torch.stack([positions - reach[0], positions + reach[1]], dim=1)
    return tags * (reach[1] > 0)[:, None]


_HIDDEN = 1
"""The code of a token that counts 0 times."""


def to_codes(counts: Tensor) -> Tensor:
    """Return the codes of counts: 0 for a token that counts once, as all do of which none is said.

    Parameters
    ----------
    counts
        LongTensor, how often tokens count; 0 for those that are hidden.
    """
    return counts.where(counts != 1, 0).where(counts != 0, _HIDDEN)


def from_codes(codes: Tensor) -> Tensor:
    """Return the LongTensor that `to_codes` was given."""
    codes = codes.long()
    return codes.where(codes != 0, 1).where(codes != _HIDDEN, 0)


class Codes:
    """How often each token of a cache counts, as `to_codes` has it.

    Parameters
    ----------
    blocks, block
        Of the cache: how many, and tokens of each.
    device
        Where it is; None for the CPU.
    """

    def __init__(self, blocks: int, block: int, device: torch.device | None = None) -> None:
        self._block = block
        # One block more, as `Tags` has it.
        self._codes = torch.zeros(blocks + 1, block, dtype=torch.int32, device=device or "cpu")

    def write(self, slots: Tensor, codes: Tensor) -> None:
        """Set the codes of tokens [n]; those with a slot below 0 are nowhere in the cache."""
        self._codes.flatten()[_places(slots, self._codes)] = codes.to(self._codes.dtype)

    def any(self, tables: Tensor, lengths: Sequence[int]) -> list[bool]:
        """Say of which requests a token counts other than once; a GPU is waited for once.

        Parameters
        ----------
        tables
            IntTensor [requests, blocks], the numbers of each request's blocks.
        lengths
            How many tokens each has.
        """
        used = tables[: len(lengths), : -(-max(lengths) // self._block)].long()
        codes = self._codes[used].flatten(1)
        ends = to_device(torch.tensor(lengths, device="cpu"), codes.device)
        there = torch.arange(codes.shape[1], device=codes.device) < ends[:, None]
        found: list[bool] = ((codes != 0) & there).any(dim=1).tolist()
        return found

    def of(self, table: Tensor, length: int) -> Tensor:
        """Return IntTensor [length], the codes of a request's first tokens, on the CPU.

        See `Tags.images`.
        """
        used = table[: -(-length // self._block)].long()
        return self._codes[used].flatten()[:length].cpu()


class Tags:
    """The tags of a cache, for the layers that share its places.

    Parameters
    ----------
    blocks, block
        Of the cache: how many, and tokens of each.
    device
        Where it is; None for the CPU.
    """

    def __init__(self, blocks: int, block: int, device: torch.device | None = None) -> None:
        self._block = block
        # One block more for what is nowhere in the cache: to leave it out would wait for a GPU.
        self._tags = torch.zeros(blocks + 1, block, 2, dtype=torch.int32, device=device or "cpu")

    def fits(self, blocks: int, block: int) -> bool:
        """Say whether they are of a cache of this size."""
        return self._tags.shape[:2] == (blocks + 1, block)

    def write(self, slots: Tensor, tags: Tensor) -> None:
        """Set the tags of tokens [n, 2]; those with a slot below 0 are nowhere in the cache."""
        self._tags.flatten(0, 1)[_places(slots, self._tags)] = tags.to(self._tags.dtype)

    def images(self, table: Tensor, length: int) -> list[ImageSpan]:
        """Return the images among a request's first tokens, whole, in order.

        Parameters
        ----------
        table
            IntTensor, the numbers of the request's blocks. Those that a sliding window has left
            behind are vLLM's block 0, into which nobody writes.
        length
            How many tokens.
        """
        used = table[: -(-length // self._block)].long()
        return spans_in(self._tags[used].flatten(0, 1)[:length].cpu())


def _places(slots: Tensor, kept: Tensor) -> Tensor:
    """Return LongTensor [n], where slots are in what is kept [blocks + 1, block, ...], flat."""
    return torch.where(slots < 0, (len(kept) - 1) * kept.shape[1], slots).long()


def spans_in(tags: Tensor) -> list[ImageSpan]:
    """Return the images whose tokens have these tags [n, 2], each once, in order."""
    runs = tags.unique_consecutive(dim=0).tolist() if len(tags) else []
    # An image that a window has left behind in part may come back: a set.
    return [ImageSpan(*one) for one in sorted({(start, stop) for start, stop in runs if stop})]


def layout_of(images: Sequence[ImageSpan], length: int, sinks: Sequence[int]) -> PromptLayout:
    """Return the layout of the first tokens of a prompt, of which more may follow.

    Parameters
    ----------
    images
        Whole: where an image's sinks are may depend on where it ends.
    length
        How many tokens.
    sinks
        Places of sinks in an image; see `HeadCategories`.
    """
    end = max([length, *(image.stop for image in images)])
    whole = layout_with_sinks(end, images, sinks)
    begun = [ImageSpan(one.start, min(one.stop, length)) for one in images if one.start < length]
    return PromptLayout(length, tuple(begun), tuple(one for one in whole.sinks if one < length))
