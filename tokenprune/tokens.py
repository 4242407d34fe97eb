"""VisualTokens: the inputs of a selector for one image or video, and batches of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import TokensError
from tokenprune.question.attention import QueryReader

Projector = Callable[[Tensor], Tensor]
"""Maps vision features [..., C] to what the language model reads [..., D]."""

INPUTS = ("features", "embeddings", "cls_attention", "projector", "query_attention", "question")
"""What a selector may name in `needs`."""

FROM_PROMPT = frozenset({"query_attention", "question"})
"""Those of them that depend on the prompt's text: another prompt, another selection."""

_TENSORS = ("features", "embeddings", "cls_attention", "query_attention", "question")


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
        for name, dims in (
            ("features", (2,)),
            ("embeddings", (2,)),
            ("cls_attention", (1, 2)),
            ("query_attention", (3,)),
        ):
            tensor: Any = getattr(self, name)
            if not isinstance(tensor, Tensor):
                continue
            token_axis = 0 if name in ("features", "embeddings") else -1
            if tensor.ndim not in dims or tensor.shape[token_axis] != self.total:
                layout = {
                    "features": "[N, C]",
                    "embeddings": "[N, D]",
                    "cls_attention": "[H, N] or [N]",
                    "query_attention": "[H, Q, N]",
                }[name]
                raise TokensError(
                    f"{self.label}: {name} has shape {list(tensor.shape)}; with grid={self.grid} "
                    f"it must be {layout} with N={self.total}."
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

    Attributes
    ----------
    grid
        (T, R, W) of every item.
    is_picture
        Whether neighbours in the grid are neighbours in a picture; where not, the grid is (1, 1, N)
        and says nothing but N.
    labels
        What to call each item in an error, B strings.
    device
        Where the items live.
    features
        [B, N, C] or None.
    embeddings
        [B, N, D] or None.
    cls_attention
        [B, H, N] or [B, N] or None.
    projector
        One callable for all items, or None.
    query_attention
        [B, H, Q, N], or the reader of the batch's only item, or None.
    question
        [B, Q] or None.
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

    @property
    def size(self) -> int:
        """B, the number of items."""
        return len(self.labels)

    @property
    def total(self) -> int:
        """N, the number of tokens of each item."""
        frames, rows, columns = self.grid
        return frames * rows * columns

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


def batch_key(item: VisualTokens, needs: Sequence[str]) -> tuple[object, ...]:
    """Return what two items must share to be put into one batch for a method with these needs."""
    key: list[object] = [item.grid, item.is_picture]
    for name in needs:
        value = getattr(item, name)
        if isinstance(value, Tensor):
            key.append((name, tuple(value.shape), value.dtype, value.device))
        else:
            # Projectors and readers have no equality: the same object, or another batch.
            key.append((name, id(value)))
    return tuple(key)


def stack(items: Sequence[VisualTokens], needs: Sequence[str]) -> TokenBatch:
    """Stack items of one `batch_key`, with just the inputs in `needs`.

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
        If an item lacks one of `needs`, or has a NaN or an infinity in it. The item is named.
    """
    first = items[0]
    fields: dict[str, Tensor] = {}
    readers: dict[str, Any] = {}
    device = next(
        (value.device for name in _TENSORS if isinstance(value := getattr(first, name), Tensor)),
        torch.device("cpu"),
    )
    for name in needs:
        for item in items:
            if getattr(item, name) is None:
                raise TokensError(
                    f"{item.label}: this method needs {name}, and VisualTokens has none. It needs: "
                    f"{', '.join(needs)}."
                )
        if name == "projector":
            continue
        tensors = [getattr(item, name) for item in items]
        if not isinstance(tensors[0], Tensor):
            readers[name] = tensors[0]  # `batch_key` puts each reader into a batch of its own
            continue
        stacked = torch.stack(tensors) if len(tensors) > 1 else tensors[0][None].contiguous()
        finite = stacked.isfinite().flatten(1).all(dim=1)
        if not bool(finite.all()):
            bad = int((~finite).nonzero()[0])
            count = int((~stacked[bad].isfinite()).sum())
            raise TokensError(
                f"{items[bad].label}: {name} holds {count} NaN or infinite values. They come from "
                "the vision encoder: check the image, and the encoder's dtype (float16 overflows; "
                "bfloat16 or float32 do not)."
            )
        fields[name] = stacked
    return TokenBatch(
        grid=first.grid,
        labels=tuple(item.label for item in items),
        device=device,
        projector=first.projector if "projector" in needs else None,
        is_picture=first.is_picture,
        **fields,
        **readers,
    )


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
