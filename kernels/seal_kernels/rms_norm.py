"""RMS norm over the last dimension, optionally after adding a residual (Zhang & Sennrich, arXiv 1910.07467).

    h = x + residual                      (h = x without a residual)
    y = w * h / sqrt(mean(h^2) + eps)

Backward, w frozen, with dy and dh the gradients that reach y and h, r = 1 / sqrt(mean(h^2) + eps), g = w * dy:

    d = dh + r * g - h * r^3 * mean(g * h)          dx = dresidual = d

Shapes: x, residual [..., D] with the last dimension contiguous; w [D]. Two leading dimensions at most, with any
strides, so that the heads of a packed q/k/v projection are normed without a copy.
Bytes per row, b per element: forward 4 b D with residual (two reads, two writes), 2 b D without. Backward 4 b D with,
3 b D without. About 4 D FLOPs: memory bound.
"""

import torch
from torch import Tensor

from seal_kernels.dispatch import LaunchConfig, apply, block_size, ceil_div, tl, triton, use_triton


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The equation in float32 (float64 for float64 input), in x's dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def add_rms_norm_ref(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm_ref(h), h) for h = x + residual."""
    h = x + residual
    return rms_norm_ref(h, weight, eps), h


@triton.jit
def rms_norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, h_ptr, rstd_ptr,
    N, D, inner, eps,
    stride_outer, stride_inner,
    HAS_RESIDUAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    mask = (rows < N)[:, None] & (cols < D)[None, :]
    x_rows = (rows // inner) * stride_outer + (rows % inner) * stride_inner
    out = rows[:, None] * D + cols[None, :]
    h = tl.load(x_ptr + x_rows[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)  # [BN, BD]
    if HAS_RESIDUAL:
        h += tl.load(residual_ptr + out, mask=mask, other=0.0).to(tl.float32)
        stored = h.to(h_ptr.dtype.element_ty)  # the sum that is stored is the sum that is normed
        tl.store(h_ptr + out, stored, mask=mask)
        h = stored.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(h * h, axis=1) / D + eps)  # [BN]
    weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)  # [BD]
    tl.store(y_ptr + out, (h * rstd[:, None] * weight[None, :]).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + rows, rstd, mask=rows < N)


