"""Long videos in sets of frames: what FlexSelect and its trained selector share.

A set is every G-th frame, so that each set spans the whole video. Each is scored by itself. The
budget is split evenly over the sets, and the remainder goes to the first ones. Memory is that of
the sets scored at one time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.errors import OptionError
from tokenprune.selectors.base import Selector, top_k
from tokenprune.tokens import TokenBatch
from tokenprune.transfer import to_device


@dataclass(frozen=True)
class FrameSets(Selector):
    """Base of the methods that score a video in sets of frames; subclasses define `score_sets`.

    Parameters
    ----------
    frames_per_set
        The most frames that are scored together.
    sets_per_pass
        How many sets one pass of the scoring model may hold. More takes more memory, and pays
        where one set does not fill the device.
    """

    not_finite: ClassVar[str] = (
        "They come from the model: check the image, and the model's dtype (float16 overflows; "
        "bfloat16 or float32 do not)."
    )

    frames_per_set: int = 64
    sets_per_pass: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("frames_per_set", "sets_per_pass"):
            if getattr(self, option) < 1:
                raise OptionError(
                    f"option {option}={getattr(self, option)} of method {self.name!r} must be at "
                    "least 1."
                )

    def score_sets(self, tokens: TokenBatch, sets: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the scores of some sets, each higher for a token more worth keeping.

        Parameters
        ----------
        tokens
            B items of one shape.
        sets
            LongTensors [n]: the tokens of each set.

        Returns
        -------
        sequence of Tensor
            float32 [B, n] for each set.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define score_sets")

    def score(self, tokens: TokenBatch) -> Tensor:
        """Return float32 [B, N], each token's score in its own set."""
        sets = frame_sets(tokens.grid, self.frames_per_set)
        scores = torch.empty(tokens.size, tokens.total, dtype=torch.float32, device=tokens.device)
        for start in range(0, len(sets), self.sets_per_pass):
            in_pass = sets[start : start + self.sets_per_pass]
            of_sets = self.score_sets(tokens, in_pass)
            for members, of_set in zip(in_pass, of_sets, strict=True):
                scores[:, to_device(members, scores.device)] = of_set.to(scores.device)
        return scores

    def pick(self, tokens: TokenBatch, scores: Tensor, keep: int) -> Tensor:
        """Return the best tokens of each set, LongTensor [B, K], ascending."""
        return pick_in_sets(
            tokens.grid,
            self.frames_per_set,
            keep,
            scores.device,
            lambda members, share: self.pick_of_set(
                tokens, members, of_set(scores, members), share
            ),
        )

    def pick_of_set(
        self, tokens: TokenBatch, members: Tensor, scores: Tensor, share: int
    ) -> Tensor:
        """Return which of a set's tokens stay, LongTensor [B, share]: the highest, by default.

        Parameters
        ----------
        tokens
            B items of one shape.
        members
            LongTensor [n], the tokens of the set; see `of_set`.
        scores
            float32 [B, n], what `score_sets` returned for it.
        share
            How many stay, between 1 and n.
        """
        return top_k(scores, share)


def pick_in_sets(
    grid: tuple[int, int, int],
    frames_per_set: int,
    keep: int,
    device: torch.device,
    pick: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """Split the budget over the sets of frames and pick in each.

    Parameters
    ----------
    grid, frames_per_set
        See `frame_sets`.
    keep
        K, tokens to keep in all.
    device
        Where the tokens of the sets are wanted.
    pick
        Given the tokens of a set, LongTensor [n], and its share, returns which of the n stay,
        LongTensor [B, share], ascending.

    Returns
    -------
    Tensor
        LongTensor [B, K], ascending.
    """
    sets = frame_sets(grid, frames_per_set)
    if len(sets) == 1:
        return pick(sets[0], keep)
    of_sets = shares(keep, [len(members) for members in sets])
    sets = [to_device(members, device) for members in sets]
    picks = [
        members[pick(members, share)] for members, share in zip(sets, of_sets, strict=True) if share
    ]
    return torch.cat(picks, dim=1).sort(dim=1).values


def of_set(values: Tensor, members: Tensor) -> Tensor:
    """Return what belongs to the tokens of a set, [B, n, ...], out of values [B, N, ...].

    On a GPU nothing is copied for the only set there is.
    """
    if len(members) == values.shape[1]:
        return values
    return values[:, to_device(members, values.device)]


def frame_sets(grid: tuple[int, int, int], frames_per_set: int) -> list[Tensor]:
    """Return the tokens of each set of frames: set g has the frames g, g + G, g + 2G, ...

    Source: FlexSelect (arXiv 2506.00993), the released code; G = ceil(T / frames_per_set).

    Parameters
    ----------
    grid
        (T, R, W): frames, rows, columns.
    frames_per_set
        The most frames of a set.

    Returns
    -------
    list of Tensor
        G LongTensors, ascending; together each of the T * R * W tokens once.
    """
    frames, rows, columns = grid
    count = -(-frames // frames_per_set)
    tokens = torch.arange(frames * rows * columns, device="cpu").view(frames, rows * columns)
    return [tokens[first::count].flatten() for first in range(count)]


def shares(keep: int, sizes: Sequence[int]) -> list[int]:
    """Split a budget evenly over sets; the remainder goes to the first ones.

    A set with fewer tokens than its share keeps them all, and the others share the rest.

    Parameters
    ----------
    keep
        Tokens to keep in all, at most ``sum(sizes)``.
    sizes
        Tokens of each set.

    Returns
    -------
    list of int
        One share for each set; they add up to `keep`.
    """
    result = [0] * len(sizes)
    larger, left = list(range(len(sizes))), keep
    # A set that keeps all it has leaves more for each of the others, which may fill further ones.
    while full := [index for index in larger if sizes[index] <= left // len(larger)]:
        for index in full:
            result[index] = sizes[index]
            left -= sizes[index]
        larger = [index for index in larger if index not in full]
        if not larger:
            return result
    even, remainder = divmod(left, len(larger))
    for order, index in enumerate(larger):
        result[index] = even + (order < remainder)
    return result
