"""Many low-rank adapters on one frozen projection (LoRA, arXiv 2106.09685): each token meets its own adapter only.

Tokens lie in segments, one adapter per segment. M projections share the input x (q/k/v; gate and up; or a single one)
and are one frozen matrix W whose outputs are M ranges of columns. For projection m of the segment's adapter, with
dropout mask d_m (ones without dropout):

    y[:, columns_m] = x W_m^T + b_m + scale_m (d_m x) A_m^T B_m

Backward, W frozen, g = dy[:, columns_m]:

    dh_m = scale_m g B_m^T      dx = dy W + sum_m d_m (dh_m A_m)
    dA_m += dh_m^T (d_m x)      dB_m += scale_m (d_m x A_m^T)^T g        summed over the segment's tokens, in order

Gradients of A and B are added into the adapters' own gradient tensors, not returned: calls accumulate.

Shapes: x [T, I], W [O, I], y [T, O]; A_m [r, I]; B_m [r, width of columns_m]: the transpose of PEFT's lora_B, so that
both are read along rows. An adapter is one flat float32 tensor; A of all its projections that share x are consecutive
rows, so that one pass over x makes every h. Ranks are true ranks, from 1; 0 where an adapter leaves a projection alone.
FLOPs over 2 T I O each way for W, per projection: 2 T r (I + width) forward, 4 T r (I + width) backward. Bytes, b per
element: x and h once to shrink, h and y (read and written) to expand, and 4 r (I + width) per segment for A and B.

On a GPU three kernels make all of it. A and B are both a factor P [r, w] between h and a range of w columns:

    shrink: h = scale x P^T (h of A, dh of B)    expand: y += scale h P (y of B, dx of A)    outer: dP += scale h^T x

Every adapter is a separate tensor, so kernels find factors by address, in a table with one record per factor. Sums are
float32. h and dh are stored in x's dtype, as operands of a matrix instruction are: rounding them adds an error like
that of rounding x, once. No program meets two segments, none adds to what another program writes, and the blocks of a
sum do not depend on the batch: a segment's bits are the same in every batch and in every run.
"""

import torch
from torch import Tensor

from seal_kernels.dispatch import LaunchConfig, apply, ceil_div, tl, triton, use_triton
from seal_kernels.linear import FrozenWeight, check_linear, frozen_linear_backward, frozen_linear_forward
from seal_kernels.lora_cpu import keep_mask, lora_backward_cpu, lora_forward_cpu
from seal_kernels.lora_tables import BLOCK_T, LaunchRange, LoraGroup, LoraTables, device_tables, load_block, load_factor


def lora_linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None, group: LoraGroup) -> Tensor:
    """The equation with torch operations alone, differentiable by autograd in x and in group.params."""
    y = torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    pieces = []
    for s, (start, end) in enumerate(zip(group.bounds, group.bounds[1:], strict=False)):
        out = y[start:end]
        row = int(group.offsets[s, 0])
        for m, (first, last) in enumerate(group.columns):
            rank, I = int(group.ranks[s, m]), x.shape[1]
            a = group.params[s][row : row + rank * I].view(rank, I).to(x.dtype)
            row += rank * I
            b_start = int(group.offsets[s, 1 + m])
            b = group.params[s][b_start : b_start + rank * (last - first)].view(rank, last - first).to(x.dtype)
            x_s = x[start:end]
            if group.dropout is not None and group.seeds is not None and group.dropout[s] > 0:
                mask = keep_mask(group.seeds[s, m], group.dropout[s], end - start, I)
                x_s = x_s * mask.to(x)
            update = float(group.scales[s, m]) * (x_s @ a.T) @ b
            out = out + torch.nn.functional.pad(update, (first, y.shape[1] - last))
        pieces.append(out)
    return torch.cat(pieces)


