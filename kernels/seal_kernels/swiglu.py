"""SwiGLU, the gate of a transformer's feed-forward block (Shazeer, arXiv 2002.05202), on a packed projection.

    y = silu(gate) * up,    gate, up = gate_up[:, :F], gate_up[:, F:],    silu(g) = g * s,    s = 1 / (1 + exp(-g))

Backward, with dy the gradient that reaches y; s is computed again from gate_up, the only tensor saved:

    dgate = dy * up * s * (1 + g * (1 - s))         dup = dy * g * s

Shapes: gate_up [T, 2F] with contiguous rows at any row stride; y [T, F].
Bytes per row, b per element: forward 3 b F (two reads, one write), backward 5 b F (three reads, two writes). About 5
FLOPs and one exponential per element forward, twice that backward: memory bound.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from seal_kernels.dispatch import LaunchConfig, apply, block_size, ceil_div, tl, triton, use_triton

WIDENED_ROWS = 32  # rows of 16-bit tensors that the CPU takes at a time


def swiglu_ref(gate_up: Tensor) -> Tensor:
    """The equation in float32 (float64 for float64 input), in gate_up's dtype."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))  # at most 1: exp(-x) overflows for large negative x
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def swiglu_forward_kernel(gate_up_ptr, y_ptr, T, F, stride_row, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (rows < T)[:, None] & (cols < F)[None, :]
    at = gate_up_ptr + rows[:, None] * stride_row + cols[None, :]
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)  # [BT, BF]
    up = tl.load(at + F, mask=mask, other=0.0).to(tl.float32)  # [BT, BF]
    y = gate * _sigmoid(gate) * up  # [BT, BF]
    tl.store(y_ptr + rows[:, None] * F + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward_kernel(
    dy_ptr, gate_up_ptr, dgate_up_ptr, T, F, stride_row, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (rows < T)[:, None] & (cols < F)[None, :]
    at = gate_up_ptr + rows[:, None] * stride_row + cols[None, :]
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)  # [BT, BF]
    up = tl.load(at + F, mask=mask, other=0.0).to(tl.float32)  # [BT, BF]
    dy = tl.load(dy_ptr + rows[:, None] * F + cols[None, :], mask=mask, other=0.0).to(tl.float32)  # [BT, BF]
    s = _sigmoid(gate)
    out = dgate_up_ptr + rows[:, None] * (2 * F) + cols[None, :]
    dgate = dy * up * s * (1.0 + gate * (1.0 - s))
    tl.store(out, dgate.to(dgate_up_ptr.dtype.element_ty), mask=mask)
    tl.store(out + F, (dy * gate * s).to(dgate_up_ptr.dtype.element_ty), mask=mask)


def launch_config(F: int) -> LaunchConfig:
    """Settings for rows of F: a program has 2048 elements, 16 per thread, of several rows where F is small."""
    block = min(1024, block_size(F))
    return LaunchConfig({"BLOCK_T": 2048 // block, "BLOCK_F": block}, num_warps=4)


def _grid(T: int, F: int) -> tuple[int, int]:
    blocks = launch_config(F).blocks
    return ceil_div(T, blocks["BLOCK_T"]), ceil_div(F, blocks["BLOCK_F"])


class SwiGLU(torch.autograd.Function):
    """Saves gate_up, which the projection before it made anyway."""

    @staticmethod
    def forward(ctx, gate_up: Tensor, batch_invariant: bool) -> Tensor:
        T, F = gate_up.shape[0], gate_up.shape[1] // 2
        y = torch.empty(T, F, dtype=gate_up.dtype, device=gate_up.device)
        if use_triton(gate_up):
            if T:
                options = launch_config(F).options()
                swiglu_forward_kernel[_grid(T, F)](gate_up, y, T, F, gate_up.stride(0), **options)
        else:
            _in_float32(partial(_forward_cpu, batch_invariant), gate_up, out=y)
        ctx.save_for_backward(gate_up)
        ctx.batch_invariant = batch_invariant
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gate_up,) = ctx.saved_tensors
        T, F = gate_up.shape[0], gate_up.shape[1] // 2
        dgate_up = torch.empty(T, 2 * F, dtype=gate_up.dtype, device=gate_up.device)
        if use_triton(dy, gate_up):
            if T:
                tensors, options = (dy.contiguous(), gate_up, dgate_up), launch_config(F).options()
                swiglu_backward_kernel[_grid(T, F)](*tensors, T, F, gate_up.stride(0), **options)
        else:
            _in_float32(partial(_backward_cpu, ctx.batch_invariant), gate_up, dy, out=dgate_up)
        return dgate_up, None


def _sigmoid_cpu(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)) by operations whose bits do not depend on where an element lies.

    torch's silu and sigmoid take other code at the end of a thread's share, which gives other bits; its exp does not.
    """
    return torch.neg(x).exp_().add_(1).reciprocal_()


def _forward_cpu(batch_invariant: bool, gate_up: Tensor, *, out: Tensor) -> None:
    gate, up = gate_up.chunk(2, 1)
    if batch_invariant:
        torch.mul(gate, _sigmoid_cpu(gate), out=out).mul_(up)
    else:
        torch.ops.aten.silu.out(gate, out=out).mul_(up)


def _backward_cpu(batch_invariant: bool, gate_up: Tensor, dy: Tensor, *, out: Tensor) -> None:
    (gate, up), (dgate, dup) = gate_up.chunk(2, 1), out.chunk(2, 1)
    if batch_invariant:
        sigmoid = _sigmoid_cpu(gate)
        torch.mul(gate, sigmoid, out=dup)
        torch.mul(dup, 1 - sigmoid, out=dgate).add_(sigmoid).mul_(dy).mul_(up)
        dup.mul_(dy)
    else:
        torch.ops.aten.silu.out(gate, out=dup).mul_(dy)
        torch.mul(dy, up, out=dgate)
        torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)


def _in_float32(fn: Callable[..., None], *tensors: Tensor, out: Tensor) -> None:
    """fn(*tensors, out=out), in float32 where tensors are narrower: some rows at a time, which stay in the cache."""
    if out.element_size() >= 4:
        fn(*tensors, out=out)
    elif len(out) > WIDENED_ROWS:
        for *rows, out_rows in zip(*(x.split(WIDENED_ROWS) for x in (*tensors, out)), strict=True):
            _in_float32(fn, *rows, out=out_rows)
    else:
        wide = torch.empty(out.shape)
        fn(*(x.float() for x in tensors), out=wide)
        out.copy_(wide)


def swiglu(gate_up: Tensor, batch_invariant: bool = False) -> Tensor:
    """silu(gate_up[:, :F]) * gate_up[:, F:], contiguous. Differentiable.

    gate_up: [T, 2F] with contiguous rows, at any row stride. batch_invariant: a row's bits do not depend on the other
    rows, for more passes on the CPU; Triton's never do. Raises ValueError on other shapes.
    """
    if gate_up.dim() != 2 or gate_up.shape[1] % 2 or not gate_up.shape[1] or gate_up.stride(1) != 1:
        raise ValueError(f"swiglu: gate_up must be [T, 2F] with contiguous rows, not {tuple(gate_up.shape)}")
    return apply(SwiGLU, gate_up, batch_invariant)
