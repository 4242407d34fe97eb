"""MLPProjector: a projector that knows its own structure, so that its Jacobian has a closed form.

Write the projector as ``M(x) = W2 a(W1 n(x) + b1) + b2``, with a norm ``n`` in front or without
one. Its Jacobian at x is ``J = W2 diag(g) W1 n'(x)``, where ``g = a'(W1 n(x) + b1)``. Without a
norm its squared Frobenius norm is a quadratic form in g, whose matrix belongs to the model alone:

    ||J||_F^2 = g' [(W2' W2) o (W1 W1')] g                                  (o: entry by entry)

A norm over c entries with gain y has ``n'(x) = diag(y) P / s``, where s is what it divides by,
``P = I - h h' / c`` for RMS norm and ``P = I - 1 1' / c - h h' / c`` for layer norm, and h = the
normalised x before the gain. With A = W1 diag(y), its rows centred for layer norm, and because h
is orthogonal to 1 there,

    ||J||_F^2 = { g' [(W2' W2) o (A A')] g - (2 - ||h||^2 / c) / c * ||W2 (g o A h)||^2 } / s^2

which is exact, the norm's epsilon included. For a norm over several parts of x (a patch merger's)
the squared norms of the parts' Jacobians add up.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenprune.errors import (
    UnreadableProjectorError,
    UnsupportedModelError,
    WeightsChangedError,
)
from tokenprune.greedy.engine import fuses
from tokenprune.late import look
from tokenprune.numerics import blocks_of, directional_derivative
from tokenprune.remembered import Remembered
from tokenprune.tower.plain_weights import why_altered, why_not_loaded, why_not_plain
from tokenprune.transfer import ToHost, to_host

Activation = Callable[[Tensor], Tensor]

_ROWS = 1024  # tokens done at once: bounds the hidden activations held to _ROWS * H
_ROWS_FUSED = 4096  # the same where kernels run: each block costs a GPU launches
_BLOCK = 512  # columns of the quadratic form's matrix done at once
_ENTRIES = 2**24  # entries of the widest intermediate when directions are pushed through


class Affine(Protocol):
    """What `MLPProjector` uses of a linear layer: ``x @ weight.T + bias``."""

    @property
    def weight(self) -> Tensor:
        """Floating point [outputs, inputs]."""

    @property
    def bias(self) -> Tensor | None:
        """Floating point [outputs], or None."""


class MLPProjector:
    """A projector ``[..., C] -> [..., D]`` made of an optional norm and one or two linear layers.

    It refers to the engine's own modules and copies no weights. Calling it calls them, in the
    weights' dtype; `lifted` gives the same function in float32, from the weights alone.

    Parameters
    ----------
    first
        The linear layer from C, or anything else with ``weight`` and ``bias``.
    activation
        An elementwise function between the two layers, or None.
    second
        The linear layer to D, or None where there is only one.
    norm
        Layer norm or RMS norm in front (told apart by what it does), or None.
    norm_groups
        How many equal parts of C are normalised each on its own: 1 for InternVL's layer norm over
        a pixel-shuffled token, 4 for the 2 x 2 patch mergers of Qwen2-VL and Qwen2.5-VL.

    Raises
    ------
    UnsupportedModelError
        If the layers do not fit each other, or one of them computes something else than its weight
        says: quantised, offloaded, or with an adapter or hooks on it.
    """

    def __init__(
        self,
        first: Affine,
        activation: Activation | None = None,
        second: Affine | None = None,
        norm: nn.Module | None = None,
        norm_groups: int = 1,
    ) -> None:
        self.first = first
        self.activation = activation
        self.second = second
        self.norm = norm
        self.norm_groups = norm_groups
        self.check()
        if second is None and activation is not None:
            raise UnsupportedModelError(
                "MLPProjector: an activation needs a linear layer after it. Pass second=..., or "
                "any callable instead of an MLPProjector together with estimator='jvp'."
            )
        if second is not None and second.weight.shape[1] != first.weight.shape[0]:
            raise UnsupportedModelError(
                f"MLPProjector: `first` gives {first.weight.shape[0]} numbers and `second` takes "
                f"{second.weight.shape[1]}. Pass the two linear layers in the order they run."
            )
        if norm_groups < 1 or first.weight.shape[1] % norm_groups:
            raise UnsupportedModelError(
                f"MLPProjector: norm_groups={norm_groups} does not divide the "
                f"{first.weight.shape[1]} inputs of `first` into equal parts."
            )
        self.grams: dict[torch.dtype, Grams] = {}  # the last ones made, for as long as they hold
        self._truncated: dict[int, tuple[Tensor, MLPProjector]] = {}  # likewise, with a digest

    def check(self) -> None:
        """Raise unless the layers compute what their weights say, now.

        Raises
        ------
        UnreadableProjectorError
            Naming the layer and what was done to it.
        """
        for name, layer in (("first", self.first), ("second", self.second)):
            reason = None if layer is None else why_not_plain(layer)
            if reason is not None:
                raise UnreadableProjectorError(f"of its layer `{name}`, {reason}")

    def __call__(self, features: Tensor) -> Tensor:
        """Project `features` [..., C] to [..., D] as the engine does, in the weights' dtype."""
        hidden = features.to(self.first.weight.dtype)
        if self.norm is not None:
            parts = torch.unflatten(hidden, -1, (self.norm_groups, -1))
            hidden = cast(Tensor, self.norm(parts)).flatten(-2)
        hidden = _apply(self.first, hidden)
        if self.activation is not None:
            hidden = self.activation(hidden)
        return hidden if self.second is None else _apply(self.second, hidden)

    def __repr__(self) -> str:
        widths = [self.first.weight.shape[1], self.first.weight.shape[0]]
        if self.second is not None:
            widths.append(self.second.weight.shape[0])
        norm = "" if self.norm is None else f", norm over {self.norm_groups} part(s)"
        return f"MLPProjector({' -> '.join(map(str, widths))}{norm})"

    def lifted(self, dtype: torch.dtype) -> LiftedProjector:
        """Return the projector with its weights in `dtype`; it lives as long as one scoring.

        Parameters
        ----------
        dtype
            float32 or float64.

        Raises
        ------
        UnsupportedModelError
            If the norm in front is neither layer norm nor RMS norm, or see `check`.
        """
        self.check()
        return LiftedProjector(self, dtype)

    def truncated(self, rank: int) -> MLPProjector:
        """Return the projector with the matrix of each linear layer cut to a rank.

        Of each matrix the largest singular values stay, in float32 or better. It is made once, and
        again whenever the weights have changed; the host waits to see whether they have.

        Parameters
        ----------
        rank
            At least 1; a matrix of no larger rank stays as it is.

        Raises
        ------
        UnreadableProjectorError
            See `check`.
        """
        self.check()
        layers = [layer for layer in (self.first, self.second) if layer is not None]
        vectors = [layer.bias for layer in layers if layer.bias is not None]
        [digest] = to_host([_digest([*(layer.weight for layer in layers), *vectors])])
        known = self._truncated.get(rank)
        if known is None or not torch.equal(known[0], digest):
            with torch.no_grad():
                first, *second = (_truncated(layer, rank) for layer in layers)
            made = MLPProjector(
                first, self.activation, second[0] if second else None, self.norm, self.norm_groups
            )
            known = self._truncated[rank] = digest, made
        return known[1]

    @cached_property
    def _slope(self) -> Activation:
        return _slope_of(self.activation, self.first.weight.device)


