"""The sensitivity of a projector, measured by calling it.

It is for projectors whose weights cannot be used in closed form: with adapters, quantised or
offloaded weights, and any other function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tokenprune.errors import OptionError
from tokenprune.numerics import blocks_of, directional_derivative
from tokenprune.tokens import Projector
from tokenprune.tower.model_projector import entry_dtype, in_dtype, module_of, probe_rows

Derivative = Callable[[Projector, Tensor, Tensor], Tensor]
"""(function, points [n, C], directions [n, C]) -> the derivative along each, [n, D]."""

_RELATIVE_STEP = 0.05
# A difference with such a step is some percent off; a dropped term takes a whole share away.
_APART = 0.25  # of their length: how far two derivatives at the probe may lie apart


def callable_form(projector: Projector, features: Tensor, working: torch.dtype) -> Projector:
    """Return the projector as a function of features in `working`, in its most precise form.

    A module is called with its plain weights in `working`. Where it does not work so (quantised or
    offloaded weights that insist on a dtype), it is called as the model calls it.

    Parameters
    ----------
    projector
        Any.
    features
        Floating point [..., C], as the projector is given them.
    working
        float32 or float64.

    Raises
    ------
    OptionError
        If it cannot be called with such features at all; the message says what was tried.
    """
    failures = []
    for dtype, function in _forms(projector, features, working):
        rows = probe_rows(features.shape[-1]).to(features.device, working)
        try:
            result = function(rows.to(dtype))
        # Whatever a foreign module raises says that it cannot be called like this.
        except Exception as error:
            failures.append(f"in {dtype}: {type(error).__name__}: {error}")
            continue
        # A plain function that comes back in a lower dtype has thrown away what was asked for.
        fits = result.dtype == dtype or (
            module_of(projector) is not None and result.is_floating_point()
        )
        if fits and result.shape[:-1] == rows.shape[:-1]:
            return _between(function, dtype, working)
        failures.append(f"in {dtype} it returned {result.dtype} {list(result.shape)}")
    name = type(module_of(projector) or projector).__name__
    raise OptionError(
        f"the projector ({name}) cannot be evaluated on [2, {features.shape[-1]}]: "
        f"{'; '.join(failures)}. The scores are computed in {working}: pass a torch.nn.Module, a "
        "tokenprune.MLPProjector or a function that returns the dtype it is given."
    )


def difference(step: float | None = None) -> Derivative:
    """Return the central difference ``[f(x + h u) - f(x - h u)] / 2h``.

    Parameters
    ----------
    step
        h; None for a twentieth of each point's length, which stands out from the rounding of
        quantised and half precision layers.
    """

    def derivative(function: Projector, points: Tensor, along: Tensor) -> Tensor:
        # Central, and not one-sided: the error is of the order of h², not of h.
        size: Tensor | float = step or _twentieth(points)
        moved = size * along
        return (function(points + moved) - function(points - moved)) / (2.0 * size)

    return derivative


def _twentieth(points: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(points, dim=-1, keepdim=True)
    return (lengths * _RELATIVE_STEP).clamp_min(1e-6)  # a point at the origin is moved too


def why_not_differentiable(function: Projector, width: int, like: Tensor) -> str | None:
    """Return why forward-mode derivatives do not pass through a function, or None where they do.

    Some operations refuse; others drop the derivative in silence, so it is compared with a
    difference.

    Parameters
    ----------
    function
        [n, C] -> [n, D].
    width
        C.
    like
        A tensor on the device and of the dtype to work with.
    """
    points, along = probe_rows(width, 4).to(like.device, like.dtype).split(2)
    along = torch.nn.functional.normalize(along, dim=-1)
    try:
        exact = directional_derivative(function, points, along)
    # Operations without a derivative raise errors of many types.
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    near = difference()(function, points, along)
    apart, length = (exact - near).norm(), near.norm()
    return None if bool(apart <= _APART * length) else "an operation in it drops derivatives"


def mean_norm(
    function: Projector,
    derivative: Derivative,
    features: Tensor,
    directions: Tensor,
    at_once: int,
) -> Tensor:
    """Return the mean over directions of ||derivative||_2 at each row of `features`.

    Parameters
    ----------
    function
        [n, C] -> [n, D].
    derivative
        How it is differentiated.
    features
        Floating point [N, C].
    directions
        Of the same dtype, [m, C].
    at_once
        Rows pushed through the function at one time, tokens times directions.

    Returns
    -------
    Tensor
        [N], of that dtype.
    """
    return _summed(function, derivative, features, directions, at_once, 1) / len(directions)


def jacobian_norm(
    function: Projector, derivative: Derivative, features: Tensor, at_once: int
) -> Tensor:
    """Return ||J||_F at each row of `features` [N, C], as [N]: along all C axes, so exact."""
    axes = torch.eye(features.shape[-1], dtype=features.dtype, device=features.device)
    return _summed(function, derivative, features, axes, at_once, 2).sqrt()


def _summed(
    function: Projector,
    derivative: Derivative,
    features: Tensor,
    directions: Tensor,
    at_once: int,
    power: int,
) -> Tensor:
    """Return the sum over directions of ||derivative||_2 ** power, [N]."""
    count = len(directions)
    totals = []
    # All directions of a few rows at a time; where even one row's are too many, some of them.
    for rows in blocks_of(features, max(1, at_once // count)):
        total = rows.new_zeros(len(rows))
        for some in blocks_of(directions, at_once):
            shape = (len(some), *rows.shape)
            # Projectors take [n, C]: each row beside each direction, direction by direction.
            points = rows.expand(shape).reshape(-1, rows.shape[-1])
            along = some.unsqueeze(1).expand(shape).reshape(-1, rows.shape[-1])
            slopes = derivative(function, points, along)
            lengths = torch.linalg.vector_norm(slopes, dim=-1).view(shape[:2])
            total += lengths.pow(power).sum(0)
        totals.append(total)
    return torch.cat(totals)


def _forms(
    projector: Projector, features: Tensor, working: torch.dtype
) -> Iterator[tuple[torch.dtype, Projector]]:
    """Yield (dtype, function) from the most precise form to the model's own."""
    precise = in_dtype(projector, working)
    yield working, projector if precise is None else precise
    native = entry_dtype(projector, features)
    # Without a precise form it was the projector itself that came first: not in one dtype twice.
    if precise is not None or native != working:
        yield native, projector


def _between(function: Projector, dtype: torch.dtype, working: torch.dtype) -> Projector:
    """Convert what goes in and what comes out."""
    return lambda features: function(features.to(dtype)).to(working)
