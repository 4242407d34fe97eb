"""What selects in ``compare_selectors.py``: methods, an oracle, and what else was tried.

`evs` and `vidcom2` are published methods for videos that tokenprune does not have:

- EVS (as in vLLM 0.32): the first frame's tokens, then those that are least like the token at the
  same place of the frame before, by cosine, of the whole video;
- VidCom2 (arXiv 2505.14454, the variant of its code: Gaussian similarity over the half of the
  channels that vary least, where the paper has plain cosines), with vLLM's exact reconciliation to
  the budget: where the frames' shares do not add up to it, the least or most distinctive tokens of
  the whole video are dropped or added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from compare_reading import MERGED, PLAIN, PROPORTIONAL, ROOT, Data, Model, Reading
from torch import Tensor
from torch.nn.functional import normalize

import tokenprune
from tokenprune.registry import build
from tokenprune.selectors.diversity import pick_diverse
from tokenprune.selectors.zeroth_order import ZerothOrder
from tokenprune.tokens import stack

BLIND = ("random", "uniform", "feature-norm", "cls-attention", "zeroth-order", "divprune")
VIDEO_BLIND = ("evs", "vidcom2")
READING = ("flexselect",)
OURS = {
    "information": (*BLIND, *VIDEO_BLIND),
    "relevant-information": (*BLIND, *VIDEO_BLIND, *READING),
}
"""Our methods, and what each is compared with."""

NOISE = 0.2
EXPONENT = 0.5

Chooser = Callable[[Model, Data, int], Tensor]
"""Returns LongTensor [Q, M, K], ascending."""


@dataclass(frozen=True)
class Entry:
    """A line of the tables: what selects, and how the selection is read."""

    choose: Chooser
    readings: tuple[Reading, ...] = (PLAIN, PROPORTIONAL)


def entries(model: Model, *, video: bool, boxes: bool, variants: bool) -> dict[str, Entry]:
    """Return what selects on a set, by name.

    Parameters
    ----------
    model
        Whose layers variants read.
    video
        Whether the set is of videos.
    boxes
        Whether it is known where the answers are to be seen.
    variants
        Whether to add what else was tried, too.
    """
    found = {name: Entry(method(name)) for name in BLIND}
    found["random"] = Entry(random_draws)
    if video:
        found |= {"evs": Entry(of_each(evs)), "vidcom2": Entry(of_each(vidcom2))}
    found |= {name: Entry(method(name)) for name in READING}
    every = (PLAIN, PROPORTIONAL, ROOT, MERGED) if variants else (PLAIN, PROPORTIONAL)
    found |= {name: Entry(method(name), every) for name in OURS}
    if boxes:
        found["oracle"] = Entry(oracle)
    if variants:
        tried = {**blind_variants(), **reading_variants(model)}
        found |= {name: Entry(choose) for name, choose in tried.items()}
    return found


# --- methods ------------------------------------------------------------------------------------


def method(name: str, **given: Any) -> Chooser:
    """Return a registered method."""
    selector = build(name, given)

    def choose(model: Model, data: Data, keep: int) -> Tensor:
        if "query_attention" not in selector.needs:
            chosen = tokenprune.select_many(data.items, selector, keep)
            return data.of_questions(torch.stack([one.kept for one in chosen]))
        layer = model.layer if given.get("layer") is None else int(given["layer"])
        asked = [item for n in range(len(data.question)) for item in data.asked(n, layer)]
        chosen = tokenprune.select_many(asked, selector, keep)
        return torch.stack([one.kept for one in chosen]).unflatten(0, (-1, data.media))

    return choose


def random_draws(model: Model, data: Data, keep: int) -> Tensor:
    """Draw anew for each image; the method itself keeps the same places of all."""
    start = data.first * data.media
    chosen = [
        tokenprune.select(item, "random", keep, seed=start + number)
        for number, item in enumerate(data.items)
    ]
    return data.of_questions(torch.stack([one.kept for one in chosen]))


def of_each(choose: Callable[[Tensor, int], Tensor]) -> Chooser:
    """Return what selects for one video after the other, from its embeddings [T, n, D]."""

    def chooser(model: Model, data: Data, keep: int) -> Tensor:
        frames = data.rows.unflatten(1, (data.items[0].grid[0], -1))
        return data.of_questions(torch.stack([choose(one, keep) for one in frames]))

    return chooser


def evs(frames: Tensor, keep: int) -> Tensor:
    """Return LongTensor [K], ascending, of a video [T, n, D]; see the module."""
    unit = normalize(frames, dim=-1)
    change = 1 - (unit[1:] * unit[:-1]).sum(dim=-1)
    # The first frame is above every change, which is 2 at most.
    scores = torch.cat([torch.full_like(frames[:1, :, 0], 255.0), change]).flatten()
    return scores.argsort(descending=True, stable=True)[:keep].sort().values


def vidcom2(frames: Tensor, keep: int) -> Tensor:
    """Return LongTensor [K], ascending, of a video [T, n, D]; see the module."""
    count, per_frame, width = frames.shape
    variance = frames.flatten(0, 1).var(dim=0, unbiased=False)
    channels = variance.argsort(stable=True)[: max(1, width // 2)]
    unit = normalize(frames[..., channels], dim=-1)

    def likeness(centre: Tensor) -> Tensor:
        distance = (unit - centre).square().sum(dim=-1)
        return torch.stack([(-distance / (2 * 2.0**a)).exp() for a in range(-3, 2)]).sum(dim=0)

    to_video = likeness(unit.mean(dim=(0, 1), keepdim=True))
    common = to_video + likeness(unit.mean(dim=1, keepdim=True))
    distinct = -to_video.mean(dim=1)
    share = ((distinct - distinct.max()) / 0.01).softmax(dim=0)
    rate = (keep / (count * per_frame) * (1 + share - share.mean())).clamp(max=1.0)
    shares = (rate * per_frame).round().long().clamp(1, per_frame)
    # Place of each token in its frame's order, the most distinctive first.
    place = common.argsort(dim=1, stable=True).argsort(dim=1)
    taken = (place < shares[:, None]).flatten()
    scores = common.flatten()
    # Those taken come before all others, each by score: the budget cuts the worst of them off, or
    # goes on with the best of the others.
    order = scores.argsort(stable=True)
    order = torch.cat([order[taken[order]], order[~taken[order]]])
    return order[:keep].sort().values


def oracle(model: Model, data: Data, keep: int) -> Tensor:
    """Keep the tokens where the answer is to be seen, then what `information` would.

    Not a method: it knows the boxes. Those are tokens of whose cell a tenth is in a box; where
    they are more than the budget, `information` chooses among them.
    """
    (_, rows, columns) = data.items[0].grid
    seen = torch.stack([overlap(boxes, rows, columns, data.side) for boxes in data.evidence])
    kernel = unusual_kernel(data.rows)[data.prompt]
    return greedy(kernel, keep, first=seen > 0.1)[:, None]


def overlap(
    boxes: Sequence[tuple[int, int, int, int]], rows: int, columns: int, side: int
) -> Tensor:
    """Return the share of each token's cell that lies in a box, the largest over boxes, [N]."""

    def along(low: int, high: int, count: int) -> Tensor:
        edges = torch.arange(count + 1) * (side / count)
        inside = edges[1:].clamp(max=high) - edges[:-1].clamp(min=low)
        return inside.clamp(min=0) / (side / count)

    shares = [
        along(top, bottom, rows)[:, None] * along(left, right, columns)
        for left, top, right, bottom in boxes
    ]
    return torch.stack(shares).amax(dim=0).flatten()


