"""information, relevant-information: keep the tokens that predict the others best.

tokenprune's own methods, one blind to the question and one that reads it. Both take the set S of
tokens that maximises ``log det(I + K_S / σ²)``, K being how alike the tokens are that the language
model would read: the information that S holds about a linear model of the image.
docs/selectors.md has the idea, what else was tried, and where it loses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.budget import tokens_kept
from tokenprune.errors import OptionError
from tokenprune.numerics import folded_sum
from tokenprune.question.attention import QueryKeys, question_scores
from tokenprune.selectors.base import Picks, Selector
from tokenprune.selectors.diversity import IntegerRows
from tokenprune.selectors.frame_sets import pick_in_sets
from tokenprune.selectors.layer_reading import LayerReading
from tokenprune.tokens import TokenBatch

_OUR_OWN = "none: tokenprune's own, see `tokenprune docs selectors`"
_AHEAD = 11  # tokens whose products are computed before it is known that they are taken
_ENTRIES = 2**26  # float64 entries held at once: 512 MiB, unless a single item needs more


@dataclass(frozen=True)
class Information(Selector):
    """Keep tokens with large or distinctive embeddings that the other kept ones do not predict.

    Greedy maximum of ``log det(I + K_S / σ²)`` over sets S of the projected tokens E [N, D], with
    ``K_ij = cos(e_i, e_j) * sqrt(v_i v_j)`` and ``σ² = noise * mean_i v_i``: each step takes the
    token with most variance left, given those taken. A token's own variance v_i is its length plus
    its distance from the mean token (`deviations`); in a video, its length times 1 + how much it
    changed since the frame before (`changes`). The objective is monotone and submodular, so the
    greedy set reaches at least 1 - 1/e of the best one's; the sets of growing size are nested. A
    method of tokenprune's own, see docs/selectors.md; the objective is that of Bayesian D-optimal
    design and of determinantal point processes.

    O(K * N * (D + K)) time, so linear in N, and O(N * (D + K)) memory.

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
    paper: ClassVar[str] = _OUR_OWN
    needs: ClassVar[tuple[str, ...]] = ("embeddings",)

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
        embeddings = tokens.require("embeddings")

        def pick(members: Tensor, share: int) -> Tensor:
            frames = _frames(tokens, members)
            return pick_informative(embeddings[:, members], share, self.noise, frames=frames)

        return Picks(pick_in_sets(tokens.grid, self.frames_per_set, keep, embeddings.device, pick))


@dataclass(frozen=True)
class RelevantInformation(LayerReading):
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
        keep. Reading costs that share of what it would; the others weigh 1. It should be a few
        times the share that is kept: where it is no larger, the question chooses next to nothing.
    """

    name: ClassVar[str] = "relevant-information"
    summary: ClassVar[str] = "information about what the end of the prompt attends to"
    paper: ClassVar[str] = _OUR_OWN
    needs: ClassVar[tuple[str, ...]] = ("query_attention", "embeddings")

    noise: float = 0.2
    candidates: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_noise(self.name, self.noise)
        if not 0 < self.candidates <= 1:
            raise OptionError(
                f"option candidates={self.candidates!r} of method {self.name!r} must be above 0 "
                "and at most 1.0, which reads every token."
            )

    def score_sets(self, tokens: TokenBatch, sets: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return each set's weights, ``1 + r / mean r``; see the class."""
        given = tokens.require_query_attention()
        embeddings = tokens.require("embeddings")
        candidates = [self._candidates(tokens, members.to(embeddings.device)) for members in sets]
        if isinstance(given, Tensor):
            last = given[:, :, -1].float()
            by_head = [last[..., members.to(given.device)] for members in sets]
            attention = [
                (folded_sum(heads, dim=1) / heads.shape[1]).gather(1, read)
                for heads, read in zip(by_head, candidates, strict=True)
            ]
        else:
            # A reader is of one item.
            read_sets = [
                members[read[0].to(members.device)]
                for members, read in zip(sets, candidates, strict=True)
            ]
            keys_of_sets = given.read(read_sets, self.layer, values=False, hidden=False)
            attention = [
                question_scores(_of_last_token(keys), "mean")[None] for keys in keys_of_sets
            ]
        weights = []
        for members, read, looked_at in zip(sets, candidates, attention, strict=True):
            # 1, the weight of the average token, for those that were not read.
            weight = looked_at.new_ones(len(looked_at), len(members))
            weights.append(weight.scatter_(1, read.to(weight.device), _weights(looked_at)))
        return weights

    def _candidates(self, tokens: TokenBatch, members: Tensor) -> Tensor:
        """Return LongTensor [B, c], ascending: which of a set's tokens are read."""
        count = tokens_kept(self.candidates, len(members))
        rows = tokens.require("embeddings")[:, members]
        return pick_informative(rows, count, self.noise, frames=_frames(tokens, members))

    def pick_of_set(
        self, tokens: TokenBatch, members: Tensor, scores: Tensor, share: int
    ) -> Tensor:
        """Return LongTensor [B, share]."""
        embeddings = tokens.require("embeddings")
        rows = embeddings[:, members.to(embeddings.device)]
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


