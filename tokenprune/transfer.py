"""Copies between the host and a device that wait for nothing, or for themselves alone."""

from __future__ import annotations

from collections.abc import Iterable

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


class ToHost:
    """Tensors on their way to the host, as they are when this is made.

    Whatever the device is given to do afterwards, it goes on with while the host waits for them.

    Parameters
    ----------
    tensors
        Of any devices.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        given = list(tensors)
        # torch copies into memory that does not move if the copy is not to be waited for.
        self._copies = [
            tensor.to("cpu", non_blocking=True) if tensor.is_cuda else tensor.cpu()
            for tensor in given
        ]
        devices = {tensor.device for tensor in given if tensor.is_cuda}
        self._events = [torch.cuda.current_stream(one).record_event() for one in devices]

    def arrived(self) -> list[Tensor]:
        """Return the tensors, on the CPU. The first call waits until they are there."""
        while self._events:
            self._events.pop().synchronize()
        return self._copies


def to_host(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return tensors on the CPU; all of them are waited for together."""
    return ToHost(tensors).arrived()
