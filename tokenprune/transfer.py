"""Copies from the host to a device that wait for nothing."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; from the host to a GPU without a wait for what runs there.

    Parameters
    ----------
    tensor
        Any tensor. One of the host may be changed only once the device has copied it.
    device
        Where it is needed.
    """
    if tensor.device.type == "cpu" and device.type == "cuda":
        # torch waits for a copy out of memory that the system may move.
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
