"""Small arrays from the host to the device and back, without the host waiting for the device.

A copy from ordinary (pageable) memory makes the host wait until the device has done all work before it. A copy from
pinned memory does not; it costs the host some ten microseconds whatever its size, so arrays that are needed together
travel as one.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seal_kernels.dispatch import ceil_div

ALIGNMENT = 16  # bytes: kernels read 16 bytes at once


def pack(arrays: Sequence[np.ndarray], pin_memory: bool) -> tuple[Tensor, list[int]]:
    """(one uint8 tensor in host memory that holds all arrays, the byte at which each begins)"""
    starts = np.cumsum([0, *(ceil_div(array.nbytes, ALIGNMENT) * ALIGNMENT for array in arrays)]).tolist()
    buffer = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=pin_memory)
    view = buffer.numpy()
    for array, start in zip(arrays, starts, strict=False):
        view[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return buffer, starts[:-1]


def views(buffer: Tensor, arrays: Sequence[np.ndarray], starts: Sequence[int]) -> list[Tensor]:
    """Tensors with the arrays' dtypes and shapes over a packed buffer."""
    tensors = []
    for array, start in zip(arrays, starts, strict=True):
        dtype = torch.from_numpy(array[:0]).dtype
        tensors.append(buffer[start : start + array.nbytes].view(dtype).view(array.shape))
    return tensors


def to_device(device: torch.device, *arrays: np.ndarray) -> list[Tensor]:
    """The arrays as tensors on the device: on a GPU in one copy that the host does not wait for."""
    if device.type != "cuda":
        return [torch.from_numpy(array).to(device) for array in arrays]
    buffer, starts = pack(arrays, pin_memory=True)
    return views(buffer.to(device, non_blocking=True), arrays, starts)


class HostCopy:
    """A tensor's numbers on the host: `tolist` waits until the device has computed them, and for nothing later."""

    def __init__(self, tensor: Tensor):
        self._host, self._event = tensor, None
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def tolist(self) -> Any:
        """The numbers, as Tensor.tolist gives them."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()
