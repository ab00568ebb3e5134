"""Rotary position embedding of queries and keys (Su et al., arXiv 2104.09864), pairing the two halves of a head.

Element i of the first half and element i of the second half, i < E/2, are one point that turns by the token's angle:

    x1' = x1 cos - x2 sin           x2' = x2 cos + x1 sin

Backward is the rotation by the negative angle, so only cos and sin are saved.

Shapes: q [T, H, E] and k [T, K, E], E even, the last dimension contiguous and the others at any stride (views into a
packed projection, for instance); cos and sin [T, E/2], which say each token's position. q and k share one launch.
Bytes per token, b per element: 2 b (H + K) E (one read, one write), and 4 E of float32 cos and sin, which all heads of
a token share. 3 FLOPs per element: memory bound.
"""

import torch
from torch import Tensor

from seal_kernels.dispatch import LaunchConfig, apply, block_size, ceil_div, tl, triton, use_triton


def rotary_ref(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The equation in float32 (float64 for float64 input), in q's dtype."""

    def rotate(x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        x1, x2 = x.to(wide).chunk(2, -1)
        c, s = cos.to(wide)[:, None], sin.to(wide)[:, None]
        return torch.cat([x1 * c - x2 * s, x2 * c + x1 * s], -1).to(x.dtype)

    return rotate(q), rotate(k)


@triton.jit
def _rotate_rows(
    x_ptr, out_ptr, cos_ptr, sin_ptr, first, N, heads, half, stride_token, stride_head,
    INVERSE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):
    rows = first + tl.arange(0, BLOCK_N)  # one row is one head of one token
    cols = tl.arange(0, BLOCK_E)
    mask = (rows < N)[:, None] & (cols < half)[None, :]
    tokens = rows // heads
    x_at = x_ptr + (tokens * stride_token + (rows - tokens * heads) * stride_head)[:, None] + cols[None, :]
    angle_at = (tokens * half)[:, None] + cols[None, :]
    x1 = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)  # [BN, BE]
    x2 = tl.load(x_at + half, mask=mask, other=0.0).to(tl.float32)  # [BN, BE]
    cos = tl.load(cos_ptr + angle_at, mask=mask, other=0.0).to(tl.float32)  # [BN, BE]
    sin = tl.load(sin_ptr + angle_at, mask=mask, other=0.0).to(tl.float32)  # [BN, BE]
    if INVERSE:
        sin = -sin
    out_at = out_ptr + (rows * (2 * half))[:, None] + cols[None, :]
    tl.store(out_at, (x1 * cos - x2 * sin).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_at + half, (x2 * cos + x1 * sin).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rotary_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    q_rows, k_rows, H, K, half, q_programs,
    stride_qt, stride_qh, stride_kt, stride_kh,
    INVERSE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):
    """The first q_programs programs rotate rows of q, the others rows of k."""
    program = tl.program_id(0).to(tl.int64)
    if program < q_programs:
        _rotate_rows(
            q_ptr, q_out_ptr, cos_ptr, sin_ptr, program * BLOCK_N, q_rows, H, half, stride_qt, stride_qh,
            INVERSE, BLOCK_N, BLOCK_E,
        )
    else:
        _rotate_rows(
            k_ptr, k_out_ptr, cos_ptr, sin_ptr, (program - q_programs) * BLOCK_N, k_rows, K, half,
            stride_kt, stride_kh, INVERSE, BLOCK_N, BLOCK_E,
        )


def launch_config(E: int) -> LaunchConfig:
    """Settings for heads of E: a program has 1024 pairs of elements, 8 per thread."""
    block = block_size(E // 2)
    return LaunchConfig({"BLOCK_N": max(1, 1024 // block), "BLOCK_E": block}, num_warps=4)


def _both_halves(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, cos) and (-sin, sin), [T, 1, E] each, kept with cos: all layers of a pass turn by the same angles."""
    kept = getattr(cos, "_both_halves", None)
    if kept is None or kept[0] is not sin:
        kept = sin, torch.cat([cos, cos], 1)[:, None], torch.cat([-sin, sin], 1)[:, None]
        cos._both_halves = kept  # pyright: ignore[reportAttributeAccessIssue]
    return kept[1:]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (angles.to(dtype) for angles in _both_halves(cos, sin))
    swapped = x.roll(x.shape[-1] // 2, -1)  # x2, x1
    return torch.mul(x, cos).addcmul_(swapped, sin, value=-1 if inverse else 1).to(x.dtype)


def _rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    (T, H, E), K = q.shape, k.shape[1]
    if not use_triton(q, k, cos, sin):
        behind_q = q.data_ptr() + H * q.stride(1) * q.element_size()
        if k.data_ptr() == behind_q and k.stride() == q.stride():  # parts of one product: turned by the same calls
            both = _rotate(q.as_strided((T, H + K, E), q.stride()), cos, sin, inverse)
            return both[:, :H], both[:, H:]
        return _rotate(q, cos, sin, inverse), _rotate(k, cos, sin, inverse)
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    config = launch_config(E)
    q_programs = ceil_div(T * H, config.blocks["BLOCK_N"])
    k_programs = ceil_div(T * K, config.blocks["BLOCK_N"])
    if T:
        rotary_kernel[(q_programs + k_programs,)](
            q, k, cos, sin, q_out, k_out, T * H, T * K, H, K, E // 2, q_programs,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), INVERSE=inverse, **config.options(),
        )
    return q_out, k_out


class Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotate_both(q, k, cos, sin, inverse=False)

    @staticmethod
    def backward(ctx, dq: Tensor, dk: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        dq, dk = (d if d.stride(-1) == 1 else d.contiguous() for d in (dq, dk))
        return *_rotate_both(dq, dk, *ctx.saved_tensors, inverse=True), None, None


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """(q', k'): q and k turned by their tokens' angles. Differentiable in q and k.

    Both are contiguous, but on the CPU parts of one contiguous [T, H + K, E] where q and k are neighbours like that.

    q: [T, H, E], k: [T, K, E], of one dtype, E even, the last dimension contiguous. cos, sin: [T, E/2], contiguous,
    float32; not to be changed in place, as on the CPU what follows from them is kept with cos. Raises ValueError on
    other shapes.
    """
    if q.dim() != 3 or k.dim() != 3 or k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2] or k.dtype != q.dtype:
        raise ValueError(f"rotary: q [T, H, E] and k [T, K, E] of one dtype, not {tuple(q.shape)}, {tuple(k.shape)}")
    T, _, E = q.shape
    if E % 2 or q.stride(2) != 1 or k.stride(2) != 1:
        raise ValueError(f"rotary: heads must be contiguous, of even length, not {tuple(q.shape)}, {tuple(k.shape)}")
    for name, angle in (("cos", cos), ("sin", sin)):
        if angle.shape != (T, E // 2) or not angle.is_contiguous():
            raise ValueError(f"rotary: {name} must be contiguous and {(T, E // 2)}, not {tuple(angle.shape)}")
    return apply(Rotary, q, k, cos, sin)
