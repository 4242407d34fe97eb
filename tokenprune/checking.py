"""What is checked of a batch's numbers and of what a selector made of them.

Whether a shape is right is known at once. Numbers are known only when the device has computed them:
they are copied to the host behind the selection, and looked at when they have arrived, so that one
wait serves all checks of a call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import SelectorError, TokensError
from tokenprune.late import Look
from tokenprune.merging import Merge
from tokenprune.selectors.base import Picks, Selector, check_scores, described
from tokenprune.tokens import TokenBatch
from tokenprune.transfer import ToHost, to_host


class BatchCheck:
    """Whether a batch's inputs are finite, and what a selector returned is what it must be.

    Parameters
    ----------
    tokens
        The B items of the batch.
    selector
        Who chooses.
    inputs
        Which inputs are looked at: those that the selector is given.
    """

    def __init__(self, tokens: TokenBatch, selector: Selector, inputs: Sequence[str]) -> None:
        self._tokens, self._selector = tokens, selector
        given = {name: getattr(tokens, name) for name in inputs}
        self._inputs = {
            name: one
            for name, one in given.items()
            if isinstance(one, Tensor) and one.is_floating_point()
        }
        # The largest entry of each item in each input and, once there are some, in the scores.
        is_double = any(one.dtype == torch.float64 for one in self._inputs.values())
        self._largest = torch.empty(
            len(self._inputs) + 1,
            tokens.size,
            dtype=torch.float64 if is_double else torch.float32,
            device=tokens.device,
        )
        for row, one in enumerate(self._inputs.values()):
            _write_largest(one, self._largest[row])
        self._looks: Sequence[Look] = ()

    def check_inputs(self) -> None:
        """Raise TokensError for the first item that has a NaN or an infinity in it."""
        self._check_inputs(to_host([self._largest[: len(self._inputs)]])[0])

    def take(self, picks: object, keeps: Sequence[int], looks: Sequence[Look] = ()) -> None:
        """Take note of what the selector returned, and how many tokens of each item it was to keep.

        Parameters
        ----------
        picks, keeps
            Both.
        looks
            What the selector left to look at.

        Raises
        ------
        SelectorError
            Saying what it returned and what it must return, if that is of the wrong kind.
        """
        selector, tokens = self._selector, self._tokens
        found = check_kind(selector, tokens, picks, max(keeps))
        self._keeps, self._has_scores, self._looks = keeps, found.scores is not None, looks
        if found.scores is not None:
            _write_largest(found.scores, self._largest[-1])
        self._merged = _ranges(found.merges or ())
        self._found = ToHost((found.kept, self._largest, *self._merged.values()))

    def kept(self) -> list[Tensor]:
        """Return the kept tokens of each item, LongTensor [K] on the host, once all is checked.

        Raises
        ------
        TokensError
            As `check_inputs`; or if a score is not finite, and the selector says that this comes
            from its inputs.
        SelectorError
            If kept tokens do not ascend, each once and inside the item, or a score is NaN.
        WeightsChangedError
            If the selector used weights that are others by now.
        """
        kept, largest, *ranges = self._found.arrived()
        self._check_inputs(largest[: len(self._inputs)])
        for look in self._looks:
            look()
        if self._has_scores:
            self._check_scores(largest[-1])
        for index, of_item in zip(self._merged, ranges, strict=True):
            self._check_merge(index, of_item.tolist())
        rows = zip(self._tokens.labels, kept, self._keeps, self._tokens.sizes, strict=True)
        return [self._checked(label, row[:keep], total) for label, row, keep, total in rows]

    def _check_inputs(self, largest: Tensor) -> None:
        for name, of_items in zip(self._inputs, largest, strict=True):
            bad = _first(~of_items.isfinite())
            if bad is not None:
                count = int((~self._inputs[name][bad].isfinite()).sum())
                raise TokensError(
                    f"{self._tokens.labels[bad]}: {name} holds {count} NaN or infinite values. "
                    "They come from the vision encoder: check the image, and the encoder's dtype "
                    "(float16 overflows; bfloat16 or float32 do not)."
                )

    def _check_scores(self, largest: Tensor) -> None:
        """Raise for the first item with a wrong score; of each item comes its largest [B]."""
        name, why = self._selector.name, self._selector.not_finite
        bad = _first(~largest.isfinite() if why else largest.isnan())
        if bad is None:
            return
        label = self._tokens.labels[bad]
        if why:
            raise TokensError(
                f"{label}: the scores of method {name!r} hold NaN or infinite values. {why}"
            )
        raise SelectorError(
            f"{label}: the scores of the selector {name!r} hold NaN, and must be numbers. Correct "
            "its `score`."
        )

    def _check_merge(self, index: int, ranges: Sequence[float]) -> None:
        """Raise if a merge counts outside the item, or weighs with what is no number."""
        first, last, lowest, highest, total = ranges
        keep, size = self._keeps[index], self._tokens.sizes[index]
        if first >= 0 and last < keep and lowest >= 0 and highest < size and math.isfinite(total):
            return
        raise SelectorError(
            f"{self._tokens.labels[index]}: the selector {self._selector.name!r} returned a merge "
            f"into {first:.0f} to {last:.0f} of tokens {lowest:.0f} to {highest:.0f} with weights "
            f"that add up to {total:g}. It must be into 0 to {keep - 1} of 0 to {size - 1}, with "
            "weights that are numbers. Correct its `select`."
        )

    def _checked(self, label: str, kept: Tensor, total: int) -> Tensor:
        ascends = kept.numel() < 2 or bool((kept[1:] > kept[:-1]).all())
        if ascends and int(kept[0]) >= 0 and int(kept[-1]) < total:
            return kept
        row = kept.tolist()
        raise SelectorError(
            f"{label}: the selector {self._selector.name!r} returned kept tokens "
            f"{row[:20]}{' ...' if len(row) > 20 else ''}; they must ascend, each once, "
            f"between 0 and {total - 1}. Correct its `select` or `pick`."
        )


def check_kind(selector: Selector, tokens: TokenBatch, picks: object, keep: int) -> Picks:
    """Raise SelectorError unless a selector returned picks of the right shapes and dtypes."""
    if not isinstance(picks, Picks):
        raise SelectorError(
            f"`select` of the selector {selector.name!r} returned {type(picks).__name__}; it must "
            "be tokenprune.Picks(kept, scores)."
        )
    kept, shape = picks.kept, (tokens.size, keep)
    if not isinstance(kept, Tensor) or kept.dtype != torch.int64 or kept.shape != shape:
        raise SelectorError(
            f"{tokens.labels[0]}: the selector {selector.name!r} returned kept tokens "
            f"{described(kept)}; it must be int64 [B, K] = {list(shape)}, ascending. Correct its "
            "`select` or `pick`."
        )
    if picks.scores is not None:
        check_scores(selector, tokens, picks.scores)
    if picks.merges is not None:
        _check_merges(selector, tokens, picks.merges)
    return picks


def _check_merges(selector: Selector, tokens: TokenBatch, merges: object) -> None:
    """Raise SelectorError unless there is a merge, or None, for each item, of the right dtypes."""
    given = list(merges) if isinstance(merges, Sequence) else [merges]
    for merge in given:
        if merge is None:
            continue
        parts: list[Any] = [getattr(merge, name, None) for name in ("into", "of", "weight")]
        space = getattr(merge, "space", None)
        if space != selector.merges:
            raise SelectorError(
                f"{tokens.labels[0]}: the selector {selector.name!r} returned a merge of {space}, "
                f"and says merges={selector.merges!r}. Name the space in the class, so that "
                "adapters gather what it takes."
            )
        dtypes = [part.dtype if isinstance(part, Tensor) else None for part in parts]
        alike = len({part.shape if isinstance(part, Tensor) else None for part in parts}) == 1
        if dtypes == [torch.int64, torch.int64, torch.float32] and alike and parts[0].ndim == 1:
            continue
        raise SelectorError(
            f"{tokens.labels[0]}: the selector {selector.name!r} returned a merge of "
            f"{', '.join(map(described, parts))}. It must be tokenprune.Merge(into, of, weight): "
            "int64 [M], int64 [M] and float32 [M]. Correct its `select`."
        )
    if len(given) != tokens.size:
        raise SelectorError(
            f"{tokens.labels[0]}: the selector {selector.name!r} returned {len(given)} merges for "
            f"{tokens.size} items. Return one for each, or None. Correct its `select`."
        )


def _ranges(merges: Sequence[Merge | None]) -> dict[int, Tensor]:
    """Return of each item that merges float64 [5]: least and largest `into` and `of`, the sum."""
    found = {}
    for index, merge in enumerate(merges):
        if merge is not None and merge.into.numel():
            ends = [*merge.into.aminmax(), *merge.of.aminmax(), merge.weight.sum()]
            found[index] = torch.stack([end.double() for end in ends])
    return found


def _write_largest(values: Tensor, largest: Tensor) -> None:
    """Write the largest entry of each item, whatever its sign, to [B]: NaN where there is a NaN.

    One number in place of a flag for each entry: a single launch reads them all.
    """
    if not values.numel():  # such as a question without text
        largest.zero_()
        return
    axes = tuple(range(1, values.ndim))
    torch.linalg.vector_norm(
        values.to(largest.device), ord=math.inf, dim=axes, dtype=largest.dtype, out=largest
    )


def _first(flags: Tensor) -> int | None:
    """Return the first index of BoolTensor [B] on the host that is True."""
    return next((index for index, flag in enumerate(flags.tolist()) if flag), None)
