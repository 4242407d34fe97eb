"""Projectors whose weights are not what they compute with, and those whose weights are."""

from __future__ import annotations

import copy
import gc
import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokenprune
from tests.core.stand_ins import KINDS, NO_DERIVATIVE, Adapter, Packed
from tokenprune import MLPProjector, Selection, VisualTokens
from tokenprune.errors import OptionError, UnreadableProjectorError
from tokenprune.tower.model_projector import (
    _GRAMS,
    ModelProjector,
    check_alike,
    in_dtype,
    read_projector,
)

C, H, D, N = 12, 40, 9, 30


def layers(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[nn.Linear, nn.Linear]:
    first, second = nn.Linear(C, H), nn.Linear(H, D)
    generator = torch.Generator().manual_seed(seed)
    for parameter in (*first.parameters(), *second.parameters()):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return first.to(dtype), second.to(dtype)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(projector: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32) -> Any:
    return VisualTokens(
        (1, 5, 6), draw(N, C, seed=1).to(dtype), draw(N, D, seed=2), projector=projector
    )


def select(projector: Callable[[Tensor], Tensor], **options: Any) -> Selection:
    return tokenprune.select(tokens(projector), "zeroth-order", 7, **options)


def true_sensitivity(projector: Callable[[Tensor], Tensor]) -> Tensor:
    """||J||_F / sqrt(C) of each token by reverse mode."""
    rows = tokens(projector).features
    return torch.stack([torch.func.jacrev(projector)(row).norm() / math.sqrt(C) for row in rows])


@pytest.mark.parametrize("inside", ["Sequential", "ModelProjector"])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_layer_computes_counts_and_not_its_weight(
    kind: str, which: int, inside: str
) -> None:
    change, reason = KINDS[kind]
    pair: list[nn.Module] = list(layers())
    plain: list[nn.Module] = list(pair)
    changed, alike = change(copy.deepcopy(pair[which]))  # type: ignore[arg-type]
    pair[which], plain[which] = changed, alike
    module = nn.Sequential(pair[0], nn.GELU(), pair[1])
    projector: Any = module
    if inside == "ModelProjector":
        projector = ModelProjector(
            module,
            lambda: MLPProjector(module[0], module[1], module[2]),  # type: ignore[arg-type]
        )
    with pytest.warns(UserWarning, match="calls the projector instead") as caught:
        selection = select(projector)
    said = [str(one.message) for one in caught if "zeroth-order" in str(one.message)]
    assert len(said) == 1
    assert "(Sequential)" in said[0]
    assert ("differences" in said[0]) == (kind in NO_DERIVATIVE)
    expected = true_sensitivity(nn.Sequential(plain[0], nn.GELU(), plain[1]))
    assert selection.scores is not None
    tolerance = 0.02 if kind in NO_DERIVATIVE else 1e-4
    torch.testing.assert_close(selection.scores, expected, rtol=tolerance, atol=0.0)
    reference = select(MLPProjector(plain[0], nn.GELU(), plain[1]))  # type: ignore[arg-type]
    if kind not in NO_DERIVATIVE:
        assert torch.equal(selection.kept, reference.kept)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert torch.equal(select(projector).kept, selection.kept)
    with pytest.raises(OptionError, match=r"estimator='frobenius'.*needs the projector's weights"):
        select(projector, estimator="frobenius")
    if inside == "ModelProjector":
        with pytest.raises(OptionError, match=reason):
            select(projector, estimator="frobenius")
    if kind in NO_DERIVATIVE:
        with pytest.raises(OptionError, match=r"cannot differentiate .*'finite-difference'"):
            select(projector, estimator="jvp")
    else:
        assert torch.equal(select(projector, estimator="jvp").kept, selection.kept)
    few = select(projector, estimator="finite-difference", directions=5)
    same = select(
        nn.Sequential(plain[0], nn.GELU(), plain[1]), estimator="finite-difference", directions=5
    )
    assert few.scores is not None
    assert same.scores is not None
    torch.testing.assert_close(few.scores, same.scores, rtol=1e-2, atol=0.0)


def norm() -> nn.LayerNorm:
    layer = nn.LayerNorm(C)
    layer.weight.data = 1.0 + 0.3 * draw(C, seed=3)
    return layer


def sequences() -> dict[str, Callable[[], nn.Module]]:
    first, second = layers()
    return {
        "linear": lambda: first,
        "one": lambda: nn.Sequential(first),
        "two": lambda: nn.Sequential(first, nn.GELU(), second),
        "no activation": lambda: nn.Sequential(first, second),
        "norm, one": lambda: nn.Sequential(norm(), first),
        "norm, two": lambda: nn.Sequential(norm(), first, nn.SiLU(), second),
        "rms norm, two": lambda: nn.Sequential(nn.RMSNorm(C), first, nn.ReLU(), second),
        "nested": lambda: nn.Sequential(norm(), nn.Sequential(first, nn.GELU(), second)),
        "with identities": lambda: nn.Sequential(
            nn.Identity(), first, nn.Mish(), nn.Dropout(0.5).eval(), second
        ),
    }


@pytest.mark.parametrize("name", sequences())
def test_plain_modules_are_read_in_closed_form(name: str) -> None:
    module = sequences()[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        auto, closed = select(module), select(module, estimator="frobenius")
    assert auto.scores is not None
    assert closed.scores is not None
    assert torch.equal(auto.scores, closed.scores)
    assert torch.equal(auto.kept, closed.kept)
    torch.testing.assert_close(auto.scores, true_sensitivity(module), rtol=1e-4, atol=0.0)


class Mixing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.roll(1, dims=-1) * x


@pytest.mark.parametrize(
    ("middle", "says"),
    [
        (nn.Softmax(-1), "Softmax between the linear layers does not work element by element"),
        (nn.LayerNorm(H), "LayerNorm between"),
        (Mixing(), "Mixing between"),
        (nn.Sequential(nn.GELU(), nn.GELU()), r"of Linear, GELU, GELU, Linear is not made of"),
        (nn.Dropout(0.5), "Dropout between"),
    ],
)
def test_other_sequences_are_called(middle: nn.Module, says: str) -> None:
    first, second = layers()
    module = nn.Sequential(first, middle, second)
    with pytest.raises(UnreadableProjectorError, match=says):
        read_projector(module)
    if not isinstance(middle, nn.Dropout):
        with pytest.warns(UserWarning, match="exact derivatives along 12 directions"):
            scores = select(module).scores
        torch.testing.assert_close(scores, true_sensitivity(module), rtol=1e-4, atol=0.0)


def test_any_function_is_called() -> None:
    first, _ = layers()

    def function(x: Tensor) -> Tensor:
        return torch.tanh(first(x)).cumsum(-1)

    with pytest.warns(UserWarning, match=r"\(function\): a function does not show its weights"):
        selection = select(function)
    torch.testing.assert_close(selection.scores, true_sensitivity(function), rtol=1e-4, atol=0.0)
    with pytest.raises(OptionError, match="a function does not show its weights"):
        select(function, estimator="frobenius")


def test_auto_with_few_directions_is_jvp() -> None:
    change, _ = KINDS["adapter"]
    first, second = layers()
    module = nn.Sequential(change(first)[0], nn.GELU(), second)
    with pytest.warns(UserWarning, match="along 5 directions"):
        auto = select(module, directions=5, seed=3)
    jvp = select(module, estimator="jvp", directions=5, seed=3)
    assert auto.scores is not None
    assert jvp.scores is not None
    assert torch.equal(auto.scores, jvp.scores)


def test_jvp_along_all_axes_is_the_closed_form() -> None:
    first, second = layers()
    for projector in (MLPProjector(first, nn.GELU(), second), lambda x: second(F.gelu(first(x)))):
        jvp = select(projector, estimator="jvp", directions=C)
        closed = select(MLPProjector(first, nn.GELU(), second), estimator="frobenius")
        torch.testing.assert_close(jvp.scores, closed.scores, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_in_float32_where_it_can_be(dtype: torch.dtype) -> None:
    first, second = layers(dtype)
    adapter = Adapter(first)
    module = nn.Sequential(adapter, nn.GELU(), second)
    low = tokenprune.select(tokens(module, dtype), "zeroth-order", 7, estimator="jvp")
    high = copy.deepcopy(module).float()
    wide = tokens(high, dtype)
    exact = tokenprune.select(wide, "zeroth-order", 7, estimator="jvp")
    assert low.scores is not None
    assert exact.scores is not None
    torch.testing.assert_close(low.scores, exact.scores, rtol=1e-5, atol=0.0)
    assert adapter.down.dtype == dtype  # the module was left alone


def test_a_layer_that_insists_on_its_dtype_is_called_in_it() -> None:
    first, second = layers()

    class Half(Packed):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype != torch.bfloat16:
                raise RuntimeError("this kernel wants bfloat16")
            return super().forward(x)

    half = Half(first)
    module = nn.Sequential(half, nn.GELU(), second.bfloat16())
    with pytest.warns(UserWarning, match="Half, which is no plain|of Half, GELU, Linear"):
        got = tokenprune.select(tokens(module, torch.bfloat16), "zeroth-order", 7).scores
    expected = true_sensitivity(nn.Sequential(half.plain(), nn.GELU(), second.float()))
    assert got is not None
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.0)


class Scaled(nn.Module):
    """A model's projector, as an engine writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = layers()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear_2(F.gelu(self.linear_1(x)))
        return result


def engine_projector(module: Scaled) -> ModelProjector:
    return ModelProjector(module, lambda: MLPProjector(module.linear_1, nn.GELU(), module.linear_2))


def test_what_is_put_on_the_whole_projector_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Scaled()
    projector = engine_projector(module)
    plain = select(projector).scores
    assert plain is not None

    def doubled(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return 2.0 * output

    handle = module.register_forward_hook(doubled)
    with pytest.warns(UserWarning, match="of Scaled, hooks see the call"):
        torch.testing.assert_close(select(projector).scores, 2.0 * plain, rtol=1e-4, atol=0.0)
    handle.remove()
    before = Scaled.forward
    monkeypatch.setattr(Scaled, "forward", lambda self, x: 2.0 * before(self, x))
    with pytest.warns(UserWarning, match="Scaled computes something else than its weights say"):
        torch.testing.assert_close(select(projector).scores, 2.0 * plain, rtol=1e-4, atol=0.0)
    monkeypatch.undo()
    assert torch.equal(select(projector).scores, plain)  # type: ignore[arg-type]
    check_alike(projector, projector.structure())
    module.linear_1 = nn.Identity()  # type: ignore[assignment]
    says = r"of its layer `first`, the kind is .*Identity"
    with pytest.raises(UnreadableProjectorError, match=says):
        projector.structure()


def test_nothing_goes_stale() -> None:
    module = Scaled()
    projector = engine_projector(module)

    def right() -> None:
        expected = true_sensitivity(module)
        torch.testing.assert_close(select(projector).scores, expected, rtol=1e-4, atol=0.0)

    right()
    base = module.linear_1
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
    module(draw(4, C, seed=9)).square().mean().backward()
    optimizer.step()
    right()
    module.load_state_dict(Scaled().state_dict())
    right()
    module.load_state_dict({k: 1.5 * v for k, v in module.state_dict().items()}, assign=True)
    right()
    base = module.linear_1
    adapter = Adapter(base)
    module.linear_1 = adapter  # type: ignore[assignment]
    with pytest.warns(UserWarning, match="Adapter"):
        right()
    adapter.up.data *= 2.0
    right()
    module.linear_1 = adapter.merged()
    right()
    module.linear_1 = base
    right()
    module.double().float()
    right()


def test_matrices_are_shared_while_the_weights_stay_and_go_with_the_module() -> None:
    module = Scaled()
    first, again = engine_projector(module), engine_projector(module)
    select(first)
    grams = _GRAMS[module]
    matrices = grams[torch.float32]
    select(again)
    assert _GRAMS[module][torch.float32] is matrices
    gone = weakref.ref(module)
    del first, again, module
    gc.collect()
    assert gone() is None  # the matrices do not keep it


def test_autocast_changes_nothing() -> None:
    module = nn.Sequential(Adapter(layers()[0]), nn.GELU(), layers()[1])
    expected = select(module, estimator="jvp")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(select(module, estimator="jvp").kept, expected.kept)


def test_another_dtype_is_worked_in_beside_the_module() -> None:
    module = nn.Sequential(Adapter(layers(torch.bfloat16)[0]), nn.GELU())
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    twin = in_dtype(module, torch.float32)
    assert twin is not None
    assert twin(draw(2, C, seed=4)).dtype == torch.float32
    assert module(draw(2, C, seed=4).bfloat16()).dtype == torch.bfloat16
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, before[name])
    assert in_dtype(lambda x: x, torch.float32) is None


class Kernel(Packed):
    """A layer that an engine's kernel for bfloat16 runs; its scales are of another dtype."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype is not torch.bfloat16:
            raise RuntimeError("expect A to be bfloat16")
        return super().forward(x.detach())


def test_kernels_of_one_dtype_are_called_in_it() -> None:
    first, second = layers()
    module = nn.Sequential(Kernel(first), nn.GELU(), Kernel(second))
    with pytest.raises(OptionError, match=r"cannot be evaluated .* expect A to be bfloat16"):
        select(ModelProjector(module))
    projector = ModelProjector(module, dtype=torch.bfloat16)
    assert in_dtype(projector, torch.float32) is None
    assert projector(draw(2, C, seed=4)).dtype is torch.bfloat16
    with pytest.warns(UserWarning, match="calls the projector instead"):
        selection = select(projector)
    plain = nn.Sequential(Packed(first).plain(), nn.GELU(), Packed(second).plain())
    assert selection.scores is not None
    # Differences of numbers with eight bits.
    torch.testing.assert_close(selection.scores, true_sensitivity(plain), rtol=0.1, atol=0.0)


def test_a_method_that_does_not_need_the_projector_never_meets_it() -> None:
    def read() -> MLPProjector:
        raise AssertionError("read")

    class Untouchable(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("called")

    item = tokens(ModelProjector(Untouchable(), read))
    for method in ("uniform", "random", "divprune", "information", "feature-norm"):
        assert len(tokenprune.select(item, method, 7)) == 7


def test_hooks_that_only_move_inputs_leave_weights_readable() -> None:
    class AlignDevicesHook:  # accelerate's, on every layer of a model spread over devices
        offload = False

    module = Scaled()
    expected = select(engine_projector(module)).scores
    hook = AlignDevicesHook()
    for part in module.modules():
        before = part.forward
        part._old_forward, part._hf_hook = before, hook  # type: ignore[assignment]
        part.forward = lambda x, before=before: before(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(select(engine_projector(module)).scores, expected)  # type: ignore[arg-type]
    hook.offload = True
    with pytest.warns(UserWarning, match="accelerate fetches the weights"):
        select(engine_projector(module))
