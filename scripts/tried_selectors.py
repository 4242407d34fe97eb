"""Selectors that tokenprune does not have: what else was tried.

`register_tried` makes them methods of this process, so that an evaluation runs them by name
(``compare_selectors.py``); `choosers` is what knows more than a method may. docs/selectors.md says
what came of it. Where nothing else is said, a selector is a function of the embeddings [B, N, D]
and the number of tokens that stay, K, to LongTensor [B, K], ascending.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenprune.budget import tokens_kept
from tokenprune.question.attention import QueryKeys, question_scores
from tokenprune.registry import register
from tokenprune.selecting import select
from tokenprune.selection import Selection
from tokenprune.selectors.base import Picks, Selector
from tokenprune.selectors.divprune import pick_diverse
from tokenprune.selectors.information import RelevantInformation
from tokenprune.selectors.layer_reading import LayerReading
from tokenprune.selectors.zeroth_order import ZerothOrder
from tokenprune.tokens import TokenBatch, VisualTokens
from tokenprune_eval.data.question import Question
from tokenprune_eval.demo.evidence import Oracle, evidence_mask
from tokenprune_eval.demo.preset import image_size
from tokenprune_eval.evaluation.choosing import random_draws
from tokenprune_eval.evaluation.engines.transformers import ChooseTokens
from tokenprune_eval.evaluation.runner import Planned

NOISE = 0.2
EXPONENT = 0.5
ORACLE = "oracle"
EVERY_READ = "relevant-information, every token read"

OfRows = Callable[[Tensor, int], Tensor]
OfRelevance = Callable[[Tensor, Tensor, int], Tensor]
"""Embeddings [B, N, D], their relevance [B, N], 1 on average, and K to LongTensor [B, K]."""

Words = Literal["last", "mean", "max"]
"""What counts of the attention: that of the prompt's last token, averaged over heads; or that of
all text behind the image, averaged or the maximum, over heads too."""


# --- as methods ---------------------------------------------------------------------------------


@cache
def register_readings() -> list[str]:
    """Register `readings`; return the names, `EVERY_READ` first."""
    found = readings()
    for selector in found:
        register(selector)
    return [selector.name for selector in found]


@cache
def register_tried(layers: int, reference: int) -> list[str]:
    """Register what was tried, for a language model of so many layers; return the names.

    Parameters
    ----------
    layers
        Of the language model, whose attention variants look at.
    reference
        Its reference layer.
    """
    tried = [*blind_variants(), *asked_variants(layers, reference)]
    for selector in tried:
        register(selector)
    return [selector.name for selector in tried]


def choosers(plan: Sequence[Planned]) -> dict[str, ChooseTokens]:
    """Return what chooses in place of a method, by condition: random draws, and the oracle."""
    oracle: dict[str, ChooseTokens] = {
        condition.key: partial(_keep_evidence_first, keep=condition.keep)
        for one in plan
        for condition in one.conditions
        if condition.method == ORACLE
    }
    return {**random_draws(plan), **oracle}


def _keep_evidence_first(
    question: Question, number: int, tokens: VisualTokens, *, keep: float
) -> Selection:
    """Keep the tokens where the answer is to be seen, then what `information` would.

    Not a method: it knows the boxes. Those are tokens of whose cell a tenth is in a box; where
    they are more than the budget, `information` chooses among them.
    """
    if tokens.embeddings is None:
        raise TypeError("an image was encoded without its embeddings")
    _, rows, columns = tokens.grid
    size = image_size(question.path)
    seen = evidence_mask(question.evidence, size, (rows, columns), covered=0.1)
    kernel = unusual_kernel(tokens.embeddings.float()[None])
    count = tokens_kept(keep, tokens.total)
    return select(tokens, Oracle(greedy(kernel, count, first=seen[None])), count)


def _selector(
    name: str,
    choose: Callable[[TokenBatch, int], Tensor],
    needs: tuple[str, ...] = ("embeddings",),
) -> type[Selector]:
    """Return a selector without options that chooses so."""
    return _subclass(
        Selector, name, needs=needs, select=lambda self, tokens, keep: Picks(choose(tokens, keep))
    )


def _subclass(base: type[Selector], name: str, **more: Any) -> type[Selector]:
    """Return a subclass under a name; fields of the base that are given get new defaults."""
    known = base.__annotations__
    fields = {field: known[field] for field in more if field in known}
    described = {"name": name, "summary": "tried, see docs/selectors.md", "__annotations__": fields}
    return dataclass(frozen=True)(type(name, (base,), {**described, **more}))


def _rows(tokens: TokenBatch) -> Tensor:
    return tokens.require("embeddings").float()


@dataclass(frozen=True)
class _Asked(LayerReading):
    """Choose by the embeddings and by what the question attends to at a layer."""

    needs: ClassVar[tuple[str, ...]] = ("query_attention", "embeddings")
    choose: ClassVar[OfRelevance]

    layer: int | None = None
    words: str = "last"

    def score_sets(self, tokens: TokenBatch, sets: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return each set's relevance, float32 [1, n], 1 on average."""
        given = tokens.require_query_attention()
        if isinstance(given, Tensor):
            raise TypeError("the model is read here, by an adapter's reader")
        found = []
        for keys in given.read(list(sets), self.layer, values=False, hidden=False):
            if self.words == "last":
                keys = QueryKeys(keys.query[:, -1:], keys.key, keys.visual, keys.scale)
            relevance = question_scores(keys, "max" if self.words == "max" else "mean")
            found.append((relevance / relevance.mean())[None])
        return found

    def pick_of_set(
        self, tokens: TokenBatch, members: Tensor, scores: Tensor, share: int
    ) -> Tensor:
        """Return LongTensor [1, share]."""
        return type(self).choose(_rows(tokens)[:, members], scores.double(), share)


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


