"""Which code runs: Triton on CUDA tensors (or on CPU tensors in Triton's interpreter), plain torch otherwise.

Triton is imported only where it can be used: a CUDA device is present, ``TRITON_INTERPRET=1`` is set, or the
program imported triton itself before (the compile gates do). Elsewhere the kernels stay plain Python functions
that nothing calls, so the CPU path needs no triton at all.
"""

import os
import sys
from typing import Any

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

__all__ = ["INTERPRET", "block_size", "cdiv", "run", "sm_count", "tl", "triton", "use_triton"]


def use_triton(*tensors: Tensor | None) -> bool:
    """True if these tensors' kernels run in Triton. Raises ValueError if they are on different devices."""
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        raise ValueError(f"tensors are on different devices: {sorted(map(str, devices))}")
    return INTERPRET or next(iter(devices)).type == "cuda"


class _Unrecorded:
    """Stands in for autograd's context where nothing is recorded."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        pass


def run(function: Any, *args: Any) -> Any:
    """function.apply(*args) of a torch.autograd.Function; where gradients are off, without autograd's bookkeeping."""
    return function.apply(*args) if torch.is_grad_enabled() else function.forward(_Unrecorded(), *args)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up, for a >= 0, b > 0."""
    return -(-a // b)


def block_size(n: int) -> int:
    """The smallest power of two >= n: the width of a Triton block that covers n elements."""
    return 1 << (n - 1).bit_length()


def sm_count(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; a small stand-in where there is none (the interpreter)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
