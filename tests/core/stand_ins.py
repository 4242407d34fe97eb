"""Layers that compute something else than their weight says, as other packages make them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Adapter(nn.Module):
    """A linear layer with a low-rank adapter beside it (LoRA); its weight is the base's."""

    def __init__(self, base: nn.Linear, rank: int = 3) -> None:
        super().__init__()
        self.base_layer = base
        self.in_features = base.in_features
        like: dict[str, Any] = {"dtype": base.weight.dtype}
        generator = torch.Generator().manual_seed(5)
        down = torch.randn(rank, base.in_features, generator=generator).to(**like)
        up = torch.randn(base.out_features, rank, generator=generator).to(**like)
        self.down, self.up = nn.Parameter(0.2 * down), nn.Parameter(0.2 * up)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base_layer(x) + x @ self.down.T @ self.up.T
        return result

    def merged(self) -> nn.Linear:
        layer = copy.deepcopy(self.base_layer)
        layer.weight.data += (self.up @ self.down).detach()
        return layer


class Packed(nn.Module):
    """Codes and scales in place of a weight, which is a method (dynamic quantisation)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        scales = base.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("codes", (base.weight.detach() / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)
        self.register_buffer("offsets", base.bias.detach())

    def weight(self) -> Tensor:
        return self.get_buffer("codes") * self.get_buffer("scales")

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight().to(x.dtype), self.get_buffer("offsets").to(x.dtype))

    def plain(self) -> nn.Linear:
        weight = self.weight()
        layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
        layer.weight.data, layer.bias.data = weight, self.get_buffer("offsets")
        return layer


class Deaf(Packed):
    """Packed, and derivatives are dropped in silence, as a kernel without a formula does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class _Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError


class Refusing(Packed):
    """Packed, with an operation that refuses forward-mode derivatives."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _Opaque.apply(x, self.weight(), self.get_buffer("offsets"))
        return result


class Coded(Tensor):
    """A weight that is a tensor of a class of its own."""


def adapted(layer: nn.Linear) -> tuple[nn.Module, nn.Linear]:
    one = Adapter(layer)
    return one, one.merged()


def packed(kind: type[Packed]) -> Callable[[nn.Linear], tuple[nn.Module, nn.Linear]]:
    def make(layer: nn.Linear) -> tuple[nn.Module, nn.Linear]:
        one = kind(layer)
        return one, one.plain()

    return make


def coded(layer: nn.Linear) -> tuple[nn.Module, nn.Linear]:
    plain = copy.deepcopy(layer)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Coded), requires_grad=False)
    return layer, plain


def offloaded(layer: nn.Linear) -> tuple[nn.Module, nn.Linear]:
    """Weights on the meta device, fetched for each call by a forward of the instance's own."""
    plain = copy.deepcopy(layer)
    layer.to("meta")
    vars(layer)["forward"] = plain.__call__
    return layer, plain


def hooked(layer: nn.Linear) -> tuple[nn.Module, nn.Linear]:
    plain = copy.deepcopy(layer)
    plain.weight.data *= 3.0
    plain.bias.data *= 3.0
    layer.register_forward_hook(lambda _module, _args, output: 3.0 * output)
    return layer, plain


def hooked_before(layer: nn.Linear) -> tuple[nn.Module, nn.Linear]:
    plain = copy.deepcopy(layer)
    plain.weight.data *= 0.5
    layer.register_forward_pre_hook(lambda _module, args: (0.5 * args[0],))
    return layer, plain


def patched(layer: nn.Linear) -> tuple[nn.Module, nn.Linear]:
    plain = copy.deepcopy(layer)
    plain.weight.data, plain.bias.data = -plain.weight.data, -plain.bias.data
    before = layer.forward
    vars(layer)["forward"] = lambda x: -before(x)
    return layer, plain


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2.0 * weight


def parametrized(layer: nn.Linear) -> tuple[nn.Module, nn.Linear]:
    plain = copy.deepcopy(layer)
    plain.weight.data *= 2.0
    parametrize.register_parametrization(layer, "weight", _Doubled())
    return layer, plain


class _Steep(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 4.0 * super().forward(x)


def subclassed(layer: nn.Linear) -> tuple[nn.Module, nn.Linear]:
    plain = copy.deepcopy(layer)
    plain.weight.data *= 4.0
    plain.bias.data *= 4.0
    layer.__class__ = _Steep
    return layer, plain


KINDS: dict[str, tuple[Callable[[nn.Linear], tuple[nn.Module, nn.Linear]], str]] = {
    "adapter": (adapted, r"Adapter, which is no plain linear layer"),
    "packed": (packed(Packed), r"Packed, which is no plain linear layer"),
    "packed, no derivative": (packed(Deaf), r"Deaf, which is no plain"),
    "packed, refuses": (packed(Refusing), r"Refusing, which is no plain"),
    "tensor subclass": (coded, r"weight is a .*Coded, no plain tensor"),
    "offloaded": (offloaded, r"forward was replaced"),
    "forward hook": (hooked, r"hooks see the call"),
    "pre-hook": (hooked_before, r"hooks see the call"),
    "patched": (patched, r"forward was replaced"),
    "parametrized": (parametrized, r"weights are parametrized"),
    "subclass": (subclassed, r"_Steep, which is no plain"),
}
"""Kind -> (what changes a layer and returns it with the plain one that computes alike; reason)."""

NO_DERIVATIVE = ("packed, no derivative", "packed, refuses")
