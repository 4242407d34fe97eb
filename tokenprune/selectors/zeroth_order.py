"""zeroth-order: keep the tokens the projector reacts to most, and no two alike (ZOO-Prune)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from tokenprune.errors import OptionError, TokensError
from tokenprune.numerics import blocks_of, first_equal_row, full_precision
from tokenprune.projectors import LiftedProjector, MLPProjector
from tokenprune.selectors.base import Selector, top_k
from tokenprune.selectors.diversity import pick_diverse
from tokenprune.tokens import Projector, TokenBatch

_ROWS = 4096  # rows pushed through the projector at once, tokens times directions


@dataclass(frozen=True)
class ZerothOrder(Selector):
    """Sensitivity of the projector at each token, then sensitivity-aware diversity (SADS).

    With ``J_i`` the projector's Jacobian at the feature x_i, and u the unit directions,

        S_i = mean over u of ||J_i u||_2
        s_i = (S_i - min S) / (max S - min S + 1e-8), or 1 everywhere where all S are equal
        first the token of largest s, then always that of largest s_i * (1 - max_j cos(z_i, z_j)),

    j over the tokens taken so far and z the projected tokens. The lowest index wins a tie, and
    tokens with s_i = 0 come after all others, as the formula has it while no token taken has an
    exact copy.

    Source: "ZOO-Prune", arXiv 2509.24837, its released code and proposition 3.1. The paper draws
    new directions for every image; here they come from a seed of the method's own, so the same
    item always gets the same selection. The paper's estimator is ``"finite-difference"``.

    Parameters
    ----------
    estimator
        How S is found, all in float32 or better whatever the model's dtype.

        ``"frobenius"``: the root mean square over all directions instead of the mean over a few,
        ``||J_i||_F / sqrt(C)``, in closed form. No randomness, and by far the cheapest; closer to
        the paper's estimator at 4,096 directions than the paper's own 64 are. It needs the
        projector as a `tokenprune.MLPProjector`.

        ``"jvp"``: the exact derivative along the paper's directions, for any projector that torch
        can differentiate.

        ``"finite-difference"``: the paper's ``[M(x + h u) - M(x - h u)] / 2h``.
    directions
        How many directions (not for ``"frobenius"``).
    step
        h (only for ``"finite-difference"``).
    seed
        Seed of the directions (not for ``"frobenius"``).
    diversity
        False to keep the tokens of largest S whatever they resemble.

    Raises
    ------
    OptionError
        On construction, for a value that cannot be used.
    """

    estimator: Literal["frobenius", "jvp", "finite-difference"] = "frobenius"
    directions: int = 64
    step: float = 0.01
    seed: int = 0
    diversity: bool = True

    name: ClassVar[str] = "zeroth-order"
    summary: ClassVar[str] = "how strongly the projector reacts to each token, and diversity"
    paper: ClassVar[str] = "ZOO-Prune, arXiv 2509.24837"
    needs: ClassVar[tuple[str, ...]] = ("features", "embeddings", "projector")

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, fits, wanted in (
            ("directions", self.directions >= 1, "at least 1 (the paper has 64)"),
            ("step", self.step > 0, "above 0 (the paper has 0.01)"),
            ("seed", 0 <= self.seed < 2**63, "between 0 and 2**63 - 1"),
        ):
            if not fits:
                raise OptionError(
                    f"option {option}={getattr(self, option)!r} of method {self.name!r} must be "
                    f"{wanted}."
                )

    def score(self, tokens: TokenBatch) -> Tensor:
        """Return S, float32 [B, N]: how strongly the projector reacts to each token.

        Raises
        ------
        OptionError
            If the estimator cannot work with this projector; the message says which can.
        TokensError
            If S is not finite.
        """
        features = tokens.require("features")
        with torch.no_grad(), full_precision(features.device):
            measure = self._measure(tokens.require_projector(), features)
            # One item at a time: products of the same shape round the same way in any batch.
            scores = torch.stack([_with_exact_ties(measure, item) for item in features])
        finite = scores.isfinite().all(dim=-1)
        if not bool(finite.all()):
            raise TokensError(
                f"{tokens.labels[int((~finite).nonzero()[0])]}: the projector's sensitivity is not "
                "finite. Check the projector's weights and the features' range."
            )
        return scores

    def pick(self, tokens: TokenBatch, scores: Tensor, keep: int) -> Tensor:
        """Return LongTensor [B, K], ascending: by S [B, N], and with `diversity` no two alike."""
        if not self.diversity:
            return top_k(scores, keep)
        lowest, highest = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
        weights = ((scores - lowest) / (highest - lowest + 1e-8)).masked_fill(lowest == highest, 1)
        return pick_diverse(tokens.require("embeddings"), keep, weights, weights.argmax(dim=-1))

    def _measure(self, projector: Projector, features: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the function from the features [N, C] of one item to its S [N]."""
        width = features.shape[-1]
        dtype = _working_dtype(projector, features)
        function = _lift(projector, dtype)
        if self.estimator == "frobenius":
            if not isinstance(function, LiftedProjector):
                raise OptionError(
                    f"estimator='frobenius' of method {self.name!r} needs the projector as a "
                    f"tokenprune.MLPProjector, whose structure it knows, not as a "
                    f"{type(projector).__name__}. Wrap it in one, or pass estimator='jvp', which "
                    "takes any projector."
                )
            closed = function
            return lambda item: closed.jacobian_norm(item) / math.sqrt(width)
        directions = _unit_directions(self.directions, width, self.seed).to(features.device, dtype)
        if self.estimator == "jvp" and isinstance(function, LiftedProjector):
            linearised = function
            return lambda item: linearised.directional_norm(item, directions)
        derivative = self._forward_mode if self.estimator == "jvp" else self._difference
        _check_evaluates(projector, function, features[0, :1].to(dtype))
        return lambda item: _mean_norm(function, derivative, item.to(dtype), directions)

    def _forward_mode(self, function: Projector, points: Tensor, along: Tensor) -> Tensor:
        return cast(Tensor, torch.func.jvp(function, (points,), (along,))[1])

    def _difference(self, function: Projector, points: Tensor, along: Tensor) -> Tensor:
        ahead, behind = points + self.step * along, points - self.step * along
        return (function(ahead) - function(behind)) / (2.0 * self.step)


