from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenprune import MLPProjector
from tokenprune.errors import UnsupportedModelError
from tokenprune.tower.projectors import LiftedProjector

C = 24


class OnePlusRMSNorm(nn.Module):
    """RMS norm that multiplies by 1 + weight, as some models' do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = 1e-3

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.weight.to(wide.dtype))).to(x.dtype)


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


NORMS: dict[str, tuple[Callable[[], nn.Module | None], int]] = {
    "no norm": (lambda: None, 1),
    "layer norm": (lambda: nn.LayerNorm(C, eps=1e-2), 1),
    "layer norm without gain": (lambda: nn.LayerNorm(C, elementwise_affine=False), 1),
    "layer norm of 4 parts": (lambda: nn.LayerNorm(C // 4), 4),
    "rms norm": (lambda: nn.RMSNorm(C, eps=1e-2), 1),
    "rms norm, default eps, 4 parts": (lambda: nn.RMSNorm(C // 4), 4),
    "1 + weight rms norm": (lambda: OnePlusRMSNorm(C), 1),
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu tanh": nn.GELU("tanh"),
    "quick gelu": quick_gelu,
    "silu": nn.SiLU(),
    "relu": nn.ReLU(inplace=True),
    "mish": nn.Mish(),
    "prelu": nn.PReLU(init=0.3).double(),
}


def make(norm: str, activation: Callable[[Tensor], Tensor] | None, seed: int = 0) -> MLPProjector:
    generator = torch.Generator().manual_seed(seed)
    build, groups = NORMS[norm]
    module = build()
    first = nn.Linear(C, 600)  # more than one block of the quadratic form
    second = nn.Linear(600, 11, bias=False) if activation is not None else None
    for part in (module, first, second):
        for parameter in part.parameters() if part is not None else ():
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        if part is not None:
            part.double()
    return MLPProjector(first, activation, second, module, groups)


def features(count: int = 6, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, C, generator=generator, dtype=torch.float64) * 1.5


def jacobians(projector: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    return torch.stack([torch.func.jacrev(projector)(point) for point in points])


@pytest.mark.parametrize("activation", [*ACTIVATIONS, None])
@pytest.mark.parametrize("norm", NORMS)
def test_closed_forms_are_those_of_autograd(norm: str, activation: str | None) -> None:
    projector = make(norm, ACTIVATIONS[activation] if activation else None)
    points = features()
    jacobian = jacobians(projector, points)
    lifted = projector.lifted(torch.float64)
    torch.testing.assert_close(lifted(points), projector(points), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        lifted.jacobian_norm(points), jacobian.flatten(1).norm(dim=1), rtol=1e-9, atol=1e-9
    )
    directions = F.normalize(features(9, seed=6), dim=-1)
    along = (jacobian @ directions.T).norm(dim=1).mean(-1)
    torch.testing.assert_close(
        lifted.directional_norm(points, directions), along, rtol=1e-9, atol=1e-9
    )


def test_frobenius_is_the_root_mean_square_over_directions() -> None:
    projector = make("layer norm", F.gelu)
    points = features(3)
    directions = F.normalize(features(20_000, seed=7), dim=-1)
    pushed = jacobians(projector, points) @ directions.T
    square = pushed.square().sum(1).mean(-1)
    closed = projector.lifted(torch.float64).jacobian_norm(points).square() / C
    torch.testing.assert_close(closed, square, rtol=0.02, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", NORMS)
def test_a_call_is_the_engines_own_projector(norm: str, dtype: torch.dtype) -> None:
    made = make(norm, F.gelu)
    front, first, second = made.norm or nn.Identity(), made.first, made.second
    assert isinstance(first, nn.Module)
    assert isinstance(second, nn.Module)
    nn.ModuleList([front, first, second]).to(dtype)
    points = features(6).to(dtype).view(2, 3, C)

    def engine(x: Tensor) -> Tensor:
        x = front(x.view(2, 3 * made.norm_groups, -1)).view(2, 3, C)
        result: Tensor = second(F.gelu(first(x)))
        return result

    assert torch.equal(made(points), engine(points))
    assert made(points).dtype == dtype


@pytest.mark.parametrize("norm", ["no norm", "layer norm", "1 + weight rms norm"])
def test_bfloat16_weights_are_worked_with_in_float32(norm: str) -> None:
    made = make(norm, F.silu)
    for part in (made.norm, made.first, made.second):
        if isinstance(part, nn.Module):
            part.bfloat16()
    points = features().bfloat16()
    low = made.lifted(torch.float32).jacobian_norm(points)
    assert low.dtype == torch.float32
    for part in (made.norm, made.first, made.second):
        if isinstance(part, nn.Module):
            part.double()  # exactly the same weights
    torch.testing.assert_close(
        low.double(), made.lifted(torch.float64).jacobian_norm(points), rtol=1e-5, atol=0.0
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("kind", [nn.LayerNorm, partial(nn.RMSNorm, eps=1e-5), OnePlusRMSNorm])
def test_norms_are_told_apart_at_any_gain_and_dtype(
    kind: Callable[[int], nn.Module], scale: float, dtype: torch.dtype
) -> None:
    norm = kind(C)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, std=scale, generator=torch.Generator().manual_seed(0))
    norm.to(dtype)
    points = features().to(dtype)
    lifted = MLPProjector(nn.Linear(C, 3).to(dtype), None, None, norm).lifted(torch.float64)
    assert lifted._norm is not None
    norm.double()
    torch.testing.assert_close(
        lifted._norm(points.double()), norm(points.double()), rtol=1e-4, atol=1e-4 * scale
    )


def norm_now(projector: MLPProjector) -> Tensor:
    return projector.lifted(torch.float64).jacobian_norm(features())


def truth(projector: MLPProjector) -> Tensor:
    frobenius: Tensor = jacobians(projector, features()).flatten(1).norm(dim=1)
    return frobenius


def test_matrices_are_computed_once_and_again_when_weights_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    builds: list[object] = []
    build = LiftedProjector._build_grams

    def counted(self: LiftedProjector, digest: Tensor) -> object:
        builds.append(self)
        return build(self, digest)

    monkeypatch.setattr(LiftedProjector, "_build_grams", counted)
    projector = make("layer norm", F.gelu)
    first, second, norm = projector.first, projector.second, projector.norm
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    assert isinstance(norm, nn.LayerNorm)

    def in_place() -> None:
        with torch.no_grad():
            first.weight.mul_(1.1)

    def through_data() -> None:
        second.weight.data[3, 4] += 0.5

    def replaced() -> None:
        second.weight = nn.Parameter(second.weight.detach() * 0.7)

    def rows_swapped() -> None:
        first.weight.data = first.weight.data.flip(0)

    def gain() -> None:
        norm.weight.data.neg_().add_(0.1)

    def inference() -> None:
        with torch.inference_mode():
            first.weight = nn.Parameter(first.weight.clone(), requires_grad=False)

    def inference_in_place() -> None:
        with torch.inference_mode():
            first.weight.mul_(0.9)

    torch.testing.assert_close(norm_now(projector), truth(projector))
    norm_now(projector)
    assert len(builds) == 1
    for change in (in_place, through_data, replaced, rows_swapped, gain):
        count = len(builds)
        change()
        torch.testing.assert_close(norm_now(projector), truth(projector))
        norm_now(projector)
        assert len(builds) == count + 1, change.__name__
    inference()  # the same values: nothing to compute again
    count = len(builds)
    norm_now(projector)
    assert len(builds) == count
    inference_in_place()
    after = norm_now(projector)
    assert len(builds) == count + 1
    fresh = nn.Linear(C, 600).double()
    fresh.load_state_dict({"weight": first.weight.clone(), "bias": first.bias.detach()})
    same = MLPProjector(fresh, projector.activation, second, norm)
    assert torch.equal(after, norm_now(same))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("activation", ["gelu", "mish", "prelu"])
def test_works_in_every_gradient_mode(
    context: Callable[[], torch.no_grad], activation: str
) -> None:
    expected = norm_now(make("layer norm", ACTIVATIONS[activation]))
    with context():
        made = make("layer norm", ACTIVATIONS[activation])
        got = made.lifted(torch.float64).jacobian_norm(features())
    assert torch.equal(got, expected)
    assert not got.requires_grad


def test_refusals() -> None:
    first, second = nn.Linear(8, 4), nn.Linear(4, 2)
    with pytest.raises(UnsupportedModelError, match="order they run"):
        MLPProjector(second, F.gelu, first)
    with pytest.raises(UnsupportedModelError, match="needs a linear layer after"):
        MLPProjector(first, F.gelu)
    with pytest.raises(UnsupportedModelError, match="norm_groups=3"):
        MLPProjector(first, F.gelu, second, nn.LayerNorm(4), norm_groups=3)
    quantised = nn.Linear(8, 4)
    quantised.weight = nn.Parameter(torch.zeros(4, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"int8.*unquantised"):
        MLPProjector(quantised, F.gelu, second)
    with pytest.raises(UnsupportedModelError, match="neither layer norm nor RMS"):
        MLPProjector(first, F.gelu, second, nn.Softmax(-1)).lifted(torch.float32)


def test_one_linear_layer_is_equally_sensitive_everywhere() -> None:
    made = make("no norm", None)
    got = made.lifted(torch.float64).jacobian_norm(features())
    assert got.unique().numel() == 1
    assert math.isclose(got[0].item(), float(made.first.weight.detach().norm()), rel_tol=1e-12)
