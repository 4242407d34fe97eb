"""VisualTokens: the inputs of a selector for one image or video, and batches of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from tokenprune.errors import TokensError
from tokenprune.question.attention import QueryReader
from tokenprune.transfer import to_device

Projector = Callable[[Tensor], Tensor]
"""Maps vision features [..., C] to what the language model reads [..., D]."""


@dataclass(frozen=True)
class _Layout:
    """How the tensor of an input lies.

    Attributes
    ----------
    said
        For an error, as in the docstring of `VisualTokens`.
    dims
        How many axes it may have.
    counts
        The axis that counts the item's tokens, or its frames, from behind; None where none does.
    of
        What that axis counts.
    """

    said: str
    dims: tuple[int, ...]
    counts: int | None = None
    of: Literal["tokens", "frames"] = "tokens"


_LAYOUTS = {
    "features": _Layout("[N, C]", (2,), -2),
    "embeddings": _Layout("[N, D]", (2,), -2),
    "cls_attention": _Layout("[H, N] or [N]", (1, 2), -1),
    "received_attention": _Layout("[H, N] or [N]", (1, 2), -1),
    "middle_attention": _Layout("[H, N] or [N]", (1, 2), -1),
    "wide_attention": _Layout("[N]", (1,), -1),
    "keys": _Layout("[H, N, d]", (3,), -2),
    "query_attention": _Layout("[H, Q, N]", (3,), -1),
    "question": _Layout("[Q]", (1,)),
    "question_embeddings": _Layout("[Q, D]", (2,)),
    "image_embeddings": _Layout("[N, J]", (2,), -2),
    "text_embeddings": _Layout("[S, J]", (2,)),
    "frame_features": _Layout("[T, G]", (2,), -2, "frames"),
    "pooling_attention": _Layout("[N]", (1,), -1),
    "deepstack": _Layout("[L, N, D]", (3,), -2),
}
"""The inputs that are tensors."""

INPUTS = (*_LAYOUTS, "projector")
"""What a selector may name in `needs`."""

FROM_PROMPT = frozenset({"query_attention", "question", "question_embeddings", "text_embeddings"})
"""Those of them that depend on the prompt's text: another prompt, another selection."""

FROM_CALLER = frozenset(
    {"image_embeddings", "text_embeddings", "frame_features", "pooling_attention"}
)
"""Those of them that no adapter gathers: the models that it prunes do not compute them."""

_TOKEN_AXIS = {
    name: layout.counts
    for name, layout in _LAYOUTS.items()
    if layout.counts is not None and layout.of == "tokens"
}
"""Of the inputs that a method of any sizes may need, the axis that counts tokens."""


