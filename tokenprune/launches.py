"""Count kernel launches and waits for the device, on the path of CUDA tensors, without a GPU.

Tensors of `on_device` say that they are on ``cuda:0`` and hold their numbers in the CPU's memory:
code that branches on the device takes the path it takes on a GPU, and computes real values.

    with counting() as counted:
        tokenprune.select(tokens, "divprune", keep=64)  # tokens made of `on_device` tensors
    counted.kernels, counted.waits

A launch is an operation that runs on the device or copies to, from or on it; views, allocation and
metadata are none. A wait is an operation at which the host stops until the device has done all that
it was given: what ``torch.cuda.set_sync_debug_mode`` would report, and waiting for an event with
nothing launched behind it. Where something was, the device goes on with that meanwhile. Triton
kernels count as one launch each, and run under Triton's interpreter.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tokenprune.tokens import VisualTokens
from tokenprune.tower import plain_weights
from tokenprune.tower.projectors import MLPProjector

DEVICE = torch.device("cuda", 0)
"""Where the tensors of `on_device` say they are."""

_FREE = frozenset(
    f"aten::{name}"
    for name in (
        *("alias", "detach", "lift_fresh", "_reshape_alias", "_unsafe_view", "view", "_to_view"),
        *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    )
)
"""Operations that launch nothing though their schema does not call them views."""

_LAUNCHES = {"sort": 4, "topk": 2, "nonzero": 3, "masked_select": 4}
"""Operations of several launches, as torch's CUDA sources have them for rows of up to 4,096 numbers
(Sort.cpp: indices, two copies, sort; TensorTopK.cpp: gather, sort; Nonzero.cu: sum, two of a
selection). Any other one counts as one launch, which some library calls exceed: a floor."""

_WAITING = frozenset(
    f"aten::{name}"
    for name in (
        *("_local_scalar_dense", "equal", "allclose", "nonzero", "masked_select"),
        *("_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount"),
    )
)
"""Operations that read on the host what the device computed, most often a size."""

_INDEXING = frozenset(
    f"aten::{name}" for name in ("index", "index_put", "index_put_", "_index_put_impl_")
)
_ANY_DEVICE = _INDEXING | {"aten::copy_", "aten::_to_copy"}
"""Operations that take tensors of the CPU beside tensors of the device."""

_HERE = str(Path(__file__))
_TORCH = str(Path(torch.__file__).parent)


@dataclass(frozen=True)
class Frame:
    """A line of Python that was running."""

    module: str
    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{'/'.join(Path(self.file).parts[-2:])}:{self.line} {self.function}"


@dataclass(frozen=True)
class Launch:
    """An operation on the device.

    Attributes
    ----------
    operation
        Its name: ``aten::add``, ``triton::name``.
    kernels
        Kernels and copies that it launches.
    waits
        How often the host waits in it.
    stack
        What was running, innermost first, without torch's own files and Triton's.
    """

    operation: str
    kernels: int
    waits: int
    stack: tuple[Frame, ...]

    def made_by(self, *packages: str) -> bool:
        """Say whether a line of one of these packages launches it, and not what it calls."""
        return bool(self.stack) and self.stack[0].module.partition(".")[0] in packages

    def inside(self, is_inside: Callable[[Frame], bool]) -> bool:
        """Say whether a frame on the stack is one of those asked for."""
        return any(map(is_inside, self.stack))


@dataclass
class Counted:
    """The operations that ran inside a block of `counting`, in their order."""

    launches: list[Launch] = field(default_factory=list, repr=False)

    @property
    def kernels(self) -> int:
        """Kernels and copies launched."""
        return sum(launch.kernels for launch in self.launches)

    @property
    def waits(self) -> int:
        """How often the host waited for the device."""
        return sum(launch.waits for launch in self.launches)

    def where(self, holds: Callable[[Launch], bool]) -> Counted:
        """Return those launches for which `holds` is true."""
        return Counted(list(filter(holds, self.launches)))

    def waiting(self) -> list[tuple[str, int]]:
        """Return where the host waited and how often, most often first."""
        places: Counter[str] = Counter()
        for launch in self.launches:
            if launch.waits:
                asking = (each for each in launch.stack if each.module != "tokenprune.transfer")
                place = str(next(asking, "?"))
                places[f"{place} ({launch.operation})"] += launch.waits
        return places.most_common()


class DeviceTensor(Tensor):
    """A tensor that says it is on `DEVICE`, and computes on the CPU."""

    on_cpu: Tensor

    # Operations reach `__torch_dispatch__`, below autograd; nothing is done above it.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type[DeviceTensor], on_cpu: Tensor) -> DeviceTensor:
        """Return a tensor of the device over the memory of one of the CPU."""
        # torch makes no views of plain tensors as inference tensors outside its own kernels.
        with torch.inference_mode(False):
            made: DeviceTensor = torch.Tensor._make_wrapper_subclass(
                cls,
                on_cpu.shape,
                strides=on_cpu.stride(),
                storage_offset=on_cpu.storage_offset(),
                dtype=on_cpu.dtype,
                device=DEVICE,
                requires_grad=on_cpu.requires_grad,
            )
            made.on_cpu = on_cpu.detach()
        return made

    def __init__(self, on_cpu: Tensor) -> None: ...

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.on_cpu!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _deep_copied(self, memo)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        function: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation outside of `counting`."""
        return _run(function, args, dict(kwargs or {}))[0]

    # Both read the memory that a tensor of the device does not have.
    def tolist(self) -> Any:
        """Return the numbers as Python's, copied to the host first."""
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Raise, as tensors on a GPU do, unless forced."""
        if not force:
            raise TypeError("can't convert a tensor on cuda:0 to numpy. Use Tensor.cpu() first.")
        return self.cpu().numpy()


plain_weights.PLAIN_TYPES.add(DeviceTensor)  # its numbers are there to be read


def on_device(value: Any) -> Any:
    """Return tensors, also those in lists, tuples and dicts, as tensors of `DEVICE`.

    A module is changed in place: its parameters and buffers become such tensors. So is an item's
    projector, if it is a module or made of them.

    Parameters
    ----------
    value
        Tensors of the CPU, a module, `VisualTokens`, or lists, tuples and dicts of them.

    Returns
    -------
    Any
        The same with tensors of the device; they share the memory of those given.
    """
    torch._C._ensureCUDADeviceGuardSet()  # without a GPU, torch's own code must not look for one
    return tree_map(_moved_there, value)


def _moved_there(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _wrapped(value)
    if isinstance(value, VisualTokens):
        parts = {part.name: getattr(value, part.name) for part in fields(value)}
        return replace(value, **{name: _moved_there(part) for name, part in parts.items()})
    if isinstance(value, MLPProjector):
        for part in (value.first, value.second, value.norm):
            _moved_there(part)
    if isinstance(value, nn.Module):
        _move_module(value)
    return value


def _move_module(outer: nn.Module) -> None:
    """Put parameters and buffers on the device, each once, so that tied weights stay tied."""
    moved: dict[int, Any] = {}
    for module in outer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                made = nn.Parameter(_wrapped(parameter.data), parameter.requires_grad)
                module._parameters[name] = moved.setdefault(id(parameter), made)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = moved.setdefault(id(buffer), _wrapped(buffer))


@contextmanager
def counting(run_kernels: bool = True) -> Iterator[Counted]:
    """Count what runs on tensors of `on_device` inside the block.

    Tensors that are made with ``device="cuda"`` inside the block are such tensors, too.

    Parameters
    ----------
    run_kernels
        False to count Triton kernels without running them: what they would write is 0 then, and
        whoever only counts need not wait for an interpreter.

    Yields
    ------
    Counted
        Complete when the block ends.

    Raises
    ------
    NotImplementedError
        For what cannot be counted: an operation that mixes devices where CUDA would refuse it, or
        one that changes a tensor's shape in place.
    """
    torch._C._ensureCUDADeviceGuardSet()
    counted = Counted()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # Of autocast, which is switched off for a device that is not there.
        warnings.filterwarnings("ignore", message=".*CUDA is not available.*")
        for patched in _triton_runs(counted, run_kernels):
            stack.enter_context(patched)
        stream = _Stream(counted)
        stack.enter_context(patch.object(torch.cuda, "current_stream", lambda *_: stream))
        stack.enter_context(_Factories(counted, empty_is_zero=not run_kernels))
        stack.enter_context(_Operations(counted, empty_is_zero=not run_kernels))
        yield counted


class _Stream:
    """The device's only stream."""

    def __init__(self, counted: Counted) -> None:
        self._counted = counted

    def record_event(self) -> _Event:
        """Return an event behind what was launched so far."""
        return _Event(self._counted)


