"""The choice of a backend, Triton on CUDA tensors (or in Triton's interpreter) or torch, and what launchers share.

Triton is imported only where it can be used: a CUDA device is present, ``TRITON_INTERPRET=1`` is set, or the
program imported triton itself before (the compile gates do). Elsewhere the kernels stay plain Python functions
that nothing calls, so the CPU path needs no triton at all.
"""

import os
import sys
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


class _Absent:
    """Stands in for triton and triton.language in signatures and decorators while triton is not imported."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, fn: Any) -> Any:
        return fn


triton: Any = _Absent()
tl: Any = _Absent()
if INTERPRET or "triton" in sys.modules or torch.cuda.is_available():
    import triton
    import triton.language as tl

__all__ = ["INTERPRET", "LaunchConfig", "apply", "block_size", "ceil_div", "tl", "triton", "use_triton"]

IntegerOrArray = TypeVar("IntegerOrArray", int, np.ndarray)


class LaunchConfig(NamedTuple):
    """Settings of a kernel's launch. Blocks decide the bits of a sum, so none follows from the size of a batch."""

    blocks: dict[str, int]  # tile sizes: the kernel's constexprs of these names
    num_warps: int
    num_stages: int | None = None  # None: Triton's default
    maxnreg: int | None = None

    def options(self) -> dict[str, int]:
        """All settings as keyword arguments of the launch."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.maxnreg}
        return self.blocks | {name: value for name, value in options.items() if value is not None}


def use_triton(*tensors: Tensor | None) -> bool:
    """True if these tensors' kernels run in Triton. Raises ValueError if they are on different devices."""
    device: torch.device | None = None
    for tensor in tensors:
        if tensor is not None and device is None:
            device = tensor.device
        elif tensor is not None and tensor.device != device:
            raise ValueError(f"tensors are on different devices: {sorted([str(device), str(tensor.device)])}")
    return INTERPRET or (device is not None and device.type == "cuda")


class _Unrecorded:
    """Stands in for autograd's context where nothing is recorded."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def apply(function: Any, *args: Any) -> Any:
    """function.apply(*args) of a torch.autograd.Function; where gradients are off, without autograd's bookkeeping."""
    return function.apply(*args) if torch.is_grad_enabled() else function.forward(_Unrecorded(), *args)


def ceil_div(a: IntegerOrArray, b: Any) -> IntegerOrArray:
    """a / b rounded up, for a >= 0, b > 0: integers or arrays of integers."""
    return -(-a // b)


def block_size(n: int) -> int:
    """The smallest power of two >= n: the width of a Triton block that covers n elements."""
    return 1 << (n - 1).bit_length()