@triton.jit
def _tile(ptr, row, column, rows, columns, stride, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
    """(addresses, mask), both [BLOCK, BC], of a tile of the matrix [rows, columns] at ptr, from (row, column) on."""
    i, j = tl.arange(0, BLOCK), tl.arange(0, BLOCK_C)
    mask = (row + i < rows)[:, None] & (column + j < columns)[None, :]
    return ptr + (tl.cast(row, tl.int64) * stride + column) + i[:, None] * stride + j[None, :], mask


@triton.jit
def _kept(token, column, width, seed, limit, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """keep_mask as booleans [BT, BC], from (token of the segment, column) on."""
    tokens, columns = token + tl.arange(0, BLOCK_T), column + tl.arange(0, BLOCK_C)
    x = tokens.to(tl.uint32)[:, None] * width.to(tl.uint32) + columns.to(tl.uint32)[None, :]
    x = x * 0x9E3779B9 + seed
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return (x ^ (x >> 16)) >= limit


@triton.jit
def lora_shrink_kernel(
    x_ptr, h_ptr, factors_ptr, blocks_ptr,
    first_factor,
    stride_x, stride_h, stride_factors,
    DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, ALIGNED_H: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """h = scale x P^T. A program makes one tile of h: a block of tokens, a block of ranks."""
    segment, start, first, end = load_block(blocks_ptr, tl.program_id(2))
    if first >= end:  # an idle block of a captured launch
        return
    p_ptr, _, rank, h_column, column, width, scale, seed, limit = load_factor(
        factors_ptr, segment, first_factor + tl.program_id(1), stride_factors, ALIGNED, ALIGNED_H
    )
    r0 = tl.program_id(0) * BLOCK_R
    if r0 >= rank:
        return
    acc = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
    for c0 in range(0, width, BLOCK_C):
        x_at, mask = _tile(x_ptr + column, first, c0, end, width, stride_x, BLOCK_T, BLOCK_C)
        x = tl.load(x_at, mask=mask, other=0.0)  # [BT, BC]
        if DROPOUT:
            x = tl.where(_kept(first - start, c0, width, seed, limit, BLOCK_T, BLOCK_C), x, 0.0).to(x.dtype)
        p_at, mask = _tile(p_ptr, r0, c0, rank, width, width, BLOCK_R, BLOCK_C)
        p = tl.load(p_at, mask=mask, other=0.0).to(x.dtype)  # [BR, BC]
        # add x p^T over this block of columns
        acc = tl.dot(x, tl.trans(p), acc, input_precision="ieee")  # [BT, BR]
    h_at, mask = _tile(h_ptr + h_column, first, r0, end, rank, stride_h, BLOCK_T, BLOCK_R)
    tl.store(h_at, (acc * scale).to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def lora_expand_kernel(
    y_ptr, h_ptr, factors_ptr, blocks_ptr,
    first_factor,
    stride_y, stride_h, stride_factors,
    DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, ALIGNED_H: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """y += scale h P. A program updates one tile of y: a block of tokens, a block of columns."""
    segment, start, first, end = load_block(blocks_ptr, tl.program_id(2))
    if first >= end:  # an idle block of a captured launch
        return
    p_ptr, _, rank, h_column, column, width, scale, seed, limit = load_factor(
        factors_ptr, segment, first_factor + tl.program_id(1), stride_factors, ALIGNED, ALIGNED_H
    )
    c0 = tl.program_id(0) * BLOCK_C
    if (rank == 0) | (c0 >= width):
        return
    acc = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float32)
    for r0 in range(0, rank, BLOCK_R):
        h_at, mask = _tile(h_ptr + h_column, first, r0, end, rank, stride_h, BLOCK_T, BLOCK_R)
        h = tl.load(h_at, mask=mask, other=0.0)  # [BT, BR]
        p_at, mask = _tile(p_ptr, r0, c0, rank, width, width, BLOCK_R, BLOCK_C)
        p = tl.load(p_at, mask=mask, other=0.0).to(h.dtype)  # [BR, BC]
        # add h p over this block of ranks
        acc = tl.dot(h, p, acc, input_precision="ieee")  # [BT, BC]
    acc *= scale
    if DROPOUT:
        acc = tl.where(_kept(first - start, c0, width, seed, limit, BLOCK_T, BLOCK_C), acc, 0.0)
    y_at, mask = _tile(y_ptr + column, first, c0, end, width, stride_y, BLOCK_T, BLOCK_C)
    y = tl.load(y_at, mask=mask, other=0.0).to(tl.float32) + acc  # [BT, BC]
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def lora_outer_kernel(
    x_ptr, h_ptr, factors_ptr, blocks_ptr,
    first_factor, rank_blocks,
    stride_x, stride_h, stride_factors,
    DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, ALIGNED_H: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """dP += scale h^T x. A program updates one tile of dP from all tokens of the segment, in order."""
    segment, start, first, end = load_block(blocks_ptr, tl.program_id(2))
    if first >= end:  # an idle block of a captured launch
        return
    _, dp_ptr, rank, h_column, column, width, scale, seed, limit = load_factor(
        factors_ptr, segment, first_factor + tl.program_id(1), stride_factors, ALIGNED, ALIGNED_H
    )
    r0, c0 = tl.program_id(0) % rank_blocks * BLOCK_R, tl.program_id(0) // rank_blocks * BLOCK_C
    if (r0 >= rank) | (c0 >= width) | (dp_ptr.to(tl.int64) == 0):  # 0: not trained
        return
    acc = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    for t0 in range(first, end, BLOCK_T):
        h_at, mask = _tile(h_ptr + h_column, t0, r0, end, rank, stride_h, BLOCK_T, BLOCK_R)
        h = tl.load(h_at, mask=mask, other=0.0)  # [BT, BR]
        x_at, mask = _tile(x_ptr + column, t0, c0, end, width, stride_x, BLOCK_T, BLOCK_C)
        x = tl.load(x_at, mask=mask, other=0.0)  # [BT, BC]
        if DROPOUT:
            x = tl.where(_kept(t0 - start, c0, width, seed, limit, BLOCK_T, BLOCK_C), x, 0.0).to(x.dtype)
        # add h^T x over this block of tokens
        acc = tl.dot(tl.trans(h), x, acc, input_precision="ieee")  # [BR, BC]
    dp_at, mask = _tile(dp_ptr, r0, c0, rank, width, width, BLOCK_R, BLOCK_C)
    tl.store(dp_at, tl.load(dp_at, mask=mask, other=0.0) + acc * scale, mask=mask)


def _config(R: int, C: int, num_warps: int, num_stages: int) -> LaunchConfig:
    return LaunchConfig({"BLOCK_T": BLOCK_T, "BLOCK_R": R, "BLOCK_C": C}, num_warps, num_stages)


# The ranks of a launch have no say: blocks decide the bits of a sum.
_FLOAT32 = {"shrink": _config(32, 32, 8, 2), "expand": _config(32, 32, 4, 2), "outer": _config(32, 32, 4, 1)}
# As measured on an H100 for 10 to 150 adapters of rank 32 with 5 or 55 tokens each: many small programs are fastest, as
# a segment has few tokens and its factors, read once, take most of the time. "outer" is too small for Hopper's matrix
# instructions then, and does not miss them.
_HALF = {"shrink": _config(16, 128, 4, 3), "expand": _config(32, 64, 4, 2), "outer": _config(32, 64, 4, 2)}


def launch_config(kernel_name: str, dtype: torch.dtype) -> LaunchConfig:
    """Settings of kernel "shrink", "expand" or "outer" for x of dtype."""
    return (_FLOAT32 if dtype == torch.float32 else _HALF)[kernel_name]


def _launch(kernel_name: str, wide: Tensor, h: Tensor, tables: LoraTables, factors: LaunchRange) -> None:
    """Run a kernel over a group's factors; wide is the tensor x or y on their wide side."""
    config, sizes = launch_config(kernel_name, wide.dtype), [factors.first]
    rank_blocks = ceil_div(factors.max_rank, config.blocks["BLOCK_R"])
    column_blocks = ceil_div(factors.max_width, config.blocks["BLOCK_C"])
    if kernel_name == "shrink":
        kernel, programs, blocks = lora_shrink_kernel, rank_blocks, tables.token_blocks
    elif kernel_name == "expand":
        kernel, programs, blocks = lora_expand_kernel, column_blocks, tables.token_blocks
    else:
        kernel, programs, blocks = lora_outer_kernel, rank_blocks * column_blocks, tables.segment_blocks
        sizes.append(rank_blocks)
    if programs and len(blocks):
        kernel[(programs, factors.count, len(blocks))](
            wide, h, tables.factor_table, blocks, *sizes, wide.stride(0), h.stride(0), tables.factor_table.stride(0),
            DROPOUT=factors.dropout, ALIGNED=tables.aligned, ALIGNED_H=tables.aligned_h, **config.options(),
        )


def _forward_triton(x: Tensor, y: Tensor, tables: LoraTables) -> Tensor:
    """Adds every segment's update to y; returns h [T, h_width, rounded up]."""
    h = torch.empty(len(x), ceil_div(tables.h_width, 16) * 16, dtype=x.dtype, device=x.device)
    for factors in tables.a:
        _launch("shrink", x, h, tables, factors)
    _launch("expand", y, h, tables, tables.b)
    return h


def _backward_triton(x: Tensor, dy: Tensor, dx: Tensor | None, h: Tensor, tables: LoraTables) -> None:
    """Adds every segment's part to dx, and its gradients of A and B to the adapters' own."""
    dh = torch.empty_like(h)
    _launch("shrink", dy, dh, tables, tables.b)
    _launch("outer", dy, h, tables, tables.b)
    for factors in tables.a:
        _launch("outer", x, dh, tables, factors)
        if dx is not None:
            for m in range(factors.count):  # one launch after the other: all of them add to the same columns
                _launch("expand", dx, dh, tables, factors._replace(first=factors.first + m, count=1))


class LoraLinear(torch.autograd.Function):
    """Saves x and h. `anchor` is a tensor that requires a gradient, so that backward runs even where x needs none."""

    @staticmethod
    def forward(
        ctx, x: Tensor, anchor: Tensor, weight: FrozenWeight, bias: Tensor | None, group: LoraGroup,
        batch_invariant: bool, dtype: torch.dtype,
    ) -> Tensor:
        y = frozen_linear_forward(x, weight, bias, batch_invariant, dtype)
        if use_triton(x, bias):
            x = x if x.stride(1) == 1 else x.contiguous()
            ctx.tables = group.tables or device_tables([group], [x.shape[1]], x.device).groups[0]
            ctx.hidden = _forward_triton(x, y, ctx.tables)
        else:
            ctx.hidden = lora_forward_cpu(x, y, group, batch_invariant)
        ctx.weight, ctx.group, ctx.batch_invariant = weight, group, batch_invariant
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        dx = frozen_linear_backward(dy, ctx.weight, ctx.batch_invariant, x.dtype) if ctx.needs_input_grad[0] else None
        if use_triton(x, dy):
            _backward_triton(x, dy if dy.stride(1) == 1 else dy.contiguous(), dx, ctx.hidden, ctx.tables)
        else:
            lora_backward_cpu(x, dy, dx, ctx.hidden, ctx.group)
        return dx, None, None, None, None, None, None


def lora_linear(
    x: Tensor,
    weight: FrozenWeight,
    bias: Tensor | None,
    group: LoraGroup,
    anchor: Tensor,
    batch_invariant: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """y [T, O] = frozen_linear(x, weight, bias, batch_invariant, dtype) plus each segment's low-rank update.

    Differentiable in x; the adapters' gradients are added to group.grads during backward. anchor: any tensor that
    requires a gradient (its own stays None). Raises ValueError on shapes that do not match.
    """
    check_linear(x, weight, bias)
    if group.bounds[0] != 0 or group.bounds[-1] != len(x):
        raise ValueError(f"lora_linear: segments cover tokens {group.bounds[0]} to {group.bounds[-1]} of {len(x)}")
    return apply(LoraLinear, x, anchor, weight, bias, group, batch_invariant, x.dtype if dtype is None else dtype)
