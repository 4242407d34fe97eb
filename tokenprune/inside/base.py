"""What a method of kind "inside" is: a frozen dataclass whose fields are its options.

A method says in stages where tokens leave (`InsideMethod.stages`), how many stay behind each
(`counts`), and what a token is worth there (`score`, `pick`). Tokens are ranked within each item,
with queries of the text behind it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from tokenprune.errors import OptionError
from tokenprune.merging import Merge
from tokenprune.question.attention import QueryKeys, question_scores
from tokenprune.selectors.base import Selector, top_k
from tokenprune.selectors.options import check_options, with_options
from tokenprune.tokens import FROM_PROMPT

Asked = Literal["last", "text"]
"""Whose queries rank an item's tokens: the prompt's last token, or all text behind the item."""


@dataclass(frozen=True)
class Stage:
    """Where tokens leave.

    Attributes
    ----------
    layer
        They leave in front of this layer, from 0, so that it is the first one without them.
    ranked_at
        The layer whose q and k rank them: this one, or the one in front of it.
    """

    layer: int
    ranked_at: int


@dataclass(frozen=True)
class StagePicks:
    """Which of an item's n tokens stay behind a stage.

    Attributes
    ----------
    kept
        LongTensor [k], ascending, counted among the n.
    merge
        Which tokens are added to which kept ones, or None.
    """

    kept: Tensor
    merge: Merge | None = None


@dataclass(frozen=True)
class InsideMethod:
    """Base class of methods that leave tokens out between layers of the language model.

    Subclass it as a frozen dataclass with the options as fields.

    Class attributes
    ----------------
    name
        What users write: ``method="fastv"``.
    summary
        What it selects by, in one line.
    paper
        Title and arXiv number.
    asked
        Whose queries `score` is given.
    weighs_text
        Whether `text_weights` says how much each token of the text counts.
    reads_states
        Whether `pick` reads the hidden states of the tokens.
    merges
        Whether it adds tokens that leave to tokens that stay.

    Raises
    ------
    OptionError
        On construction, for an option of the wrong type or a value that cannot be used.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str] = ""
    asked: ClassVar[Asked] = "last"
    weighs_text: ClassVar[bool] = False
    reads_states: ClassVar[bool] = False
    merges: ClassVar[bool] = False

    needs: ClassVar[tuple[str, ...]] = ()
    """What of the vision encoder it looks at: nothing, as for every method of this kind."""

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def gathers(self) -> tuple[str, ...]:
        """What adapters have the vision encoder gather, see `tokenprune.Selector.gathers`."""
        return self.needs

    @property
    def where(self) -> str:
        """The option that says where tokens leave, as errors name it."""
        names = [option.name for option in dataclasses.fields(self)]
        return next((name for name in names if name.startswith("layer")), "layer")

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> InsideMethod:
        """Build the method from option names and values.

        Raises
        ------
        OptionError
            For a name that it does not have (with the nearest one) or a value it cannot take.
        """
        return with_options(cls, options)

    def stages(self, depth: int) -> tuple[Stage, ...]:
        """Return where tokens leave, in order.

        Parameters
        ----------
        depth
            How many layers the language model has.

        Raises
        ------
        OptionError
            If the model has too few layers, or the options name others than it has.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say where tokens leave")

    def counts(self, total: int, keep: int) -> tuple[int, ...]:
        """Return how many tokens of an item stay behind each stage; the last of them is `keep`.

        Parameters
        ----------
        total
            N, how many tokens the item has.
        keep
            Between 1 and N.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how many tokens stay")

    def tokens_by_layer(self, depth: int, total: int, keep: int) -> list[int]:
        """Return how many tokens of an item each layer reads.

        Parameters
        ----------
        depth
            How many layers the language model has.
        total, keep
            See `counts`.
        """
        result, counts = [total] * depth, self.counts(total, keep)
        for stage, count in zip(self.stages(depth), counts, strict=True):
            result[stage.layer :] = [count] * (depth - stage.layer)
        return result

    def text_weights(self, visual: Tensor, text: Tensor) -> Tensor:
        """Return how much each token of the text counts in the mean over queries, float32 [Q].

        Asked for where `weighs_text` is set.

        Parameters
        ----------
        visual
            [N, D], the language model's inputs at the item's tokens.
        text
            [Q, D], those at the text behind it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not weigh the text")

    def score(self, seen: QueryKeys) -> Tensor:
        """Return float32 [n], higher for a token of the item more worth keeping.

        By default the attention that the queries pay to it, averaged over heads and queries.

        Parameters
        ----------
        seen
            q and k at the stage: queries as `asked` says, keys of all that is left of the prompt.
        """
        return question_scores(seen, "mean")

    def pick(self, scores: Tensor, keep: int, states: Callable[[], Tensor]) -> StagePicks:
        """Return what stays of an item by its scores; the highest by default.

        Parameters
        ----------
        scores
            float32 [n] of the tokens that are left; ties go to the lowest index.
        keep
            How many stay, between 1 and n.
        states
            Returns [n, D], what goes into the stage's layer at these tokens. Only for methods with
            `reads_states`.
        """
        return StagePicks(top_k(scores[None], keep)[0])

    # For subclasses ---------------------------------------------------------------------------

    def _stages_behind(self, layers: list[int], depth: int, ranked: int) -> tuple[Stage, ...]:
        """Return stages that take effect in front of some layers, once they are checked.

        Parameters
        ----------
        layers
            Layers without the tokens that left, from 0.
        depth
            Of the language model.
        ranked
            How many layers in front of each its ranking is made: 0 or 1.
        """
        inside = all(max(1, ranked) <= layer < depth for layer in layers)
        rising = all(one < other for one, other in itertools.pairwise(layers))
        if not layers or not inside or not rising:
            raise OptionError(
                f"method {self.name!r} would have tokens leave in front of the layers "
                f"{', '.join(map(str, layers)) or '(none)'}, and this language model has {depth}, "
                f"from 0 to {depth - 1}. Give {self.where} so that they rise from 1 to "
                f"{depth - 1}."
            )
        return tuple(Stage(layer, layer - ranked) for layer in layers)


def reads_text(method: Selector | InsideMethod) -> bool:
    """Say whether a method chooses by the text of the prompt, so that it needs a question."""
    return isinstance(method, InsideMethod) or bool(FROM_PROMPT & set(method.needs))


def layers_of(method: str, option: str, text: str, depth: int | None = None) -> list[int]:
    """Return the layers that an option names.

    Parameters
    ----------
    method, option
        Their names, for errors.
    text
        Whole numbers, from 0, or fractions of the depth, with commas between them: ``"8,16,24"`` or
        ``"0.25,0.5,0.75"``.
    depth
        How many layers there are; None where it is only checked what is written.

    Raises
    ------
    OptionError
        If it names something else.
    """
    layers = []
    for entry in text.split(","):
        try:
            written = float(entry) if "." in entry else int(entry)
        except ValueError:
            written = -1
        is_share = isinstance(written, float)
        if written < 0 or (is_share and not 0.0 < written < 1.0):
            raise OptionError(
                f"option {option}={text!r} of method {method!r} must be layers from 0, such as "
                "'8,16,24', or fractions of the depth, such as '0.25,0.5,0.75'."
            )
        layers.append(math.floor(written * (depth or 0) + 0.5) if is_share else int(written))
    return layers


def rounded(number: float) -> int:
    """Return the nearest whole number, halves up, as budgets are rounded."""
    return math.floor(number + 0.5)
