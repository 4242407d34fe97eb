"""The share of a head's attention inside each of BlindSight's masks, and the head's category.

Every head is measured on a few prompts with q and k of the plain model. On one prompt, a head's
category is the sparsest mask that holds a given share of its attention; all prompts together decide
on its final category (`Thresholds`). Source: BlindSight (arXiv 2507.09071) names these two steps;
formulas and numbers are a reconstruction.

Only *contested* queries are measured: image tokens of the second and later images. Text attends to
everything in every mask, and within the first image ``intra`` and ``dense`` are the same, so such
queries do not tell heads apart; they would only raise all coverages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.errors import ConfigError, LayoutError, TokensError
from tokenprune.masks.heads import Thresholds
from tokenprune.masks.layout import PromptLayout
from tokenprune.masks.mask import BLOCK, Causal, Mask
from tokenprune.masks.patterns import CATEGORIES, Category, category_mask
from tokenprune.numerics import full_precision

ALPHA = 0.9
"""Share of the attention that a mask must hold (reconstruction): at most a tenth is lost."""

DENSE, SINK, INTRA = 0.25, 0.75, 0.75
"""Shares of the prompts (reconstruction). A wrong mask costs accuracy and a dense head only time.
Therefore a head gets a sparse category only if it fits on three prompts of four."""

_NUMBERS_AT_ONCE = 2**24  # float32 attention that exists at one time (64 MiB)


def coverage(
    query: Tensor,
    key: Tensor,
    layout: PromptLayout,
    *,
    scale: float | None = None,
    model: Mask | None = None,
) -> Tensor:
    """Return the share of each head's attention that lies inside each category's mask.

    It is the mean over the contested queries. Computed in float32 and for a few queries at a time.

    Parameters
    ----------
    query
        [H, L, d], after the rotary embedding.
    key
        [G, L, d], after the rotary embedding; H is a multiple of G.
    layout
        Of the prompt, sinks included.
    scale
        Factor on q kᵀ; d ** -0.5 where it is left out.
    model
        What the model's own mask lets through; None for `Causal`.

    Returns
    -------
    Tensor
        float32 [H, 4] on the CPU, in the order of `CATEGORIES`; ``dense`` is 1 by definition.

    Raises
    ------
    LayoutError
        If the prompt has fewer than two images, or is not as long as q and k.
    TokensError
        If the attention is not finite.
    """
    model_mask = Causal(layout.length) if model is None else model
    contested = _contested(layout)
    device = query.device
    sparse = CATEGORIES[:-1]
    masks = [category_mask(layout, category, model_mask).to(device) for category in sparse]
    keys = torch.arange(layout.length, device=device)
    head = torch.zeros(1, dtype=torch.int64, device=device)
    # Masks of categories are the same for all heads, so one head is enough to ask them.
    held = torch.zeros(len(query), len(CATEGORIES), dtype=torch.float32, device=device)
    for queries, attention in _attention(query, key, model_mask, contested, scale):
        for number, mask in enumerate(masks):
            # One product sums over queries and keys, and makes no copy of the attention.
            allowed = mask.allowed(head, queries[:, None], keys[None])
            held[:, number] += attention.flatten(1) @ allowed.flatten().float()
    held /= len(contested)
    held[:, -1] = 1.0
    return _finite(held).cpu()


def received(
    query: Tensor,
    key: Tensor,
    layout: PromptLayout,
    *,
    scale: float | None = None,
    model: Mask | None = None,
) -> Tensor:
    """Return how much attention each image token gets from the images behind its own.

    All tokens of an image are seen by the same queries then, so that they can be compared, and
    only attention across images is what masks take away.

    Parameters
    ----------
    query, key, layout, scale, model
        As for `coverage`; sinks of the layout do not matter.

    Returns
    -------
    Tensor
        float32 [L] on the CPU, the sum over heads and queries; 0 for text and the last image.

    Raises
    ------
    LayoutError, TokensError
        As for `coverage`.
    """
    model_mask = Causal(layout.length) if model is None else model
    image = layout.image_of.to(query.device)
    result = torch.zeros(layout.length, dtype=torch.float32, device=query.device)
    for queries, attention in _attention(query, key, model_mask, _contested(layout), scale):
        # Text has image -1, which is below every image's number.
        earlier = (image >= 0) & (image[queries][:, None] > image)
        result += (attention.sum(dim=0) * earlier).sum(dim=0)
    return _finite(result).cpu()


def _contested(layout: PromptLayout) -> Tensor:
    """Return LongTensor, the image tokens of the second and later images."""
    if len(layout.images) < 2:
        raise LayoutError(
            f"a prompt with {len(layout.images)} image(s) cannot calibrate heads: what they do "
            "between images does not show. Give prompts of two or more images."
        )
    return (layout.image_of > 0).nonzero()[:, 0]


def _attention(
    query: Tensor, key: Tensor, model_mask: Mask, wanted: Tensor, scale: float | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield positions [n] of some queries at a time, and their attention float32 [H, n, L]."""
    heads, length, size = query.shape
    groups = len(key)
    if {length, key.shape[1]} != {model_mask.length} or heads % groups:
        raise LayoutError(
            f"queries of {heads} heads and {length} tokens and keys of {groups} heads and "
            f"{key.shape[1]} tokens do not fit a prompt of {model_mask.length} tokens. Give q and "
            "k of the whole prompt, with a multiple of the key heads."
        )
    scale = size**-0.5 if scale is None else scale
    device = query.device
    # Masks answer for broadcast indices, so heads, queries and keys each get an axis.
    keys = torch.arange(length, device=device)
    head = torch.arange(model_mask.heads, device=device)[:, None, None]
    model_mask = model_mask.to(device)
    with full_precision(device):
        all_keys = key.float()
        for queries in wanted.to(device).split(max(1, _NUMBERS_AT_ONCE // (heads * length))):
            # Heads side by side for each key head, so that keys need not be repeated.
            some = query[:, queries].float().unflatten(0, (groups, -1))
            logits = (torch.einsum("ghqd,gld->ghql", some, all_keys) * scale).flatten(0, 1)
            allowed = model_mask.allowed(head, queries[:, None], keys[None])
            yield queries, logits.masked_fill_(~allowed, float("-inf")).softmax(dim=-1)


def _finite(values: Tensor) -> Tensor:
    if not bool(values.isfinite().all()):
        raise TokensError(
            "the attention holds NaN or infinite values. Check the model's dtype (float16 "
            "overflows; bfloat16 or float32 do not)."
        )
    return values


def densities(layout: PromptLayout, model: Mask | None = None, block: int = BLOCK) -> Tensor:
    """Return the share of the causal blocks that each category's mask computes.

    Parameters
    ----------
    layout
        Of the prompt, sinks included.
    model
        What the model's own mask lets through; None for `Causal`.
    block
        Queries, and keys, of a block.

    Returns
    -------
    Tensor
        float64 [4], in the order of `CATEGORIES`.
    """
    shares = [category_mask(layout, category, model).density(block) for category in CATEGORIES]
    return torch.tensor(shares, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class PromptCoverage:
    """What was measured on one prompt.

    Attributes
    ----------
    held
        float32 [layers, H, 4]: `coverage` of each layer.
    density
        float64 [layers, 4]: `densities` of each layer.
    """

    held: Tensor
    density: Tensor

    def labels(self, alpha: Sequence[float]) -> Tensor:
        """Return each head's category on this prompt.

        It is the sparsest whose mask holds the share `alpha` of the attention, by density on this
        prompt, and of equally dense ones the first in `CATEGORIES`: ``sink`` does not lie within
        ``intra``, and comes first. Where none does it is ``dense``.

        Parameters
        ----------
        alpha
            For each layer.

        Returns
        -------
        Tensor
            LongTensor [layers, H] into `CATEGORIES`.
        """
        # In float64: alpha as a float32 could lie above a share that equals it.
        least = torch.tensor(list(alpha), dtype=torch.float64)[:, None, None]
        enough = self.held.double() >= least
        enough[..., -1] = True  # dense
        # Categories from the sparsest on; the first that holds enough, put back into its number.
        order = self.density.argsort(dim=-1, stable=True)[:, None].expand_as(enough)
        first = enough.gather(-1, order).int().argmax(dim=-1, keepdim=True)
        return order.gather(-1, first)[..., 0]


def thresholds(
    layers: int,
    alpha: float | Sequence[float] = ALPHA,
    *,
    dense: float = DENSE,
    sink: float = SINK,
    intra: float = INTRA,
) -> Thresholds:
    """Return thresholds for a model. All defaults, and the straight line, are reconstructions.

    Parameters
    ----------
    layers
        Of the model.
    alpha
        One share for all layers, or those of the first and the last layer with a straight line
        between them: the paper has a fixed schedule for one model and a linear one for another.
    dense, sink, intra
        See `Thresholds`.

    Raises
    ------
    ConfigError
        If a share is not above 0 (`dense`: not 0 or above) and at most 1.
    """
    ends = [alpha] if isinstance(alpha, int | float) else list(alpha)
    if len(ends) not in (1, 2):
        raise ConfigError(
            f"alpha={ends} has {len(ends)} numbers. Give one for all layers, or two: of the first "
            "and of the last layer."
        )
    for name, share in (*(("alpha", share) for share in ends), ("sink", sink), ("intra", intra)):
        if not 0 < share <= 1:
            raise ConfigError(f"{name}={share} is no share. Give more than 0 and at most 1.")
    if not 0 <= dense <= 1:
        raise ConfigError(f"dense={dense} is no share. Give 0 to 1.")
    first, last = float(ends[0]), float(ends[-1])
    steps = max(1, layers - 1)
    line = tuple(first + (last - first) * number / steps for number in range(layers))
    return Thresholds(alpha=line, dense=float(dense), sink=float(sink), intra=float(intra))


def categories_of(
    prompts: Sequence[PromptCoverage], limits: Thresholds
) -> tuple[tuple[Category, ...], ...]:
    """Return each head's category, for each layer, from all prompts together.

    Parameters
    ----------
    prompts
        At least one, of one model.
    limits
        See `Thresholds` for the rule.

    Raises
    ------
    LayoutError
        If there is no prompt, or there are not as many alphas as layers.
    """
    if not prompts or len(limits.alpha) != len(prompts[0].held):
        layers = len(prompts[0].held) if prompts else "no"
        raise LayoutError(
            f"{len(prompts)} prompts of {layers} layers were measured, and there are "
            f"{len(limits.alpha)} alphas. Give at least one prompt, and an alpha for every layer."
        )
    labels = torch.stack([prompt.labels(limits.alpha) for prompt in prompts])  # [P, layers, H]
    shares = {
        category: (labels == number).sum(dim=0).double() / len(prompts)
        for number, category in enumerate(CATEGORIES)
    }
    # From the last rule to the first, so that the first one that holds has the last word.
    numbers = torch.full_like(labels[0], CATEGORIES.index("intra+sink"))
    numbers[shares["intra"] >= limits.intra] = CATEGORIES.index("intra")
    numbers[shares["sink"] >= limits.sink] = CATEGORIES.index("sink")
    numbers[shares["dense"] > limits.dense] = CATEGORIES.index("dense")
    return tuple(tuple(CATEGORIES[number] for number in layer) for layer in numbers.tolist())


def expected_density(
    prompts: Sequence[PromptCoverage], categories: Sequence[Sequence[Category]]
) -> float:
    """Return the share of the causal blocks that heads of these categories compute.

    The mean over the prompts, the layers and the heads: of ``heads_mask(...).density(block)``.

    Parameters
    ----------
    prompts
        What was measured.
    categories
        For each layer, each head's.
    """
    chosen = torch.tensor(
        [[CATEGORIES.index(category) for category in layer] for layer in categories]
    )
    means = torch.stack([prompt.density for prompt in prompts]).mean(dim=0)  # [layers, 4]
    return float(means.gather(1, chosen).mean())
