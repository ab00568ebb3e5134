"""bfloat16 in Triton's interpreter, computed as on a GPU: in float32, each result rounded to the nearest, ties to even.

The interpreter keeps a bfloat16 tensor as its bits in an array of uint16. That is right for what only moves elements,
but operators, sums and products compute with the bits as if they were integers, and casts truncate, all of it silently.
``install`` widens the operands of whatever computes to float32, which is exact, and rounds bfloat16 results.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle, _get_np_dtype


def widen(bits: np.ndarray) -> np.ndarray:
    """float32 of bfloat16 bits: they are its upper half."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, of two equally near ones the even one; overflow becomes inf, NaN stays NaN."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    bits = x.view(np.uint32)
    upper, is_odd = bits >> 16, bits >> 16 & 1
    rounded = (bits + np.uint32(0x7FFF) + is_odd) >> 16
    quiet_nan = upper | 0x40  # the carry of the rounding could turn NaN into inf or zero
    return np.where(np.isnan(x), quiet_nan, rounded).astype(np.uint16)


def _widened(value: Any) -> Any:
    is_bfloat16 = isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16
    return TensorHandle(widen(value.data), tl.float32) if is_bfloat16 else value


def _computed_in_float32(operator):
    """An operator of the builder whose result has its operands' dtype, or is a comparison's."""

    def compute(self, *args):
        operands = [_widened(arg) for arg in args]
        result = operator(self, *operands)
        if all(a is b for a, b in zip(args, operands, strict=True)) or result.data.dtype == bool:
            return result
        return TensorHandle(round_to_bfloat16(result.data), tl.bfloat16)

    return compute


def _cast(self, x: TensorHandle, dtype: Any) -> TensorHandle:
    x = _widened(x)
    if dtype.scalar == tl.bfloat16:
        return TensorHandle(round_to_bfloat16(x.data), tl.bfloat16)
    return TensorHandle(x.data.astype(_get_np_dtype(dtype)), dtype.scalar)


def _dot_of(dot):
    """A product's sum is float32: Triton has no bfloat16 one."""
    return lambda self, a, b, total, *options: dot(self, _widened(a), _widened(b), total, *options)


def _sum_of(reduce):
    """tl.sum of a bfloat16 tensor: each partial sum is rounded, as on a GPU, whose order is another."""

    def compute(self, x):
        return self.generic_reduce((x,))[0] if x.dtype == tl.bfloat16 else reduce(self, x)

    return compute


def _atomic_of(atomic):
    def refuse_bfloat16(self, *args):
        if any(_widened(arg) is not arg for arg in args):
            raise NotImplementedError("atomics on bfloat16 are not computed in the interpreter")
        return atomic(self, *args)

    return refuse_bfloat16


def install() -> None:
    """Patch the interpreter, for the life of the process."""
    builder = InterpreterBuilder
    if hasattr(builder, "get_bf16"):  # it is patched already
        return
    for name in ("unary_op", "binary_op", "ternary_op", "create_fma"):
        setattr(builder, name, _computed_in_float32(getattr(builder, name)))
    builder.cast_impl = _cast
    builder.create_dot = _dot_of(builder.create_dot)
    ReduceOps.sum = _sum_of(ReduceOps.sum)
    builder.create_atomic_rmw = _atomic_of(builder.create_atomic_rmw)
    builder.get_bf16 = lambda self, value: TensorHandle(round_to_bfloat16(np.array([value])), tl.bfloat16)
