"""information, relevant-information: keep the tokens that predict the others best.

tokenprune's own methods, one blind to the question and one that reads it. Both take the set S of
tokens that maximises ``log det(I + K_S / σ²)``, K being how alike the tokens are that the language
model would read: the information that S holds about a linear model of the image.
docs/selectors.md has the idea, what else was tried, and where it loses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokenprune.budget import tokens_kept
from tokenprune.errors import OptionError
from tokenprune.greedy.engine import Some, folded_sum, pick
from tokenprune.greedy.items import Items
from tokenprune.question.attention import QueryKeys, question_scores
from tokenprune.representation import representatives
from tokenprune.selectors.base import ByPlace, Picks
from tokenprune.selectors.frame_sets import of_set, pick_in_sets, shares
from tokenprune.selectors.layer_reading import LayerReading
from tokenprune.selectors.token_vectors import TokenVectors
from tokenprune.tokens import TokenBatch
from tokenprune.transfer import to_device, to_host

_OUR_OWN = "none: tokenprune's own, see `tokenprune docs selectors`"
_GROUP = 2048  # tokens of which candidates are chosen together, at most


@dataclass(frozen=True)
class Information(TokenVectors):
    """Keep tokens with large or distinctive embeddings that the other kept ones do not predict.

    Greedy maximum of ``log det(I + K_S / σ²)`` over sets S of the projected tokens E [N, D], with
    ``K_ij = cos(e_i, e_j) * sqrt(v_i v_j)`` and ``σ² = noise * mean_i v_i``: each step takes the
    token with most variance left, given those taken. A token's own variance v_i is its length plus
    its distance from the mean token (`IntegerRows.deviations`); in a video, its length times
    1 + how much it changed since the frame before (`IntegerRows.changes`). The objective is
    monotone and submodular, so the greedy set reaches at least 1 - 1/e of the best one's; the sets
    of growing size are nested. A method of tokenprune's own, see docs/selectors.md; the objective
    is that of Bayesian D-optimal design and of determinantal point processes.

    O(K * N * (D + K)) time, so linear in N, and O(N * (D + K)) memory; on a GPU all products of up
    to 4,096 tokens are held as well.

    Parameters
    ----------
    noise
        σ² as a multiple of the tokens' mean variance. Towards 0 a token is worth only what lies
        outside the span of those taken; a large one takes those of most variance first.
    frames_per_set
        The most frames of a video that are weighed against each other. Longer ones are split into
        sets, every G-th frame one set, with an equal share of the budget each.
    """

    name: ClassVar[str] = "information"
    summary: ClassVar[str] = "large or distinctive embeddings that other tokens do not predict"
    takes_sizes: ClassVar[bool] = True
    paper: ClassVar[str] = _OUR_OWN
    needs: ClassVar[tuple[str, ...]] = ("embeddings",)
    by_place: ClassVar[ByPlace] = "frame"

    noise: float = 0.2
    frames_per_set: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_noise(self.name, self.noise)
        if self.frames_per_set < 1:
            raise OptionError(
                f"option frames_per_set={self.frames_per_set} of method {self.name!r} must be at "
                "least 1."
            )

    def select(self, tokens: TokenBatch, keep: int) -> Picks:
        """Return LongTensor [B, K], ascending; there are no scores."""
        vectors = self.vectors(tokens)

        def pick(members: Tensor, share: int) -> Tensor:
            frames = _frames(tokens, members)
            rows = of_set(vectors, members)
            return pick_informative(rows, share, self.noise, frames=frames)

        return Picks(pick_in_sets(tokens.grid, self.frames_per_set, keep, vectors.device, pick))

    def select_sizes(self, tokens: TokenBatch, keeps: Sequence[int]) -> Picks:
        """Return LongTensor [B, max(keeps)]; there are no scores."""
        grids = tokens.grids or (tokens.grid,) * tokens.size
        if all(frames == 1 for frames, _, _ in grids):
            rows = self.vectors(tokens)
            return Picks(pick_informative(rows, keeps, self.noise, sizes=tokens.sizes))
        # Videos have sets and changes of their own.
        alone = (self.select(tokens.alone(index), keep) for index, keep in enumerate(keeps))
        return Picks(pad_sequence([picks.kept[0] for picks in alone], batch_first=True))


@dataclass(frozen=True)
class RelevantInformation(LayerReading, TokenVectors):
    """Keep the tokens with most information about what the question attends to.

    As `Information`, and a token's variance is its length times ``1 + r_i / mean r``, in a video
    times that plus the change since the frame before. r_i is the attention that the prompt's last
    token, the one that the answer's first word is read from, pays to token i at the reference
    layer, averaged over heads. So a token with average attention has twice its length, and
    a token without any still counts.
    A method of tokenprune's own, see docs/selectors.md. What is read, and its cost, are those of
    `FlexSelect`.

    Parameters
    ----------
    layer
        The reference layer, see `FlexSelect`.
    noise
        See `Information`.
    candidates
        Share of each set's tokens that is read with the question: those that `Information` would
        keep. They are read at their positions in the prompt of the whole set. Any other token has
        the weight of the read one that it is most similar to. 1.0 reads every token, at up to five
        times the cost.
    min_candidates
        How many of a set's tokens are read at least. Reading fewer saves next to no time: a prompt
        of a few dozen tokens takes about as long as a shorter one.
    """

    name: ClassVar[str] = "relevant-information"
    summary: ClassVar[str] = "information about what the end of the prompt attends to"
    paper: ClassVar[str] = _OUR_OWN
    needs: ClassVar[tuple[str, ...]] = ("query_attention", "embeddings")
    by_place: ClassVar[ByPlace] = "frame"

    noise: float = 0.2
    candidates: float = 0.2
    min_candidates: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_noise(self.name, self.noise)
        if not 0 < self.candidates <= 1:
            raise OptionError(
                f"option candidates={self.candidates!r} of method {self.name!r} must be above 0 "
                "and at most 1.0, which reads every token."
            )
        if self.min_candidates < 1:
            raise OptionError(
                f"option min_candidates={self.min_candidates} of method {self.name!r} must be at "
                "least 1."
            )

    def score_sets(self, tokens: TokenBatch, sets: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return each set's weights, ``1 + r / mean r``; see the class."""
        given = tokens.require_query_attention()
        vectors = self.vectors(tokens)
        there = [to_device(members, vectors.device) for members in sets]
        chosen = [self._candidates(tokens, members) for members in there]
        candidates = [read for read, _ in chosen]
        if isinstance(given, Tensor):
            last = given[:, :, -1].float()
            by_head = [last[..., to_device(members, given.device)] for members in sets]
            attention = [
                (folded_sum(heads, dim=1) / heads.shape[1]).gather(1, read)
                for heads, read in zip(by_head, candidates, strict=True)
            ]
        else:
            # A reader is of one item. Its prompts are made on the host, where it is known what is
            # read if that is all.
            whole = all(
                read.shape[1] == len(members)
                for read, members in zip(candidates, sets, strict=True)
            )
            keys_of_sets = given.read(
                list(sets),
                self.layer,
                values=False,
                hidden=False,
                among=None if whole else to_host([read[0] for read in candidates]),
            )
            attention = [
                question_scores(_of_last_token(keys), "mean")[None] for keys in keys_of_sets
            ]
        weights = []
        for (read, standing), looked_at in zip(chosen, attention, strict=True):
            weight = looked_at.new_zeros(standing.shape)
            weight.scatter_(1, read.to(weight.device), _weights(looked_at))
            weights.append(weight.gather(1, standing.to(weight.device)))
        return weights

    def _candidates(self, tokens: TokenBatch, members: Tensor) -> tuple[Tensor, Tensor]:
        """Return which of a set's tokens are read, and which of those stands for each token.

        Returns
        -------
        read
            LongTensor [B, c], ascending.
        standing
            LongTensor [B, n]; a token that is read stands for itself.
        """
        total, frames = len(members), _frames(tokens, members)
        rows = of_set(self.vectors(tokens), members)
        count = max(tokens_kept(self.candidates, total), min(self.min_candidates, total))
        every = torch.arange(total, device=rows.device)
        if count == total:
            return (every.expand(len(rows), -1),) * 2
        # A share of the tokens of a large set is many: in groups, time and memory stay linear.
        groups = _groups(every, frames)
        standing = torch.empty_like(every).repeat(len(rows), 1)
        read = []
        for group, share in zip(groups, shares(count, list(map(len, groups))), strict=True):
            of_group = rows[:, group]
            # Groups of one image's tokens are a part of its frame.
            of_frames = 1 if frames == 1 else _frames(tokens, members[group])
            picked = pick_informative(of_group, share, self.noise, frames=of_frames)
            read.append(group[picked])
            standing[:, group] = read[-1].gather(1, representatives(of_group, picked))
        return torch.cat(read, dim=1).sort(dim=1).values, standing

    def pick_of_set(
        self, tokens: TokenBatch, members: Tensor, scores: Tensor, share: int
    ) -> Tensor:
        """Return LongTensor [B, share]."""
        rows = of_set(self.vectors(tokens), members)
        return pick_informative(rows, share, self.noise, scores, _frames(tokens, members))


