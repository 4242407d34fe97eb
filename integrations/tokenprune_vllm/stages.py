"""Positions of kept tokens on their way from the first stage of a pipeline to the others.

Rows, and the offsets that travel with them, reach the first stage alone. It puts the positions that
it used beside the hidden states that it hands on; later stages use those, and hand them on in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.sequence import IntermediateTensors

_KEY = "tokenprune_positions"


def with_room(make: Callable[..., IntermediateTensors], axes: int) -> Callable[..., Any]:
    """Return vLLM's `make_empty_intermediate_tensors` with room for positions.

    vLLM copies what comes from the stage before into these buffers, which captured graphs read.

    Parameters
    ----------
    make
        The model's own.
    axes
        Of positions.
    """

    def made(batch_size: int, dtype: torch.dtype, device: torch.device) -> IntermediateTensors:
        tensors = make(batch_size=batch_size, dtype=dtype, device=device)
        # Tokens come first, as in all that is handed on: vLLM cuts there.
        tensors[_KEY] = torch.zeros(batch_size, axes, dtype=torch.int64, device=device)
        return tensors

    return made


def hand_on(output: Any, positions: Tensor) -> None:
    """Put positions [tokens] or [A, tokens] into what a stage hands on; the last hands nothing."""
    if isinstance(output, IntermediateTensors):
        output[_KEY] = positions.reshape(-1, positions.shape[-1]).T.contiguous()


def taken_over(tensors: IntermediateTensors) -> tuple[IntermediateTensors, Tensor]:
    """Return what the stage before handed on as vLLM's model knows it, and the positions."""
    rest = dict(tensors.items())
    positions = rest.pop(_KEY)
    return IntermediateTensors(rest), positions.T if positions.shape[1] > 1 else positions[:, 0]
