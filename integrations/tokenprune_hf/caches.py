"""Key-value caches that hold a pruned prompt: what is known of them, wherever they go.

Callers count in tokens of their own prompt; such a cache holds the short one. So it must not be
read by a call that does not know. What is known of it therefore travels inside the cache: it is
there after a copy, a pickle or a move to another device. While no pruned call is running the
cache refuses to be filled further, so that a plain model cannot go on from it by mistake.

Rows are told by their content, the keys of one layer: it does not matter how often a cache was
copied, cropped, re-ordered or repeated in between.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor

from tokenprune.errors import PromptError

T = TypeVar("T")

_IN_CACHE = "_tokenprune"
"""The attribute of a cache in which what is known of it is kept."""


UNFINISHED = (
    "the call that filled this cache of a pruned prompt did not end, so that what it holds is not "
    "known. Read the prompt again, with a new cache."
)


@dataclass(eq=False)
class Holding(Generic[T]):
    """What a cache holds.

    Attributes
    ----------
    prompt
        What the owner has to know of the prompt that filled it.
    after
        LongTensor [B, n], the tokens that were read after the prompt; None where they are not
        known, because embeddings were read.
    refusal
        Why calls cannot go on from it, or None.
    """

    prompt: T
    after: Tensor | None
    refusal: str | None = None
    # How the cache is recognised: its length when it was left, the layer whose keys tell rows and
    # the first number of each of those keys [B, ...], in the pieces in which they came. Comparing
    # them is spared where the very tensor (with its version) is there still; a cache whose keys
    # cannot be read is known as the very object alone.
    _length: int = 0
    _layer: int | None = None
    _samples: list[Tensor] = field(default_factory=list)
    _seen: Any = None
    _owner: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is only true of the very object."""
        return {**self.__dict__, "_seen": None, "_owner": None}


@dataclass(frozen=True)
class Held(Generic[T]):
    """A cache that was found to hold a known prompt.

    Attributes
    ----------
    holding
        What is known of it; its `prompt` still is that of all rows, uncut.
    length
        Tokens in it.
    rows
        LongTensor [B], which row of the prompt each row of the cache is; None for all in order.
    """

    holding: Holding[T]
    length: int
    rows: Tensor | None


class Filling(Generic[T]):
    """A call that reads a cache and fills it further.

    Inside the block the cache is open. When the block ends it is noted what it holds; when it ends
    with an exception before anything was filled, the cache is what it was.

    Parameters
    ----------
    cache
        A cache of transformers, or None.

    Attributes
    ----------
    cache
        The same; a call that makes a cache of its own puts it here.
    before
        What the cache was found to hold, or None.
    holding
        What it holds when the block ends; None, where the block does not say, for nothing known.

    Raises
    ------
    PromptError
        When the block begins, if the cache was changed so that what it holds cannot be told.
    """

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.before: Held[T] | None = None
        self.holding: Holding[T] | None = None
        self._noted: Holding[T] | None = getattr(cache, "__dict__", {}).get(_IN_CACHE)

    def __enter__(self) -> Self:
        """Open the cache."""
        self._length = cache_length(self.cache)
        if self._noted is not None:
            self.before = _held(self.cache, self._noted, self._length)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the cache."""
        if self.cache is None:
            return
        length = cache_length(self.cache)
        if error is None:
            if self.holding is not None and length:
                _note(self.cache, self.holding, length)
        elif length != self._length:
            _close(self.cache, Holding(None, None, UNFINISHED))
        elif self.before is not None:
            _close(self.cache, self._noted)


def cache_length(cache: Any) -> int:
    """Return how many tokens a cache holds; 0 for None."""
    return 0 if cache is None else int(cache.get_seq_length())


def _note(cache: Any, holding: Holding[T], length: int) -> None:
    """Note what a cache holds now, and close it.

    Parameters
    ----------
    cache
        Just filled further by a call that knows.
    holding
        What is known of it; one that was found in a cache is carried on.
    length
        Tokens in it.
    """
    if holding._layer is None:
        holding._layer = _layer_to_tell_by(cache, length)
    keys = None if holding._layer is None else cache.layers[holding._layer].keys
    if keys is not None and length > holding._length:
        sample = keys[:, 0, holding._length : length, 0].detach().clone()
        # An offloaded cache moves its keys from call to call.
        device = holding._samples[0].device if holding._samples else sample.device
        holding._samples.append(sample.to(device))
    holding._length = length
    holding._seen = None if keys is None else (weakref.ref(keys), _version(keys))
    holding._owner = weakref.ref(cache)
    _close(cache, holding)


def _held(cache: Any, holding: Holding[T], length: int) -> Held[T] | None:
    """Return what a cache holds, and open it; None where it was emptied since.

    Raises
    ------
    PromptError
        If calls cannot go on from it.
    """
    if length == 0:
        _open(cache)
        return None
    if holding.refusal is not None:
        raise PromptError(holding.refusal)
    rows = _rows(cache, holding, length)
    if length < holding._length:
        holding = _cropped(holding, length)
    if rows is not None:
        holding = _of_rows(holding, rows)
    _open(cache)
    return Held(holding, length, rows)


def _close(cache: Any, holding: Any) -> None:
    """Put into a cache what it holds, and have it refuse to be filled."""
    cache.__dict__[_IN_CACHE] = holding
    if not isinstance(cache, _Sealed):
        plain: Any = type(cache)
        cache.__class__ = _sealed(plain)


def _open(cache: Any) -> None:
    """Take everything off a cache again."""
    cache.__dict__.pop(_IN_CACHE, None)
    if isinstance(cache, _Sealed):
        cache.__class__ = type(cache).plain_class


def _rows(cache: Any, holding: Holding[Any], length: int) -> Tensor | None:
    """Return which row of the holding each row of the cache is; None where nothing moved.

    Raises
    ------
    PromptError
        If rows are not those that were left, or cannot be compared.
    """
    changed = PromptError(
        "this cache of a pruned prompt no longer holds what was left in it, so that its tokens "
        "cannot be told. Go on from the cache as it was returned, or from a copy, a crop "
        "(cache.crop(-n)) or a re-ordering of it; or read the whole prompt again."
    )
    if length > holding._length:  # a shallow copy, whose layers were filled further by the other
        raise changed
    if holding._layer is None:
        # Keys that cannot be read: nothing but the very object, untouched, is known.
        same = holding._owner is not None and holding._owner() is cache
        if not same or length != holding._length:
            raise changed
        return None
    keys = cache.layers[holding._layer].keys
    if holding._seen is not None and length == holding._length:
        reference, version = holding._seen
        if reference() is keys and _version(keys) == version:
            return None
    left = torch.cat(holding._samples, dim=1)
    if length > left.shape[1] or keys.shape[-2] < length:
        raise changed
    now = keys[:, 0, :length, 0].to(left.device)
    same_row = (now[:, None] == left[None, :, :length]).all(dim=-1)  # [rows now, rows left]
    if not bool(same_row.any(dim=1).all()):
        raise changed
    rows = same_row.long().argmax(dim=1)
    # Equal rows are told by their place.
    own = torch.arange(len(rows), device=rows.device)
    in_place = own < same_row.shape[1]
    in_place &= same_row[own, own.clamp(max=same_row.shape[1] - 1)]
    rows = torch.where(in_place, own, rows)
    if len(rows) == same_row.shape[1] and bool((rows == own).all()):
        return None
    return rows


def _version(keys: Tensor) -> int | None:
    """Return how often a tensor was written to; tensors of inference mode do not count it."""
    return None if keys.is_inference() else keys._version


def _cropped(holding: Holding[T], length: int) -> Holding[T]:
    """Return what is known when a cache's end was cut off."""
    samples = torch.cat(holding._samples, dim=1)[:, :length]
    return replace(holding, _length=length, _samples=[samples])