# --- what variants are made of ------------------------------------------------------------------


def greedy(
    kernel: Tensor,
    keep: int,
    noise: float = NOISE,
    *,
    first: Tensor | None = None,
    observed: Tensor | None = None,
) -> Tensor:
    """Take the token with most variance left, one after another, given those taken.

    The method `information` on any kernel, as an independent calculation.

    Parameters
    ----------
    kernel
        float64 [B, N, N].
    keep
        K.
    noise
        As a multiple of the tokens' mean variance.
    first
        BoolTensor [B, N]: tokens that come before all others.
    observed
        [B, N + 1], what has been seen before any token is taken: its covariance with each, and its
        own variance.

    Returns
    -------
    Tensor
        LongTensor [B, K], ascending.
    """
    variance = torch.diagonal(kernel, dim1=1, dim2=2).clone()
    level = (noise * variance.mean(dim=1)).clamp_min(1e-12)
    item = torch.arange(len(kernel))
    taken = torch.zeros(variance.shape, dtype=torch.bool)
    factor: list[Tensor] = []
    kept: list[Tensor] = []
    if observed is not None:
        factor.append(observed[:, :-1] / (observed[:, -1] + level).sqrt()[:, None])
        variance = (variance - factor[0].square()).clamp_min(0)
    for _ in range(keep):
        score = variance.masked_fill(taken, -1)
        if first is not None:
            score = score + first * ~taken * (2 * variance.amax() + 1)
        pick = score.argmax(dim=1)
        kept.append(pick)
        taken[item, pick] = True
        column = kernel[item, pick].clone()
        for row in factor:
            column -= row * row[item, pick][:, None]
        factor.append(column / (variance[item, pick] + level).sqrt()[:, None])
        variance = (variance - factor[-1].square()).clamp_min(0)
    return torch.stack(kept, dim=1).sort(dim=1).values