def blind_variants() -> list[type[Selector]]:
    """Return what was tried without the question."""

    def weighed(choose: OfRelevance, weights: Callable[[Tensor], Tensor]) -> OfRows:
        return lambda rows, keep: choose(rows, weights(rows), keep)

    def informative(kernel: Callable[[Tensor], Tensor], noise: float = NOISE) -> OfRows:
        return lambda rows, keep: greedy(kernel(rows), keep, noise)

    def with_cls(power: float, tokens: TokenBatch, keep: int) -> Tensor:
        attention = tokens.require("cls_attention").double().reshape(tokens.size, -1, tokens.total)
        attention = attention.mean(dim=1)
        factor = (attention / attention.mean(dim=1, keepdim=True)) ** power
        own = scaled(_rows(tokens), EXPONENT) * factor[..., None]
        return greedy(own @ own.transpose(1, 2), keep)

    def with_sensitivity(power: float, tokens: TokenBatch, keep: int) -> Tensor:
        found = ZerothOrder().score(tokens).double()
        relative = found / found.mean(dim=1, keepdim=True)
        rows = _rows(tokens)
        kernel = scaled_kernel(rows, norm(rows.double()) * relative**power)
        return greedy(kernel, keep)

    def ones(rows: Tensor) -> Tensor:
        return torch.ones(rows.shape[:2])

    of_rows: dict[str, OfRows] = {
        "embedding norm alone": lambda rows, keep: highest(norm(rows), keep),
        "norm without the mean alone": lambda rows, keep: highest(contrast(rows), keep),
        "norm x cosine diversity": weighed(diverse, norm),
        "norm^2 x cosine diversity": weighed(diverse, lambda rows: norm(rows) ** 2),
        "norm without the mean x cosine diversity": weighed(diverse, contrast),
        "farthest first": weighed(farthest, ones),
        "norm without the mean x farthest first": weighed(farthest, contrast),
        "facility location": weighed(facility, ones),
        "facility location, norm without the mean": weighed(facility, contrast),
        "facility location, its square": weighed(facility, lambda rows: contrast(rows) ** 2),
        **{
            f"information, length^{exponent:g}": informative(
                partial(linear_kernel, exponent=exponent)
            )
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
            f"information, noise {noise:g}": informative(unusual_kernel, noise)
            for noise in (0.05, 0.1, 0.4, 1.0)
        },
        **{
            f"information, RBF kernel, tau {tau:g}": informative(
                partial(rbf_kernel, exponent=EXPONENT, tau=tau)
            )
            for tau in (0.3, 1.0, 3.0)
        },
        "information, given the mean token": given_mean,
        "information without the mean": informative(
            lambda rows: linear_kernel(centred(rows), EXPONENT)
        ),
    }
    sensitivity = ("embeddings", *ZerothOrder.needs)
    return [
        *(
            _selector(name, lambda tokens, keep, choose=choose: choose(_rows(tokens), keep))
            for name, choose in of_rows.items()
        ),
        *(
            _selector(
                f"information, length x sensitivity^{power:g}",
                partial(with_sensitivity, power),
                tuple(dict.fromkeys(sensitivity)),
            )
            for power in (1.0, 1.5, 2.0)
        ),
        *(
            _selector(
                f"information x CLS attention^{power:g}",
                partial(with_cls, power),
                ("embeddings", "cls_attention"),
            )
            for power in (0.25, 0.5)
        ),
    ]