def _with_exact_ties(measure: Callable[[Tensor], Tensor], item: Tensor) -> Tensor:
    """Return S, float32 [N], bit-equal for equal rows: a matrix product does not promise that."""
    # A copy starts at an aligned address, as an item that comes alone does.
    return measure(item.clone()).float()[first_equal_row(item)]


def _mean_norm(
    function: Projector,
    derivative: Callable[[Projector, Tensor, Tensor], Tensor],
    features: Tensor,
    directions: Tensor,
) -> Tensor:
    """Return the mean over directions of ||derivative||_2 at each row of `features`, [N]."""
    count = len(directions)
    totals = []
    for rows in blocks_of(features, max(1, _ROWS // count)):
        total = rows.new_zeros(len(rows))
        for part in blocks_of(directions, _ROWS):
            shape = (len(part), *rows.shape)
            points = rows.expand(shape).reshape(-1, rows.shape[-1])
            along = part.unsqueeze(1).expand(shape).reshape(-1, rows.shape[-1])
            slopes = derivative(function, points, along)
            total += torch.linalg.vector_norm(slopes, dim=-1).view(shape[:2]).sum(0)
        totals.append(total)
    return torch.cat(totals) / count


def _unit_directions(count: int, width: int, seed: int) -> Tensor:
    """Return float32 [count, width] on the CPU: N(0, I) scaled to unit length, from `seed` only."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    drawn = torch.randn(count, width, generator=generator, dtype=torch.float32, device="cpu")
    norms: Tensor = torch.linalg.vector_norm(drawn, dim=-1, keepdim=True)
    return drawn.div_(norms.add_(1e-12))


def _working_dtype(projector: Projector, features: Tensor) -> torch.dtype:
    """Return float32, or float64 where the features or the projector's weights have it."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    if isinstance(projector, MLPProjector):
        dtype = torch.promote_types(dtype, projector.first.weight.dtype)
    elif isinstance(projector, nn.Module):
        for parameter in projector.parameters():
            if parameter.is_floating_point():
                dtype = torch.promote_types(dtype, parameter.dtype)
    return dtype


def _lift(projector: Projector, dtype: torch.dtype) -> Projector:
    """Return the projector as a function that computes in `dtype`, where that can be arranged."""
    if isinstance(projector, MLPProjector):
        return projector.lifted(dtype)
    if not isinstance(projector, nn.Module):
        return projector
    module = projector
    state: dict[str, Any] = {
        name: tensor.detach().to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    }

    def call(features: Tensor) -> Tensor:
        return cast(Tensor, torch.func.functional_call(module, state, (features,)))

    return call


def _check_evaluates(projector: Projector, function: Projector, sample: Tensor) -> None:
    """Raise OptionError unless `function` takes and returns the dtype of `sample` [1, C]."""
    hint = (
        f"The scores are computed in {sample.dtype}, so the projector "
        f"({type(projector).__name__}) must be a torch.nn.Module, a tokenprune.MLPProjector or a "
        "function that works in that dtype. Pass one of these."
    )
    try:
        result = function(sample)
    except RuntimeError as error:
        raise OptionError(f"the projector cannot be evaluated: {error}. {hint}") from error
    if result.dtype != sample.dtype:
        raise OptionError(f"the projector returned {result.dtype}. {hint}")
