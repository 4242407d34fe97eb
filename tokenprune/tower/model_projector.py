"""ModelProjector: a model's own projector, called as the model calls it and read only when asked.

Most methods never look at the projector, so nothing of it is read until one does. `read_projector`
then says whether its weights can be used in closed form, or why they cannot: the structure is read
anew each time, because adapters come and go, and weights move.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokenprune.errors import UnreadableProjectorError, UnsupportedModelError, reason_of
from tokenprune.tokens import Projector
from tokenprune.tower.plain_weights import FLOATS, why_altered
from tokenprune.tower.projectors import Grams, MLPProjector, known_of

Around = Callable[[Projector, Tensor], Tensor]
"""How a token's features [..., C] go through the module and come out as [..., D]."""

_GRAMS: weakref.WeakKeyDictionary[nn.Module, dict[torch.dtype, Grams]] = weakref.WeakKeyDictionary()
"""Each projector's matrices; they know of which weights they were made."""


class ModelProjector:
    """A model's own projector ``[..., C] -> [..., D]``, with whatever was put on it.

    Parameters
    ----------
    module
        The module that the model calls.
    read
        Returns its structure as it is now; None where that is not known.
    around
        What the model does around the module, for example grouping patches; None for nothing.
    dtype
        The only one in which the module can be called, where the kernels of its quantised layers
        take no other. None where it can be called in that of its weights, and a copy of it with
        its plain weights in another one in that one.
    """

    def __init__(
        self,
        module: nn.Module,
        read: Callable[[], MLPProjector] | None = None,
        around: Around | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.module = module
        self.dtype = dtype
        self._read = read
        self._around = around

    def __call__(self, features: Tensor) -> Tensor:
        """Project `features` [..., C] to [..., D] as the model does, in the module's dtype."""
        return self.through(self.module, features.to(entry_dtype(self, features)))

    def through(self, module: Projector, features: Tensor) -> Tensor:
        """Project `features` with another module in the own one's place."""
        return module(features) if self._around is None else self._around(module, features)

    def structure(self) -> MLPProjector:
        """Return the layers whose weights are what the module computes with.

        Raises
        ------
        UnreadableProjectorError
            Saying why its weights cannot be used.
        """
        if self._read is None:
            raise UnreadableProjectorError(f"the structure of {self!r} is not known")
        reason = why_altered(self.module)
        if reason is not None:
            raise UnreadableProjectorError(f"of {self!r}, {reason}")
        try:
            mlp = self._read()
        except UnsupportedModelError:
            raise
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise UnreadableProjectorError(
                f"{self!r} is not made of the layers that this model's projectors are made of "
                f"({reason_of(error)})"
            ) from error
        mlp.grams = _GRAMS.setdefault(self.module, {})
        return mlp

    def __repr__(self) -> str:
        return type(self.module).__name__


def read_projector(projector: Projector) -> MLPProjector:
    """Return the layers of a projector whose weights are what it computes with.

    Parameters
    ----------
    projector
        An `MLPProjector`, a `ModelProjector`, or a plain ``torch.nn.Linear`` or
        ``torch.nn.Sequential`` of an optional layer norm or RMS norm, a linear layer and, after an
        elementwise activation, another one.

    Raises
    ------
    UnreadableProjectorError
        If it is none of these, or its weights cannot be used; the message says why.
    """
    if isinstance(projector, MLPProjector):
        projector.check()
        return projector
    if isinstance(projector, ModelProjector):
        return projector.structure()
    if isinstance(projector, nn.Module):
        return ModelProjector(projector, lambda: _read_layers(projector)).structure()
    raise UnreadableProjectorError(f"a {type(projector).__name__} does not show its weights")


def check_alike(projector: Projector, mlp: MLPProjector) -> None:
    """Raise unless a projector computes what its structure says, on a probe.

    What is put on a layer shows on the layer; this finds what was done elsewhere, for example to
    the module's class.

    Raises
    ------
    UnreadableProjectorError
        If they differ by more than rounding.
    """
    if projector is mlp:
        return
    weight = mlp.first.weight
    module = module_of(projector)
    known = known_of(module) if module is not None and weight.is_cuda else {}
    if weight.dtype in known:
        return
    rows = probe_rows(weight.shape[1]).to(weight.device, weight.dtype)
    expected, got = mlp(rows), projector(rows)
    # Shards of a matrix are added up in another order.
    tolerance = max(8.0 * torch.finfo(weight.dtype).eps, 1e-4)
    if got.shape != expected.shape or not bool(
        (got - expected).abs().max() <= tolerance * expected.abs().max()
    ):
        raise UnreadableProjectorError(
            f"{_name(projector)} computes something else than its weights say"
        )
    known[weight.dtype] = True


def probe_rows(width: int, count: int = 2) -> Tensor:
    """Return float32 [count, width] on the CPU, always the same: N(0, 1)."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    return torch.randn(count, width, generator=generator, dtype=torch.float32, device="cpu")


def entry_dtype(projector: Projector, features: Tensor) -> torch.dtype:
    """Return the dtype in which a projector takes its features: that of its first real weight."""
    if isinstance(projector, ModelProjector) and projector.dtype is not None:
        return projector.dtype
    if isinstance(projector, MLPProjector):
        dtype = projector.first.weight.dtype
        return dtype if dtype in FLOATS else features.dtype
    module = module_of(projector)
    own = () if module is None else module.parameters()
    return next((one.dtype for one in own if one.dtype in FLOATS), features.dtype)


def module_of(projector: Projector) -> nn.Module | None:
    """Return the module that a projector calls, if it is one or known to call one."""
    if isinstance(projector, ModelProjector):
        return projector.module
    return projector if isinstance(projector, nn.Module) else None


def in_dtype(projector: Projector, dtype: torch.dtype) -> Projector | None:
    """Return a projector that works in another dtype, or None where there is none.

    The module itself is left alone, since other threads may be calling it: a twin has the same
    children, hooks and settings, and converted weights. Weights that are not plain numbers are
    shared, so a quantised layer works as precisely as it does.

    Parameters
    ----------
    projector
        Any.
    dtype
        float32 or float64.
    """
    module = module_of(projector)
    if module is None or (isinstance(projector, ModelProjector) and projector.dtype is not None):
        return None
    twin = _twin(module, dtype, {})
    if isinstance(projector, ModelProjector):
        own = projector
        return lambda features: own.through(twin, features)
    return twin


def _twin(module: nn.Module, dtype: torch.dtype, known: dict[int, nn.Module]) -> nn.Module:
    """Return a module with a dict of weights and children of its own, and all else shared."""
    if id(module) in known:
        return known[id(module)]

    def converted(tensor: Any) -> Any:
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.dtype in FLOATS
        return tensor.detach().to(dtype) if plain and not tensor.is_meta else tensor

    twin: Any = type(module).__new__(type(module))
    known[id(module)] = twin
    state = dict(vars(module))
    state["_parameters"] = {name: converted(one) for name, one in module._parameters.items()}
    state["_buffers"] = {name: converted(one) for name, one in module._buffers.items()}
    state["_modules"] = {
        name: None if child is None else _twin(child, dtype, known)
        for name, child in module._modules.items()
    }
    vars(twin).update(state)
    return cast(nn.Module, twin)


def _name(projector: Projector) -> str:
    module = module_of(projector)
    return type(projector if module is None else module).__name__


def _read_layers(module: nn.Module) -> MLPProjector:
    """Return what a single linear layer, or a plain sequence of layers, computes.

    Raises
    ------
    UnreadableProjectorError
        If it is neither.
    """
    parts = list(_flat(module))
    linear = [isinstance(part, nn.Linear) for part in parts]
    norm = parts.pop(0) if linear[:1] == [False] and len(parts) in (2, 4) else None
    activation = parts.pop(1) if len(parts) == 3 else None
    if len(parts) not in (1, 2) or not all(isinstance(part, nn.Linear) for part in parts):
        kinds = ", ".join(type(part).__name__ for part in _flat(module))
        raise UnreadableProjectorError(
            f"{type(module).__name__} of {kinds or 'nothing'} is not made of a norm or none, a "
            "linear layer and, after an activation, another one"
        )
    if activation is not None and not _is_elementwise(activation):
        raise UnreadableProjectorError(
            f"{type(activation).__name__} between the linear layers does not work element by "
            "element"
        )
    first, *more = cast(list[nn.Linear], parts)
    return MLPProjector(first, activation, more[0] if more else None, norm)


def _flat(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of nested sequences in order, without those that do nothing."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        reason = why_altered(module)
        if reason is not None:
            raise UnreadableProjectorError(f"of a {type(module).__name__} in it, {reason}")
        for child in module:
            yield from _flat(child)
    elif not isinstance(module, nn.Identity) and (
        not isinstance(module, nn.Dropout) or module.training
    ):
        yield module


def _is_elementwise(activation: nn.Module) -> bool:
    """Say whether each number of the output depends on the same number of the input alone."""
    rows = probe_rows(16, 1)[0]
    parameter = next(activation.parameters(), None)
    if parameter is not None:
        rows = rows.to(parameter.device, parameter.dtype)
    with torch.no_grad():
        try:
            whole, part = activation(rows.clone()), activation(rows[:5].clone())
            turned = activation(rows.flip(0))
        except RuntimeError:
            return False
        # Not bit by bit: a vector unit rounds otherwise than what is left over does.
        return torch.allclose(whole[:5], part, atol=1e-4) and torch.allclose(
            whole.flip(0), turned, atol=1e-4
        )
