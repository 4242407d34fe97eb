"""zeroth-order: keep tokens to which the projector is sensitive, and no two alike (ZOO-Prune)."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tokenprune.errors import (
    OptionError,
    UnreadableProjectorError,
    UnsupportedModelError,
)
from tokenprune.greedy import engine
from tokenprune.numerics import directional_derivative, full_precision
from tokenprune.selectors.base import top_k
from tokenprune.selectors.divprune import pick_diverse
from tokenprune.selectors.token_vectors import TokenVectors
from tokenprune.tokens import Projector, TokenBatch
from tokenprune.tower import sensitivity
from tokenprune.tower.model_projector import check_alike, entry_dtype, module_of, read_projector
from tokenprune.tower.projectors import LiftedProjector
from tokenprune.transfer import to_device

_ROWS = 4096  # rows pushed through the projector at once, tokens times directions

_SAID: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
"""What was said of each projector: it is said once."""


@dataclass(frozen=True)
class ZerothOrder(TokenVectors):
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
    item always gets the same selection. The paper's estimator is ``"finite-difference"``. Where all
    S are equal, its code has weights of 0. Its code for LLaVA-NeXT keeps other numbers of tokens,
    ``int(int(2880 r) / crops)`` of each crop for a share of r, means to keep newline tokens beside
    them and, by a slip, keeps as many others; and it measures a projector of rank 128 (`rank`).
    Here a share is one of what unpadding leaves of each crop, rounded half up and not down, and
    newlines stay.

    Parameters
    ----------
    estimator
        How S is computed, in float32 or better wherever the projector allows it.

        ``"auto"``: the closed form if the projector computes with the weights it has, else
        ``"jvp"``, which only calls it: for adapters, quantised or offloaded weights, hooks, or
        any function. One warning says which was taken, and why. If an operation in the projector
        has no derivative (some quantised kernels), differences along the same directions are
        taken, with steps of a twentieth of each feature's length.

        ``"frobenius"``: the root mean square over all directions instead of the mean over a few,
        ``||J_i||_F / sqrt(C)``, in closed form. No randomness, and by far the cheapest; closer to
        the paper's estimator at 4,096 directions than the paper's own 64 are. It needs the
        weights, so a projector that `tokenprune.tower.model_projector.read_projector` can read.

        ``"jvp"``: the exact derivative along the paper's directions, for any projector that torch
        can differentiate. Where C is no larger than `directions`, along the C axes: there is
        nothing left to draw then, and S is that of ``"frobenius"``.

        ``"finite-difference"``: the paper's ``[M(x + h u) - M(x - h u)] / 2h``.
    directions
        How many directions (not for ``"frobenius"``).
    step
        h (only for ``"finite-difference"``).
    seed
        Seed of the directions (not for ``"frobenius"``).
    diversity
        False to keep the tokens of largest S whatever they resemble.
    rank
        Cut the matrices of both linear layers to this rank before S is measured, as the authors'
        code does for LLaVA-NeXT (128); None for the projector as it is. It needs the weights. With
        ``"frobenius"`` it saves no time: it is for their scores.

    Raises
    ------
    OptionError
        On construction, for a value that cannot be used.
    """

    estimator: Literal["auto", "frobenius", "jvp", "finite-difference"] = "auto"
    directions: int = 64
    step: float = 0.01
    seed: int = 0
    diversity: bool = True
    rank: int | None = None

    name: ClassVar[str] = "zeroth-order"
    summary: ClassVar[str] = "how strongly the projector reacts to each token, and diversity"
    paper: ClassVar[str] = "ZOO-Prune, arXiv 2509.24837"
    needs: ClassVar[tuple[str, ...]] = ("features", "embeddings", "projector")
    not_finite: ClassVar[str] = "Check the projector's weights and the features' range."

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, fits, wanted in (
            ("directions", self.directions >= 1, "at least 1 (the paper has 64)"),
            ("step", self.step > 0, "above 0 (the paper has 0.01)"),
            ("seed", 0 <= self.seed < 2**63, "between 0 and 2**63 - 1"),
            ("rank", self.rank is None or self.rank >= 1, "at least 1 (the authors have 128)"),
        ):
            if not fits:
                raise OptionError(
                    f"option {option}={getattr(self, option)!r} of method {self.name!r} must be "
                    f"{wanted}."
                )

    def check_projector(self, projector: Projector) -> None:
        """Raise if what was asked for needs the projector's weights and they cannot be used.

        Raises
        ------
        OptionError
            Saying why, and what needs no weights.
        """
        if self._needs_weights:
            try:
                read_projector(projector)
            except UnsupportedModelError as error:
                raise self._refusal(error) from error

    def score(self, tokens: TokenBatch) -> Tensor:
        """Return S, float32 [B, N]: how strongly the projector reacts to each token.

        Raises
        ------
        OptionError
            If the estimator cannot work with this projector; the message says which can.
        """
        features = tokens.require("features")
        with torch.no_grad(), full_precision(features.device):
            measure = self._measure(tokens.require_projector(), features)
            scores = _with_exact_ties(measure, features)
        return scores

    def pick(self, tokens: TokenBatch, scores: Tensor, keep: int) -> Tensor:
        """Return LongTensor [B, K], ascending: by S [B, N], and with `diversity` no two alike."""
        if not self.diversity:
            return top_k(scores, keep)
        weights, first = engine.scaled(scores)
        return pick_diverse(self.vectors(tokens), keep, weights, first)

    def _measure(self, projector: Projector, features: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the function from the features [N, C] of one item to its S [N]."""
        working = torch.promote_types(
            torch.promote_types(features.dtype, torch.float32), entry_dtype(projector, features)
        )
        try:
            mlp = read_projector(projector)
            lifted = mlp.lifted(working)
            check_alike(projector, mlp)
            if self.rank is not None:
                lifted = mlp.truncated(self.rank).lifted(working)
        except UnsupportedModelError as error:
            if self._needs_weights:
                raise self._refusal(error) from error
            return self._by_calls(projector, features, working, _reason(error))
        return self._by_weights(lifted, features, working)

    def _by_weights(
        self, lifted: LiftedProjector, features: Tensor, working: torch.dtype
    ) -> Callable[[Tensor], Tensor]:
        """Measure with the weights."""
        width = features.shape[-1]
        closed = self.estimator in ("auto", "frobenius")
        if closed or (self.estimator == "jvp" and self.directions >= width):
            return lambda item: lifted.jacobian_norm(item, math.sqrt(width))
        directions = self._directions(features, working)
        if self.estimator == "jvp":
            return lambda item: lifted.directional_norm(item, directions)
        return self._along(lifted, sensitivity.difference(self.step), directions)

    def _by_calls(
        self, projector: Projector, features: Tensor, working: torch.dtype, reason: str
    ) -> Callable[[Tensor], Tensor]:
        """Measure with calls alone; `reason` is why the weights cannot be used."""
        width = features.shape[-1]
        function = sensitivity.callable_form(projector, features, working)
        directions = self._directions(features, working)
        if self.estimator == "finite-difference":
            return self._along(function, sensitivity.difference(self.step), directions)
        derivative: sensitivity.Derivative = directional_derivative
        how = "exact derivatives"
        refused = sensitivity.why_not_differentiable(function, width, directions)
        if refused is not None:
            if self.estimator == "jvp":
                raise OptionError(
                    f"estimator='jvp' of method {self.name!r} cannot differentiate the projector: "
                    f"{refused}. Pass estimator='finite-difference', or 'auto', which takes "
                    "differences there."
                )
            derivative = sensitivity.difference()
            how = f"differences, since it cannot be differentiated ({refused}),"
        if self.estimator == "auto":
            _say_once(
                projector,
                f"method {self.name!r} cannot use the weights of the projector "
                f"({type(module_of(projector) or projector).__name__}): {reason}. It calls the "
                f"projector instead (estimator='jvp'): {how} along "
                f"{min(self.directions, width)} directions. That takes longer, and scores differ "
                "a little from the closed form's.",
            )
        if self.directions >= width:
            return lambda item: (
                sensitivity.jacobian_norm(function, derivative, item.to(working), _ROWS)
                / math.sqrt(width)
            )
        return self._along(function, derivative, directions)

    def _along(
        self, function: Projector, derivative: sensitivity.Derivative, directions: Tensor
    ) -> Callable[[Tensor], Tensor]:
        return lambda item: sensitivity.mean_norm(
            function, derivative, item.to(directions.dtype), directions, _ROWS
        )

    def _directions(self, features: Tensor, working: torch.dtype) -> Tensor:
        drawn = _unit_directions(self.directions, features.shape[-1], self.seed)
        return to_device(drawn, features.device).to(working)

    @property
    def _needs_weights(self) -> bool:
        return self.estimator == "frobenius" or self.rank is not None

    def _refusal(self, error: UnsupportedModelError) -> OptionError:
        if self.rank is not None:
            return OptionError(
                f"rank={self.rank} of method {self.name!r} needs the projector's weights: "
                f"{_reason(error)}. Leave the rank out, or give the projector as a "
                "tokenprune.MLPProjector."
            )
        return OptionError(
            f"estimator='frobenius' of method {self.name!r} needs the projector's weights: "
            f"{_reason(error)}. Leave the estimator out, or pass estimator='jvp', which "
            "takes any projector; or give the projector as a tokenprune.MLPProjector."
        )


def _reason(error: UnsupportedModelError) -> str:
    return error.reason if isinstance(error, UnreadableProjectorError) else str(error).rstrip(".")


def _say_once(projector: Projector, text: str) -> None:
    """Warn of a projector, unless the same was said of it before."""
    subject: Any = module_of(projector) or projector
    try:
        if _SAID.get(subject) == text:
            return
        _SAID[subject] = text
    except TypeError:  # not every callable can be referred to weakly
        pass
    warnings.warn(text, UserWarning, stacklevel=2)


def _with_exact_ties(measure: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
    """Return S, float32 [B, N], bit-equal for equal rows: products of matrices may differ there."""
    # One item at a time: products of the same shape round the same way in any batch.
    measured = [measure(_aligned(item)).float() for item in features]
    scores = measured[0][None] if len(measured) == 1 else torch.stack(measured)
    return scores.gather(1, engine.first_equal_rows(features))


def _aligned(item: Tensor) -> Tensor:
    """Return an item that starts at an aligned address, as all do that come alone.

    On a GPU memory starts there; on the CPU it may be another library's.
    """
    whole = item.is_cuda and item.storage_offset() == 0 and item.is_contiguous()
    return item if whole else item.clone()


def _unit_directions(count: int, width: int, seed: int) -> Tensor:
    """Return float32 [count, width] on the CPU: N(0, I) scaled to unit length, from `seed` only."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    drawn = torch.randn(count, width, generator=generator, dtype=torch.float32, device="cpu")
    norms: Tensor = torch.linalg.vector_norm(drawn, dim=-1, keepdim=True)
    return drawn.div_(norms.add_(1e-12))