@dataclass(frozen=True, eq=False)
class _Layer:
    """A linear layer of weights that were made here."""

    weight: Tensor
    bias: Tensor | None


def _truncated(layer: Affine, rank: int) -> _Layer:
    """Return a copy of a layer with the largest `rank` singular values of its matrix."""
    weight = layer.weight.detach()
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    if rank < min(wide.shape):
        left, values, right = torch.linalg.svd(wide, full_matrices=False)
        wide = (left[:, :rank] * values[:rank]) @ right[:rank]
    bias = None if layer.bias is None else layer.bias.detach().to(wide.dtype, copy=True)
    return _Layer(wide, bias)


def _apply(layer: Affine, hidden: Tensor) -> Tensor:
    if isinstance(layer, nn.Module):  # with whatever was put on it since
        return cast(Tensor, layer(hidden))
    return F.linear(hidden, layer.weight, layer.bias)


@dataclass(frozen=True, eq=False)
class _Norm:
    """Layer norm or RMS norm over c entries, in one dtype."""

    centred: bool
    gain: Tensor
    shift: Tensor | None
    epsilon: float

    def normalise(self, parts: Tensor) -> tuple[Tensor, Tensor]:
        """Return ([..., c] without gain and shift, [..., 1] what was divided by)."""
        if self.centred:
            parts = parts - parts.mean(-1, keepdim=True)
        scale = parts.square().mean(-1, keepdim=True).add_(self.epsilon).sqrt_()
        return parts / scale, scale

    def __call__(self, parts: Tensor) -> Tensor:
        normalised = self.normalise(parts)[0] * self.gain
        return normalised if self.shift is None else normalised + self.shift


