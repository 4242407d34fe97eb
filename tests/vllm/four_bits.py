"""Products with weights of four bits, where vLLM's library has no kernel for them.

It has none for processors without AVX-512. There the same product is written out in torch, in every
process that imports this file (`tests.vllm.processes`), so that what is ours around such layers is
tested on every processor.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm import _custom_ops  # noqa: F401  # loads vLLM's library

CODES = 8
"""Of four bits each, in an int32, the first one lowest."""


def product(
    input: Tensor,
    q_weight: Tensor,
    out: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    pack_factor: int,
    isa_hint: str,
) -> None:
    """Do as vLLM's kernel of GPTQ and AWQ on CPUs, which says what its arguments are called.

    Parameters
    ----------
    input
        [M, in].
    q_weight
        int32 [out / 16, in * 2]: of 16 outputs at a time, the codes of each input.
    out
        [M, out], which is written.
    scales
        [groups, out].
    zeros
        int32 [groups, out / 8]; 8 everywhere where there are none.
    bias
        [out].
    pack_factor, isa_hint
        The kernel's own.
    """
    inputs = input.shape[1]
    blocks = _codes(q_weight.view(-1, inputs, 16 // CODES))  # [out / 16, in, 16]
    codes = blocks.movedim(0, 1).flatten(1)
    zero = 8 if zeros is None else _spread(_codes(zeros), inputs)
    weight = (codes - zero) * _spread(scales.float(), inputs)
    answer = input.float() @ weight
    out.copy_(answer if bias is None else answer + bias)


def _codes(packed: Tensor) -> Tensor:
    """Return the codes [..., n * 8] in int32 [..., n]."""
    return ((packed[..., None] >> torch.arange(0, 32, 4)) & 15).flatten(-2)


def _spread(of_groups: Tensor, inputs: int) -> Tensor:
    """Return a row for each input, of rows for each group of inputs."""
    return of_groups.repeat_interleave(inputs // len(of_groups), dim=0)


if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
    _LIBRARY = torch.library.Library("_C", "FRAGMENT")
    _LIBRARY.define(
        "cpu_gemm_wna16(Tensor input, Tensor q_weight, Tensor(a!) out, Tensor scales, "
        "Tensor? zeros, Tensor? bias, SymInt pack_factor, str isa_hint) -> ()"
    )
    _LIBRARY.impl("cpu_gemm_wna16", product, "CPU")