def _of_last_token(seen: QueryKeys) -> QueryKeys:
    """Return the same with the last of the question's tokens alone."""
    return QueryKeys(seen.query[:, -1:], seen.key, seen.visual, seen.scale)


def _weights(attention: Tensor) -> Tensor:
    """[B, n] -> 1 + r / mean r, float32 [B, n]; all 1 if no token gets attention."""
    mean = folded_sum(attention, dim=1)[:, None] / attention.shape[1]
    return 1.0 + attention / mean.masked_fill(mean == 0, 1.0)


def pick_informative(
    embeddings: Tensor,
    keep: int,
    noise: float = 0.2,
    weights: Tensor | None = None,
    frames: int = 1,
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
        K, between 1 and N.
    noise
        σ² as a multiple of the mean variance; above 0.
    weights
        Floating point [B, N], above 0: a token's variance as a multiple of its length. None for 1,
        to which `deviations` are added in an image. In a video `changes` are added to either.
    frames
        How many frames the tokens are of, one after another.

    Returns
    -------
    Tensor
        LongTensor [B, K], ascending.
    """
    size, total, width = embeddings.shape
    if keep == total:
        every = torch.arange(total, dtype=torch.int64, device=embeddings.device)
        return every.expand(size, -1)
    step = max(1, _ENTRIES // (total * (2 * width + keep)))
    kept = []
    for start in range(0, size, step):
        items = slice(start, start + step)
        rows = IntegerRows.from_embeddings(embeddings[items])
        # ||row|| ** -0.5 makes squared lengths lengths; 0 where the row is.
        factors = rows.squared_norms().sqrt().sqrt().reciprocal()
        factors.masked_fill_(factors.isinf(), 0.0)
        multiple = torch.ones_like(factors)
        if weights is not None:
            multiple = weights[items].to(factors.device, torch.float64)
        if frames > 1:
            multiple = multiple + changes(rows, frames)
        elif weights is None:
            multiple = multiple + deviations(rows)
        # Variances are squares of what the rows are multiplied by.
        factors *= multiple.sqrt()
        kept.append(_greedy(rows, factors, keep, noise))
    return torch.cat(kept).sort(dim=-1).values


def deviations(rows: IntegerRows) -> Tensor:
    """Return how far each token is from the mean token, as a multiple of its own length.

    Parameters
    ----------
    rows
        Of B items, N tokens each.

    Returns
    -------
    Tensor
        float64 [B, N]; 0 for a token without length.
    """
    total = rows.rows.shape[1]
    mean = folded_sum(rows.rows * rows.scales[..., None], dim=1) / total
    # As whole numbers, so that products with it are exact too.
    centre = IntegerRows.from_embeddings(mean[:, None])
    products = torch.bmm(rows.rows, centre.rows.transpose(1, 2)).squeeze(-1)
    products *= rows.scales * centre.scales
    squared = rows.squared_norms()
    # ||e||² - 2 e·m + ||m||², which is exact but for the last roundings; those may fall below 0.
    distances = (squared - 2.0 * products + centre.squared_norms()).clamp_(min=0.0).sqrt()
    inverse = squared.sqrt().reciprocal()
    return distances * inverse.masked_fill(inverse.isinf(), 0.0)


def changes(rows: IntegerRows, frames: int) -> Tensor:
    """Return how much tokens changed since the frame before, as a multiple of the mean.

    A change is 1 - the cosine to the token at the same place one frame before. The first frame has
    the mean.

    Parameters
    ----------
    rows
        Of B videos, N tokens each.
    frames
        T, at least 2; N is a multiple of it.

    Returns
    -------
    Tensor
        float64 [B, N]; 1 everywhere where nothing changes at all.
    """
    per_frame = rows.rows.shape[1] // frames
    before, after = rows.rows[:, :-per_frame], rows.rows[:, per_frame:]
    inverse = rows.inverse_norms
    norms = inverse[:, :-per_frame] * inverse[:, per_frame:]
    # Products of whole numbers: exact, so `vecdot` may add them in any order.
    cosine = torch.linalg.vecdot(before, after) * norms
    change = (1.0 - cosine).clamp_(min=0.0)
    mean = folded_sum(change, dim=1)[:, None] / change.shape[1]
    change = torch.where(mean == 0, 1.0, change / mean.masked_fill(mean == 0, 1.0))
    return torch.nn.functional.pad(change, (per_frame, 0), value=1.0)


def _greedy(rows: IntegerRows, factors: Tensor, keep: int, noise: float) -> Tensor:
    """Return LongTensor [B, K] in the order taken; row i is multiplied by `factors` [B, N].

    The gain of a token is ``log(1 + variance left / σ²)``, which grows with the variance left, so
    the token of largest variance is the greedy choice. The variances are those of the tokens given
    the ones taken: a pivoted Cholesky factorisation of ``K + σ² I`` has them on its diagonal, and
    adds a row of its factor for each token taken.
    """
    variance = rows.squared_norms() * factors.square()
    size, total = variance.shape
    level = folded_sum(variance, dim=1) * (noise / total)
    # All rows are zero: nothing is divided by 0, and ties go to the lowest index.
    level = level.masked_fill(level == 0, 1.0)
    taken = torch.zeros_like(variance, dtype=torch.bool)
    item = torch.arange(size, dtype=torch.int64, device=variance.device)
    kept = torch.empty(size, keep, dtype=torch.int64, device=variance.device)
    # The rows of the Cholesky factor that belong to the tokens taken, over all tokens.
    triangle = torch.empty(keep, size, total, dtype=torch.float64, device=variance.device)
    # Reading all rows for a product is what takes the time. So each reading also makes the products
    # of the tokens that may be next, those of most variance now; it does not change the choice.
    known = kept[:, :0]
    products = triangle.new_empty(size, 0, total)
    for step in range(keep):
        left = variance.masked_fill(taken, -math.inf)
        # torch.argmax gives the first of equal values.
        pick = left.argmax(dim=-1)
        kept[:, step] = pick
        taken.scatter_(1, pick[:, None], True)
        if step + 1 == keep:
            break
        if not bool((known == pick[:, None]).any(dim=1).all()):
            likely = left.topk(min(_AHEAD, total), dim=-1).indices
            known = torch.cat([pick[:, None], likely], dim=1)
            products = rows.products_with(known)
        # Where the pick is among the known ones; argmax of bools is not on every device.
        column = (known == pick[:, None]).byte().argmax(dim=1)
        covariance = products[item, column] * factors * factors[item, pick, None]
        if step:
            earlier = triangle[:step]
            # Folded, as a matrix product would add in an order that the batch decides.
            covariance -= folded_sum(earlier * earlier[:, item, pick, None], dim=0)
        scale = (variance[item, pick] + level).sqrt()
        triangle[step] = covariance / scale[:, None]
        variance = (variance - triangle[step].square()).clamp_(min=0.0)
    return kept
