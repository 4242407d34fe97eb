"""PromptLayout: the positions of a prompt's images, from which every attention mask is made.

A prompt of L tokens is text, with spans of image tokens in it. Everything that is in no span is
text: words, and the delimiters that many models put around an image.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.errors import LayoutError
from tokenprune.selection import Selection


@dataclass(frozen=True)
class ImageSpan:
    """The tokens of one image or video: those from `start` up to, not including, `stop`.

    Attributes
    ----------
    start, stop
        Positions in the prompt, from 0.
    grid
        (frames, rows, columns) of the tokens, or None where it is not known.
    """

    start: int
    stop: int
    grid: tuple[int, int, int] | None = None

    def __len__(self) -> int:
        """Return how many tokens there are."""
        return self.stop - self.start


@dataclass(frozen=True)
class PromptLayout:
    """One prompt, as a mask sees it.

    Parameters
    ----------
    length
        L, its tokens.
    images
        Spans of image tokens, in order.
    sinks
        Positions of tokens that get much attention whatever they hold, such as the first token.

    Raises
    ------
    LayoutError
        If a span is empty, out of order, overlaps another or ends behind the prompt, if its grid
        has another number of tokens, or if a sink is outside the prompt.
    """

    length: int
    images: tuple[ImageSpan, ...] = ()
    sinks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.length < 1:
            raise LayoutError(f"a prompt of {self.length} tokens has no layout; give at least 1.")
        for number, span in enumerate(self.images, start=1):
            if not 0 <= span.start < span.stop <= self.length:
                raise LayoutError(
                    f"image {number} has the tokens {span.start} to {span.stop} of a prompt of "
                    f"{self.length}. A span begins at 0 or later, holds at least one token and "
                    "ends with the prompt at the latest."
                )
            if span.grid is not None:
                frames, rows, columns = span.grid
                if frames * rows * columns != len(span):
                    raise LayoutError(
                        f"image {number} has {len(span)} tokens and the grid {span.grid}, whose "
                        f"product is {frames * rows * columns}. Correct one of them."
                    )
        for number, (span, following) in enumerate(itertools.pairwise(self.images), start=1):
            if following.start < span.stop:
                raise LayoutError(
                    f"images {number} and {number + 1} overlap or are out of order: the first has "
                    f"the tokens {span.start} to {span.stop}, the second {following.start} to "
                    f"{following.stop}. Give spans in order, each beginning behind the last one."
                )
        for sink in self.sinks:
            if not 0 <= sink < self.length:
                raise LayoutError(
                    f"sink {sink} is no token of a prompt of {self.length}. Give positions from 0 "
                    f"to {self.length - 1}."
                )

    @property
    def image_of(self) -> Tensor:
        """LongTensor [L]: the number of the image each token belongs to, or -1 for text."""
        result = torch.full((self.length,), -1, dtype=torch.int64)
        for number, span in enumerate(self.images):
            result[span.start : span.stop] = number
        return result

    @property
    def is_sink(self) -> Tensor:
        """BoolTensor [L]."""
        result = torch.zeros(self.length, dtype=torch.bool)
        result[list(self.sinks)] = True
        return result

    def kept(self, selections: Sequence[Selection]) -> Tensor:
        """Return BoolTensor [L]: all text, and the tokens of each image that were selected.

        With `tokenprune.masks.visible_keys` it is the mask that hides what was not.

        Parameters
        ----------
        selections
            One for each image, in order.

        Raises
        ------
        LayoutError
            If there are not as many selections as images, or one is of another number of tokens.
        """
        given = [selection.total for selection in selections]
        sizes = [len(span) for span in self.images]
        if given != sizes:
            raise LayoutError(
                f"there are selections of {given} tokens, and images of {sizes}. Give one "
                "selection for each image, in order."
            )
        result = torch.ones(self.length, dtype=torch.bool)
        for span, selection in zip(self.images, selections, strict=True):
            result[span.start : span.stop] = False
            result[span.start + selection.kept.cpu()] = True
        return result


def image_spans(is_image: Sequence[bool] | Tensor) -> list[ImageSpan]:
    """Return the runs of image tokens in a prompt, as spans.

    Images that touch are one run; a caller that knows their sizes splits it.

    Parameters
    ----------
    is_image
        Bool [L], True where a token is an image's.
    """
    # A run begins where the flags rise and ends where they fall; a 0 at either end closes the last.
    flags = torch.as_tensor(is_image, dtype=torch.int8).cpu()
    edges = torch.diff(flags, prepend=flags.new_zeros(1), append=flags.new_zeros(1)).nonzero()[:, 0]
    return [ImageSpan(start, stop) for start, stop in edges.view(-1, 2).tolist()]