@dataclass(frozen=True, eq=False)
class VisualTokens:
    """The inputs of a selector for one image or video.

    Give what the method needs (`tokenprune.methods()[name].needs`); the rest may be None.

    Parameters
    ----------
    grid
        (T, R, W): frames, rows, columns; N = T * R * W tokens. Where only N is known: (1, 1, N),
        with ``is_picture=False``.
    features
        [N, C] output of the vision encoder, before the projector. Where several patches become
        one token (pixel shuffle, 2x2 merger), the patches of a token side by side.
    embeddings
        [N, D] output of the projector: what the language model would read.
    cls_attention
        [H, N] or [N], the softmax attention of the CLS token to each token at the scoring layer;
        on an encoder without CLS token the attention each token receives.
    received_attention
        [H, N] or [N], the attention each token receives at the scoring layer: the mean over all
        queries, that of a CLS token included. Without a CLS token it is ``cls_attention``.
    middle_attention
        [H, N] or [N], the attention each token receives at a layer in the middle of the encoder.
    wide_attention
        [N], the CLS token's attention at the scoring layer as one head over the full width:
        softmax of q kᵀ / sqrt(C), the CLS key included in the softmax.
    keys
        [H, N, d], each token's keys at the scoring layer.
    projector
        Callable [..., C] -> [..., D]. Closed forms can be used of a `tokenprune.MLPProjector`, a
        ``torch.nn.Linear`` and a ``torch.nn.Sequential`` of an optional norm, a linear layer and,
        after an activation, another one.
    query_attention
        [H, Q, N], the attention of the question's Q tokens to each visual token; or a
        `tokenprune.question.attention.QueryReader`, which reads some of the tokens at a time, so
        that a long video's attention need not exist at once.
    question
        LongTensor [Q], the ids of the text after the item, in the model's own vocabulary.
    question_embeddings
        [Q, D], the language model's input embeddings of that text, up to the end of the user's
        turn.
    image_embeddings, text_embeddings
        [N, J] and [S, J], tokens and parts of the question in a joint space of images and text,
        such as CLIP's. The models that adapters prune do not compute them.
    frame_features
        [T, G], one vector for each frame, such as the output of SigLIP's pooling head. Likewise.
    pooling_attention
        [N], the attention of such a head to each token of its frame. Likewise.
    deepstack
        [L, N, D], the tokens at each of the tower's L deepstack taps: what some models add to their
        first layers beside the embeddings (Qwen3-VL), the tap of the lowest layer first.
    label
        What to call this item in an error, for example ``"image 2"``.
    is_picture
        Whether neighbours in the grid are neighbours in a picture or video. False for tokens
        without a position in the picture (queries of a resampler), or if their positions are not
        known.

    Raises
    ------
    TokensError
        If the grid is not three positive ints, or not (1, 1, N) without a picture, or a tensor's
        shape does not fit it.
    """

    grid: tuple[int, int, int]
    features: Tensor | None = None
    embeddings: Tensor | None = None
    cls_attention: Tensor | None = None
    projector: Projector | None = None
    query_attention: Tensor | QueryReader | None = None
    question: Tensor | None = None
    label: str = "the item"
    is_picture: bool = True
    question_embeddings: Tensor | None = None
    keys: Tensor | None = None
    received_attention: Tensor | None = None
    middle_attention: Tensor | None = None
    wide_attention: Tensor | None = None
    image_embeddings: Tensor | None = None
    text_embeddings: Tensor | None = None
    frame_features: Tensor | None = None
    pooling_attention: Tensor | None = None
    deepstack: Tensor | None = None

    def __post_init__(self) -> None:
        grid = tuple(self.grid)
        if len(grid) != 3 or any(
            isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in grid
        ):
            raise TokensError(
                f"{self.label}: grid={self.grid!r} is not (frames, rows, columns), three whole "
                "numbers of at least 1. A single image has one frame: (1, rows, columns)."
            )
        object.__setattr__(self, "grid", grid)
        if not self.is_picture and grid[:2] != (1, 1):
            raise TokensError(
                f"{self.label}: grid={grid} came with is_picture=False. Tokens without "
                f"positions in a picture have the grid (1, 1, {self.total}); pass it, or leave "
                "is_picture out."
            )
        for name, layout in _LAYOUTS.items():
            tensor: Any = getattr(self, name)
            if not isinstance(tensor, Tensor) or name == "question":
                continue
            count = self.total if layout.of == "tokens" else grid[0]
            axis = layout.counts
            if tensor.ndim not in layout.dims or (axis is not None and tensor.shape[axis] != count):
                symbol = "N" if layout.of == "tokens" else "T"
                raise TokensError(
                    f"{self.label}: {name} has shape {list(tensor.shape)}; with grid={self.grid} "
                    f"it must be {layout.said} with {symbol}={count}."
                )
        for one, other in (
            ("question_embeddings", "embeddings"),
            ("text_embeddings", "image_embeddings"),
        ):
            width, same = getattr(self, one), getattr(self, other)
            if width is not None and same is not None and width.shape[-1] != same.shape[-1]:
                raise TokensError(
                    f"{self.label}: {one} has shape {list(width.shape)} and {other} "
                    f"{list(same.shape)}; they are compared, so both must be of one width."
                )
        if self.question is not None and (self.question.ndim != 1 or _is_float(self.question)):
            raise TokensError(
                f"{self.label}: question has shape {list(self.question.shape)} and dtype "
                f"{self.question.dtype}; it must be whole numbers [Q], the ids of the text."
            )

    @property
    def total(self) -> int:
        """N, the number of tokens."""
        frames, rows, columns = self.grid
        return frames * rows * columns


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """B items of one shape, stacked: what `Selector.score` and `Selector.select` are given.

    The fields are those of `VisualTokens` with a leading axis B. Only the inputs in the method's
    `needs` are guaranteed; `require` returns a tensor, or raises if it is missing.

    A selector that says so (`Selector.takes_sizes`) is also given items of different sizes: N is
    that of the largest then, and rows behind an item's own tokens are there but mean nothing.

    Attributes
    ----------
    grid
        (T, R, W) of every item; (1, 1, N) where sizes differ.
    is_picture
        Whether neighbours in the grid are neighbours in a picture; where not, the grid is (1, 1, N)
        and says nothing but N.
    labels
        What to call each item in an error, B strings.
    device
        Where the items live.
    projector
        One callable for all items, or None.
    query_attention
        [B, H, Q, N], or the reader of the batch's only item, or None.
    features, embeddings, cls_attention, and all other tensors of `VisualTokens`
        With a leading axis B, for example [B, N, C]; or None.
    grids
        Of each item, where sizes differ; else None.
    """

    grid: tuple[int, int, int]
    labels: tuple[str, ...]
    device: torch.device
    features: Tensor | None = None
    embeddings: Tensor | None = None
    cls_attention: Tensor | None = None
    projector: Projector | None = None
    query_attention: Tensor | QueryReader | None = None
    question: Tensor | None = None
    is_picture: bool = True
    grids: tuple[tuple[int, int, int], ...] | None = None
    question_embeddings: Tensor | None = None
    keys: Tensor | None = None
    received_attention: Tensor | None = None
    middle_attention: Tensor | None = None
    wide_attention: Tensor | None = None
    image_embeddings: Tensor | None = None
    text_embeddings: Tensor | None = None
    frame_features: Tensor | None = None
    pooling_attention: Tensor | None = None
    deepstack: Tensor | None = None

    @property
    def size(self) -> int:
        """B, the number of items."""
        return len(self.labels)

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many tokens each item has of its own, B numbers of at most N."""
        if self.grids is None:
            return (self.total,) * self.size
        return tuple(map(math.prod, self.grids))

    @property
    def total(self) -> int:
        """N, the number of tokens of each item, or of the largest."""
        frames, rows, columns = self.grid
        return frames * rows * columns

    def each(self, name: str) -> list[Tensor]:
        """Return what `require` returns item by item, without padding: [N, C], [H, N] and so on.

        Raises
        ------
        TokensError
            If the batch does not have it.
        """
        axis = _TOKEN_AXIS[name]
        both = zip(self.require(name), self.sizes, strict=True)
        return [of_item.narrow(axis, 0, size) for of_item, size in both]

    def alone(self, index: int) -> TokenBatch:
        """Return a batch of one of the items, of its own tokens."""
        fields: dict[str, Any] = {}
        for name in _LAYOUTS:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                own = self.each(name)[index] if name in _TOKEN_AXIS else value[index]
                fields[name] = own[None]
        grid = self.grid if self.grids is None else self.grids[index]
        return replace(self, grid=grid, grids=None, labels=self.labels[index : index + 1], **fields)

    def require(self, name: str) -> Tensor:
        """Return the tensor called `name`.

        Raises
        ------
        TokensError
            If the batch does not have it.
        """
        tensor: Any = getattr(self, name)
        if not isinstance(tensor, Tensor):
            raise self._missing(name)
        return tensor

    def require_query_attention(self) -> Tensor | QueryReader:
        """Return the question's attention: a tensor, or the reader of the batch's only item.

        Raises
        ------
        TokensError
            If the batch has neither.
        """
        if self.query_attention is None:
            raise self._missing("query_attention")
        return self.query_attention

    def _missing(self, name: str) -> TokensError:
        return TokensError(
            f"{self.labels[0]}: {name} is missing. Pass VisualTokens({name}=...), and name "
            f"{name!r} in the selector's `needs` so that adapters gather it."
        )

    def require_projector(self) -> Projector:
        """Return the projector.

        Raises
        ------
        TokensError
            If the batch does not have one.
        """
        if self.projector is None:
            raise TokensError(
                f"{self.labels[0]}: projector is missing. Pass VisualTokens(projector=...), a "
                "callable from features [..., C] to embeddings [..., D]."
            )
        return self.projector


def batch_key(
    item: VisualTokens, needs: Sequence[str], any_size: bool = False
) -> tuple[object, ...]:
    """Return what two items must share to be put into one batch for a method with these needs.

    Parameters
    ----------
    item
        One of them.
    needs
        The method's.
    any_size
        Whether they may have different numbers of tokens; see `stack`.
    """
    key: list[object] = [item.is_picture]
    if not any_size:
        key.append(item.grid)
    for name in needs:
        value = getattr(item, name)
        if isinstance(value, Tensor):
            shape = list(value.shape)
            if any_size and name in _TOKEN_AXIS:
                del shape[_TOKEN_AXIS[name]]
            key.append((name, tuple(shape), value.dtype, value.device))
        else:
            # Projectors and readers have no equality: the same object, or another batch.
            key.append((name, id(value)))
    return tuple(key)


def stack(items: Sequence[VisualTokens], needs: Sequence[str]) -> TokenBatch:
    """Stack items of one `batch_key`, with just the inputs in `needs`.

    Items of different sizes, whose keys are those of `any_size`, are padded. What their numbers
    are is not looked at; see `tokenprune.checking`.

    Parameters
    ----------
    items
        At least one item.
    needs
        Names out of `INPUTS`.

    Returns
    -------
    TokenBatch
        The items in the order given.

    Raises
    ------
    TokensError
        If an item lacks one of `needs`. The item is named.
    """
    first = items[0]
    fields: dict[str, Any] = {}
    device = next(
        (value.device for name in _LAYOUTS if isinstance(value := getattr(first, name), Tensor)),
        torch.device("cpu"),
    )
    grids = tuple(item.grid for item in items)
    padded = len(set(grids)) > 1
    places = _places_of_padded([item.total for item in items], device) if padded else None
    for name in needs:
        for item in items:
            if getattr(item, name) is None:
                raise TokensError(
                    f"{item.label}: this method needs {name}, and VisualTokens has none. It needs: "
                    f"{', '.join(needs)}."
                )
        values = [getattr(item, name) for item in items]
        if not isinstance(values[0], Tensor):
            fields[name] = values[0]  # `batch_key` puts what is no tensor into a batch of its own
        elif places is not None and name in _TOKEN_AXIS:
            fields[name] = _padded(values, _TOKEN_AXIS[name], places)
        else:
            one = len(values) == 1
            fields[name] = values[0][None].contiguous() if one else torch.stack(values)
    return TokenBatch(
        grid=(1, 1, max(item.total for item in items)) if padded else first.grid,
        labels=tuple(item.label for item in items),
        device=device,
        is_picture=first.is_picture,
        grids=grids if padded else None,
        **fields,
    )


def token_axis(name: str) -> int | None:
    """Return the axis of an input that counts tokens, from behind; None where none does."""
    return _TOKEN_AXIS.get(name)


def tokens_at(values: Mapping[str, Tensor], place: Tensor | slice) -> dict[str, Tensor]:
    """Return inputs of some tokens, by name.

    Parameters
    ----------
    values
        Inputs of more tokens, by name.
    place
        LongTensor [n] or a slice: which tokens.
    """
    found = {}
    for name, value in values.items():
        behind = (slice(None),) * (-1 - _TOKEN_AXIS[name])
        found[name] = value[(..., place, *behind)]
    return found


def _places_of_padded(sizes: Sequence[int], device: torch.device) -> Tensor:
    """Return LongTensor [B * N], for each row of a padded batch one of the items laid end to end.

    Behind an item's own tokens its first one stands again: a number like all others.
    """
    columns = torch.arange(max(sizes), device="cpu")
    lengths = torch.tensor(sizes, device="cpu")[:, None]
    starts = lengths.cumsum(0) - lengths
    own: Tensor = columns.where(columns < lengths, 0)
    return to_device((starts + own).flatten(), device)


def _padded(values: Sequence[Tensor], axis: int, places: Tensor) -> Tensor:
    """Return values of items of different sizes as [B, ...], in two launches for any B."""
    together = torch.cat(list(values), dim=axis).index_select(axis, places)
    by_item: Tensor = together.unflatten(axis, (len(values), -1))
    return by_item.movedim(values[0].ndim + axis, 0)


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
