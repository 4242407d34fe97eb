"""From the rows of an encoder back to the tokens of its tower, in a model of no family.

One run of the encoder is watched module by module, and values are followed backwards: the rows are
what the projector returned, its input is put together of what the tower's last layer or the norm
behind it returned, and that layer has the attention. Values that only move keep every bit, so each
step is found by equality and none is guessed. That the projector makes each row of its own tokens
alone is tried on tokens in another order. What cannot be followed so is not found, with the reason.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.tokens import Projector
from tokenprune.tower.plain_weights import only_watches
from tokenprune.tower.structure import same

_COLUMNS = 64
"""Tokens are told apart by so many of their numbers, and compared by all."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


_COMPILED = "do_not_compile"
"""What vLLM's modules for torch.compile have, which do not run their hooks."""


class NotFoundError(Exception):
    """What stands behind the rows of a model could not be found; says why."""


@dataclass(frozen=True)
class Call:
    """One run of a module.

    Attributes
    ----------
    module
        Which.
    given
        The first tensor among its arguments.
    returned
        The first tensor of what it returned.
    """

    module: nn.Module
    given: Tensor
    returned: Tensor


@contextmanager
def watch_calls(modules: Iterable[nn.Module]) -> Iterator[list[Call]]:
    """Collect the runs of some modules in this thread while the block runs, in their order."""
    thread = threading.get_ident()
    calls: list[Call] = []

    def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given, returned = _first((*args, *kwargs.values())), _first(output)
        if threading.get_ident() == thread and given is not None and returned is not None:
            calls.append(Call(module, given.detach(), returned.detach()))

    # torch has a table of hooks and another of those that take kwargs, and threads may see one of
    # them without the other.
    def hook(module: nn.Module, args: Any, *more: Any) -> None:
        see(module, args, more[0] if len(more) > 1 else {}, more[-1])

    with ExitStack() as stack:
        for module in modules:
            if not hasattr(module, _COMPILED):
                handle = module.register_forward_hook(only_watches(hook), with_kwargs=True)
                stack.callback(handle.remove)
            else:
                stack.enter_context(_forward_seen(module, see))
        yield calls


@contextmanager
def _forward_seen(module: Any, see: Callable[[Any, Any, Any, Any], None]) -> Iterator[None]:
    """Have a module's forward seen in the block, which only one thread may enter at a time."""
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        see(module, args, kwargs, output)
        return output

    had = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if had is not None:
            module.forward = had


def _first(value: Any) -> Tensor | None:
    """Return the first tensor of a tensor, a sequence or a mapping."""
    if isinstance(value, Tensor):
        return value
    if hasattr(value, "values"):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return None
    return next((one for one in value if isinstance(one, Tensor)), None)


