"""Causal attention over sequences packed end to end, without padding (Dao et al., arXiv 2205.14135 and 2307.08691).

    out_i = sum_j p_ij v_j,   p_ij = exp(scale * q_i . k_j - lse_i),   lse_i = log sum_j exp(scale * q_i . k_j)

over the tokens j <= i of i's own sequence and, with a window W, j > i - W. Backward, with dout the gradient of out:

    delta_i = out_i . dout_i        ds_ij = p_ij (dout_i . v_j - delta_i)
    dq_i = scale sum_j ds_ij k_j    dk_j = scale sum_i ds_ij q_i        dv_j = sum_i p_ij dout_i

Shapes: q [T, H, E], k and v [T, K, E], query head h reading key head h // (H // K); cu_seqlens int32 [S + 1],
sequence s being the tokens cu_seqlens[s] .. cu_seqlens[s + 1]. Nothing of size T x T is ever made: p is recomputed in
backward from lse, one float per query and head. No sum crosses sequences and none is made by atomic additions, so a
sequence's bits depend neither on the other sequences nor on the run.
FLOPs, P the number of pairs (i, j): 4 P H E forward, 10 P H E backward (14 as done here: p is made twice, once for dk
and dv, once for dq). Bytes, b per element: 2 b T (H + K) E forward when a sequence's keys stay in cache.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from seal_kernels.attention_common import capability, common_arguments, head_block, launch_config, online_softmax
from seal_kernels.attention_cpu import Sequences, attention_backward_cpu, attention_forward_cpu
from seal_kernels.dispatch import apply, ceil_div, tl, triton, use_triton


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """The equation in float32 (float64 for float64 input), in q's dtype: one matrix of scores per sequence and head."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    bounds, group = cu_seqlens.tolist(), (k.shape[1], -1)
    outs = [q[:0]]
    for start, end in pairwise(bounds):
        qs, ks, vs = (x[start:end].to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
        scores = torch.einsum("ikge,jke->kgij", qs.unflatten(1, group), ks) * factor
        i = torch.arange(end - start, device=q.device)
        distance = i[:, None] - i[None, :]
        hidden = (distance < 0) | (distance >= (end if window is None else window))
        p = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        outs.append(torch.einsum("kgij,jke->ikge", p, vs).flatten(1, 2).to(q.dtype))
    return torch.cat(outs)


@triton.jit
def _load_rows(ptr, first, length, stride, E: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    """Rows first .. first + BLOCK of a sequence's head at ptr; 0 past its end, whatever the neighbour holds there."""
    rows, cols = tl.arange(0, BLOCK), tl.arange(0, BLOCK_E)
    mask = (first + rows < length)[:, None] & (cols < E)[None, :]  # [BLOCK, BE]
    return tl.load(ptr + first.to(tl.int64) * stride + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def _store_rows(ptr, x, first, length, stride, E: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    rows, cols = tl.arange(0, BLOCK), tl.arange(0, BLOCK_E)
    mask = (first + rows < length)[:, None] & (cols < E)[None, :]  # [BLOCK, BE]
    out = ptr + first.to(tl.int64) * stride + rows[:, None] * stride + cols[None, :]
    tl.store(out, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _visible(i, j, window, HAS_WINDOW: tl.constexpr):
    """Whether query i sees key j. A key past the sequence's end is seen only by queries past it."""
    seen = j <= i
    if HAS_WINDOW:
        seen &= j > i - window
    return seen


@triton.jit
def _key_blocks(m0, length, window, HAS_WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(first, edge, full, diagonal): where the keys of queries m0 .. m0 + BLOCK_M begin, and the numbers of key blocks
    that the window's edge cuts, that all queries see whole, and that the diagonal cuts."""
    first, edge = m0 * 0, m0 * 0  # a Python 0 would be no tensor in the interpreter
    whole = (m0 + 1) // BLOCK_N
    if HAS_WINDOW:
        first = tl.maximum(m0 - window + 1, 0) // BLOCK_N
        whole = tl.maximum(whole, first)
        edge = tl.minimum(tl.cdiv(tl.maximum(m0 + BLOCK_M - window, 0), BLOCK_N), whole) - first
    return first * BLOCK_N, edge, whole - first - edge, tl.cdiv(tl.minimum(m0 + BLOCK_M, length), BLOCK_N) - whole


@triton.jit
def _query_blocks(n0, length, window, HAS_WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(first, diagonal, full, edge): the same for the queries that see keys n0 .. n0 + BLOCK_N."""
    first, edge = n0 // BLOCK_M, n0 * 0
    end = tl.cdiv(length, BLOCK_M)
    if HAS_WINDOW:
        end = tl.minimum(end, tl.cdiv(n0 + BLOCK_N + window - 1, BLOCK_M))
    diagonal = tl.minimum(tl.cdiv(n0 + BLOCK_N - 1, BLOCK_M), end) - first
    full = end - first - diagonal
    if HAS_WINDOW:
        edge = tl.maximum(full - tl.maximum((n0 + window) // BLOCK_M - first - diagonal, 0), 0)
    return first * BLOCK_M, diagonal, full - edge, edge


@triton.jit
def _attend(
    acc, l_i, m_i, q, k_ptr, v_ptr, m0, n0, length, window, scale2, stride_kt, stride_vt,
    HAS_WINDOW: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(acc, l_i, m_i) with one more block of keys: the sums of p v and of p, and the largest score."""
    # compute q k^T
    k = _load_rows(k_ptr, n0, length, stride_kt, E, BLOCK_N, BLOCK_E)  # [BN, BE]
    score = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BM, BN]
    if MASKED:
        i, j = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
        score = tl.where(_visible(i[:, None], j[None, :], window, HAS_WINDOW), score, float("-inf"))
    p, alpha, m_i = online_softmax(m_i, score, scale2, MASKED and HAS_WINDOW)
    # rescale the accumulator and add p v
    v = _load_rows(v_ptr, n0, length, stride_vt, E, BLOCK_N, BLOCK_E)  # [BN, BE]
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")  # [BM, BE]
    return acc, l_i * alpha + tl.sum(p, axis=1), m_i


@triton.jit
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_seqlens_ptr,
    T, group, window, scale2,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot,
    HAS_WINDOW: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):
    """A program makes out and lse of BLOCK_M queries of one head. The last queries, with the most keys, start first."""
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head = tl.program_id(1).to(tl.int64)
    start = tl.load(cu_seqlens_ptr + tl.program_id(2)).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + tl.program_id(2) + 1) - start).to(tl.int32)
    if m0 >= length:
        return
    k_ptr += start * stride_kt + head // group * stride_kh
    v_ptr += start * stride_vt + head // group * stride_vh
    q = _load_rows(q_ptr + start * stride_qt + head * stride_qh, m0, length, stride_qt, E, BLOCK_M, BLOCK_E)  # [BM, BE]
    acc = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    first, edge, full, diagonal = _key_blocks(m0, length, window, HAS_WINDOW, BLOCK_M, BLOCK_N)
    # keys that all queries see
    for block in range(full):
        acc, l_i, m_i = _attend(
            acc, l_i, m_i, q, k_ptr, v_ptr, m0, first + (edge + block) * BLOCK_N, length, window, scale2,
            stride_kt, stride_vt, HAS_WINDOW, E, BLOCK_M, BLOCK_N, BLOCK_E, MASKED=False,
        )
    # keys at the window's edge and on the diagonal
    for block in range(edge + diagonal):
        n0 = first + tl.where(block < edge, block, block + full) * BLOCK_N
        acc, l_i, m_i = _attend(
            acc, l_i, m_i, q, k_ptr, v_ptr, m0, n0, length, window, scale2,
            stride_kt, stride_vt, HAS_WINDOW, E, BLOCK_M, BLOCK_N, BLOCK_E, MASKED=True,
        )
    if HAS_WINDOW:
        l_i = tl.where(l_i == 0.0, 1.0, l_i)  # a row past the end, which is not stored, may see nothing
    out = out_ptr + start * stride_ot + head * E
    _store_rows(out, acc / l_i[:, None], m0, length, stride_ot, E, BLOCK_M, BLOCK_E)
    rows = m0 + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + head * T + start + rows, m_i + tl.math.log2(l_i), mask=rows < length)


@triton.jit
def attention_delta_kernel(
    out_ptr, dout_ptr, delta_ptr,
    T, H,
    E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):
    """delta_i = out_i . dout_i for BLOCK_M tokens of one head per program."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_E)
    head = tl.program_id(1).to(tl.int64)
    mask = (rows < T)[:, None] & (cols < E)[None, :]
    offsets = (rows * H + head)[:, None] * E + cols[None, :]
    out = tl.load(out_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [BM, BE]
    dout = tl.load(dout_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [BM, BE]
    tl.store(delta_ptr + head * T + rows, tl.sum(out * dout, axis=1), mask=rows < T)


@triton.jit
def _add_dkdv(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, m0, n0, length, window, scale2, stride_qt, stride_ot,
    HAS_WINDOW: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dk and dv with one more block of queries. Scores are held transposed: p and ds are then left operands."""
    # recompute p^T from k q^T and lse
    i = m0 + tl.arange(0, BLOCK_M)
    q = _load_rows(q_ptr, m0, length, stride_qt, E, BLOCK_M, BLOCK_E)  # [BM, BE]
    lse = tl.load(lse_ptr + i, mask=i < length, other=float("inf"))  # [BM]; inf: p = 0 past the end
    score = tl.dot(k, tl.trans(q), input_precision="ieee")  # [BN, BM]
    p = tl.math.exp2(score * scale2 - lse[None, :])  # [BN, BM]
    if MASKED:
        j = n0 + tl.arange(0, BLOCK_N)
        p = tl.where(_visible(i[None, :], j[:, None], window, HAS_WINDOW), p, 0.0)
    # dv += p^T dout
    dout = _load_rows(dout_ptr, m0, length, stride_ot, E, BLOCK_M, BLOCK_E)  # [BM, BE]
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")  # [BN, BE]
    # ds^T = p^T (v dout^T - delta), dk += ds^T q
    dp = tl.dot(v, tl.trans(dout), input_precision="ieee")  # [BN, BM]
    delta = tl.load(delta_ptr + i, mask=i < length, other=0.0)  # [BM]
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")  # [BN, BE]
    return dk, dv


@triton.jit
def attention_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, cu_seqlens_ptr,
    T, group, window, scale, scale2,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_gt,
    HAS_WINDOW: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):
    """A program makes dk and dv of BLOCK_N keys of one key head. The first keys of a sequence have the most queries."""
    n0 = tl.program_id(0) * BLOCK_N
    key_head = tl.program_id(1).to(tl.int64)
    start = tl.load(cu_seqlens_ptr + tl.program_id(2)).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + tl.program_id(2) + 1) - start).to(tl.int32)
    if n0 >= length:
        return
    k = _load_rows(k_ptr + start * stride_kt + key_head * stride_kh, n0, length, stride_kt, E, BLOCK_N, BLOCK_E)
    v = _load_rows(v_ptr + start * stride_vt + key_head * stride_vh, n0, length, stride_vt, E, BLOCK_N, BLOCK_E)
    dk = tl.zeros([BLOCK_N, BLOCK_E], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_E], dtype=tl.float32)
    first, diagonal, full, edge = _query_blocks(n0, length, window, HAS_WINDOW, BLOCK_M, BLOCK_N)
    # The whole group in one program, in order: its sum needs no atomic additions and has the same bits every time.
    # One loop over heads and blocks, not two nested ones: loads of the next head start before the last one is done.
    q_ptr += start * stride_qt + key_head * group * stride_qh
    dout_ptr += start * stride_ot + key_head * group * E
    lse_ptr += key_head * group * T + start
    delta_ptr += key_head * group * T + start
    cut = diagonal + edge
    # queries on the diagonal and at the window's edge
    for step in range(group * cut):
        head, block = (step // cut).to(tl.int64), step % cut
        m0 = first + tl.where(block < diagonal, block, block + full) * BLOCK_M
        dk, dv = _add_dkdv(
            dk, dv, k, v, q_ptr + head * stride_qh, dout_ptr + head * E, lse_ptr + head * T, delta_ptr + head * T,
            m0, n0, length, window, scale2, stride_qt, stride_ot,
            HAS_WINDOW, E, BLOCK_M, BLOCK_N, BLOCK_E, MASKED=True,
        )
    # Queries that see all of the keys. Where there are none, loads that run ahead of the loop are masked, and their
    # quotient by 0, which a GPU computes without a trap, is not used; a guard against it makes registers spill.
    for step in range(group * full):
        head, m0 = (step // full).to(tl.int64), first + (diagonal + step % full) * BLOCK_M
        dk, dv = _add_dkdv(
            dk, dv, k, v, q_ptr + head * stride_qh, dout_ptr + head * E, lse_ptr + head * T, delta_ptr + head * T,
            m0, n0, length, window, scale2, stride_qt, stride_ot,
            HAS_WINDOW, E, BLOCK_M, BLOCK_N, BLOCK_E, MASKED=False,
        )
    out = start * stride_gt + key_head * E
    _store_rows(dk_ptr + out, dk * scale, n0, length, stride_gt, E, BLOCK_N, BLOCK_E)
    _store_rows(dv_ptr + out, dv, n0, length, stride_gt, E, BLOCK_N, BLOCK_E)


@triton.jit
def _add_dq(
    dq, q, dout, lse, delta, k_ptr, v_ptr, m0, n0, length, window, scale2, stride_kt, stride_vt,
    HAS_WINDOW: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dq with one more block of keys."""
    k = _load_rows(k_ptr, n0, length, stride_kt, E, BLOCK_N, BLOCK_E)  # [BN, BE]
    v = _load_rows(v_ptr, n0, length, stride_vt, E, BLOCK_N, BLOCK_E)  # [BN, BE]
    # recompute p from q k^T and lse
    p = tl.math.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale2 - lse[:, None])  # [BM, BN]
    if MASKED:
        i, j = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
        p = tl.where(_visible(i[:, None], j[None, :], window, HAS_WINDOW), p, 0.0)
    # ds = p (dout v^T - delta), dq += ds k
    ds = p * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None])  # [BM, BN]
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")  # [BM, BE]


@triton.jit
def attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, cu_seqlens_ptr,
    T, group, window, scale, scale2,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot,
    HAS_WINDOW: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):
    """A program makes dq of BLOCK_M queries of one head, as the forward kernel makes out."""
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head = tl.program_id(1).to(tl.int64)
    start = tl.load(cu_seqlens_ptr + tl.program_id(2)).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + tl.program_id(2) + 1) - start).to(tl.int32)
    if m0 >= length:
        return
    k_ptr += start * stride_kt + head // group * stride_kh
    v_ptr += start * stride_vt + head // group * stride_vh
    out = start * stride_ot + head * E
    q = _load_rows(q_ptr + start * stride_qt + head * stride_qh, m0, length, stride_qt, E, BLOCK_M, BLOCK_E)  # [BM, BE]
    dout = _load_rows(dout_ptr + out, m0, length, stride_ot, E, BLOCK_M, BLOCK_E)  # [BM, BE]
    rows = m0 + tl.arange(0, BLOCK_M)
    lse = tl.load(lse_ptr + head * T + start + rows, mask=rows < length, other=float("inf"))  # [BM]
    delta = tl.load(delta_ptr + head * T + start + rows, mask=rows < length, other=0.0)  # [BM]
    dq = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.float32)
    first, edge, full, diagonal = _key_blocks(m0, length, window, HAS_WINDOW, BLOCK_M, BLOCK_N)
    for block in range(full):
        dq = _add_dq(
            dq, q, dout, lse, delta, k_ptr, v_ptr, m0, first + (edge + block) * BLOCK_N, length, window, scale2,
            stride_kt, stride_vt, HAS_WINDOW, E, BLOCK_M, BLOCK_N, BLOCK_E, MASKED=False,
        )
    for block in range(edge + diagonal):
        n0 = first + tl.where(block < edge, block, block + full) * BLOCK_N
        dq = _add_dq(
            dq, q, dout, lse, delta, k_ptr, v_ptr, m0, n0, length, window, scale2,
            stride_kt, stride_vt, HAS_WINDOW, E, BLOCK_M, BLOCK_N, BLOCK_E, MASKED=True,
        )
    _store_rows(dq_ptr + out, dq * scale, m0, length, stride_ot, E, BLOCK_M, BLOCK_E)


def _arguments(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int | None) -> dict[str, Any]:
    """The arguments that the forward kernel and both backward kernels share."""
    (T, H, E), K = q.shape, k.shape[1]
    strides = {"stride_qt": q.stride(0), "stride_qh": q.stride(1), "stride_kt": k.stride(0), "stride_kh": k.stride(1)}
    strides |= {"stride_vt": v.stride(0), "stride_vh": v.stride(1), "stride_ot": H * E}
    tensors = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "cu_seqlens_ptr": cu_seqlens}
    return {**tensors, "T": T, **strides, **common_arguments(E, H // K, scale, window)}


def _forward_triton(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """(out, lse [H, T]), lse in base 2."""
    (T, H, E), S = q.shape, cu_seqlens.numel() - 1
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(H, T, dtype=torch.float32, device=q.device)
    if T:
        config = launch_config("forward", E, q.dtype, capability(q.device))
        attention_forward_kernel[(ceil_div(max_seqlen, config.blocks["BLOCK_M"]), H, S)](
            **_arguments(q, k, v, cu_seqlens, scale, window), out_ptr=out, lse_ptr=lse, **config.options()
        )
    return out, lse


def _backward_triton(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    (T, H, E), K, S = q.shape, k.shape[1], cu_seqlens.numel() - 1
    dq, dk, dv = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    delta = torch.empty_like(lse)
    if T:
        config = launch_config("delta", E, q.dtype)
        attention_delta_kernel[(ceil_div(T, config.blocks["BLOCK_M"]), H)](
            out, dout, delta, T, H, E=E, BLOCK_E=head_block(E), **config.options()
        )
        arguments = _arguments(q, k, v, cu_seqlens, scale, window)
        arguments |= {"dout_ptr": dout, "lse_ptr": lse, "delta_ptr": delta, "scale": scale}
        config = launch_config("dkdv", E, q.dtype, capability(q.device))
        attention_dkdv_kernel[(ceil_div(max_seqlen, config.blocks["BLOCK_N"]), K, S)](
            **arguments, dk_ptr=dk, dv_ptr=dv, stride_gt=K * E, **config.options()
        )
        config = launch_config("dq", E, q.dtype, capability(q.device))
        attention_dq_kernel[(ceil_div(max_seqlen, config.blocks["BLOCK_M"]), H, S)](
            **arguments, dq_ptr=dq, **config.options()
        )
    return dq, dk, dv


class Attention(torch.autograd.Function):
    """Saves q, k, v, out and one float per query and head."""

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int | None,
        batch_invariant: bool,
    ) -> Tensor:
        ctx.max_seqlen, ctx.scale, ctx.window = max_seqlen, scale, window
        if use_triton(q, k, v, cu_seqlens):
            if q.dtype == torch.float64:
                raise ValueError("attention: float64 is for the CPU")
            out, lse = _forward_triton(q, k, v, cu_seqlens, max_seqlen, scale, window)
        else:
            ctx.sequences = Sequences.read(cu_seqlens, q.shape[0], max_seqlen, window, batch_invariant)
            out, lse = attention_forward_cpu(q, k, v, ctx.sequences, scale, window)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)
        return out

    @staticmethod
    def backward(ctx, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
        if use_triton(dout, q):
            dout, sizes = dout.contiguous(), (ctx.max_seqlen, ctx.scale, ctx.window)
            grads = _backward_triton(dout, q, k, v, out, lse, cu_seqlens, *sizes)
        else:
            grads = attention_backward_cpu(dout, q, k, v, out, lse, ctx.sequences, ctx.scale, ctx.window)
        return *grads, None, None, None, None, None


def _check(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float | None, window: int | None
) -> None:
    if q.dim() != 3 or k.dim() != 3 or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(f"attention: q [T, H, E] and k [T, K, E] do not match: {tuple(q.shape)}, {tuple(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"attention: v is {tuple(v.shape)}, k is {tuple(k.shape)}")
    if k.shape[1] == 0 or q.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"attention: {q.shape[1]} query heads do not divide among {k.shape[1]} key heads")
    if not 1 <= q.shape[2] <= 256:
        raise ValueError(f"attention: heads of 1 to 256 elements, not {q.shape[2]}")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"attention: q, k, v must share a floating dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    if any(x.stride(2) != 1 for x in (q, k, v)):
        raise ValueError("attention: the last dimension of q, k and v must be contiguous")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or not cu_seqlens.numel():
        raise ValueError(f"attention: cu_seqlens must be int32 [S + 1], not {cu_seqlens.dtype} {cu_seqlens.shape}")
    if max_seqlen < 0 or (scale is not None and not scale > 0) or (window is not None and window < 1):
        raise ValueError(f"attention: max_seqlen {max_seqlen} < 0, scale {scale} <= 0 or window {window} < 1")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None = None,
    window: int | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Causal attention within each packed sequence: [T, H, E], contiguous. Differentiable in q, k and v.

    q: [T, H, E]; k, v: [T, K, E], H a multiple of K, E at most 256; the last dimension contiguous, the other strides
    free. cu_seqlens: int32 [S + 1] on the same device, rising from 0 to T. max_seqlen: at least the longest sequence.
    scale: above 0, E ** -0.5 unless given. window: a query sees itself and the window - 1 tokens before it, or all.
    batch_invariant: a sequence's bits do not depend on the others, for a slower path on the CPU; Triton's never do.
    Raises ValueError on shapes, dtypes and devices that do not match. What cu_seqlens holds is checked on the CPU
    only: the host does not read it from a GPU.
    """
    _check(q, k, v, cu_seqlens, max_seqlen, scale, window)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return apply(Attention, q, k, v, cu_seqlens, max_seqlen, scale, window, batch_invariant)
