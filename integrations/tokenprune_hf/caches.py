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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

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

_CHANGED = (
    "this cache of a pruned prompt no longer holds what was left in it, so that its tokens "
    "cannot be told. Go on from the cache as it was returned, or from a copy, a crop "
    "(cache.crop(-n)) or a re-ordering of it; or read the whole prompt again."
)


class Cache(Protocol):
    """What is used of a cache of transformers."""

    @property
    def layers(self) -> Sequence[Any]:
        """One for each decoder layer; most kinds have `keys` [B, G, K, d]."""

    def get_seq_length(self) -> int:
        """Return how many tokens it holds."""


@dataclass(frozen=True, eq=False)
class _Trace:
    """By what a cache is recognised.

    A sample of one layer's keys is compared: one number a token tells which row of the batch it
    was, as equal prompts alone have equal keys. That is spared where the very tensor is there still
    and was not written to.

    Attributes
    ----------
    length
        Tokens in the cache when it was left.
    layer
        The layer; None where no layer's keys can be read. The cache is then known as the very
        object, with as many tokens, and as nothing else.
    samples
        The first number of each of its keys, [B, n] each, in the pieces in which calls added them.
    keys, version
        The layer's keys, and how often they had been written to.
    owner
        The cache.
    """

    length: int = 0
    layer: int | None = None
    samples: tuple[Tensor, ...] = ()
    # Weak, so that the note keeps no keys alive that the cache itself has given up.
    keys: weakref.ref[Tensor] | None = None
    version: int | None = None
    owner: weakref.ref[Cache] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is only true of the very object."""
        return {**self.__dict__, "keys": None, "version": None, "owner": None}

    def left(self, cache: Cache, length: int) -> _Trace:
        """Return that of a cache of this trace which a call that knows has filled further."""
        layer = _layer_to_tell_by(cache, length) if self.layer is None else self.layer
        owner = weakref.ref(cache)
        if layer is None:
            return replace(self, length=length, owner=owner, keys=None)
        # Only what was added is copied: a loop of steps costs a few bytes each, not the prompt.
        keys: Tensor = cache.layers[layer].keys
        samples = self.samples
        if length > self.length:
            added = keys[:, 0, self.length : length, 0].detach().clone()
            # An offloaded cache moves its keys from call to call.
            samples = (*samples, added.to(samples[0].device if samples else added.device))
        return _Trace(length, layer, samples, weakref.ref(keys), _version(keys), owner)

    def rows_of(self, cache: Cache, length: int) -> Tensor | None:
        """Return which row of those left each row of a cache is; None where nothing moved.

        Raises
        ------
        PromptError
            If rows are not those that were left, or cannot be compared.
        """
        if length > self.length:  # a shallow copy, whose layers were filled further by the other
            raise PromptError(_CHANGED)
        if self.layer is None:
            same_object = self.owner is not None and self.owner() is cache
            if not same_object or length != self.length:
                raise PromptError(_CHANGED)
            return None
        keys: Tensor = cache.layers[self.layer].keys
        same_tensor = self.keys is not None and self.keys() is keys
        if same_tensor and length == self.length and _version(keys) == self.version:
            return None
        # Exact equality is right: rows are copies, or they are not what was left.
        left = torch.cat(self.samples, dim=1)
        if length > left.shape[1] or keys.shape[-2] < length:
            raise PromptError(_CHANGED)
        now = keys[:, 0, :length, 0].to(left.device)
        same_row = (now[:, None] == left[None, :, :length]).all(dim=-1)  # [rows now, rows left]
        if not bool(same_row.any(dim=1).all()):
            raise PromptError(_CHANGED)
        rows = same_row.long().argmax(dim=1)
        # Of rows that were left equal (a prompt twice in a batch) `argmax` finds the first. A row
        # that is equal to the one in its own place has not moved.
        places = torch.arange(len(rows), device=rows.device)
        in_place = places < same_row.shape[1]
        in_place &= same_row[places, places.clamp(max=same_row.shape[1] - 1)]
        rows = torch.where(in_place, places, rows)
        if len(rows) == same_row.shape[1] and bool((rows == places).all()):
            return None
        return rows

    def cropped(self, length: int) -> _Trace:
        """Return that of a cache whose end was cut off."""
        samples = torch.cat(self.samples, dim=1)[:, :length]
        return replace(self, length=length, samples=(samples,))

    def of_rows(self, rows: Tensor) -> _Trace:
        """Return that of a cache of some rows, in any order and with repeats."""
        return replace(self, samples=(torch.cat(self.samples, dim=1)[rows],))


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
    _trace: _Trace = field(default_factory=_Trace)


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

    def __init__(self, cache: Cache | None) -> None:
        self.cache = cache
        self.before: Held[T] | None = None
        self.holding: Holding[T] | None = None
        # Read before the block begins: opening a cache takes the note out of it.
        self._noted: Holding[T] | None = getattr(cache, "__dict__", {}).get(_IN_CACHE)

    def __enter__(self) -> Self:
        """Open the cache."""
        self._length = cache_length(self.cache)
        if self.cache is not None and self._noted is not None:
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
                now = self.holding._trace.left(self.cache, length)
                _close(self.cache, replace(self.holding, _trace=now))
        elif length != self._length:
            # Some layers were filled by the call and others were not.
            _close(self.cache, Holding(None, None, UNFINISHED))
        elif self.before is not None and self._noted is not None:
            _close(self.cache, self._noted)


def cache_length(cache: Cache | None) -> int:
    """Return how many tokens a cache holds; 0 for None."""
    return 0 if cache is None else int(cache.get_seq_length())


def _held(cache: Cache, holding: Holding[T], length: int) -> Held[T] | None:
    """Return what a cache holds, and open it; None where it was emptied since.

    Raises
    ------
    PromptError
        If calls cannot go on from it.
    """
    if length == 0:  # `cache.reset()` keeps the note, and nothing of what it speaks of
        _open(cache)
        return None
    if holding.refusal is not None:
        raise PromptError(holding.refusal)
    trace = holding._trace
    rows = trace.rows_of(cache, length)
    if length < trace.length:
        trace = trace.cropped(length)
    after = holding.after
    if rows is not None:
        trace = trace.of_rows(rows)
        after = None if after is None else after[rows.to(after.device)]
    _open(cache)
    return Held(replace(holding, after=after, _trace=trace), length, rows)


def _close(cache: Any, holding: Holding[Any]) -> None:
    """Put into a cache what it holds, and have it refuse to be filled."""
    cache.__dict__[_IN_CACHE] = holding
    # By its class: methods made at run time and put on the instance could not be pickled.
    if not isinstance(cache, _Sealed):
        plain: Any = type(cache)
        cache.__class__ = _sealed(plain)


def _open(cache: Any) -> None:
    """Take everything off a cache again."""
    cache.__dict__.pop(_IN_CACHE, None)
    if isinstance(cache, _Sealed):
        cache.__class__ = type(cache).plain_class


def _version(keys: Tensor) -> int | None:
    """Return how often a tensor was written to; tensors of inference mode do not count it."""
    return None if keys.is_inference() else keys._version


def _layer_to_tell_by(cache: Cache, length: int) -> int | None:
    """Return a layer whose keys are all there as they are; None in a cache that has none."""
    for number, layer in enumerate(cache.layers):
        keys = getattr(layer, "keys", None)
        # A quantized layer keeps the last tokens alone in `keys`, a sliding one forgets the first
        # and a cross-attention layer holds no tokens of the prompt.
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

    def __reduce_ex__(self, _protocol: object) -> tuple[Any, ...]:
        # The class is made at run time, so a pickle names the plain one.
        return _rebuilt, (type(self).plain_class,), dict(self.__dict__)


def _refusing(name: str) -> Callable[..., object]:
    """Return a method that fills an emptied cache, and refuses to fill one that holds a prompt."""

    def method(self: Any, *args: object, **kwargs: object) -> object:
        if cache_length(self):
            raise PromptError(
                "this cache holds a pruned prompt, which this call does not know of. Go on inside "
                "a block of tokenprune_hf.prune, through the whole model; or, for an answer "
                "without pruning, read the prompt again without this cache."
            )
        _open(self)  # it was emptied (`cache.reset()`), and is any cache again
        return getattr(self, name)(*args, **kwargs)

    method.__name__ = name
    return method


_FILLING = ("update", "update_conv_state", "update_recurrent_state", "update_indexer")
"""Methods by which layers put something into a cache."""


@functools.lru_cache(maxsize=32)
def _sealed(plain: type) -> type:
    """Return a cache's class that refuses; made once for each class."""
    # The cache stays an instance of its own class, by which transformers tells kinds apart.
    methods = {name: _refusing(name) for name in _FILLING if hasattr(plain, name)}
    return type(plain.__name__, (_Sealed, plain), {**methods, "plain_class": plain})


def _rebuilt(plain: type) -> object:
    """Return an empty instance of a sealed class, for copies and pickles."""
    kind: Any = _sealed(plain)
    return kind.__new__(kind)