def scaled(rows: Tensor, exponent: float) -> Tensor:
    """Return float64 rows whose lengths are those of `rows` to the power `exponent`."""
    wide = rows.double()
    return wide * wide.norm(dim=-1, keepdim=True).clamp_min(1e-12) ** (exponent - 1)


def linear_kernel(rows: Tensor, exponent: float) -> Tensor:
    """Cosine times the lengths to the power `exponent`; [B, N, N]."""
    return scaled_kernel(rows, norm(rows.double()) ** (2 * exponent))


def scaled_kernel(rows: Tensor, variances: Tensor) -> Tensor:
    """Cosine times the square roots of these variances [B, N]."""
    own = normalize(rows.double(), dim=-1) * variances.double().sqrt()[..., None]
    return own @ own.transpose(1, 2)


def unusual_kernel(rows: Tensor, factor: float = 1.0) -> Tensor:
    """Cosine times lengths and distances from the mean; `information`'s own where factor is 1."""
    return scaled_kernel(rows, norm(rows.double()) + factor * contrast(rows.double()))


def rbf_kernel(rows: Tensor, exponent: float, tau: float) -> Tensor:
    """exp(-(1 - cosine) / (tau * its mean)) times the lengths to the power `exponent`."""
    unit = normalize(rows.double(), dim=-1)
    distance = 1 - unit @ unit.transpose(1, 2)
    length = rows.double().norm(dim=-1) ** exponent
    kernel = (-distance / (tau * distance.mean(dim=(1, 2), keepdim=True))).exp()
    return kernel * length[:, :, None] * length[:, None, :]


def given_mean(rows: Tensor, keep: int) -> Tensor:
    """`information` where the mean token has been seen before any is taken."""
    own = scaled(rows, EXPONENT)
    mean = own.mean(dim=1, keepdim=True)
    observed = (torch.cat([own, mean], dim=1) * mean).sum(dim=-1)
    return greedy(own @ own.transpose(1, 2), keep, observed=observed)


def norm(rows: Tensor) -> Tensor:
    """Length of each row."""
    return rows.norm(dim=-1)


def centred(rows: Tensor) -> Tensor:
    """Return each item's rows without their mean."""
    return rows - rows.mean(dim=1, keepdim=True)


def contrast(rows: Tensor) -> Tensor:
    """Length of each row without the mean."""
    return norm(centred(rows))


def highest(scores: Tensor, keep: int) -> Tensor:
    """Return the indices of the highest scores, ascending."""
    return scores.topk(keep, dim=1).indices.sort(dim=1).values


def farthest(rows: Tensor, weights: Tensor, keep: int) -> Tensor:
    """Farthest-first traversal by Euclidean distance, times a weight."""
    item = torch.arange(len(rows))
    pick = contrast(rows).argmax(dim=1)
    kept = [pick]
    nearest = torch.full(rows.shape[:2], math.inf)
    for _ in range(keep - 1):
        nearest = nearest.minimum((rows - rows[item, pick][:, None]).norm(dim=-1))
        score = weights * nearest
        score[item[:, None], torch.stack(kept, 1)] = -1
        pick = score.argmax(dim=1)
        kept.append(pick)
    return torch.stack(kept, dim=1).sort(dim=1).values


def facility(rows: Tensor, weights: Tensor, keep: int) -> Tensor:
    """Facility location: the weighted sum over tokens of the cosine to the nearest kept one."""
    unit = normalize(rows, dim=-1)
    likeness = unit @ unit.transpose(1, 2)
    covered = torch.full(rows.shape[:2], -1.0)
    kept: list[Tensor] = []
    item = torch.arange(len(rows))
    for _ in range(keep):
        gain = ((likeness - covered[:, :, None]).clamp(min=0) * weights[:, :, None]).sum(dim=1)
        if kept:
            gain[item[:, None], torch.stack(kept, 1)] = -1
        kept.append(gain.argmax(dim=1))
        covered = covered.maximum(likeness[item, :, kept[-1]])
    return torch.stack(kept, dim=1).sort(dim=1).values


