"""Many low-rank adapters on one frozen projection (LoRA, arXiv 2106.09685): each token meets its own adapter only.

Tokens lie in segments, one adapter a segment. M projections share the input x (q/k/v; gate and up; or one alone) and
are one frozen matrix W whose outputs are M ranges of columns. For projection m of the segment's adapter, with dropout
mask d_m (ones without dropout):

    y[:, columns_m] = x W_m^T + b_m + scale_m (d_m x) A_m^T B_m

Backward, W frozen, g = dy[:, columns_m]:

    dh_m = scale_m g B_m^T      dx = dy W + sum_m d_m (dh_m A_m)
    dA_m += dh_m^T (d_m x)      dB_m += scale_m (d_m x A_m^T)^T g        summed over the segment's tokens, in order

Gradients of A and B are added into the adapters' own gradient tensors, not returned: calls accumulate.

Shapes: x [T, I], W [O, I], y [T, O]; A_m [r, I]; B_m [r, width of columns_m]: the transpose of PEFT's lora_B, so that
both are read along rows. An adapter is one flat float32 tensor; A of all its projections that share x are consecutive
rows, so that one pass over x makes every h. Ranks are true ranks, from 1; 0 where an adapter leaves a projection alone.
FLOPs over 2 T I O each way for W: 2 T r (I + width) forward and 4 T r (I + width) backward a projection. Bytes, b an
element: x and h once to shrink, h and y (read and written) to expand, and 4 r (I + width) a segment for A and B.

On a GPU three kernels make all of it. A and B are both a factor P [r, w] between h and a range of w columns:

    shrink: h = scale x P^T (h of A, dh of B)    expand: y += scale h P (y of B, dx of A)    outer: dP += scale h^T x

Every adapter being a tensor of its own, kernels find factors by address, in a table with a record a factor. Sums are
float32. h and dh are stored in x's dtype, as operands of a matrix instruction are: rounding them adds an error like
that of rounding x, once. No program meets two segments, none adds to what another one writes, and the blocks of a sum
do not depend on the company: a segment's bits are the same alone and among others, and in every run.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from seal_kernels.dispatch import cdiv, tl, triton, use_triton
from seal_kernels.linear import check_linear, frozen_linear_backward, frozen_linear_forward

BLOCK_T = 64  # tokens a block: the rows of Hopper's matrix instruction, and about the length of a segment


class Factors(NamedTuple):
    """Which of a segment's records a launch is for: units first .. first + count, none of more rows or columns."""

    first: int
    count: int
    rows: int
    columns: int
    dropout: bool


@dataclass(frozen=True)
class LoraTables:
    """What the kernels read of a group, on its device; see device_tables."""

    records: Tensor  # [S, units, 9] int64, as _factor reads them
    blocks: Tensor  # [n, 4] int32: (segment, its first token, first token of the block, the segment's end)
    spans: Tensor  # the same with one block a segment
    a: list[Factors]  # one unit for all projections; for segments with dropout, a unit a projection
    b: Factors  # a unit a projection
    rows: int  # the most rows of A that any segment has: the width of h
    aligned: bool  # to 16 bytes: every row of every factor, and the columns that it meets
    aligned_h: bool  # to 16 bytes: all ranks are multiples of 8


@dataclass(frozen=True)
class LoraGroup:
    """The adapters of S segments on one group of M projections that share their input.

    params, grads: a flat float32 tensor a segment (grads None where nothing is trained). Segments of one adapter must
    be one segment. offsets [S, 1 + M]: where in them A begins (all projections' rows, consecutive), and each B.
    """

    bounds: tuple[int, ...]  # S + 1: segment s is tokens bounds[s] .. bounds[s + 1]
    columns: tuple[tuple[int, int], ...]  # M ranges of the output
    params: Sequence[Tensor]
    grads: Sequence[Tensor | None]
    offsets: np.ndarray  # [S, 1 + M] int64
    ranks: np.ndarray  # [S, M] int64
    scales: np.ndarray  # [S, M] float64
    dropout: np.ndarray | None = None  # [S] probability that an input element is dropped
    seeds: np.ndarray | None = field(default=None)  # [S, M] uint32: one random stream a segment and projection
    tables: LoraTables | None = None  # for the GPU, which otherwise makes them in each forward