def _check_noise(method: str, noise: float) -> None:
    if not noise > 0:
        raise OptionError(
            f"option noise={noise!r} of method {method!r} must be above 0; the default is 0.2."
        )


def _frames(tokens: TokenBatch, members: Tensor) -> int:
    """Return how many frames a set of tokens has."""
    _, rows, columns = tokens.grid
    return len(members) // (rows * columns)


def _groups(every: Tensor, frames: int) -> list[Tensor]:
    """Split the tokens of a set [n] into groups that each span all of it, of whole frames."""
    count = -(-len(every) // _GROUP)
    if frames == 1:
        return [every[first::count] for first in range(count)]
    by_frame = every.view(frames, -1)
    count = min(count, frames)
    return [by_frame[first::count].flatten() for first in range(count)]


def _of_last_token(seen: QueryKeys) -> QueryKeys:
    """Return the same with the last of the question's tokens alone."""
    return QueryKeys(seen.query[:, -1:], seen.key, seen.visual, seen.scale)


def _weights(attention: Tensor) -> Tensor:
    """[B, n] -> 1 + r / mean r, float32 [B, n]; all 1 if no token gets attention."""
    mean = folded_sum(attention, dim=1)[:, None] / attention.shape[1]
    return 1.0 + attention / mean.masked_fill(mean == 0, 1.0)


def pick_informative(
    embeddings: Tensor,
    keep: int | Sequence[int],
    noise: float = 0.2,
    weights: Tensor | None = None,
    frames: int = 1,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """Take `keep` tokens of each item: always the one with most variance left.

    Every number comes out of exact products (see `IntegerRows`), elementwise operations and sums
    of a fixed order, so it is the same in any batch and on any device. The lowest index wins a
    tie.

    Parameters
    ----------
    embeddings
        Floating point [B, N, D].
    keep
        K of all items or of each, between 1 and N.
    noise
        σ² as a multiple of the mean variance; above 0.
    weights
        Floating point [B, N], above 0: a token's variance as a multiple of its length. None for 1,
        to which `IntegerRows.deviations` are added in an image. In a video `IntegerRows.changes`
        are added to either.
    frames
        How many frames the tokens are of, one after another.
    sizes
        How many tokens each item has of its own, if not N; for images alone.

    Returns
    -------
    Tensor
        LongTensor [B, K], ascending; 0 behind an item's own K.
    """
    per_frame = embeddings.shape[1] // frames

    def choose(items: Items, some: Some) -> Tensor:
        multiple = None if weights is None else weights[some].to(embeddings.device, torch.float64)
        if frames > 1:
            changes = items.changes(per_frame)
            multiple = 1.0 + changes if multiple is None else multiple + changes
        elif multiple is None:
            multiple = items.deviating()
        return items.most_variance(multiple, noise)

    return pick(embeddings, keep, choose, sizes)
