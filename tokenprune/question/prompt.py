"""The prompt in which a set of an item's tokens is read together with the question.

A set is read as if it was the whole video: all of the prompt's text stands around it, text inside
the video (time stamps, frame numbers) comes with its frame, and positions are counted afresh. Where
only some tokens of a set are read, the others are taken out of that prompt, and those that are left
keep their positions, as in a pruned prompt.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import PromptError


@dataclass(frozen=True, eq=False)
class SetPrompt:
    """The prompt of one set.

    Attributes
    ----------
    ids
        LongTensor [L]; what stands at visual columns does not count.
    visual
        LongTensor [V], the columns of visual tokens, ascending.
    sources
        LongTensor [V], what goes there: below N a token of the item, from N on a loose one.
    asked
        LongTensor [n], the columns of the set's own tokens, in the set's order.
    questions
        Q; the question is the last Q tokens.
    whole
        The prompt of all the set's tokens, where some were taken out of this one; None otherwise.
    columns
        LongTensor [L], where in `whole` each of these tokens stands; None where that is None.
    """

    ids: Tensor
    visual: Tensor
    sources: Tensor
    asked: Tensor
    questions: int
    whole: SetPrompt | None = None
    columns: Tensor | None = None

    @property
    def is_visual(self) -> Tensor:
        """BoolTensor [L]."""
        mask = torch.zeros_like(self.ids, dtype=torch.bool)
        mask[self.visual] = True
        return mask

    def only(self, read: Tensor) -> SetPrompt:
        """Return this prompt without the set's tokens that are not read.

        Parameters
        ----------
        read
            LongTensor [r], ascending: which of the set's n tokens stay, counted in the set.
        """
        stays = torch.ones_like(self.ids, dtype=torch.bool)
        stays[self.asked] = False
        stays[self.asked[read]] = True
        columns = stays.nonzero()[:, 0]
        place = stays.cumsum(dim=0) - 1  # where each column that stays comes to stand
        left = stays[self.visual]
        return replace(
            self,
            ids=self.ids[columns],
            visual=place[self.visual[left]],
            sources=self.sources[left],
            asked=place[self.asked[read]],
            whole=self,
            columns=columns,
        )


def no_text_behind(label: str) -> PromptError:
    """Return the error for an item that ends its prompt, and is ranked by what comes after it."""
    return PromptError(
        f"{label}: no text comes after it, and this method ranks its tokens by the text that does. "
        "Put the question after the image or video, or make the prompt with "
        "add_generation_prompt=True."
    )


class ItemPrompt:
    """One image's or video's part in a prompt.

    Parameters
    ----------
    ids
        LongTensor [L], the prompt without padding or with it.
    text
        LongTensor, the columns of text, ascending.
    columns
        LongTensor [N], the columns of the item's tokens, ascending.
    loose
        LongTensor [M], columns that are filled by the encoder and belong to no token of the item,
        such as newlines; they stay wherever they stand inside the item or just behind it.
    grid
        (T, R, W) of the item.
    label
        What to call it in an error.

    Attributes
    ----------
    question
        LongTensor [Q], the ids of the text after the item.

    Raises
    ------
    PromptError
        If no text comes after the item.
    """

    def __init__(
        self,
        ids: Tensor,
        text: Tensor,
        columns: Tensor,
        loose: Tensor,
        grid: tuple[int, int, int],
        label: str,
    ) -> None:
        self._ids = ids
        self._columns = columns
        self._loose = loose
        self._per_frame = grid[1] * grid[2]
        first, last = int(columns[0]), int(columns[-1])
        self._after = text[text > last]
        if not len(self._after):
            raise no_text_behind(label)
        self.question = ids[self._after]
        self._before = text[text < first]
        # Text inside a video is about the frame that comes next.
        self._labels = text[(text > first) & (text < last)]
        self._label_frames = torch.searchsorted(columns, self._labels) // self._per_frame

    def of_set(self, tokens: Tensor, read: Tensor | None = None) -> SetPrompt:
        """Return the prompt that holds some of the item's tokens and all of the text.

        Parameters
        ----------
        tokens
            LongTensor [n], ascending.
        read
            LongTensor [r], ascending: which of those n are read; None for all of them.
        """
        if read is not None and len(read) < len(tokens):
            return self.of_set(tokens).only(read.to(self._ids.device))
        tokens = tokens.to(self._ids.device)
        frames = torch.unique(tokens // self._per_frame)
        labels = self._labels[torch.isin(self._label_frames, frames)]
        text = torch.cat([self._before, labels, self._after])
        columns, order = torch.cat([text, self._columns[tokens], self._loose]).sort()
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        loose = torch.arange(len(self._loose), device=order.device) + len(self._columns)
        visual, by_place = place[len(text) :].sort()
        return SetPrompt(
            ids=self._ids[columns],
            visual=visual,
            sources=torch.cat([tokens, loose])[by_place],
            asked=place[len(text) : len(text) + len(tokens)],
            questions=len(self._after),
        )


@dataclass(frozen=True)
class Marks:
    """Ids of a model's vocabulary that are no words of a user.

    Attributes
    ----------
    ends
        Those that end a turn or a text.
    others
        Those around images and videos, of padding, and so on.
    """

    ends: frozenset[int]
    others: frozenset[int]

    @classmethod
    def of(cls, config: Any, generation_ends: Any = None) -> Marks:
        """Return the ids that a model's config names (``..._token_id``).

        Parameters
        ----------
        config
            Of transformers' kind.
        generation_ends
            The generation config's ``eos_token_id``: an id, several, or None.
        """
        found: dict[bool, set[int]] = {True: set(), False: set()}
        named = [config.to_dict(), config.get_text_config().to_dict()]
        pairs = [pair for one in named for pair in one.items() if pair[0].endswith("_token_id")]
        for name, value in [*pairs, ("eos_token_id", generation_ends)]:
            several = value if isinstance(value, list | tuple) else [value]
            ids = {one for one in several if isinstance(one, int) and not isinstance(one, bool)}
            found[name == "eos_token_id"] |= ids
        return cls(frozenset(found[True]), frozenset(found[False] - found[True]))

    def users_text(self, ids: Tensor) -> Tensor:
        """Return what the user says after an item: the last turn that is over, without marks.

        What stands behind its end is the chat template's. Where no turn ends, as in templates whose
        marks are words, it is all of the text.

        Parameters
        ----------
        ids
            LongTensor [Q] on the CPU, the text after an item.

        Returns
        -------
        LongTensor
            [Q'], at least one; all of `ids` if nothing but marks is left.
        """
        given = ids.tolist()
        places = [place for place, one in enumerate(given) if one in self.ends]
        turns = [
            [one for one in given[start:stop] if one not in self.others]
            for start, stop in itertools.pairwise([0, *(place + 1 for place in places)])
        ]
        spoken = [turn[:-1] for turn in turns if len(turn) > 1]
        if not places:
            spoken = [[one for one in given if one not in self.others]]
        words = spoken[-1] if spoken else []
        return torch.tensor(words or given, dtype=torch.int64, device=ids.device)


def loose_rows(columns: Tensor, rows: Tensor, taken: Tensor) -> Tensor:
    """Return the rows that belong to no item and stand inside one, or just behind it: newlines.

    Parameters
    ----------
    columns
        LongTensor [R], where in the prompt each of the encoder's rows stands.
    rows
        LongTensor [N], the item's, in the order of the prompt.
    taken
        BoolTensor [R], rows of any item, or of another prompt.

    Returns
    -------
    Tensor
        LongTensor [M].
    """
    own = columns[rows]
    near = (columns > own[0]) & (columns <= own[-1] + 1)
    return (near & ~taken).nonzero()[:, 0]


def positions_on_axes(is_visual: Tensor, grid: tuple[int, int, int], interval: int = 1) -> Tensor:
    """Return the positions that models with M-RoPE give to a prompt with one image or video.

    Text counts on on all axes; an unbroken run of visual tokens counts its frames, rows and columns
    from there, and the next text begins one behind the furthest of them. Source: Qwen2-VL
    (arXiv 2409.12191), section 2.1.

    Parameters
    ----------
    is_visual
        BoolTensor [L]; each run of visual tokens is made of whole frames.
    grid
        (T, R, W); only R and W are looked at.
    interval
        Steps on the first axis from one frame to the next.

    Returns
    -------
    Tensor
        LongTensor [3, L].
    """
    _, rows, columns = grid
    per_frame = rows * columns
    values, sizes = torch.unique_consecutive(is_visual, return_counts=True)
    parts = []
    start = 0
    for visual, size in zip(values.tolist(), sizes.tolist(), strict=True):
        steps = torch.arange(size, device=is_visual.device)
        if visual:
            cell = steps % per_frame
            axes = [steps // per_frame * interval, cell // columns, cell % columns]
            part = torch.stack(axes)
        else:
            part = steps.expand(3, -1)
        parts.append(part + start)
        start += int(part.max()) + 1
    return torch.cat(parts, dim=1)


def counted_interval(
    positions: Tensor, is_visual: Tensor, grid: tuple[int, int, int]
) -> int | None:
    """Return the interval with which `positions_on_axes` counts an item as its model counts it.

    So a model that nobody described can be read: where its own positions of a whole image or video
    are those of the paper, a set of its frames is counted likewise. Frames may have times of their
    own, which sets do not keep; their interval is the mean one.

    Parameters
    ----------
    positions
        LongTensor [3, L], the model's own: from an item's first token to its last, or one behind.
    is_visual
        BoolTensor [L], which of them are the item's tokens; the others are text.
    grid
        (T, R, W) of the item.

    Returns
    -------
    int or None
        Steps on the first axis from one frame to the next; None where the model counts otherwise.
    """
    _, rows, columns = grid
    per_frame = rows * columns
    values, sizes = torch.unique_consecutive(is_visual.cpu(), return_counts=True)
    # The device is named because a default device may be set.
    cell = torch.arange(per_frame, device="cpu")
    sides = torch.stack([cell // columns, cell % columns])[:, None]
    intervals: list[int] = []
    start = int(positions[0, 0])
    for visual, run in zip(values.tolist(), positions.cpu().split(sizes.tolist(), 1), strict=True):
        counted = run - start
        start = int(run.max()) + 1
        if not visual:
            steps = torch.arange(run.shape[1], device="cpu")
            if not torch.equal(counted, steps.expand_as(counted)):
                return None
            continue
        if run.shape[1] % per_frame:
            return None
        times, *on_sides = counted.unflatten(1, (-1, per_frame))
        steps = times[:, 0].diff()
        whole = bool((times == times[:, :1]).all()) and int(times[0, 0]) == 0
        forward = bool((steps >= 0).all())
        if not (whole and forward and bool((torch.stack(on_sides) == sides).all())):
            return None
        intervals += steps.tolist()
    return round(sum(intervals) / len(intervals)) if intervals else 1
