"""What a selector is: a frozen dataclass whose fields are its options, with `score` or `select`.

A method that ranks tokens one by one defines `score`; one that weighs scored tokens against each
other defines `pick` too, and one without scores defines `select`. Either way exactly `keep` tokens
come back, ascending, and ties go to the lowest index.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tokenprune.errors import SelectorError, did_you_mean
from tokenprune.merging import Merge
from tokenprune.selectors.options import check_options, with_options
from tokenprune.tokens import INPUTS, Projector, TokenBatch, VisualTokens
from tokenprune.transfer import to_device

ByPlace = Literal["", "frame", "place"]
"""What of a token's place a method looks at; see `Selector.by_place`."""


@dataclass(frozen=True)
class Picks:
    """What a selector returns for B items.

    Attributes
    ----------
    kept
        LongTensor [B, K], ascending in each row.
    scores
        float32 [B, N], or None where the method has no score per token.
    merges
        For each item which tokens are added to which kept ones, or None; None where the method
        merges nothing. What an item of which everything stays has here is left out.
    """

    kept: Tensor
    scores: Tensor | None = None
    merges: Sequence[Merge | None] | None = None


@dataclass(frozen=True)
class Selector:
    """Base class of every selector: subclass it as a frozen dataclass with the options as fields.

    Class attributes
    ----------------
    name
        What users write: ``method="cls-attention"``.
    summary
        What it selects by, in one line.
    paper
        Title and arXiv number, or where else the method comes from; "" for a baseline.
    needs
        Names out of `tokenprune.tokens.INPUTS`; adapters gather only these. Those of an object may
        be others, where what it looks at is an option.
    optional
        Likewise, for what the method uses where a caller gives it; no adapter gathers it.
    of_place
        Whether the choice also depends on an item's index in its batch, for example because scores
        were prepared for known items. No method should need it. An item that comes several times
        is then selected from each time.
    merges
        Where it adds tokens to kept ones, ``"features"`` or ``"embeddings"``, or "" where it does
        not; see `Picks.merges`. Features that are added up go through the projector.
    by_place
        What of a token's place is part of the method, so that exact copies are not
        interchangeable: ``"frame"`` where it compares frames, ``"place"`` for anything else (an
        even grid, runs of the raster, neighbours); "" for nothing.
    for_videos
        Whether the method compares a video's frames and has nothing of its own to say about a
        single image, of which it also takes as many tokens as are asked for.
    needs_picture
        Whether the method uses neighbours in the grid; items that are no picture are refused.
    takes_sizes
        Whether a batch may have items of different sizes. On a GPU they are then padded and
        selected in the launches of one: `score` is given batches whose `TokenBatch.sizes` differ,
        and `select_sizes` takes the place of `select`. A method with a `select` or `pick` of its
        own needs a `select_sizes` of its own, too.
    not_finite
        Where a score that is NaN or infinite comes from the item and not from the method: what to
        do about it. Such a score raises TokensError then; otherwise a NaN raises SelectorError.

    Raises
    ------
    SelectorError
        When a subclass is defined, for `needs` that are no names out of `INPUTS`.
    OptionError
        On construction, for an option of the wrong type or a value outside its `Literal`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]] = ()
    of_place: ClassVar[bool] = False
    merges: ClassVar[Literal["", "features", "embeddings"]] = ""
    by_place: ClassVar[ByPlace] = ""
    for_videos: ClassVar[bool] = False
    needs_picture: ClassVar[bool] = False
    takes_sizes: ClassVar[bool] = False
    not_finite: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for inputs in ("needs", "optional"):
            if inputs in vars(cls):
                _check_needs(cls.__name__, inputs, getattr(cls, inputs))
        own = cls.select is not Selector.select or cls.pick is not Selector.pick
        if cls.takes_sizes and own and cls.select_sizes is Selector.select_sizes:
            raise SelectorError(
                f"selector {cls.__name__} says takes_sizes and has a `select` or `pick` of its "
                "own. Define `select_sizes` as well, or leave takes_sizes out."
            )

    def __post_init__(self) -> None:
        _check_needs(type(self).__name__, "needs", self.needs)  # may have been changed since
        check_options(self)

    @property
    def gathers(self) -> tuple[str, ...]:
        """What adapters have to gather: `needs`, and the projector where features are added up."""
        added = self.merges == "features" and "projector" not in self.needs
        return (*self.needs, "projector") if added else self.needs

    @property
    def tap(self) -> int | None:
        """The deepstack tap of the tower that it looks at, from 0; None where it looks at none."""
        return None

    def inputs_of(self, item: VisualTokens) -> tuple[str, ...]:
        """Return which inputs of an item the method is given: `needs`, and `optional` ones."""
        given = [name for name in self.optional if getattr(item, name) is not None]
        return (*self.needs, *given)

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> Selector:
        """Build the selector from option names and values.

        Raises
        ------
        OptionError
            For a name the method does not have (with the nearest one) or a value it cannot take.
        """
        return with_options(cls, options)

    def check_model(self, config: Any) -> None:
        """Raise if the method does not work with a model; most work with any.

        Parameters
        ----------
        config
            The vision-language model's, as transformers loads it.

        Raises
        ------
        UnsupportedModelError
            Naming what does not fit.
        """
        return None

    def check_projector(self, projector: Projector) -> None:
        """Raise if the method does not work with a model's projector; its weights may be missing.

        Called before anything runs, for methods that name the projector in `needs`.

        Parameters
        ----------
        projector
            The model's, as `TokenBatch.projector` will be.

        Raises
        ------
        OptionError, UnsupportedModelError
            Saying why it cannot.
        """
        return None

    def score(self, tokens: TokenBatch) -> Tensor:
        """Return float32 scores [B, N], higher for a token more worth keeping.

        Parameters
        ----------
        tokens
            B items of one shape, with everything in `needs`.
        """
        raise NotImplementedError(f"{type(self).__name__} defines neither score nor select")

    def pick(self, tokens: TokenBatch, scores: Tensor, keep: int) -> Tensor:
        """Return LongTensor [B, K], ascending: what stays by these scores; the highest, by default.

        Parameters
        ----------
        tokens
            B items of one shape, with everything in `needs`.
        scores
            What `score` returned for them.
        keep
            K, between 1 and N.
        """
        return top_k(scores, keep)

    def select(self, tokens: TokenBatch, keep: int) -> Picks:
        """Return the `keep` tokens of each item that stay: `score`, then `pick`.

        Parameters
        ----------
        tokens
            B items of one shape, with everything in `needs`.
        keep
            K, between 1 and N.
        """
        # Checked before `pick`, which may use them as an index or a weight.
        scores = self.score(tokens)
        check_scores(self, tokens, scores)
        return Picks(self.pick(tokens, scores, keep), scores)

    def select_sizes(self, tokens: TokenBatch, keeps: Sequence[int]) -> Picks:
        """Return the tokens of each item that stay, for items of different sizes.

        Exactly what `select` returns for each item alone. Called only where `takes_sizes` is set.

        Parameters
        ----------
        tokens
            B items, padded to N tokens, of which item i has ``tokens.sizes[i]`` of its own.
        keeps
            How many tokens of each item stay, between 1 and its size.

        Returns
        -------
        Picks
            LongTensor [B, max(keeps)]: in row i the first ``keeps[i]`` are item i's, ascending,
            and what follows is not read. Scores [B, N], behind an item's size any numbers.
        """
        scores = self.score(tokens)
        check_scores(self, tokens, scores)
        return Picks(top_of_sizes(scores, tokens.sizes, keeps), scores)


def top_k(scores: Tensor, keep: int) -> Tensor:
    """Return the indices of the `keep` highest scores of each row, ascending; the first wins a tie.

    Parameters
    ----------
    scores
        float [B, N] without NaN.
    keep
        K, between 1 and N.

    Returns
    -------
    Tensor
        LongTensor [B, K].
    """
    # torch.topk leaves the order of equal scores open; a stable sort does not.
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return ascending(order[..., :keep])


def top_of_sizes(scores: Tensor, sizes: Sequence[int], keeps: Sequence[int]) -> Tensor:
    """Return `top_k` of each row's own scores; see `Selector.select_sizes`.

    Parameters
    ----------
    scores
        float [B, N] without NaN.
    sizes, keeps
        How many scores of each row are its own, and how many of them stay.

    Returns
    -------
    Tensor
        LongTensor [B, max(keeps)], N where a row has fewer.
    """
    total, most = scores.shape[-1], max(keeps)
    # Ones of lowest score lie in front of the padding: the sort is stable.
    behind = _behind(sizes, total, scores.device)
    order = torch.sort(
        scores.masked_fill(behind, -math.inf), dim=-1, descending=True, stable=True
    ).indices[:, :most]
    if len(set(keeps)) > 1:
        order = order.masked_fill(_behind(keeps, most, scores.device), total)
    return ascending(order)


def ascending(indices: Tensor) -> Tensor:
    """Return LongTensor [..., K] with each row in order."""
    # On a GPU half the launches of a sort; all are taken, and of equal ones it does not matter.
    return indices.topk(indices.shape[-1], dim=-1, largest=False, sorted=True).values


def _behind(counts: Sequence[int], length: int, device: torch.device) -> Tensor:
    """Return BoolTensor [B, length], True behind the first so many of each row."""
    places = torch.arange(length, device="cpu")
    return to_device(places >= torch.tensor(counts, device="cpu")[:, None], device)


def check_scores(selector: Selector, tokens: TokenBatch, scores: Any) -> None:
    """Raise SelectorError unless scores are float32 [B, N]; what numbers they are is not read."""
    shape = (tokens.size, tokens.total)
    if not isinstance(scores, Tensor) or scores.dtype != torch.float32 or scores.shape != shape:
        raise SelectorError(
            f"{tokens.labels[0]}: the selector {selector.name!r} returned scores "
            f"{described(scores)}; it must be float32 [B, N] = {list(shape)}, one for each token "
            "of each item. Correct its `score`."
        )


def described(value: Any) -> str:
    """Return what a selector returned, for an error."""
    if isinstance(value, Tensor):
        return f"of dtype {value.dtype} and shape {list(value.shape)}"
    return f"that are a {type(value).__name__}"


def _check_needs(name: str, which: str, needs: Any) -> None:
    """Raise SelectorError unless `needs` or `optional` is a tuple of names out of `INPUTS`."""
    if not isinstance(needs, tuple):
        comma = f" For one name write {which} = ({needs!r},)." if isinstance(needs, str) else ""
        raise SelectorError(
            f"selector {name}: {which}={needs!r} is no tuple of names.{comma} "
            f"{did_you_mean('', INPUTS)}"
        )
    for need in needs:
        if need not in INPUTS:
            raise SelectorError(
                f"selector {name}: {which} names {need!r}, which no adapter gathers. "
                f"{did_you_mean(str(need), INPUTS)}"
            )
