"""What a selector is: a frozen dataclass whose fields are its options, with `score` or `select`.

A method that ranks tokens one by one defines `score`; one that weighs scored tokens against each
other defines `pick` too, and one without scores defines `select`. Either way exactly `keep` tokens
come back, ascending, and ties go to the lowest index.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tokenprune.errors import OptionError, did_you_mean
from tokenprune.tokens import Projector, TokenBatch


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
    """Base of every method: subclass it as a frozen dataclass, with the options as fields.

    Class attributes
    ----------------
    name
        What users write: ``method="cls-attention"``.
    summary
        What it looks at, in one line.
    paper
        Title and arXiv number, or where else the method comes from; "" for a baseline.
    needs
        Names out of `tokenprune.tokens.INPUTS`; adapters gather only these.
    of_place
        Whether the choice hangs on an item's place in its batch too, as where rows were prepared
        for known items. No method should need it; an item that comes several times is then chosen
        from each time.
    needs_picture
        Whether the method looks at neighbours in the grid; items that are no picture are refused.

    Raises
    ------
    OptionError
        On construction, for an option of the wrong type or a value outside its `Literal`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]]
    of_place: ClassVar[bool] = False
    needs_picture: ClassVar[bool] = False

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            _check_type(self.name, field.name, getattr(self, field.name), hints[field.name])

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
        """Raise unless the method can serve a model; most can serve any.

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
        """Raise unless the method can work with a model's projector, whose weights may be missing.

        Asked before anything runs, of methods that name the projector in `needs`.

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
        scores = self.score(tokens)
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


def _check_type(method: str, option: str, value: Any, hint: Any) -> None:
    """Raise OptionError unless `value` is of the annotated type: Literal, int, float, bool, str."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        alternatives = typing.get_args(hint)
        for alternative in alternatives:
            try:
                return _check_type(method, option, value, alternative)
            except OptionError:
                continue
        raise OptionError(f"option {option}={value!r} of method {method!r} must be a {hint}.")
    if origin is Literal:
        allowed = typing.get_args(hint)
        if value not in allowed:
            names = [str(choice) for choice in allowed]
            raise OptionError(
                f"option {option}={value!r} of method {method!r} is not one of its values. "
                f"{did_you_mean(str(value), names)}"
            )
        return None
    fits = {
        bool: isinstance(value, bool),
        int: isinstance(value, int) and not isinstance(value, bool),
        float: isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value),
    }.get(hint, hint is None or not isinstance(hint, type) or isinstance(value, hint))
    if hint in (None, type(None)):
        fits = value is None
    if not fits:
        wanted = {float: "a finite number", int: "a whole number", bool: "True or False"}.get(
            hint, getattr(hint, "__name__", str(hint))
        )
        # A float that does not fit is nan or infinite, as it is written already.
        kind = "" if hint is type(value) is float else f", not {type(value).__name__}"
        raise OptionError(f"option {option}={value!r} of method {method!r} must be {wanted}{kind}.")
    return None