@dataclass(frozen=True, eq=False)
class Grams:
    """The matrices that belong to the model alone, as column blocks of their upper triangles.

    Attributes
    ----------
    digest
        int64 [rows], on the CPU: what the weights were when these were made.
    versions
        How often torch had seen each of them written to.
    kind
        What else they hang on: the number of the norm's parts, and whether it centres.
    parts
        For each part of the norm the blocks of ``(W2' W2) o (A A')``.
    outer
        The blocks of ``W2' W2``, where there is a norm.
    bias
        [H], what is added to A h, if anything.
    """

    digest: Tensor
    versions: list[int | None]
    kind: tuple[object, ...]
    parts: list[list[Tensor]]
    outer: list[Tensor]
    bias: Tensor | None


@dataclass(frozen=True, eq=False)
class _Front:
    """A block of n tokens on its way to the activation.

    Attributes
    ----------
    hidden
        [n, H], what the activation is given.
    normalised
        [n, G, c], h of each part; empty without a norm.
    pushed
        For each part A h, [n, H]; empty without a norm.
    scales
        [n, G], what each part was divided by; empty without a norm.
    """

    hidden: Tensor
    normalised: Tensor
    pushed: list[Tensor]
    scales: Tensor


class LiftedProjector:
    """An `MLPProjector` in float32 or float64, with what can be said about its Jacobian.

    Weights that have another dtype are copied when first needed and dropped with this object.
    """

    def __init__(self, projector: MLPProjector, dtype: torch.dtype) -> None:
        self._projector = projector
        self._dtype = dtype
        self._norm = (
            None
            if projector.norm is None
            else _read_norm(projector.norm, self._part_width, dtype, projector.first.weight.device)
        )

    def __call__(self, features: Tensor) -> Tensor:
        """Project [..., C] to [..., D]."""
        hidden = features.to(self._dtype)
        if self._norm is not None:
            parts = torch.unflatten(hidden, -1, (self._projector.norm_groups, -1))
            hidden = self._norm(parts).flatten(-2)
        hidden = F.linear(hidden, self._first, self._lift(self._projector.first.bias))
        if self._projector.activation is not None:
            hidden = self._projector.activation(hidden)
        if self._second is not None and self._projector.second is not None:
            hidden = F.linear(hidden, self._second, self._lift(self._projector.second.bias))
        return hidden

    def jacobian_norm(self, features: Tensor, divisor: float = 1.0) -> Tensor:
        """Return ||J||_F / divisor at each row of `features` [N, C], [N] in this object's dtype.

        Exact up to rounding, see the formulas at the top of this file. N * H * (H + 2C) floating
        point operations without a norm, that again for every part of one; the matrices (half of
        H x H for each part, and one more where there is a norm) are computed once per model and
        again whenever the weights have changed.
        """
        with torch.no_grad():
            if self._second is not None and fuses(self._second):
                norms = [
                    self._fused_jacobian_norm(rows.to(self._dtype), divisor)
                    for rows in blocks_of(features, _ROWS_FUSED)
                ]
                return norms[0] if len(norms) == 1 else torch.cat(norms)
            squares = [
                self._squared_jacobian_norm(self._front(rows.to(self._dtype)))
                for rows in blocks_of(features, _ROWS)
            ]
            together = squares[0] if len(squares) == 1 else torch.cat(squares)
            return together.clamp_(min=0.0).sqrt_().div_(divisor)

    def directional_norm(self, features: Tensor, directions: Tensor) -> Tensor:
        """Return the mean over directions u of ||J u||_2 at each row of `features`.

        Exact up to rounding. ``W1 u`` is computed once for all tokens and the rest is one pass
        through W2 per token and direction, in blocks of bounded size.

        Parameters
        ----------
        features
            Floating point [N, C].
        directions
            Floating point [m, C].

        Returns
        -------
        Tensor
            [N] in this object's dtype.
        """
        with torch.no_grad():
            directions = directions.to(self._dtype)
            moved = self._push_directions(directions)
            count = len(directions)
            width = max(self._first.shape[0], 0 if self._second is None else len(self._second))
            step = max(1, _ENTRIES // (width * count))
            totals = []
            for rows in blocks_of(features.to(self._dtype), step):
                tangents = self._tangents(self._front(rows), directions, moved)
                totals.append(torch.linalg.vector_norm(tangents, dim=-1).sum(-1))
            return torch.cat(totals) / count

    def _squared_jacobian_norm(self, front: _Front) -> Tensor:
        """Return ||J||_F^2 of a block of tokens, [n]."""
        if self._second is None:
            return self._squared_jacobian_norm_of_one_layer(front)
        slopes = self._projector._slope(front.hidden)
        grams = self._grams
        if self._norm is None:
            return _quadratic(grams.parts[0], slopes)
        total = slopes.new_zeros(len(slopes))
        for part, (blocks, pushed) in enumerate(zip(grams.parts, front.pushed, strict=True)):
            inner = _quadratic(blocks, slopes)
            inner -= self._shrinkage(front, part) * _quadratic(grams.outer, slopes * pushed)
            total += inner / front.scales[:, part].square()
        return total

    def _fused_jacobian_norm(self, features: Tensor, divisor: float) -> Tensor:
        """Return what `jacobian_norm` does of a block of tokens, with kernels between products."""
        from tokenprune.greedy.fused import jacobian  # imports Triton, which is not everywhere

        grams, norm = self._grams, self._norm
        if norm is None:
            bias = self._lift(self._projector.first.bias)
            slopes = self._projector._slope(F.linear(features, self._first, bias))
            return jacobian.norm_without(slopes @ grams.parts[0][0], slopes, divisor)
        groups = self._projector.norm_groups
        scaled, inverse, shrinkage = jacobian.normalise(
            torch.unflatten(features, -1, (groups, -1)), norm.gain, norm.epsilon, norm.centred
        )
        pushed = [
            F.linear(scaled[:, part], weights)
            for part, weights in enumerate(self._first.chunk(groups, dim=-1))
        ]
        hidden = _sum_of(pushed)
        slopes = self._projector._slope(hidden if grams.bias is None else hidden + grams.bias)
        total = slopes.new_empty(len(slopes))
        for part, along in enumerate(pushed):
            jacobian.add_part(
                total,
                slopes @ grams.parts[part][0],
                slopes,
                (
                    (slopes * along) @ grams.outer[0],
                    along,
                    inverse[:, part],
                    shrinkage[:, part],
                ),
                first=part == 0,
                divisor=divisor if part == groups - 1 else None,
            )
        return total

    def _squared_jacobian_norm_of_one_layer(self, front: _Front) -> Tensor:
        """Return ||J||_F^2 where there is no activation: the same for all unless a norm differs."""
        total = front.hidden.new_zeros(len(front.hidden))
        for part, weights in enumerate(self._centred_parts()):
            square = torch.linalg.vector_norm(weights).square()
            if self._norm is None:
                total += square
            else:
                pushed = torch.linalg.vector_norm(front.pushed[part], dim=-1).square()
                inner = square - self._shrinkage(front, part) * pushed
                total += inner / front.scales[:, part].square()
        return total

    def _shrinkage(self, front: _Front, part: int) -> Tensor:
        """Return (2 - ||h||^2 / c) / c of one part, [n]: what P P' takes off along h."""
        return (2.0 - front.normalised[:, part].square().mean(-1)) / self._part_width

    def _tangents(self, front: _Front, directions: Tensor, moved: list[Tensor]) -> Tensor:
        """Return J u for a block of n tokens and m directions, [n, m, D]."""
        if self._norm is None:
            tangents = moved[0].expand(len(front.hidden), -1, -1)
        else:
            tangents = front.hidden.new_zeros(())
            for part, aside in enumerate(directions.chunk(self._projector.norm_groups, dim=-1)):
                along = front.normalised[:, part] @ aside.T / self._part_width
                bent = moved[part] - along.unsqueeze(-1) * front.pushed[part].unsqueeze(1)
                tangents = tangents + bent / front.scales[:, part, None, None]
        if self._second is None:
            return tangents
        return F.linear(tangents * self._projector._slope(front.hidden).unsqueeze(1), self._second)

    def _push_directions(self, directions: Tensor) -> list[Tensor]:
        """Return A u for each part, [m, H]."""
        parts = self._centred_parts()
        asides = directions.chunk(len(parts), dim=-1)
        return [F.linear(aside, weights) for aside, weights in zip(asides, parts, strict=True)]

    def _front(self, features: Tensor) -> _Front:
        """Run a block of tokens [n, C] up to the activation."""
        bias = self._lift(self._projector.first.bias)
        if self._norm is None:
            hidden = F.linear(features, self._first, bias)
            empty = features.new_empty(0)
            return _Front(hidden, empty, [], empty)
        parts = torch.unflatten(features, -1, (self._projector.norm_groups, -1))
        normalised, scales = self._norm.normalise(parts)
        columns = self._first.chunk(self._projector.norm_groups, dim=-1)
        pushed = [
            F.linear(normalised[:, part] * self._norm.gain, weights)
            for part, weights in enumerate(columns)
        ]
        hidden = _sum_of(pushed)
        if (moved := self._bias_behind_norm()) is not None:
            hidden = hidden + moved
        return _Front(hidden, normalised, pushed, scales.squeeze(-1))

    def _bias_behind_norm(self) -> Tensor | None:
        """Return [H], what is added to A h: the first layer's bias, and what the shift becomes."""
        bias = self._lift(self._projector.first.bias)
        shift = None if self._norm is None else self._norm.shift
        if shift is None:
            return bias
        shift = shift.repeat(self._projector.norm_groups)
        return self._first @ shift if bias is None else torch.addmv(bias, self._first, shift)

    def _centred_parts(self) -> list[Tensor]:
        """Return A of each part, [H, c]: W1 with the gain, and centred for layer norm."""
        if self._norm is None:
            return [self._first]
        columns = self._first.chunk(self._projector.norm_groups, dim=-1)
        parts = [weights * self._norm.gain for weights in columns]
        if self._norm.centred:
            parts = [part - part.mean(-1, keepdim=True) for part in parts]
        return parts

    @cached_property
    def _grams(self) -> Grams:
        """The model's matrices, from the projector's cache if its weights are what they were."""
        digest = _digest(self._weights())
        grams, dtype = self._projector.grams, self._dtype
        known = grams.get(dtype)
        arriving = ToHost([digest])
        if known is not None and known.kind == self._kind:
            if digest.is_cuda and self._seem_unchanged(known):
                before = known.digest

                def look_at() -> None:
                    if not torch.equal(before, arriving.arrived()[0]):
                        grams.pop(dtype, None)
                        raise WeightsChangedError(
                            "the projector's weights were changed through `.data` since the last "
                            "call, and this one was scored by what they were. Call again: they "
                            "have been forgotten."
                        )

                # Reading weights is quick, and waiting until they are read is not.
                look(look_at)
                return known
            if torch.equal(known.digest, arriving.arrived()[0]):
                return known
        grams.pop(dtype, None)  # never two sets of matrices at once
        known = grams[dtype] = self._build_grams(arriving.arrived()[0])
        return known

    def _seem_unchanged(self, known: Grams) -> bool:
        """Say whether weights are likely to be those of known matrices: nobody trains them."""
        training = bool(getattr(self._projector.first, "training", False))
        return not training and known.versions == list(map(_version, self._weights()))

    def _build_grams(self, digest: Tensor) -> Grams:
        first = self._centred_parts()
        second = cast(Tensor, self._second)
        parts: list[list[Tensor]] = [[] for _ in first]
        outer: list[Tensor] = []
        # On a GPU half of the products cost less than the launches of many blocks. Kernels take
        # one block.
        width = second.shape[1] if second.is_cuda or fuses(second) else _BLOCK
        for start in range(0, second.shape[1], width):
            columns = slice(start, min(start + width, second.shape[1]))
            block = second[:, : columns.stop].T @ second[:, columns]
            block[:start] *= 2.0  # these entries stand for their mirror images too
            for blocks, weights in zip(parts, first, strict=True):
                blocks.append((weights[: columns.stop] @ weights[columns].T).mul_(block))
            if self._norm is not None:
                outer.append(block)
        versions = list(map(_version, self._weights()))
        return Grams(digest, versions, self._kind, parts, outer, self._bias_behind_norm())

    @property
    def _kind(self) -> tuple[object, ...]:
        return self._projector.norm_groups, None if self._norm is None else self._norm.centred

    def _weights(self) -> list[Tensor]:
        """Return the tensors that `Grams` is computed from."""
        first, second, norm = self._projector.first, self._projector.second, self._norm
        used = [first.weight, None if second is None else second.weight, first.bias]
        if norm is not None:
            used += [norm.gain, norm.shift]
        return [weight for weight in used if weight is not None]

    @property
    def _part_width(self) -> int:
        return self._projector.first.weight.shape[1] // self._projector.norm_groups

    @cached_property
    def _first(self) -> Tensor:
        return cast(Tensor, self._lift(self._projector.first.weight))

    @cached_property
    def _second(self) -> Tensor | None:
        return None if self._projector.second is None else self._lift(self._projector.second.weight)

    def _lift(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().to(self._dtype)


def _quadratic(blocks: list[Tensor], vectors: Tensor) -> Tensor:
    """Return v' M v for each row v of `vectors` [n, H], with M given as `Grams` keeps it.

    Only the upper triangle's blocks are multiplied: a little over half of the operations.
    """

    def of_block(block: Tensor) -> Tensor:
        stop, width = block.shape
        product = vectors[:, :stop] @ block
        return product.mul_(vectors[:, stop - width : stop]).sum(-1)

    total = of_block(blocks[0])
    for block in blocks[1:]:
        total += of_block(block)
    return total


_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[Any, dict[Any, Any]]] = (
    weakref.WeakKeyDictionary()
)
"""What trying a module said of it, as long as its code is the same."""


def known_of(module: object) -> dict[Any, Any]:
    """Return what is remembered of a module; empty once its code is another, and of what is none.

    For what does not depend on weights. On a GPU every try would be a wait; on a CPU modules are
    tried anew each time.
    """
    if not isinstance(module, nn.Module):
        return {}
    code = [(id(part), type(part), type(part).forward) for part in module.modules()]
    before = _KNOWN.get(module)
    if before is None or before[0] != code:
        before = _KNOWN[module] = code, {}
    return before[1]


def _digest(weights: Sequence[Tensor]) -> Tensor:
    """Return int64 [rows of all], which changes with any bit, short of an exact coincidence.

    Reading the weights is the only way to notice every change: version counters miss edits
    through ``.data``, which weight loaders and adapter merges use, and inference tensors have none.
    """
    readable = [_as_integers(weight.detach()) for weight in weights]
    if fuses(readable[0]):
        from tokenprune.greedy.fused import jacobian  # imports Triton, which is not everywhere

        return jacobian.sums(readable)
    ends = list(accumulate(map(len, readable)))
    digest = readable[0].new_empty(ends[-1], dtype=torch.int64)
    for rows, end in zip(readable, ends, strict=True):
        torch.sum(rows, -1, dtype=torch.int64, out=digest[end - len(rows) : end])
    return digest


def _sum_of(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(list(parts)).sum(0)


def _as_integers(weight: Tensor) -> Tensor:
    """Return the bits of a matrix or a vector as whole numbers [rows, n]."""
    rows = weight[None] if weight.ndim == 1 else weight
    if rows.stride(-1) != 1 and rows.stride(0) == 1:
        rows = rows.T
    rows = rows.contiguous()
    row_bytes = rows.shape[-1] * rows.element_size()
    integer = {0: torch.int64, 4: torch.int32}.get(row_bytes % 8, torch.int16)
    return rows.view(integer)


def _version(weight: Tensor) -> int | None:
    """Return how often torch saw a tensor written to; tensors of inference mode do not count it."""
    return None if weight.is_inference() else weight._version


def _read_norm(norm: nn.Module, width: int, dtype: torch.dtype, device: torch.device) -> _Norm:
    """Return what `norm` computes over `width` entries, found by trying the kinds there are.

    Names do not tell: some models' RMS norm multiplies by ``1 + weight``.

    Raises
    ------
    UnsupportedModelError
        If it is none of them.
    """
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    reason = why_altered(norm) or (None if weight is None else why_not_loaded("weight", weight))
    if reason is not None:
        raise UnreadableProjectorError(f"of the norm in front, {reason}")
    own = device if weight is None else weight.device
    own_dtype = dtype if weight is None else weight.dtype
    epsilon = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    if epsilon is None:  # torch.nn.RMSNorm without eps takes that of the dtype it computes in
        epsilon = torch.finfo(torch.promote_types(own_dtype, torch.float32)).eps
    gain = torch.ones(width, dtype=dtype, device=own) if weight is None else weight.detach()
    shift = None if bias is None else bias.detach().to(dtype)

    def candidate_of(centred: bool, offset: float) -> _Norm:
        lifted = gain.to(dtype)
        return _Norm(centred, lifted + offset if offset else lifted, shift, float(epsilon))

    known = known_of(norm) if own.type == "cuda" else {}
    kind = ("norm", width, own_dtype, dtype)
    if kind in known:
        return candidate_of(*known[kind])
    if gain.shape == (width,):
        kinds = [(centred, offset) for centred in (True, False) for offset in (0.0, 1.0)]
        candidates = [candidate_of(*each) for each in kinds]
        # Not symmetric about zero, so that centring shows.
        probe = torch.linspace(-1.0, 2.0, width, dtype=dtype, device=own)
        with torch.no_grad():
            got = norm(probe.to(own_dtype)).to(dtype)
            expected = [candidate(probe.to(own_dtype).to(dtype)) for candidate in candidates]
        found = [*((got - values).abs().max() for values in expected), got.abs().max()]
        *errors, largest = torch.stack(found).tolist()
        nearest = errors.index(min(errors))
        # A few roundings of the norm's own dtype.
        if errors[nearest] <= 8.0 * torch.finfo(own_dtype).eps * largest:
            known[kind] = kinds[nearest]
            return candidates[nearest]
    raise UnsupportedModelError(
        f"MLPProjector: {type(norm).__name__} over {width} entries is neither layer norm nor RMS "
        "norm. Pass the projector as a plain callable, with estimator='jvp'."
    )


def _ones(hidden: Tensor) -> Tensor:
    return torch.ones_like(hidden)


def _relu_slope(hidden: Tensor) -> Tensor:
    return (hidden > 0).to(hidden.dtype)


def _quick_gelu(hidden: Tensor) -> Tensor:
    return hidden * torch.sigmoid(1.702 * hidden)


def _quick_gelu_slope(hidden: Tensor) -> Tensor:
    gate = torch.sigmoid(1.702 * hidden)
    return gate * (1.0 + 1.702 * hidden * (1.0 - gate))


_ONES: Remembered[tuple[torch.device, torch.dtype], Tensor] = Remembered()


def _one(hidden: Tensor) -> Tensor:
    """Return ones of a tensor's shape; a GPU is told to write one only once."""
    one = _ONES.made((hidden.device, hidden.dtype), lambda: hidden.new_ones(()))
    return one.expand_as(hidden)


def _silu_slope(hidden: Tensor) -> Tensor:
    return cast(Tensor, torch.ops.aten.silu_backward(_one(hidden), hidden))


def _gelu_slope(approximate: str) -> Activation:
    def slope(hidden: Tensor) -> Tensor:
        slopes = torch.ops.aten.gelu_backward(_one(hidden), hidden, approximate=approximate)
        return cast(Tensor, slopes)

    return slope


_SLOPES: tuple[tuple[Activation, Activation], ...] = (
    (F.gelu, _gelu_slope("none")),
    (lambda hidden: F.gelu(hidden, approximate="tanh"), _gelu_slope("tanh")),
    (_quick_gelu, _quick_gelu_slope),
    (F.silu, _silu_slope),
    (F.relu, _relu_slope),
)


def _slope_of(activation: Activation | None, device: torch.device) -> Activation:
    """Return the derivative of an elementwise function, in closed form if it is a known one.

    The function is recognised by its values, because every library has names of its own for it;
    the known ones differ from each other by far more than the tolerance.
    """
    if activation is None:
        return _ones
    applied = activation

    def by_forward_mode(hidden: Tensor) -> Tensor:
        return directional_derivative(applied, hidden.clone(), torch.ones_like(hidden))

    learns = isinstance(activation, nn.Module) and any(True for _ in activation.parameters())
    known = known_of(activation) if device.type == "cuda" else {}
    if "slope" in known:
        place: int | None = known["slope"]
        return by_forward_mode if place is None else _SLOPES[place][1]
    known["slope"] = None
    if not learns:
        probe = torch.linspace(-6.0, 6.0, 97, dtype=torch.float32, device=device)
        with torch.no_grad():
            values = activation(probe.clone())
            for place, (function, slope) in enumerate(_SLOPES):
                if values.shape == probe.shape and torch.allclose(
                    values.float(), function(probe), rtol=0.0, atol=1e-5
                ):
                    known["slope"] = place
                    return slope
    return by_forward_mode
