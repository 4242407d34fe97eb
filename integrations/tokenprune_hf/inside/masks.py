"""What a decoder passes to a layer, cut to the columns that are left there.

Every argument with an axis of tokens is known by its name. One that is not known is refused: which
of its axes counts tokens is never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from tokenprune.errors import UnsupportedModelError
from tokenprune_hf.engine import CACHE_NAMES
from tokenprune_hf.prompt import TYPE_IDS

Form = Literal["shown", "added", "columns"]
"""How an attention function takes a mask: as bools [R, 1, Q, K], as numbers that are added to the
logits, or as [R, K] with what is no padding."""

_ROTARY = ("position_embeddings", "position_embeddings_global", "position_embeddings_local")
_BY_ROW = ("per_layer_input",)
_BY_COLUMN = ("position_ids", *TYPE_IDS)
_UNTOUCHED = (*CACHE_NAMES, "past_key_value", "shared_kv_states")
"""The last one is read by layers that share keys, and decoders with such layers are refused."""


def form_of(attention: Any) -> Form:
    """Return how a layer's attention takes masks.

    Raises
    ------
    UnsupportedModelError
        If its implementation is not known.
    """
    name = str(attention.config._attn_implementation)
    if name == "eager":
        return "added"
    if name == "sdpa":
        return "shown"
    if "flash" in name:
        return "columns"
    raise UnsupportedModelError(
        f"the masks of the attention implementation {name!r} cannot be cut to the tokens that are "
        "left behind a stage. Call model.set_attn_implementation('sdpa')."
    )


def in_form(shown: Tensor, form: Form, dtype: torch.dtype) -> Tensor:
    """Return a mask in the form that an attention function takes.

    Parameters
    ----------
    shown
        BoolTensor [R, 1, Q, K].
    form
        ``"shown"`` or ``"added"``.
    dtype
        Of the logits.
    """
    if form == "shown":
        return shown
    return torch.zeros(shown.shape, dtype=dtype, device=shown.device).masked_fill_(
        ~shown, torch.finfo(dtype).min
    )


class Cut:
    """Cuts the arguments of the layers of one call to the columns that are left.

    Parameters
    ----------
    columns
        LongTensor [R, S], the columns that are left of T.
    valid
        BoolTensor [R, S], False where a row is filled up.
    padded
        Whether any row is.
    total
        T, columns of the call.
    """

    def __init__(self, columns: Tensor, valid: Tensor, padded: bool, total: int) -> None:
        self._columns = columns
        self._valid = valid
        self._padded = padded
        self._total = total
        # Most layers get the same tensors. What was cut is held, so that an id stays its own.
        self._known: dict[tuple[str, int], tuple[Any, Any]] = {}

    def arguments(self, named: Mapping[str, Any], layer: Any, states: Tensor) -> dict[str, Any]:
        """Return a layer's arguments.

        Parameters
        ----------
        named
            By name, without the hidden states.
        layer
            The layer.
        states
            [R, S, D], its hidden states.

        Raises
        ------
        UnsupportedModelError
            If one of them is not known.
        """
        form = form_of(layer.self_attn)
        result = dict(named)
        for name, value in named.items():
            if name == "attention_mask":
                result[name] = self._cached(name, value, lambda v: self._mask(v, form, states))
            elif name in _UNTOUCHED or _is_setting(value):
                continue
            elif name in _ROTARY:
                result[name] = self._cached(name, value, self._rotary)
            elif name in _BY_ROW and isinstance(value, Tensor):
                result[name] = self._cached(name, value, self._rows)
            elif name in _BY_COLUMN and isinstance(value, Tensor):
                result[name] = self._cached(name, value, self._by_column)
            elif name == "cache_position" and isinstance(value, Tensor) and value.ndim == 1:
                result[name] = value[: self._columns.shape[1]]
            else:
                raise _unknown(layer, name, value)
        if form == "columns" and any(named.get(name) is not None for name in _ROTARY):
            # Flash attention reads positions for one thing: gaps are taken for ends of prompts.
            result["position_ids"] = None
        return result

    def _cached(self, name: str, value: Any, cut: Any) -> Any:
        key = name, id(value)
        if key not in self._known:
            self._known[key] = value, cut(value)
        return self._known[key][1]

    def _rotary(self, value: Any) -> Any:
        """Cut cos and sin, [..., R or 1, T, d] each."""
        return type(value)(self._rows(one) for one in value)

    def _rows(self, value: Tensor) -> Tensor:
        rows, columns = self._columns.shape
        self._check(value, -2)
        lead, width = value.shape[:-3], value.shape[-1]
        index = self._columns.to(value.device)[..., None].expand(*lead, rows, columns, width)
        return value.expand(*lead, rows, -1, -1).gather(-2, index)

    def _by_column(self, value: Tensor) -> Tensor:
        """Cut [..., R or 1, T]."""
        self._check(value, -1)
        index = self._columns.to(value.device).expand(*value.shape[:-2], -1, -1)
        return value.expand(*value.shape[:-2], len(self._columns), -1).gather(-1, index)

    def _check(self, value: Tensor, axis: int) -> None:
        if value.shape[axis] != self._total or value.shape[axis - 1] not in (
            1,
            len(self._columns),
        ):
            raise _shape(value, len(self._columns), self._total)

    def _mask(self, mask: Any, form: Form, states: Tensor) -> Tensor | None:
        """Cut a mask that the model made; None where none is needed."""
        valid = self._valid.to(states.device)
        if mask is None:
            if not self._padded:
                return None
            if form == "columns":
                return valid.to(torch.int64)
            places = torch.arange(valid.shape[1], device=valid.device)
            shown = (places <= places[:, None]) & valid[:, None, :]
            return in_form(_self_seen(shown, valid)[:, None], form, states.dtype)
        if isinstance(mask, Tensor) and mask.ndim == 2 and form == "columns":
            return self._by_column(mask) * valid.to(mask.dtype)
        if not isinstance(mask, Tensor) or mask.ndim != 4:
            raise UnsupportedModelError(
                f"the attention mask of a layer is a {type(mask).__name__}, which cannot be cut to "
                "the tokens that are left behind a stage. Call "
                "model.set_attn_implementation('sdpa')."
            )
        rows, columns = self._columns.shape
        if mask.shape[0] not in (1, rows) or mask.shape[-2:] != (self._total, self._total):
            raise _shape(mask, rows, self._total)
        heads = mask.shape[1]
        index = self._columns.to(mask.device)
        every = mask.expand(rows, -1, -1, -1)
        every = every.gather(2, index[:, None, :, None].expand(-1, heads, -1, mask.shape[-1]))
        every = every.gather(3, index[:, None, None].expand(-1, heads, columns, -1))
        if not self._padded:
            return every
        valid = self._valid.to(mask.device)
        if mask.dtype == torch.bool:
            return _self_seen(every & valid[:, None, None], valid[:, None])
        # A mask of numbers may hold others than two, so what is left of it stays as it is.
        own = _self_seen(torch.zeros_like(every, dtype=torch.bool), valid[:, None])
        every = every.masked_fill(~valid[:, None, None], torch.finfo(mask.dtype).min)
        return every.masked_fill(own, 0.0)


def _self_seen(shown: Tensor, valid: Tensor) -> Tensor:
    """Return a mask [..., S, S] in which what fills up a row sees itself.

    A softmax over nothing is NaN in some kernels, and NaN times no weight is NaN. Nobody else looks
    at these columns.
    """
    own = torch.eye(valid.shape[-1], dtype=torch.bool, device=valid.device)
    return shown | (own & ~valid[..., None])


def _is_setting(value: Any) -> bool:
    """Say whether a value has no axis of tokens."""
    if isinstance(value, Tensor):
        return value.ndim == 0
    return value is None or isinstance(value, (bool, int, float, str))


def _shape(value: Tensor, rows: int, total: int) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"a layer of the language model is given a tensor of shape {list(value.shape)} where "
        f"{rows} rows of {total} tokens are read, so that it is not known which of its numbers "
        "belong to the tokens that are left. Use a method that prunes before the language model "
        "(see `tokenprune methods`)."
    )


def _unknown(layer: Any, name: str, value: Any) -> UnsupportedModelError:
    shape = f" of shape {list(value.shape)}" if isinstance(value, Tensor) else ""
    return UnsupportedModelError(
        f"{type(layer).__name__} is given {name} ({type(value).__name__}{shape}), and it is not "
        "known how that goes with fewer tokens. Use a method that prunes before the language model "
        "(see `tokenprune methods`)."
    )
