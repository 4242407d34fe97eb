"""Which tokens of an image are attention sinks whatever the image shows, measured on prompts.

A sink is detected in two ways. The first is its effect: the token gets far more attention from
later images than the other tokens of its image. The second is its known cause: massive activations,
very large values in a few hidden dimensions. Source of the latter: "See What You Are Told: Visual
Attention Sink" (ICLR 2025), with its formula and its tau. Reconstructions: that the dimensions are
those of the first token and of the delimiters of images, how much attention makes a sink, and in
how many images it must be one.

A static mask knows positions, not tokens. So the result is places: positions counted from either
end of an image that are sinks in at least half of the images. Tokens outside of images are always
visible in BlindSight's masks, so they are not searched.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.activations import over_root_mean_square
from tokenprune.masks.layout import PromptLayout

PLACES = 8
"""Places at either end of an image that are examined (reconstruction)."""

FACTOR = 10.0
"""A sink gets more than this times the mean attention of its image's tokens (reconstruction)."""

STABLE = 0.5
"""Share of the images in which a place must be a sink (reconstruction)."""

TAU = 20.0
"""From how many times the root mean square of a hidden state on an entry of it is massive."""


def massive_activations(states: Tensor, tau: float = TAU) -> Tensor:
    """Return the massive entries of one layer's hidden states.

    They are those of ``|x| * rsqrt(mean(x²) + 1e-6)``, in float32, that are above `tau`.

    Parameters
    ----------
    states
        [L, D], at a layer's input.
    tau
        See `TAU`. No entry can be above the root of D.

    Returns
    -------
    Tensor
        LongTensor [n, 2] on the CPU, token and dimension of each.
    """
    return (over_root_mean_square(states).abs() > tau).nonzero().cpu()


@dataclass(frozen=True)
class Sinks:
    """What was found in all prompts.

    Attributes
    ----------
    places
        The stable ones, either way found: 0 is an image's first token, -1 its last.
    attended
        Place -> share of the images in which it gets far more attention; the stable ones.
    attended_in
        How many images that was looked for in: those that others follow, of more tokens than
        `FACTOR`.
    massive
        Place -> share of the images in which its activations are massive; the stable ones.
    images
        How many images there were.
    dimensions
        Hidden dimensions in which the first token or a delimiter is massive.
    tokens, covered
        Image tokens that are massive in one of these, and how many of them lie at `places`.
    width
        D, of the hidden states.
    tau
        What they were compared with.
    """

    places: tuple[int, ...]
    attended: dict[int, float]
    attended_in: int
    massive: dict[int, float]
    images: int
    dimensions: tuple[int, ...]
    tokens: int
    covered: int
    width: int
    tau: float

    @property
    def can_be_massive(self) -> bool:
        """Whether a hidden state of this width can have an entry above `tau` at all."""
        return math.sqrt(self.width) > self.tau


class SinkSearch:
    """Collects what was seen, prompt by prompt.

    Parameters
    ----------
    width
        D, of the model's hidden states.
    tau
        See `TAU`.
    """

    def __init__(self, width: int, tau: float = TAU) -> None:
        self._width = width
        self._tau = tau
        self._attended: Counter[int] = Counter()
        self._attended_in = 0
        self._prompts: list[tuple[PromptLayout, Tensor]] = []
        self._dimensions: set[int] = set()

    def add(self, layout: PromptLayout, attention: Tensor, massive: Sequence[Tensor]) -> None:
        """Take in one prompt.

        Parameters
        ----------
        layout
            Of the prompt.
        attention
            float32 [L], what `tokenprune.masks.coverage.received` gave, summed over layers.
        massive
            What `massive_activations` gave for each layer.
        """
        for span in layout.images[:-1]:
            in_image = attention[span.start : span.stop]
            if len(span) <= FACTOR or not bool(in_image.any()):
                # No token can exceed so many times the mean, or no later image attends to this one.
                continue
            self._attended_in += 1
            sinks = (in_image > FACTOR * in_image.mean()).nonzero()[:, 0].tolist()
            self._attended.update(_places(sinks, len(span)))
        empty = torch.empty(0, 2, dtype=torch.int64)
        entries = torch.cat([empty, *massive]).unique(dim=0)
        of_image = layout.image_of
        # Where an image has a delimiter, it is the token just before or just behind it.
        edges = [position for span in layout.images for position in (span.start - 1, span.stop)]
        in_prompt = [position for position in (0, *edges) if 0 <= position < layout.length]
        marks = torch.tensor(sorted({position for position in in_prompt if of_image[position] < 0}))
        self._dimensions.update(entries[torch.isin(entries[:, 0], marks)][:, 1].tolist())
        self._prompts.append((layout, entries[of_image[entries[:, 0]] >= 0]))

    def result(self) -> Sinks:
        """Return what was found."""
        dimensions = torch.tensor(sorted(self._dimensions), dtype=torch.int64)
        votes: Counter[int] = Counter()
        tokens: list[tuple[int, int]] = []  # place from the start, size of the image
        for layout, entries in self._prompts:
            # Only now: dimensions of a later prompt count for the earlier ones too.
            in_dimensions = torch.isin(entries[:, 1], dimensions)
            massive_tokens = entries[in_dimensions][:, 0].unique().tolist()
            for span in layout.images:
                in_image = [
                    token - span.start
                    for token in massive_tokens
                    if span.start <= token < span.stop
                ]
                votes.update(_places(in_image, len(span)))
                tokens += [(place, len(span)) for place in in_image]
        images = sum(len(layout.images) for layout, _ in self._prompts)
        attended = _stable(self._attended, self._attended_in)
        massive = _stable(votes, images)
        places = set(attended) | set(massive)
        return Sinks(
            places=tuple(sorted(places, key=lambda place: (place < 0, place))),
            attended=attended,
            attended_in=self._attended_in,
            massive=massive,
            images=images,
            dimensions=tuple(sorted(self._dimensions)),
            tokens=len(tokens),
            covered=sum(place in places or place - size in places for place, size in tokens),
            width=self._width,
            tau=self._tau,
        )


def _places(tokens: Sequence[int], size: int) -> list[int]:
    """Return the tokens that stand near an end of their image, counted from that end."""
    named = [token if 2 * token < size else token - size for token in tokens]
    return [place for place in named if -PLACES <= place < PLACES]


def _stable(votes: Counter[int], images: int) -> dict[int, float]:
    return {
        place: votes[place] / images
        for place in sorted(votes, key=lambda place: (place < 0, place))
        if votes[place] >= STABLE * images
    }