def _of_rows(holding: Holding[T], rows: Tensor) -> Holding[T]:
    """Return what is known of some rows; the owner's part is left to the owner."""
    samples = torch.cat(holding._samples, dim=1)[rows]
    after = None if holding.after is None else holding.after[rows.to(holding.after.device)]
    return replace(holding, after=after, _samples=[samples])


def _layer_to_tell_by(cache: Any, length: int) -> int | None:
    """Return a layer whose keys are all there as they are; None in a cache that has none."""
    for number, layer in enumerate(cache.layers):
        keys = getattr(layer, "keys", None)
        if (
            isinstance(keys, Tensor)
            and keys.ndim == 4
            and keys.shape[-2] >= length
            and not getattr(layer, "is_sliding", False)
            and int(layer.get_seq_length()) == length
        ):
            return number
    return None


# Caches that refuse -------------------------------------------------------------------------------


class _Sealed:
    """Mixed into the class of a cache that holds a pruned prompt while no pruned call is running.

    The cache stays an instance of its own class, and can be copied, cropped and moved.
    """

    plain_class: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so a pickle names the plain one.
        return _rebuilt, (type(self).plain_class,), dict(self.__dict__)


def _refusing(name: str) -> Any:
    """Return a method that fills an emptied cache, and refuses to fill one that holds a prompt."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if cache_length(self):
            raise PromptError(
                "this cache holds a pruned prompt, which this call does not know of. Go on inside "
                "a block of tokenprune_hf.prune, through the whole model; or, for an answer "
                "without pruning, read the prompt again without this cache."
            )
        _open(self)
        return getattr(self, name)(*args, **kwargs)

    method.__name__ = name
    return method


_FILLING = ("update", "update_conv_state", "update_recurrent_state", "update_indexer")
"""Methods by which layers put something into a cache."""


@functools.lru_cache(maxsize=32)
def _sealed(plain: type) -> type:
    """Return a cache's class that refuses; made once for each class."""
    methods = {name: _refusing(name) for name in _FILLING if hasattr(plain, name)}
    return type(plain.__name__, (_Sealed, plain), {**methods, "plain_class": plain})


def _rebuilt(plain: type) -> Any:
    """Return an empty instance of a sealed class, for copies and pickles."""
    kind: Any = _sealed(plain)
    return kind.__new__(kind)
