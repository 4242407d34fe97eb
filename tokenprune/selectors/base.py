"""What a selector is: a frozen dataclass whose fields are its options, with `score` or `select`.

A method that ranks tokens one by one defines `score`; one that weighs scored tokens against each
other defines `pick` too, and one without scores defines `select`. Either way exactly `keep` tokens
come back, ascending, and ties go to the lowest index.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from tokenprune.errors import OptionError, SelectorError, did_you_mean
from tokenprune.selectors.options import check_option
from tokenprune.tokens import INPUTS, Projector, TokenBatch


@dataclass(frozen=True)
class Picks:
    """What a selector returns for B items.

    Attributes
    ----------
    kept
        LongTensor [B, K], ascending in each row.
    scores
        float32 [B, N], or None where the method has no score per token.
    """

    kept: Tensor
    scores: Tensor | None = None


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
        Names out of `tokenprune.tokens.INPUTS`; adapters gather only these.
    of_place
        Whether the choice also depends on an item's index in its batch, for example because scores
        were prepared for known items. No method should need it. An item that comes several times
        is then selected from each time.
    needs_picture
        Whether the method uses neighbours in the grid; items that are no picture are refused.

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
    of_place: ClassVar[bool] = False
    needs_picture: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "needs" in vars(cls):
            _check_needs(cls.__name__, cls.needs)

    def __post_init__(self) -> None:
        _check_needs(type(self).__name__, self.needs)  # the class may have been changed since
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            check_option(self.name, field.name, getattr(self, field.name), hints[field.name])

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> Selector:
        """Build the selector from option names and values.

        Raises
        ------
        OptionError
            For a name the method does not have (with the nearest one) or a value it cannot take.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        for name in options:
            if name not in known:
                raise OptionError(
                    f"method {cls.name!r} has no option {name!r}. {did_you_mean(name, known)}"
                )
        return cls(**options)

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
        _check_scores(self, tokens, scores)
        return Picks(self.pick(tokens, scores, keep), scores)


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
    return order[..., :keep].sort(dim=-1).values


def check_picks(selector: Selector, tokens: TokenBatch, picks: Picks, keep: int) -> None:
    """Raise unless a selector returned what it must.

    Parameters
    ----------
    selector
        Whose `select` it was.
    tokens
        The B items it was given.
    picks
        What it returned.
    keep
        K, how many it was to keep.

    Raises
    ------
    SelectorError
        Saying what it returned and what it must return.
    """
    if not isinstance(picks, Picks):
        raise SelectorError(
            f"`select` of the selector {selector.name!r} returned {type(picks).__name__}; it must "
            "be tokenprune.Picks(kept, scores)."
        )
    kept, shape = picks.kept, (tokens.size, keep)
    if not isinstance(kept, Tensor) or kept.dtype != torch.int64 or kept.shape != shape:
        raise SelectorError(
            f"{tokens.labels[0]}: the selector {selector.name!r} returned kept tokens "
            f"{_described(kept)}; it must be int64 [B, K] = {list(shape)}, ascending. Correct its "
            "`select` or `pick`."
        )
    flags = [((kept[:, 1:] > kept[:, :-1]).all() & (kept >= 0).all() & (kept < tokens.total).all())]
    if picks.scores is not None:
        _check_scores(selector, tokens, picks.scores)
        flags.append(~picks.scores.isnan().any())
    # One transfer for both flags: on a GPU each one waits for the device.
    whole, *numbers = torch.stack([flag.to(kept.device) for flag in flags]).tolist()
    if not all(numbers):
        bad = int(cast(Tensor, picks.scores).isnan().any(dim=1).nonzero()[0])
        raise SelectorError(
            f"{tokens.labels[bad]}: the scores of the selector {selector.name!r} hold NaN, and "
            "must be numbers. Correct its `score`."
        )
    if not whole:
        for label, row in zip(tokens.labels, kept.tolist(), strict=True):
            if sorted(set(row)) != row or row[0] < 0 or row[-1] >= tokens.total:
                raise SelectorError(
                    f"{label}: the selector {selector.name!r} returned kept tokens "
                    f"{row[:20]}{' ...' if len(row) > 20 else ''}; they must ascend, each once, "
                    f"between 0 and {tokens.total - 1}. Correct its `select` or `pick`."
                )


def _check_scores(selector: Selector, tokens: TokenBatch, scores: Any) -> None:
    """Raise SelectorError unless scores are float32 [B, N]."""
    shape = (tokens.size, tokens.total)
    if not isinstance(scores, Tensor) or scores.dtype != torch.float32 or scores.shape != shape:
        raise SelectorError(
            f"{tokens.labels[0]}: the selector {selector.name!r} returned scores "
            f"{_described(scores)}; it must be float32 [B, N] = {list(shape)}, one for each token "
            "of each item. Correct its `score`."
        )


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"of dtype {value.dtype} and shape {list(value.shape)}"
    return f"that are a {type(value).__name__}"


def _check_needs(name: str, needs: Any) -> None:
    """Raise SelectorError unless `needs` is a tuple of names out of `INPUTS`."""
    if not isinstance(needs, tuple):
        comma = f" For one name write needs = ({needs!r},)." if isinstance(needs, str) else ""
        raise SelectorError(
            f"selector {name}: needs={needs!r} is no tuple of names.{comma} "
            f"{did_you_mean('', INPUTS)}"
        )
    for need in needs:
        if need not in INPUTS:
            raise SelectorError(
                f"selector {name}: needs names {need!r}, which no adapter gathers. "
                f"{did_you_mean(str(need), INPUTS)}"
            )