def diverse(rows: Tensor, weights: Tensor, keep: int) -> Tensor:
    """Cosine diversity from the token of most weight on, times a weight."""
    return pick_diverse(rows, keep, weights, weights.argmax(dim=1))


# --- what was tried -----------------------------------------------------------------------------


def blind_variants() -> dict[str, Chooser]:
    """Return what was tried without the question."""

    def of(choose: Callable[[Tensor, int], Tensor]) -> Chooser:
        return lambda model, data, keep: data.of_questions(choose(data.rows, keep))

    def weighed(
        choose: Callable[[Tensor, Tensor, int], Tensor], weights: Callable[[Tensor], Tensor]
    ) -> Chooser:
        return of(lambda rows, keep: choose(rows, weights(rows), keep))

    def informative(kernel: Callable[[Tensor], Tensor], noise: float = NOISE) -> Chooser:
        return of(lambda rows, keep: greedy(kernel(rows), keep, noise))

    def lengths(exponent: float, noise: float = NOISE) -> Chooser:
        return informative(lambda rows: linear_kernel(rows, exponent), noise)

    def radial(tau: float) -> Chooser:
        return informative(lambda rows: rbf_kernel(rows, EXPONENT, tau))

    def with_cls(power: float) -> Chooser:
        def choose(model: Model, data: Data, keep: int) -> Tensor:
            seen = [one.cls_attention for one in data.items if one.cls_attention is not None]
            attention = torch.stack([one.double().reshape(-1, data.tokens).mean(0) for one in seen])
            factor = (attention / attention.mean(dim=1, keepdim=True)) ** power
            own = scaled(data.rows, EXPONENT) * factor[..., None]
            return data.of_questions(greedy(own @ own.transpose(1, 2), keep))

        return choose

    def ones(rows: Tensor) -> Tensor:
        return torch.ones(rows.shape[:2])

    def with_sensitivity(power: float) -> Chooser:
        zeroth_order = ZerothOrder()

        def choose(model: Model, data: Data, keep: int) -> Tensor:
            found = zeroth_order.score(stack(data.items, zeroth_order.needs)).double()
            relative = found / found.mean(dim=1, keepdim=True)
            kernel = scaled_kernel(data.rows, norm(data.rows.double()) * relative**power)
            return data.of_questions(greedy(kernel, keep))

        return choose

    return {
        "embedding norm alone": of(lambda rows, keep: highest(norm(rows), keep)),
        "norm without the mean alone": of(lambda rows, keep: highest(contrast(rows), keep)),
        "norm x cosine diversity": weighed(diverse, norm),
        "norm^2 x cosine diversity": weighed(diverse, lambda rows: norm(rows) ** 2),
        "norm without the mean x cosine diversity": weighed(diverse, contrast),
        "farthest first": weighed(farthest, ones),
        "norm without the mean x farthest first": weighed(farthest, contrast),
        "facility location": weighed(facility, ones),
        "facility location, norm without the mean": weighed(facility, contrast),
        "facility location, its square": weighed(facility, lambda rows: contrast(rows) ** 2),
        **{
            f"information, length^{exponent:g}": lengths(exponent)
            for exponent in (0.0, 0.25, 0.5, 0.75, 1.0)
        },
        **{
            f"information, length + {factor:g} x distance": informative(
                partial(unusual_kernel, factor=factor)
            )
            for factor in (0.5, 2.0)
        },
        "information, distance from the mean alone": informative(
            lambda rows: scaled_kernel(rows, contrast(rows))
        ),
        "information, length x distance": informative(
            lambda rows: scaled_kernel(rows, norm(rows) * contrast(rows))
        ),
        **{
            f"information, length x sensitivity^{power:g}": with_sensitivity(power)
            for power in (1.0, 1.5, 2.0)
        },
        **{
            f"information, noise {noise:g}": informative(unusual_kernel, noise)
            for noise in (0.05, 0.1, 0.4, 1.0)
        },
        **{f"information, RBF kernel, tau {tau:g}": radial(tau) for tau in (0.3, 1.0, 3.0)},
        "information, given the mean token": of(given_mean),
        "information without the mean": of(
            lambda rows, keep: greedy(linear_kernel(centred(rows), EXPONENT), keep)
        ),
        "information x CLS attention^0.25": with_cls(0.25),
        "information x CLS attention^0.5": with_cls(0.5),
    }


