"""Whether a layer computes ``x @ weight.T + bias`` with the weight that it shows.

Closed forms rest on that. Adapters, hooks, quantisation, offloading and replaced forwards all break
it, and none of them says so: a weight is still there to be read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_Hook = TypeVar("_Hook", bound=Callable[..., Any])

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes of weights that are numbers and not codes for them."""


PLAIN_TYPES: set[type[Tensor]] = {Tensor, nn.Parameter}
"""Types of tensors that hold their numbers. Others hold codes, shards or promises of them."""

_WATCHES = "only_watches"


def only_watches(hook: _Hook) -> _Hook:
    """Mark a hook as one that reads calls and changes nothing, and return it.

    The hooks of another thread that watches the same projector must not change how it is measured.
    """
    setattr(hook, _WATCHES, True)
    return hook


def why_altered(module: nn.Module) -> str | None:
    """Return what was put on a module that may change what it computes, or None.

    Parameters
    ----------
    module
        Any module; its children are not checked.
    """
    if "forward" in vars(module) and not _only_moved(module):
        if hasattr(module, "_hf_hook"):
            return "accelerate fetches the weights for each call (offloading)"
        return "the forward was replaced"
    hooks = (*list(module._forward_hooks.values()), *list(module._forward_pre_hooks.values()))
    if not all(getattr(hook, _WATCHES, False) for hook in hooks):
        return "hooks see the call and may change it"
    if parametrize.is_parametrized(module):
        return "the weights are parametrized"
    return None


def why_not_plain(layer: Any) -> str | None:
    """Return why a layer may compute something else than its weight says, or None.

    Parameters
    ----------
    layer
        A module, or anything else with ``weight`` and ``bias``, which is taken at its word.
    """
    if isinstance(layer, nn.Module):
        reason = why_altered(layer)
        if reason is not None:
            return reason
        if type(layer).forward is not nn.Linear.forward:
            return f"the kind is {_full_name(type(layer))}, which is no plain linear layer"
    bias = getattr(layer, "bias", None)
    return _why_no_matrix(getattr(layer, "weight", None)) or (
        None if bias is None else why_not_loaded("bias", bias)
    )


def why_not_loaded(name: str, tensor: Any) -> str | None:
    """Return why a tensor does not hold its numbers, or None.

    Parameters
    ----------
    name
        What to call it.
    tensor
        What a layer has under that name.
    """
    if not isinstance(tensor, Tensor):
        return f"the {name} is no tensor (packed, as quantisation does)"
    if type(tensor) not in PLAIN_TYPES:
        return f"the {name} is a {_full_name(type(tensor))}, no plain tensor"
    if tensor.is_meta:
        return f"the {name} is not in memory (offloaded, or not loaded)"
    return None


def _why_no_matrix(weight: Any) -> str | None:
    """Return why a weight cannot be read as a matrix of floating point numbers, or None."""
    reason = why_not_loaded("weight", weight)
    if reason is not None:
        return reason
    if weight.dtype not in FLOATS or weight.ndim != 2 or weight.layout is not torch.strided:
        return (
            f"the weight has dtype {weight.dtype} and shape {list(weight.shape)}; it must be an "
            "unquantised matrix"
        )
    return None


def _only_moved(module: nn.Module) -> bool:
    """Say whether accelerate moves a module's inputs to its device, and does nothing else.

    It puts such hooks on every layer where a model is spread over several devices.
    """
    hook = vars(module).get("_hf_hook")
    hooks: Any = getattr(hook, "hooks", (hook,))
    moved = all(
        type(single).__name__ == "AlignDevicesHook" and not single.offload for single in hooks
    )
    before = getattr(vars(module).get("_old_forward"), "__func__", None)
    return moved and before is type(module).forward


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