@triton.jit
def rms_norm_backward_kernel(
    dy_ptr, dh_ptr, h_ptr, weight_ptr, rstd_ptr, dx_ptr,
    N, D, inner,
    stride_outer, stride_inner,
    HAS_DH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    mask = (rows < N)[:, None] & (cols < D)[None, :]
    h_rows = (rows // inner) * stride_outer + (rows % inner) * stride_inner
    out = rows[:, None] * D + cols[None, :]
    h = tl.load(h_ptr + h_rows[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)  # [BN, BD]
    g = tl.load(dy_ptr + out, mask=mask, other=0.0).to(tl.float32)  # [BN, BD]
    g *= tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    rstd = tl.load(rstd_ptr + rows, mask=rows < N, other=0.0)  # [BN]
    # d = r g - h r^3 mean(g h), to which the gradient that reaches h is added
    dx = rstd[:, None] * g - h * (rstd * rstd * rstd * tl.sum(g * h, axis=1) / D)[:, None]
    if HAS_DH:
        dx += tl.load(dh_ptr + out, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def launch_config(D: int) -> LaunchConfig:
    """Settings for rows of D: a program holds whole rows in registers, 16 elements per thread."""
    block = block_size(D)
    rows = max(1, 2048 // block)
    return LaunchConfig({"BLOCK_N": rows, "BLOCK_D": block}, num_warps=min(16, max(1, rows * block // 512)))


def _row_strides(x: Tensor) -> tuple[int, int, int]:
    """(inner size, outer stride, inner stride) of the rows of x [N, D] or [N, M, D]."""
    if x.dim() == 3:
        return x.shape[1], x.stride(0), x.stride(1)
    return 1, x.stride(0), 0


class RMSNorm(torch.autograd.Function):
    """Saves h and one float32 per row; returns (y, h). Without a residual h is x itself, returned untouched."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        D, rows = x.shape[-1], x.numel() // x.shape[-1]
        config = launch_config(D)
        if use_triton(x, weight, residual):
            y = torch.empty(x.shape, dtype=dtype, device=x.device)
            h = x if residual is None else torch.empty(x.shape, dtype=residual.dtype, device=x.device)
            rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
            if rows:
                inner, stride_outer, stride_inner = _row_strides(x)
                rms_norm_forward_kernel[(ceil_div(rows, config.blocks["BLOCK_N"]),)](
                    x, residual, weight, y, h, rstd, rows, D, inner, eps, stride_outer, stride_inner,
                    HAS_RESIDUAL=residual is not None, **config.options(),
                )
        else:
            h = x if residual is None else torch.add(residual, x)
            wide = h.to(torch.promote_types(h.dtype, torch.float32))
            # The norm of a row takes one pass and no temporary, where square().mean() takes both.
            rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(D).add_(eps).rsqrt_()
            y = torch.mul(wide, rstd).mul_(weight).to(dtype)
        ctx.save_for_backward(h, weight, rstd)
        ctx.dtype = x.dtype
        ctx.set_materialize_grads(False)
        return y, h

    @staticmethod
    def backward(ctx, dy: Tensor | None, dh: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        if dy is None:  # only h is used
            return None if dh is None else dh.to(ctx.dtype), None, None, dh if ctx.needs_input_grad[3] else None, None
        h, weight, rstd = ctx.saved_tensors
        D, rows = h.shape[-1], h.numel() // h.shape[-1]
        config = launch_config(D)
        dy, dh = dy.contiguous(), None if dh is None else dh.contiguous()
        if use_triton(dy, h):
            dx = torch.empty(h.shape, dtype=h.dtype, device=h.device)
            if rows:
                inner, stride_outer, stride_inner = _row_strides(h)
                rms_norm_backward_kernel[(ceil_div(rows, config.blocks["BLOCK_N"]),)](
                    dy, dh, h, weight, rstd, dx, rows, D, inner, stride_outer, stride_inner,
                    HAS_DH=dh is not None, **config.options(),
                )
        else:
            wide = torch.promote_types(h.dtype, torch.float32)
            g = dy.to(wide) * weight
            mean = torch.linalg.vecdot(g, h.to(wide)).unsqueeze_(-1).div_(D)
            g.mul_(rstd).addcmul_(h.to(wide), rstd.pow(3).mul_(mean), value=-1)
            dx = (g if dh is None else g.add_(dh)).to(h.dtype)
        return dx.to(ctx.dtype), None, None, dx if ctx.needs_input_grad[3] else None, None


def _check(x: Tensor, weight: Tensor) -> None:
    if x.dim() not in (2, 3) or x.stride(-1) != 1:
        raise ValueError(f"rms_norm: x must be [N, D] or [N, M, D] with contiguous rows, not {tuple(x.shape)}")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight is {tuple(weight.shape)}, x is {tuple(x.shape)}")


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """y = w * x / sqrt(mean(x^2) + eps), contiguous, in dtype or x's. Differentiable in x; weight is frozen.

    x: [N, D] or [N, M, D], last dimension contiguous. weight: [D]. Raises ValueError on other shapes.
    """
    _check(x, weight)
    return apply(RMSNorm, x, weight, eps, None, dtype or x.dtype)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """(rms_norm(h) in dtype or x's, h in residual's) for h = x + residual, in one pass. Differentiable in both.

    x: [N, D] or [N, M, D], last dimension contiguous. residual: of x's shape, contiguous, of x's dtype or a wider one.
    weight: [D]. Raises ValueError on other shapes.
    """
    _check(x, weight)
    if residual.shape != x.shape or not residual.is_contiguous():
        raise ValueError(f"rms_norm: residual must be contiguous and {tuple(x.shape)}, not {tuple(residual.shape)}")
    return apply(RMSNorm, x, weight, eps, residual, dtype or x.dtype)