def asked_variants(layers: int, reference: int) -> list[type[Selector]]:
    """Return what was tried with the question's attention; see `register_tried`."""

    def of(name: str, choose: OfRelevance, layer: int | None = None, words: Words = "last") -> Any:
        return _subclass(_Asked, name, choose=staticmethod(choose), layer=layer, words=words)

    def alone(rows: Tensor, found: Tensor, keep: int) -> Tensor:
        return highest(found, keep)

    def summed(rows: Tensor, found: Tensor, keep: int) -> Tensor:
        return diverse(rows, unit_range(found.float()) + unit_range(norm(rows)), keep)

    def unit_range(values: Tensor) -> Tensor:
        low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
        return (values - low) / (high - low)

    def weighed(
        weight: Callable[[Tensor], Tensor] = lambda r: 1 + r, noise: float = NOISE
    ) -> OfRelevance:
        def choose(rows: Tensor, found: Tensor, keep: int) -> Tensor:
            wide = scaled(rows, EXPONENT) * weight(found).sqrt()[..., None]
            return greedy(wide @ wide.transpose(1, 2), keep, noise)

        return choose

    weights: Mapping[str, Callable[[Tensor], Tensor]] = {
        "r": lambda r: r + 1e-12,
        "0.3 + r": lambda r: 0.3 + r,
        "3 + r": lambda r: 3 + r,
        "(1 + r)^0.5": lambda r: (1 + r).sqrt(),
        "(1 + r)^2": lambda r: (1 + r).square(),
    }
    relevant = "information, w = 1 + r"
    found = []
    for layer in range(layers):
        found.append(of(f"last token, mean of heads, layer {layer}, alone", alone, layer))
        found.append(of(f"all words, maximum, layer {layer}, alone", alone, layer, "max"))
    return [
        *found,
        of("(attention + norm) x cosine diversity", summed),
        *(of(f"information, w = {name}", weighed(weight)) for name, weight in weights.items()),
        *(of(f"{relevant}, noise {n:g}", weighed(noise=n)) for n in (0.05, 0.1, 0.4, 1.0)),
        of(f"{relevant}, mean of all words", weighed(), words="mean"),
        of(f"{relevant}, maximum of all words and heads", weighed(), words="max"),
        *(
            of(f"{relevant}, layer {layer}", weighed(), layer)
            for layer in range(layers)
            if layer != reference
        ),
    ]


def readings() -> list[type[Selector]]:
    """Return `relevant-information` with every token read, and with a share of any number."""
    return [
        _subclass(RelevantInformation, EVERY_READ, candidates=1.0),
        *(
            _subclass(
                RelevantInformation,
                f"relevant-information, {share} read",
                candidates=candidates,
                min_candidates=1,
            )
            for share, candidates in (("a quarter", 0.25), ("half", 0.5))
        ),
    ]