# What there is to look at -------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """One layer of a tower.

    Attributes
    ----------
    stack
        Where its tower keeps its layers.
    module
        The layer.
    attention
        The module in it that attends.
    """

    stack: str
    module: nn.Module
    attention: nn.Module


OUTPUTS = ("out_proj", "o_proj", "projection_layer", "proj")
"""What towers call the last projection of an attention."""

APART = (("q_proj", "k_proj", "v_proj"), ("q", "k", "v"))
"""What they call those that make q, k and v (Qwen2.5-Omni's the second)."""

FUSED = ("qkv", "qkv_proj")
"""What they call the one that makes q, k and v."""


def is_attention(module: Any) -> bool:
    """Say whether a module is an attention with its projections under the usual names."""
    apart = any(all(hasattr(module, name) for name in names) for names in APART)
    fused = any(isinstance(getattr(module, name, None), nn.Module) for name in FUSED)
    last = any(isinstance(getattr(module, name, None), nn.Module) for name in OUTPUTS)
    return last and (apart or fused)


def layers_that_attend(
    model: nn.Module, attends: Callable[[nn.Module], bool], besides: Collection[nn.Module]
) -> list[Layer]:
    """Return all numbered layers with an attention of a kind that can be read.

    Parameters
    ----------
    model
        Tower, projector and language model.
    attends
        Says whether a module is such an attention.
    besides
        The modules that are not looked into: the language model.
    """
    named = dict(model.named_modules())
    apart = {id(inner) for module in besides for inner in module.modules()}
    found: dict[str, Layer] = {}
    for name, module in named.items():
        parts = name.split(".")
        numbers = [place for place, part in enumerate(parts) if part.isdigit()]
        if id(module) in apart or not numbers or not attends(module):
            continue
        layer = ".".join(parts[: numbers[-1] + 1])
        stack = ".".join(parts[: numbers[-1]])
        found.setdefault(layer, Layer(stack, named[layer], module))
    return list(found.values())


def to_watch(
    model: nn.Module, layers: Sequence[Layer], besides: Collection[nn.Module]
) -> list[nn.Module]:
    """Return the modules in which rows and tokens may be seen: not the inside of layers."""
    apart = {id(inner) for module in besides for inner in module.modules()}
    own = {id(layer.module) for layer in layers}
    apart |= {id(inner) for layer in layers for inner in layer.module.modules()} - own
    return [module for module in model.modules() if module is not model and id(module) not in apart]


# The way ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A module whose every output is made of its own entries of the input alone.

    Attributes
    ----------
    module
        Which.
    width
        Numbers of one entry of its input.
    entries
        How many entries make one output.
    dimensions
        Dimensions of its input.
    tail
        Shape of an entry, where a convolution takes it; else empty.
    interleaved
        How many tokens are put together in an entry number by number and not one after the other.
    """

    module: nn.Module
    width: int
    entries: int
    dimensions: int
    tail: tuple[int, ...] = ()
    interleaved: int = 1

    def __call__(self, tokens: Tensor, module: Projector | None = None) -> Tensor:
        """Return [n, D] of tokens [..., C], whatever is put together to an output side by side."""
        given = tokens.reshape(-1, self.width)
        if self.interleaved > 1:
            given = given.unflatten(-1, (self.interleaved, -1)).mT.flatten(1)
        if self.tail:
            given = given.reshape(-1, *self.tail)
        else:
            given = given[(None,) * (self.dimensions - 2)]
        returned = _first((module or self.module)(given))
        if returned is None:
            raise NotFoundError(f"{type(self.module).__name__} returns no tokens")
        return returned.reshape(-1, len(self._channels(returned)))

    def _channels(self, returned: Tensor) -> Tensor:
        """Return what has as many entries as an output has numbers."""
        return returned[0].flatten() if self.tail else returned.reshape(-1, returned.shape[-1])[0]


class Chain(nn.Module):
    """A projector that is several modules, one after the other.

    Parameters
    ----------
    steps
        They.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(step.module for step in steps)
        self._steps = tuple(steps)

    def forward(self, features: Tensor) -> Tensor:
        """Return [n, D] of features [n, C]."""
        tokens = features
        # Its own modules, which a twin in another dtype has in their place.
        for step, module in zip(self._steps, self.parts, strict=True):
            tokens = step(tokens, module)
        return tokens.reshape(len(features), -1)


@dataclass(frozen=True)
class Places:
    """What stands behind each row, for images of the same sizes.

    Attributes
    ----------
    features
        LongTensor [R, s], the features of a row, side by side, of all that their source returned;
        -1: none, the row is structure.
    tokens
        LongTensor [R, t], likewise the tokens of the tower's last layer that it was made of.
    """

    features: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Way:
    """The way of tokens from a tower to the rows of the encoder.

    Attributes
    ----------
    layer
        The tower's layer that returned them.
    norm
        The norm behind it, where there is one.
    tower
        What the tower does with them behind it (GLM's convolution).
    projector
        What makes rows of its output.
    width
        Numbers of a row's features.
    """

    layer: Layer
    norm: nn.Module | None
    tower: tuple[Step, ...]
    projector: tuple[Step, ...]
    width: int

    def watched(self) -> list[nn.Module]:
        """Return the modules whose runs `places` looks at."""
        norm = [] if self.norm is None else [self.norm]
        return [self.layer.module, *norm, *(step.module for step in self.tower + self.projector)]

    def returned(self, calls: Sequence[Call]) -> list[Tensor]:
        """Return what the tower's layer returned, run by run."""
        return [call.returned for call in calls if call.module is self.layer.module]

    @property
    def source(self) -> nn.Module:
        """The module that returns features."""
        return self.tower[-1].module if self.tower else self.norm or self.layer.module

    def features(self, calls: Sequence[Call], places: Places) -> Tensor:
        """Return [R, C], the features of each row; of structure, anything."""
        found = self._returned(calls)
        return found[places.features.clamp(min=0).to(found.device)].flatten(1)

    def _returned(self, calls: Sequence[Call]) -> Tensor:
        if self.tower:
            return _channels_last(_of(calls, self.source), self.tower[-1])
        return _of_tower(calls, self.layer, self.norm)

    def places(self, calls: Sequence[Call], rows: Tensor) -> Places:
        """Return what stands behind each row.

        Parameters
        ----------
        calls
            Of the modules of `watched`, in one run of the encoder.
        rows
            [R, D], what it returned.

        Raises
        ------
        NotFoundError
            If some of it is not what it was on the way that was found.
        """
        behind = _indices(rows, _channels_last(_of(calls, self.projector[-1].module)))
        if behind is None or bool((behind < 0).all()):
            raise NotFoundError("the projector does not return the rows that the model reads")
        structure = behind < 0
        places = behind.clamp(min=0)[:, None]
        features = places
        steps = self.tower + self.projector
        for number in range(len(steps) - 1, -1, -1):
            step = steps[number]
            if number + 1 == len(self.tower):
                features = places
            before = (
                _channels_last(_of(calls, steps[number - 1].module), steps[number - 1])
                if number
                else _of_tower(calls, self.layer, self.norm)
            )
            own = _behind(step, _of(calls, step.module), before)
            if own is None:
                raise NotFoundError(_NOT_TOKENS)
            places = own[places].flatten(1)
        if not self.tower:
            features = places
        whole = structure[:, None]
        return Places(torch.where(whole, -1, features), torch.where(whole, -1, places))

    def around(self, run: Projector, features: Tensor) -> Tensor:
        """Send features [..., C] through the projector, in the shape that it takes."""
        flat = features.reshape(-1, features.shape[-1])
        step = self.projector[0]
        projected = step(flat, run) if len(self.projector) == 1 else run(flat)
        return projected.reshape(*features.shape[:-1], -1)

    def module(self) -> nn.Module:
        """Return the projector as one module, which `around` calls."""
        if len(self.projector) == 1:
            return self.projector[0].module
        return Chain(self.projector)


_NOT_TOKENS = (
    "what its rows are made of is not put together of the tokens that a layer of a tower of a "
    "known kind returned"
)
_STEPS = 8
"""At most so many modules make a projector."""


def find_way(calls: Sequence[Call], rows: Tensor, layers: Sequence[Layer]) -> Way:
    """Return the way of tokens from tower to rows, and try it.

    Parameters
    ----------
    calls
        Of the modules of `to_watch`, in one run of the encoder on noise, so that tokens differ.
    rows
        [R, D], what it returned. Those that no projector returns are structure.
    layers
        See `layers_that_attend`.

    Raises
    ------
    NotFoundError
        Saying what could not be found.
    """
    first = next((one for call in calls for one in layers if one.module is call.module), None)
    if first is None:
        raise NotFoundError("its tower has no layers of a known kind")
    ran = {id(call.module) for call in calls}
    tower = [one for one in layers if one.stack == first.stack and id(one.module) in ran]
    inside = {id(layer.module) for layer in tower}
    steps: list[Step] = []
    wanted = rows
    while len(steps) < _STEPS:
        step = _last_step(calls, wanted, inside)
        if step is None:
            break
        steps.insert(0, step)
        start = _start(calls, step, tower)
        if start is not None:
            layer, norm, steps[0] = start
            own = None if norm is None else _row_by_row(norm, calls)
            if own is not None and _in_projector(calls, norm, step.module, layer):
                steps.insert(0, own)
                norm = None
            way = _way(calls, layer, norm, steps)
            way.places(calls, rows)
            return way
        # What stands inside a projector is none: go on with what it is given.
        wanted = _entries(step, _of(calls, step.module))
        inside |= {id(module) for module in step.module.modules()}
    if not steps:
        raise NotFoundError(
            "no module of it returns the rows that the model reads, each made of its own tokens"
        )
    raise NotFoundError(_NOT_TOKENS)


def _way(calls: Sequence[Call], layer: Layer, norm: nn.Module | None, steps: Sequence[Step]) -> Way:
    # A convolution that puts patches together is the tower's, as its families say.
    count = next((n for n, step in enumerate(steps) if not step.tail), len(steps))
    count = min(count, len(steps) - 1)
    way = Way(layer, norm, tuple(steps[:count]), tuple(steps[count:]), 0)
    first = way.projector[0]
    width = first.width * first.entries
    for step in way.projector[1:]:
        # As many of the first outputs as the next one takes together.
        given = step.width * step.entries
        returned = _channels_last(_of(calls, first.module)).shape[-1]
        width *= given // returned
        first = step
    return replace(way, width=width)


def _last_step(calls: Sequence[Call], wanted: Tensor, besides: Set[int]) -> Step | None:
    """Return the outermost module that returns `wanted` [n, C], each made of its own entries."""
    tried: set[int] = set(besides)
    # An outer module returns after those inside.
    for call in reversed(calls):
        if id(call.module) in tried:
            continue
        tried.add(id(call.module))
        if besides & {id(module) for module in call.module.modules()}:
            continue  # it holds what was found already, or the tower
        step = _row_by_row(call.module, calls)
        if step is None:
            continue
        returned = _channels_last(_of(calls, call.module), step)
        if wanted.shape[-1] % returned.shape[-1]:
            continue
        found = _indices(wanted.reshape(-1, returned.shape[-1]), returned)
        if found is not None and bool((found >= 0).any()):
            return step
    return None


def _row_by_row(module: nn.Module, calls: Sequence[Call]) -> Step | None:
    """Return a module as a step; None where an output is not made of its own entries alone."""
    runs = _of(calls, module)
    given, returned = runs[0].given, runs[0].returned
    if not given.is_floating_point() or not returned.is_floating_point() or given.ndim < 2:
        return None
    if given.data_ptr() == returned.data_ptr() and given.shape == returned.shape:
        return None  # it does nothing
    convolves = hasattr(module, "in_channels") and hasattr(module, "kernel_size")  # vLLM's, too
    tail = tuple(given.shape[1:]) if convolves else ()
    if tail and returned[0].numel() != len(returned[0]):
        return None  # a convolution over whole pictures
    width = given[0].numel() if tail else given.shape[-1]
    count = returned.numel() // (len(returned[0]) if tail else returned.shape[-1])
    if not count or (given.numel() // width) % count:
        return None
    step = Step(module, width, given.numel() // width // count, given.ndim, tail)
    try:
        given, returned = _entries(step, runs), _channels_last(runs, step)
        # Each next to others than before, and not all there.
        order = torch.arange(len(returned), device=given.device).flip(0)
        order = order[: max(1, len(returned) // 2)]
        again = step(given[order])
    except Exception:  # it takes more than tokens, or tokens in a shape of its own
        return None
    alike = again.shape == returned[order].shape and bool(same(again, returned[order]).all())
    return step if alike else None


def _start(
    calls: Sequence[Call], step: Step, tower: Sequence[Layer]
) -> tuple[Layer, nn.Module | None, Step] | None:
    """Return which layer's tokens, perhaps behind a norm, a step is given; None if of none."""
    inside = {id(module) for module in step.module.modules()}
    norms = {
        id(call.module): call.module
        for call in calls
        if "norm" in type(call.module).__name__.lower() and id(call.module) not in inside
    }
    for layer in reversed(tower):
        for norm in (None, *norms.values()):
            try:
                tokens = _of_tower(calls, layer, norm)
            except NotFoundError:
                continue
            counts = {1, step.width // tokens.shape[-1]} if not step.tail else set()
            for count in sorted(counts - {0}):
                put = replace(step, interleaved=count)
                if _behind(put, _of(calls, step.module), tokens) is not None:
                    return layer, norm, put
            if step.tail and _behind(step, _of(calls, step.module), tokens) is not None:
                return layer, norm, step
    return None


def _in_projector(
    calls: Sequence[Call], norm: nn.Module | None, module: nn.Module, layer: Layer
) -> bool:
    """Say whether a module that holds no tower has both a norm and what is given its output."""
    for call in calls:
        inside = set(call.module.modules())
        if {norm, module} <= inside and layer.module not in inside:
            return True
    return False


def _of_tower(calls: Sequence[Call], layer: Layer, norm: nn.Module | None) -> Tensor:
    """Return [n, C], the tokens that a layer returned, behind the norm if there is one.

    Raises
    ------
    NotFoundError
        If the norm is given other tokens.
    """
    returned = [call.returned for call in _of(calls, layer.module)]
    tokens = _together(layer.module, returned)
    if norm is None:
        return tokens
    # A pooling head may be normed by the same module.
    sizes = {value.numel() for value in returned}
    runs = [call for call in _of(calls, norm) if call.given.numel() in sizes]
    if not runs or any(call.given.shape != call.returned.shape for call in runs):
        raise NotFoundError("the norm is given other tokens")
    if not _equal(_together(norm, [call.given for call in runs]), tokens):
        raise NotFoundError("the norm is given other tokens")
    return _together(norm, [call.returned for call in runs])


def _entries(step: Step, calls: Sequence[Call]) -> Tensor:
    """Return [n, C], what each output of a step was made of, its entries side by side."""
    given = [call.given.flatten(1) if step.tail else call.given for call in calls]
    flat = _together(step.module, given)
    return flat.reshape(-1, step.width * step.entries)


def _channels_last(calls: Sequence[Call], step: Step | None = None) -> Tensor:
    """Return [n, C], the outputs of a module."""
    returned = [
        call.returned.flatten(1) if step is not None and step.tail else call.returned
        for call in calls
    ]
    return _together(calls[0].module, returned)


def _behind(step: Step, calls: Sequence[Call], tokens: Tensor) -> Tensor | None:
    """Return LongTensor [n, t], which tokens each output of a step was made of.

    None where some are not among `tokens` [m, C].
    """
    given = _entries(step, calls)
    if given.shape[-1] % tokens.shape[-1]:
        return None
    pieces = given.reshape(-1, step.width)
    if step.tail:  # channels first
        pieces = pieces.reshape(len(pieces), step.tail[0], -1).mT
    elif step.interleaved > 1:
        pieces = pieces.unflatten(-1, (-1, step.interleaved)).mT
    if pieces.reshape(len(pieces), -1).shape[-1] % tokens.shape[-1]:
        return None
    found = _indices(pieces.reshape(-1, tokens.shape[-1]), tokens)
    if found is None or bool((found < 0).any()):
        return None
    return found.reshape(len(given), -1)


# Equality of tokens -------------------------------------------------------------------------------


def _of(calls: Sequence[Call], module: nn.Module) -> list[Call]:
    found = [call for call in calls if call.module is module]
    if not found:
        raise NotFoundError(f"{type(module).__name__} did not run")
    return found


def _together(module: nn.Module, values: Sequence[Tensor]) -> Tensor:
    if len({value.shape[-1:] for value in values}) > 1 or not values[0].ndim:
        raise NotFoundError(f"{type(module).__name__} is run on tokens of several widths")
    return torch.cat([value.reshape(-1, value.shape[-1]) for value in values])


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(_bits(one), _bits(other))


def _bits(value: Tensor) -> Tensor:
    """Return numbers as whole ones: what is not finite is equal to itself."""
    return value.contiguous().view(_BITS[value.dtype.itemsize])


def _indices(wanted: Tensor, known: Tensor) -> Tensor | None:
    """Return LongTensor [n]: of each row of `wanted` the row of `known` that equals it; -1: none.

    Of equal rows the first is the first one's, the second the second one's, and so on; where there
    are more of them than known, the last known is that of the rest.

    None where the two cannot be compared.
    """
    if wanted.shape[-1] != known.shape[-1] or wanted.dtype != known.dtype:
        return None
    if wanted.shape == known.shape and _equal(wanted, known):
        return torch.arange(len(wanted), device=wanted.device)
    wanted, known = _bits(wanted), _bits(known)
    marks, others = _marks(wanted), _marks(known)
    order = others.argsort(stable=True)
    ordered = others[order].contiguous()
    start = torch.searchsorted(ordered, marks)
    count = torch.searchsorted(ordered, marks, right=True) - start
    # Of each row its number among the equal ones.
    own = marks.argsort(stable=True)
    ahead = torch.searchsorted(marks[own].contiguous(), marks)
    number = torch.empty_like(own)
    number[own] = torch.arange(len(own), device=own.device) - ahead[own]
    place = start + torch.minimum(number, (count - 1).clamp(min=0))
    found = order[place.clamp(max=len(order) - 1)]
    alike = (count > 0) & (known[found] == wanted).all(dim=-1)
    return torch.where(alike, found, -1)


def _marks(bits: Tensor) -> Tensor:
    """Return int64 [n], by which rows [n, C] of whole numbers are told apart."""
    width = bits.shape[-1]
    columns = torch.arange(0, width, max(1, width // _COLUMNS), device=bits.device)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (len(columns),), generator=generator) * 2 + 1
    return (bits[:, columns].long() * factors.to(bits.device)).sum(dim=-1)