def keep_mask(seed: int, probability: float, rows: int, columns: int) -> Tensor:
    """[rows, columns] float32: 0 where dropped, 1 / (1 - probability) where kept.

    Element (i, j) hashes its counter i * columns + j with the seed, in 32-bit integers (multiply and xor-shift
    rounds), so that the forward, the backward and every backend draw the same.
    """
    word = (1 << 32) - 1
    x = torch.arange(rows * columns, dtype=torch.int64).mul_(0x9E3779B9).add_(int(seed)).bitwise_and_(word)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x.bitwise_xor_(x >> shift).mul_(factor).bitwise_and_(word)
    x.bitwise_xor_(x >> 16)
    kept = x >= math.floor(probability * (1 << 32))
    return kept.view(rows, columns).float().div_(1 - probability)


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
            given = x[start:end]
            if group.dropout is not None and group.seeds is not None and group.dropout[s] > 0:
                mask = keep_mask(group.seeds[s, m], group.dropout[s], end - start, I)
                given = given * mask.to(x)
            update = float(group.scales[s, m]) * (given @ a.T) @ b
            out = out + torch.nn.functional.pad(update, (first, y.shape[1] - last))
        pieces.append(out)
    return torch.cat(pieces)


@dataclass(frozen=True)
class _Part:
    """One segment's adapter on one projection, as views into its flat tensors."""

    rows: slice  # of the group's A and h
    columns: slice  # of y
    b: Tensor  # [r, width]
    db: Tensor | None
    scale: float
    mask: Tensor | None  # [tokens of the segment, I]


def _segment(group: LoraGroup, s: int, x: Tensor) -> tuple[Tensor, Tensor | None, list[_Part]]:
    """(A [R, I], dA or None, parts) of segment s, whose tokens are x [n, I]; R = 0 where no projection is adapted."""
    ranks, (row, *b_starts) = group.ranks[s].tolist(), group.offsets[s].tolist()
    I, R, first_row = x.shape[1], sum(ranks), 0
    params, grads = group.params[s], group.grads[s]
    a = params.as_strided((R, I), (I, 1), row)
    da = None if grads is None else grads.as_strided((R, I), (I, 1), row)
    parts = []
    for m, (rank, b_start, (first, last)) in enumerate(zip(ranks, b_starts, group.columns, strict=True)):
        if rank == 0:
            continue
        shape = (rank, last - first), (last - first, 1), b_start
        mask = None
        if group.dropout is not None and group.seeds is not None and group.dropout[s] > 0:
            mask = keep_mask(group.seeds[s, m], group.dropout[s], len(x), I)
        db = None if grads is None else grads.as_strided(*shape)
        rows = slice(first_row, first_row + rank)
        parts.append(_Part(rows, slice(first, last), params.as_strided(*shape), db, float(group.scales[s, m]), mask))
        first_row += rank
    return a, da, parts


def _spans(group: LoraGroup) -> list[tuple[int, int, int]]:
    """(segment, first token, end) of the segments that have tokens and an adapter on this group."""
    adapted, bounds = np.flatnonzero(group.ranks.any(1)).tolist(), group.bounds
    return [(s, bounds[s], bounds[s + 1]) for s in adapted if bounds[s + 1] > bounds[s]]


def _forward_cpu(x: Tensor, y: Tensor, group: LoraGroup) -> list[Tensor]:
    """Adds every segment's update to y; returns each segment's h."""
    hidden = []
    for s, start, end in _spans(group):
        given, out = x[start:end], y[start:end]
        a, _, parts = _segment(group, s, given)
        if parts[0].mask is None:
            h = given @ a.T  # [n, R]: one pass over x for all projections
        else:
            h = torch.cat([(given if p.mask is None else given * p.mask) @ a[p.rows].T for p in parts], 1)
        for part in parts:
            out[:, part.columns].addmm_(h[:, part.rows], part.b, alpha=part.scale)
        hidden.append(h)
    return hidden


def _backward_cpu(x: Tensor, dy: Tensor, dx: Tensor | None, hidden: list[Tensor], group: LoraGroup) -> None:
    """Adds every segment's part to dx, and its gradients of A and B to the adapters' own."""
    for (s, start, end), h in zip(_spans(group), hidden, strict=True):
        given, g = x[start:end], dy[start:end]
        a, da, parts = _segment(group, s, given)
        dh = torch.empty_like(h)
        for part in parts:
            columns = g[:, part.columns]
            torch.mm(columns, part.b.T, out=dh[:, part.rows]).mul_(part.scale)
            if part.db is not None:
                part.db.addmm_(h[:, part.rows].T, columns, alpha=part.scale)
        # Without dropout all projections read the same x: one product for all of them.
        reads = [(slice(None), None)] if parts[0].mask is None else [(part.rows, part.mask) for part in parts]
        for rows, mask in reads:
            if da is not None:
                da[rows].addmm_(dh[:, rows].T, given if mask is None else given * mask)
            if dx is not None and mask is None:
                dx[start:end].addmm_(dh, a)
            elif dx is not None and mask is not None:
                dx[start:end].addcmul_(dh[:, rows] @ a[rows], mask)