@dataclass(frozen=True)
class Relevance:
    """How a question's attention becomes one number for each token.

    Attributes
    ----------
    layer
        Of the language model.
    words
        ``"last"``, the prompt's last token; or all behind the image, ``"mean"`` or ``"max"``.
    heads
        ``"mean"`` or ``"max"``.
    """

    layer: int
    words: str = "last"
    heads: str = "mean"

    def of(self, data: Data) -> Tensor:
        """Return float64 [Q, M, N], 1 on average over an item's tokens."""
        place = data.layers.index(self.layer)
        found = torch.stack(
            [torch.stack([self._reduce(one[place]) for one in own]) for own in data.attention]
        )
        return found / found.mean(dim=-1, keepdim=True)

    def _reduce(self, attention: Tensor) -> Tensor:
        """[H, q, N] -> [N]."""
        wide = attention.double()
        rows = wide.amax(dim=0) if self.heads == "max" else wide.mean(dim=0)
        if self.words == "last":
            return rows[-1]
        return rows.amax(dim=0) if self.words == "max" else rows.mean(dim=0)


def reading_variants(model: Model) -> dict[str, Chooser]:
    """Return what was tried with the question's attention."""
    own = Relevance(model.layer)

    def each(relevance: Relevance, choose: Callable[[Tensor, Tensor, int], Tensor]) -> Chooser:
        """Select from each question's rows [B, N, D] and their relevance [B, N]."""

        def chooser(model: Model, data: Data, keep: int) -> Tensor:
            found = relevance.of(data).flatten(0, 1)
            rows = data.of_questions(data.rows).flatten(0, 1)
            parts = torch.arange(len(rows)).split(512)
            kept = torch.cat([choose(rows[part], found[part], keep) for part in parts])
            return kept.unflatten(0, (-1, data.media))

        return chooser

    def alone(relevance: Relevance) -> Chooser:
        return each(relevance, lambda rows, found, keep: highest(found, keep))

    def weighed(
        weight: Callable[[Tensor], Tensor] = lambda r: 1 + r,
        relevance: Relevance = own,
        noise: float = NOISE,
    ) -> Chooser:
        def choose(rows: Tensor, found: Tensor, keep: int) -> Tensor:
            wide = scaled(rows, EXPONENT) * weight(found).sqrt()[..., None]
            return greedy(wide @ wide.transpose(1, 2), keep, noise)

        return each(relevance, choose)

    def summed(rows: Tensor, found: Tensor, keep: int) -> Tensor:
        return diverse(rows, unit_range(found.float()) + unit_range(norm(rows)), keep)

    def unit_range(values: Tensor) -> Tensor:
        low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
        return (values - low) / (high - low)

    found: dict[str, Chooser] = {}
    for layer in range(model.layers):
        found[f"last token, mean of heads, layer {layer}, alone"] = alone(Relevance(layer))
        found[f"all words, maximum, layer {layer}, alone"] = alone(Relevance(layer, "max", "max"))
    found |= {
        "(attention + norm) x cosine diversity": each(own, summed),
        "information, w = r": weighed(lambda r: r + 1e-12),
        "information, w = 0.3 + r": weighed(lambda r: 0.3 + r),
        "information, w = 3 + r": weighed(lambda r: 3 + r),
        "information, w = (1 + r)^0.5": weighed(lambda r: (1 + r).sqrt()),
        "information, w = (1 + r)^2": weighed(lambda r: (1 + r).square()),
        **{
            f"information, w = 1 + r, noise {noise:g}": weighed(noise=noise)
            for noise in (0.05, 0.1, 0.4, 1.0)
        },
        "information, w = 1 + r, mean of all words": weighed(
            relevance=Relevance(model.layer, "mean")
        ),
        "information, w = 1 + r, maximum of all words and heads": weighed(
            relevance=Relevance(model.layer, "max", "max")
        ),
    }
    for layer in range(model.layers):
        if layer != model.layer:
            found[f"information, w = 1 + r, layer {layer}"] = weighed(relevance=Relevance(layer))
    return {
        **found,
        "relevant-information, a quarter read": method("relevant-information", candidates=0.25),
        "relevant-information, half read": method("relevant-information", candidates=0.5),
    }