class _Event:
    """A place in what the device was given to do."""

    def __init__(self, counted: Counted) -> None:
        self._counted = counted
        self._behind = len(counted.launches)

    def synchronize(self) -> None:
        """Wait until the device has come here: a wait where it has nothing else to do."""
        if len(self._counted.launches) == self._behind:
            _note(self._counted, "cuda::event_synchronize", 0, 1)


class _Operations(TorchDispatchMode):
    """Counts operations below autograd, also those that torch's C++ code calls."""

    def __init__(self, counted: Counted, empty_is_zero: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._counted = counted
        self._empty_is_zero = empty_is_zero

    def __torch_dispatch__(
        self,
        function: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if _any_wrapped(args, kwargs):
            # Inference mode hands over operations whole that are made of others.
            with self:
                result = function.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result, kernels, waits = _run(function, args, kwargs)
        if self._empty_is_zero and "empty" in function._schema.name and _any_wrapped(result):
            result.on_cpu.zero_()
        if kernels or waits:
            _note(self._counted, function._schema.name, kernels, waits)
        return result


class _Factories(TorchFunctionMode):
    """Does what never reaches an operation without a GPU."""

    def __init__(self, counted: Counted, empty_is_zero: bool) -> None:
        super().__init__()
        self._counted = counted
        self._empty_is_zero = empty_is_zero

    def __torch_function__(
        self,
        function: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is F.scaled_dot_product_attention and _any_wrapped(args, kwargs):
            # torch asks the GPU which of its kernels fits; whichever it is, it is one launch.
            _note(self._counted, "aten::scaled_dot_product_attention", 1, 0)
            return _wrapped(function(*_unwrapped(args), **_unwrapped(kwargs)))
        if function in (Tensor.__getitem__, Tensor.__setitem__) and _any_wrapped(args):
            # A list as index is copied to the device.
            return function(args[0], _lists_as_tensors(args[1]), *args[2:], **kwargs)
        if function is Tensor.pin_memory:
            return args[0]  # needs a GPU, and changes nothing that is counted
        if function is Tensor.cuda or (function is Tensor.to and _goes_there(args, kwargs)):
            return _moved(function, args, kwargs)
        if not any(map(_names_device, (*args, *kwargs.values()))):
            return function(*args, **kwargs)
        return self._make(function, args, kwargs)

    def _make(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a tensor on the device."""
        copies = function in (torch.tensor, torch.as_tensor, torch.asarray)
        if copies and not isinstance(args[0], DeviceTensor):  # numbers that are there are read
            args = tree_map(lambda each: each.item() if _any_wrapped(each) else each, args)
        elif _any_wrapped(args, kwargs):  # like another one, which is there already
            kwargs = {name: value for name, value in kwargs.items() if not _names_device(value)}
            return function(*args, **kwargs)
        cpu = torch.device("cpu")
        args, kwargs = tree_map(lambda each: cpu if _names_device(each) else each, (args, kwargs))
        made = function(*args, **kwargs)
        if not isinstance(made, Tensor):
            return made  # torch.autocast and the like
        if self._empty_is_zero and function.__name__.startswith("empty"):
            made.zero_()
        if copies:
            _note(self._counted, "aten::_to_copy", 1, 1)
        elif not function.__name__.startswith("empty") and made.numel():
            _note(self._counted, f"aten::{function.__name__}", 1, 0)
        return _wrapped(made)


def _run(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, int, int]:
    """Run an operation on the CPU; return its result, launches and waits.

    Raises
    ------
    NotImplementedError
        See `counting`.
    """
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    given = {id(each.on_cpu): each for each in tensors if isinstance(each, DeviceTensor)}
    to = kwargs.get("device")
    made_there = to is not None and _names_device(to)
    if not given and not made_there:
        return function(*args, **kwargs), 0, 0
    name: str = function._schema.name
    _check_devices(name, tensors)
    waits, more = _waits(name, args, kwargs)
    if made_there:
        kwargs["device"] = torch.device("cpu")
    result = function(*_unwrapped(args), **_unwrapped(kwargs))
    leaves_it = to is not None and not made_there
    outputs = [each for each in tree_leaves(result) if isinstance(each, Tensor)]

    def there(each: Any) -> Any:
        if not isinstance(each, Tensor) or leaves_it:
            return each
        known = given.get(id(each))
        if known is not None and known.shape != each.shape:
            raise NotImplementedError(
                f"{name} changes a tensor's shape in place, which is not counted."
            )
        return _wrapped(each) if known is None else known

    free = name in _FREE or function.is_view or (outputs and not any(map(torch.numel, outputs)))
    kernels = 0 if free and not waits else _LAUNCHES.get(name.removeprefix("aten::"), 1) + more
    return tree_map(there, result), kernels, waits


def _waits(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    """Return how often the host waits in an operation, and launches that come with it."""
    if name in _WAITING:
        return 1, 0
    if name in ("aten::_to_copy", "aten::copy_"):
        source, target = (args[1], args[0]) if name == "aten::copy_" else (args[0], None)
        here = isinstance(source, DeviceTensor)
        there = isinstance(target, DeviceTensor)
        if target is None:
            device = kwargs.get("device")
            there = here if device is None else _names_device(device)
        blocks = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        # Copies from the device that do not block are the caller's to wait for.
        return int(here != there and blocks), 0
    if name in _INDEXING:
        indices = [index for index in args[1] if index is not None]
        masks = [index for index in indices if index.dtype in (torch.bool, torch.uint8)]
        if masks and name != "aten::index" and args[2].numel() == 1 and len(indices) == 1:
            return 0, 0  # torch fills where the mask is, without looking for indices
        copied = [index for index in indices if not isinstance(index, DeviceTensor)]
        found = [index for index in masks if isinstance(index, DeviceTensor)]
        return len(copied) + len(found), len(copied) + _LAUNCHES["nonzero"] * len(found)
    if name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
        return 1, 1
    return 0, 0


def _check_devices(name: str, tensors: Sequence[Tensor]) -> None:
    """Raise where CUDA would, so that nothing is counted that cannot run there."""
    apart = [each for each in tensors if not isinstance(each, DeviceTensor) and each.ndim]
    if apart and len(apart) < len(tensors) and name not in _ANY_DEVICE:
        raise NotImplementedError(
            f"{name} is given tensors of cuda:0 and of the CPU, which CUDA refuses. Move them to "
            "one device first."
        )


def _moved(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Do `Tensor.to` and `Tensor.cuda` without torch's look at the GPU."""
    source, *rest = args
    if function is Tensor.cuda:
        rest, kwargs = [], {"device": DEVICE, "non_blocking": kwargs.get("non_blocking", False)}
    copy = kwargs.pop("copy", False)
    if rest and isinstance(rest[0], Tensor):
        rest[:1] = [DEVICE, rest[0].dtype]
    _, dtype, non_blocking, memory = torch._C._nn._parse_to(*rest, **kwargs)
    same = isinstance(source, DeviceTensor) and dtype in (None, source.dtype)
    if same and not copy:
        return source
    return torch.ops.aten._to_copy.default(
        source, dtype=dtype, device=DEVICE, non_blocking=non_blocking, memory_format=memory
    )


def _note(counted: Counted, operation: str, kernels: int, waits: int) -> None:
    counted.launches.append(Launch(operation, kernels, waits, tuple(_stack(sys._getframe(1)))))


def _stack(frame: FrameType | None) -> Iterator[Frame]:
    while frame is not None:
        file = frame.f_code.co_filename
        module = str(frame.f_globals.get("__name__"))
        foreign = file.startswith((_TORCH, "<")) or module.partition(".")[0] == "triton"
        if file != _HERE and not foreign:
            yield Frame(module, file, frame.f_lineno, frame.f_code.co_name)
        frame = frame.f_back


def _wrapped(value: Tensor) -> Tensor:
    return value if isinstance(value, DeviceTensor) else DeviceTensor(value)


def _unwrapped(value: Any) -> Any:
    return tree_map(lambda each: each.on_cpu if isinstance(each, DeviceTensor) else each, value)


def _any_wrapped(*values: Any) -> bool:
    return any(isinstance(each, DeviceTensor) for each in tree_leaves(values))


def _goes_there(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Say whether a call of `Tensor.to` names the device, or a tensor that is there."""
    targets = (*args[1:], *kwargs.values())
    return any(isinstance(each, DeviceTensor) or _names_device(each) for each in targets)


def _names_device(value: Any) -> bool:
    """Say whether an argument is the name of the device."""
    if isinstance(value, str):
        return value.partition(":")[0] == "cuda"
    return isinstance(value, torch.device) and value.type == "cuda"


def _lists_as_tensors(index: Any) -> Any:
    """Return an index with its lists as tensors of the CPU."""
    if isinstance(index, tuple):
        return tuple(map(_lists_as_tensors, index))
    return torch.tensor(index) if isinstance(index, list) else index


def _deep_copied(value: DeviceTensor, memo: dict[int, Any]) -> Any:
    if id(value) not in memo:
        made: Tensor = _wrapped(value.on_cpu.clone())
        is_parameter = isinstance(value, nn.Parameter)
        memo[id(value)] = nn.Parameter(made, value.requires_grad) if is_parameter else made
    return memo[id(value)]


# Triton -------------------------------------------------------------------------------------------


def _triton_runs(counted: Counted, runs: bool) -> list[Any]:
    """Return what makes Triton's two ways of running a kernel count it."""
    try:
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction
    except ImportError:
        return []

    def launched(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        there = _any_wrapped(args, kwargs)
        if there and not kwargs.get("warmup"):
            _note(counted, f"triton::{self.__name__}", 1, 0)
        return there

    def interpreted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if launched(self, args, kwargs) and not runs:
            return None
        with torch._C.DisableTorchFunction():  # what the interpreter does is none of the device's
            return run(self, *_unwrapped(args), **_unwrapped(kwargs))

    def compiled(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not launched(self, args, kwargs):
            return run_compiled(self, *args, **kwargs)
        if not runs:
            return None
        with torch._C.DisableTorchFunction(), patch.object(JITFunction, "__call__", called):
            return run(InterpretedFunction(self.fn), *_unwrapped(args), **_unwrapped(kwargs))

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Run what a kernel calls as the kernel itself is run."""
        return InterpretedFunction(self.fn)(*args, **kwargs)

    run, run_compiled = InterpretedFunction.run, JITFunction.run
    return [
        patch.object(InterpretedFunction, "run", interpreted),
        patch.object(JITFunction, "run", compiled),
    ]