@triton.jit
def _factor(records_ptr, segment, unit, stride, ALIGNED: tl.constexpr, ALIGNED_H: tl.constexpr):
    """(P, dP, rank, first column in h, first column of the range, columns, scale, dropout's seed and limit)."""
    at = records_ptr + segment * stride + unit * 9
    p = tl.load(at).to(tl.pointer_type(tl.float32))
    dp = tl.load(at + 1).to(tl.pointer_type(tl.float32))
    column, width = tl.load(at + 4).to(tl.int32), tl.load(at + 5).to(tl.int32)
    if ALIGNED:
        p, dp = tl.multiple_of(p, 16), tl.multiple_of(dp, 16)
        column, width = tl.multiple_of(column, 16), tl.multiple_of(width, 16)
    scale = tl.load(at + 6).to(tl.int32).to(tl.float32, bitcast=True)
    rank, row = tl.load(at + 2).to(tl.int32), tl.load(at + 3).to(tl.int32)
    if ALIGNED_H:
        rank, row = tl.multiple_of(rank, 8), tl.multiple_of(row, 8)
    return p, dp, rank, row, column, width, scale, tl.load(at + 7).to(tl.uint32), tl.load(at + 8).to(tl.uint32)


@triton.jit
def _block(blocks_ptr, index):
    """(segment, its first token, first token of the block, the segment's end)"""
    at = blocks_ptr + index.to(tl.int64) * 4
    return tl.load(at).to(tl.int64), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def _tile(ptr, row, column, rows, columns, stride, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
    """(addresses, mask) of a tile of the matrix [rows, columns] at ptr, from (row, column) on."""
    i, j = tl.arange(0, BLOCK), tl.arange(0, BLOCK_C)
    mask = (row + i < rows)[:, None] & (column + j < columns)[None, :]
    return ptr + (tl.cast(row, tl.int64) * stride + column) + i[:, None] * stride + j[None, :], mask


@triton.jit
def _kept(token, column, width, seed, limit, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """keep_mask as booleans, from (token of the segment, column) on."""
    tokens, columns = token + tl.arange(0, BLOCK_T), column + tl.arange(0, BLOCK_C)
    x = tokens.to(tl.uint32)[:, None] * width.to(tl.uint32) + columns.to(tl.uint32)[None, :]
    x = x * 0x9E3779B9 + seed
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return (x ^ (x >> 16)) >= limit


@triton.jit
def lora_shrink_kernel(
    x_ptr, h_ptr, records_ptr, blocks_ptr,
    first_unit,
    stride_x, stride_h, stride_records,
    DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, ALIGNED_H: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    segment, start, first, end = _block(blocks_ptr, tl.program_id(2))
    p_ptr, _, rank, row, column, width, scale, seed, limit = _factor(
        records_ptr, segment, first_unit + tl.program_id(1), stride_records, ALIGNED, ALIGNED_H
    )
    r0 = tl.program_id(0) * BLOCK_R
    if r0 >= rank:
        return
    acc = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
    for c0 in range(0, width, BLOCK_C):
        x_at, mask = _tile(x_ptr + column, first, c0, end, width, stride_x, BLOCK_T, BLOCK_C)
        x = tl.load(x_at, mask=mask, other=0.0)
        if DROPOUT:
            x = tl.where(_kept(first - start, c0, width, seed, limit, BLOCK_T, BLOCK_C), x, 0.0).to(x.dtype)
        p_at, mask = _tile(p_ptr, r0, c0, rank, width, width, BLOCK_R, BLOCK_C)
        p = tl.load(p_at, mask=mask, other=0.0).to(x.dtype)
        acc = tl.dot(x, tl.trans(p), acc, input_precision="ieee")
    h_at, mask = _tile(h_ptr + row, first, r0, end, rank, stride_h, BLOCK_T, BLOCK_R)
    tl.store(h_at, (acc * scale).to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def lora_expand_kernel(
    y_ptr, h_ptr, records_ptr, blocks_ptr,
    first_unit,
    stride_y, stride_h, stride_records,
    DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, ALIGNED_H: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    segment, start, first, end = _block(blocks_ptr, tl.program_id(2))
    p_ptr, _, rank, row, column, width, scale, seed, limit = _factor(
        records_ptr, segment, first_unit + tl.program_id(1), stride_records, ALIGNED, ALIGNED_H
    )
    c0 = tl.program_id(0) * BLOCK_C
    if (rank == 0) | (c0 >= width):
        return
    acc = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float32)
    for r0 in range(0, rank, BLOCK_R):
        h_at, mask = _tile(h_ptr + row, first, r0, end, rank, stride_h, BLOCK_T, BLOCK_R)
        h = tl.load(h_at, mask=mask, other=0.0)
        p_at, mask = _tile(p_ptr, r0, c0, rank, width, width, BLOCK_R, BLOCK_C)
        p = tl.load(p_at, mask=mask, other=0.0).to(h.dtype)
        acc = tl.dot(h, p, acc, input_precision="ieee")
    acc *= scale
    if DROPOUT:
        acc = tl.where(_kept(first - start, c0, width, seed, limit, BLOCK_T, BLOCK_C), acc, 0.0)
    y_at, mask = _tile(y_ptr + column, first, c0, end, width, stride_y, BLOCK_T, BLOCK_C)
    y = tl.load(y_at, mask=mask, other=0.0).to(tl.float32) + acc
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def lora_outer_kernel(
    x_ptr, h_ptr, records_ptr, spans_ptr,
    first_unit, row_blocks,
    stride_x, stride_h, stride_records,
    DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, ALIGNED_H: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    segment, start, first, end = _block(spans_ptr, tl.program_id(2))
    _, dp_ptr, rank, row, column, width, scale, seed, limit = _factor(
        records_ptr, segment, first_unit + tl.program_id(1), stride_records, ALIGNED, ALIGNED_H
    )
    r0, c0 = tl.program_id(0) % row_blocks * BLOCK_R, tl.program_id(0) // row_blocks * BLOCK_C
    if (r0 >= rank) | (c0 >= width) | (dp_ptr.to(tl.int64) == 0):  # 0: not trained
        return
    acc = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    for t0 in range(first, end, BLOCK_T):
        h_at, mask = _tile(h_ptr + row, t0, r0, end, rank, stride_h, BLOCK_T, BLOCK_R)
        h = tl.load(h_at, mask=mask, other=0.0)
        x_at, mask = _tile(x_ptr + column, t0, c0, end, width, stride_x, BLOCK_T, BLOCK_C)
        x = tl.load(x_at, mask=mask, other=0.0)
        if DROPOUT:
            x = tl.where(_kept(t0 - start, c0, width, seed, limit, BLOCK_T, BLOCK_C), x, 0.0).to(x.dtype)
        acc = tl.dot(tl.trans(h), x, acc, input_precision="ieee")
    dp_at, mask = _tile(dp_ptr, r0, c0, rank, width, width, BLOCK_R, BLOCK_C)
    tl.store(dp_at, tl.load(dp_at, mask=mask, other=0.0) + acc * scale, mask=mask)


# (BLOCK_R, BLOCK_C, num_warps, num_stages). Never by the ranks of a launch: blocks decide the bits of a sum.
_FLOAT32 = {"shrink": (32, 32, 8, 2), "expand": (32, 32, 4, 2), "outer": (32, 32, 4, 1)}
_HALF = {"shrink": (64, 64, 8, 3), "expand": (32, 128, 8, 2), "outer": (64, 128, 8, 2)}


def launch_config(which: str, dtype: torch.dtype) -> dict[str, int]:
    """Blocks, warps and stages of kernel `which` ("shrink", "expand", "outer") for x of dtype."""
    R, C, warps, stages = (_FLOAT32 if dtype == torch.float32 else _HALF)[which]
    return {"BLOCK_T": BLOCK_T, "BLOCK_R": R, "BLOCK_C": C, "num_warps": warps, "num_stages": stages}


def _addresses(tensors: Sequence[Tensor | None], device: torch.device) -> np.ndarray:
    """[S, 2, 1] int64: address (0 for None) and size in elements. Kernels trust them: they are checked here."""
    tensors = [None if t is None or not t.numel() else t for t in tensors]  # an empty tensor stands for no adapter
    for t in tensors:
        if t is not None and (t.device != device or t.dtype != torch.float32 or not t.is_contiguous()):
            raise ValueError(f"lora: adapters must be contiguous float32 on {device}, not {t.dtype} on {t.device}")
    pairs = [(0, 0) if t is None else (t.data_ptr(), t.numel()) for t in tensors]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2, 1)


def _blocks(bounds: Sequence[int]) -> np.ndarray:
    """[n, 4] int32, as _block reads them: the blocks of every segment that has tokens."""
    starts, ends = np.array((bounds[:-1], bounds[1:]), dtype=np.int64)
    counts = -(-(ends - starts) // BLOCK_T)
    s = np.repeat(np.arange(len(starts)), counts)
    within = np.arange(len(s)) - (counts.cumsum() - counts)[s]
    return np.stack([s, starts[s], starts[s] + BLOCK_T * within, ends[s]], axis=1).astype(np.int32)


def device_tables(groups: Sequence[LoraGroup], inputs: Sequence[int], device: torch.device) -> list[LoraTables]:
    """Tables of groups that share their segments, such as all of a batch's, for LoraGroup.tables.

    inputs: I of each group. The host's work is numpy over all groups at once; what it made is copied to the device
    in two pieces. Raises ValueError on adapters that are not as LoraGroup says. At most 65535 blocks of tokens.
    """
    bounds, L, M = groups[0].bounds, len(groups), max(len(g.columns) for g in groups)
    if any(g.bounds != bounds for g in groups):
        raise ValueError("lora: groups must have the same bounds")
    S = len(bounds) - 1
    dropout = any(g.dropout is not None and g.seeds is not None and g.dropout.any() for g in groups)
    # [L, S, M], or 1 where all have the same; projections that a group lacks are of rank 0.
    ranks, offsets, seeds = (np.zeros((L, S, n), dtype=np.int64) for n in (M, 1 + M, M))
    columns, I = np.zeros((L, 1, M, 2), dtype=np.int64), np.array(inputs, dtype=np.int64).reshape(L, 1, 1)
    scales, drop = np.zeros((L, S, M), dtype=np.float32), np.zeros((L, S, 1))
    for i, g in enumerate(groups):
        m = len(g.columns)
        ranks[i, :, :m], offsets[i, :, : 1 + m], scales[i, :, :m], columns[i, :, :m] = (
            g.ranks, g.offsets, g.scales, g.columns,
        )  # fmt: skip
        if g.dropout is not None and g.seeds is not None:
            drop[i, :, 0], seeds[i, :, :m] = g.dropout, g.seeds
    if not ((drop >= 0) & (drop < 1)).all():
        raise ValueError("lora: the probability of dropout must be at least 0 and below 1")
    widths, total = columns[..., 1] - columns[..., 0], ranks.sum(2, keepdims=True)
    before = ranks.cumsum(2) - ranks
    distinct = {id(tensors): tensors for g in groups for tensors in (g.params, g.grads)}  # a batch's groups share them
    held = {key: _addresses(tensors, device) for key, tensors in distinct.items()}
    params, grads = (np.stack([held[id(getattr(g, name))] for g in groups]) for name in ("params", "grads"))
    ends = np.concatenate([offsets[..., :1] + total * I, offsets[..., 1:] + ranks * widths], axis=2)
    used = np.concatenate([total, ranks], axis=2) > 0
    for sizes in (params[:, :, 1], np.where(grads[:, :, 0] == 0, params[:, :, 1], grads[:, :, 1])):
        if (used & ((offsets < 0) | (ends > sizes))).any():
            raise ValueError("lora: an adapter's offsets reach beyond its tensor")

    records = np.zeros((L, S, 1 + (2 if dropout else 1) * M, 9), dtype=np.int64)

    def put(first: int, at: np.ndarray, *fields: np.ndarray | int) -> None:
        """Records of the units from first on, whose factors begin at element `at`."""
        units = slice(first, first + at.shape[2])
        records[:, :, units, 0] = params[:, :, 0] + 4 * at
        records[:, :, units, 1] = np.where(grads[:, :, 0] == 0, 0, grads[:, :, 0] + 4 * at)
        for i, values in enumerate(fields):
            records[:, :, units, 2 + i] = values

    # A segment without dropout has one record for all rows of A, whatever its company has.
    put(0, offsets[..., :1], np.where(drop > 0, 0, total), 0, 0, I, np.ones_like(scales[..., :1]).view(np.int32))
    put(1, offsets[..., 1:], ranks, before, columns[..., 0], widths, scales.view(np.int32))
    if dropout:
        scale = (np.float32(1) / (1 - drop).astype(np.float32)).view(np.int32)
        limit = np.floor(drop * (1 << 32))
        put(1 + M, offsets[..., :1] + before * I, np.where(drop > 0, ranks, 0), before, 0, I, scale, seeds, limit)
    mixed = np.bitwise_or.reduce(records[..., :2], axis=(1, 2, 3)) | np.bitwise_or.reduce(columns, axis=(1, 2, 3))
    aligned = (mixed | np.array(inputs)) % 16 == 0
    aligned_h = (ranks % 8 == 0).all((1, 2))
    table, blocks = torch.from_numpy(records).to(device), _blocks(bounds)
    most = total.max((1, 2), initial=0).tolist()

    made, n = [], len(blocks)
    blocks = torch.from_numpy(np.concatenate([blocks, blocks[blocks[:, 1] == blocks[:, 2]]])).to(device)
    for i, g in enumerate(groups):
        m, rank = len(g.columns), int(ranks[i].max(initial=0))
        a = [Factors(0, 1, most[i], inputs[i], False)]
        if dropout:
            a.append(Factors(1 + M, m, rank, inputs[i], True))
        b = Factors(1, m, rank, int(widths[i].max()), False)
        made.append(LoraTables(table[i], blocks[:n], blocks[n:], a, b, most[i], bool(aligned[i]), bool(aligned_h[i])))
    return made


def _launch(which: str, x: Tensor, h: Tensor, tables: LoraTables, factors: Factors) -> None:
    """Kernel `which` over a group's factors, x being the tensor on their wide side."""
    config = launch_config(which, x.dtype)
    rows, columns = cdiv(factors.rows, config["BLOCK_R"]), cdiv(factors.columns, config["BLOCK_C"])
    kernel, inner, blocks = {
        "shrink": (lora_shrink_kernel, rows, tables.blocks),
        "expand": (lora_expand_kernel, columns, tables.blocks),
        "outer": (lora_outer_kernel, rows * columns, tables.spans),
    }[which]
    if inner and len(blocks):
        kernel[(inner, factors.count, len(blocks))](
            x, h, tables.records, blocks, factors.first, *([rows] if which == "outer" else []),
            x.stride(0), h.stride(0), tables.records.stride(0),
            DROPOUT=factors.dropout, ALIGNED=tables.aligned, ALIGNED_H=tables.aligned_h, **config,
        )  # fmt: skip


def _forward_triton(x: Tensor, y: Tensor, tables: LoraTables) -> Tensor:
    """Adds every segment's update to y; returns h [T, rows]."""
    h = torch.empty(len(x), cdiv(tables.rows, 16) * 16, dtype=x.dtype, device=x.device)
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
        ctx, x: Tensor, anchor: Tensor, weight: Tensor, bias: Tensor | None, group: LoraGroup, row_tile: int | None
    ) -> Tensor:
        y = frozen_linear_forward(x, weight, bias, row_tile)
        if use_triton(x, weight, bias):
            x = x if x.stride(1) == 1 else x.contiguous()
            ctx.tables = group.tables or device_tables([group], [x.shape[1]], x.device)[0]
            ctx.hidden = _forward_triton(x, y, ctx.tables)
        else:
            ctx.hidden = _forward_cpu(x, y, group)
        ctx.group, ctx.row_tile = group, row_tile
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        dx = frozen_linear_backward(dy, weight, ctx.row_tile) if ctx.needs_input_grad[0] else None
        if use_triton(x, weight, dy):
            _backward_triton(x, dy if dy.stride(1) == 1 else dy.contiguous(), dx, ctx.hidden, ctx.tables)
        else:
            _backward_cpu(x, dy, dx, ctx.hidden, ctx.group)
        return dx, None, None, None, None, None


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, group: LoraGroup, anchor: Tensor, row_tile: int | None = None
) -> Tensor:
    """y [T, O] = frozen_linear(x, weight, bias) plus each segment's low-rank update.

    Differentiable in x; the adapters' gradients are added to group.grads during backward. anchor: any tensor that
    requires a gradient (its own stays None). row_tile: as of frozen_linear. Raises ValueError on shapes that do not
    match.
    """
    check_linear(x, weight, bias)
    if group.bounds[0] != 0 or group.bounds[-1] != len(x):
        raise ValueError(f"lora_linear: segments cover tokens {group.bounds[0]} to {group.bounds[-1]} of {len(x)}")
    return LoraLinear.apply(x, anchor, weight, bias, group, row_tile)  # pyright: ignore[reportReturnType]
