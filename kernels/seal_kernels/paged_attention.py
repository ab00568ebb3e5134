"""Causal attention over keys and values kept in blocks, as the sampler has them (Kwon et al., arXiv 2309.06180).

    out_i = sum_j p_ij v_j,   p_ij = exp(scale * q_i . k_j) / sum_j exp(scale * q_i . k_j)

over the tokens j <= i of i's own sequence and, with a window W, j > i - W. Token j of sequence s lies in block
block_tables[s, j // B] at offset j % B. The queries of a sequence are its last tokens: one when decoding, some with a
context before them in chunked prefill, all of it in a first prefill; one call may mix them.

Shapes: q [T, H, E], query head h reading key head h // (H // K); key_cache, value_cache [N, B, K, E], N blocks of B
tokens; block_tables int32 [S, M]; cu_seqlens int32 [S + 1], the queries of sequence s being the rows cu_seqlens[s] ..
cu_seqlens[s + 1] of q; context_lens int32 [S], the tokens of a sequence in the cache, its queries included.
FLOPs, P the number of pairs (i, j): 4 P H E. Bytes, b per element: 2 b K E a token of context for each block of
queries, which in decoding is one query: 2 H / (b K) FLOPs a byte, limited by memory.

On a GPU two kernels share a call. Sequences of several queries: a program has BLOCK_M pairs of a query and a head of
its group, so that the heads of a group read keys once. Sequences of one query: the context is cut into splits of SPLIT
tokens, a program for each, and a second kernel adds up what they found, in order. Which kernel serves a sequence, and
where it is cut, depends on that sequence alone, and so do its bits. Nothing outside the window is read, nor anything
past the context: what unwritten places of a block hold does not matter.
"""

import torch
from torch import Tensor

from seal_kernels.attention import LOG2_E
from seal_kernels.dispatch import block_size, cdiv, tl, triton, use_triton
from seal_kernels.paged_attention_cpu import Tiles, paged_attention_cpu

SPLIT = 256  # tokens of context a program when decoding. Never by the size of the batch: splits decide bits.


def write_kv_ref(k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """A token at a time."""
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            block, offset = divmod(slot, key_cache.shape[1])
            key_cache[block, offset], value_cache[block, offset] = k[t], v[t]


def paged_attention_ref(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    max_query: int,
    max_context: int,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """The equation in float32 (float64 for float64 input), in q's dtype, a matrix of scores a sequence and head."""
    factor, B, group = q.shape[-1] ** -0.5 if scale is None else scale, key_cache.shape[1], (key_cache.shape[2], -1)
    out = torch.zeros_like(q)
    for s, context in enumerate(context_lens.tolist()):
        rows = slice(int(cu_seqlens[s]), int(cu_seqlens[s + 1]))
        if rows.stop == rows.start or context == 0:
            continue
        i = torch.arange(context - (rows.stop - rows.start), context, device=q.device)[:, None]
        j = torch.arange(0 if window is None else max(int(i[0]) - window + 1, 0), context, device=q.device)
        blocks = block_tables[s].long()[j // B]
        wide = torch.promote_types(q.dtype, torch.float32)
        qs, ks, vs = (x.to(wide) for x in (q[rows], key_cache[blocks, j % B], value_cache[blocks, j % B]))
        scores = torch.einsum("ikge,jke->kgij", qs.unflatten(1, group), ks) * factor
        hidden = (j > i) | (j <= i - (context if window is None else window))
        p = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[rows] = torch.einsum("kgij,jke->ikge", p, vs).flatten(1, 2).to(q.dtype)
    return out


@triton.jit
def write_kv_kernel(
    k_ptr, v_ptr, key_ptr, value_ptr, slots_ptr,
    T, N, K,
    stride_kt, stride_kh, stride_vt, stride_vh, stride_kb, stride_ko, stride_kk, stride_vb, stride_vo, stride_vk,
    E: tl.constexpr, B: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """BLOCK_R pairs of a token and a head a program."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_E)
    token, head = rows // K, rows % K
    slot = tl.load(slots_ptr + token, mask=token < T, other=-1)
    block, offset = slot // B, slot % B
    mask = ((slot >= 0) & (block < N))[:, None] & (cols < E)[None, :]
    k = tl.load(k_ptr + (token * stride_kt + head * stride_kh)[:, None] + cols[None, :], mask=mask)
    v = tl.load(v_ptr + (token * stride_vt + head * stride_vh)[:, None] + cols[None, :], mask=mask)
    key_ptr += (block * stride_kb + offset * stride_ko + head * stride_kk)[:, None] + cols[None, :]
    value_ptr += (block * stride_vb + offset * stride_vo + head * stride_vk)[:, None] + cols[None, :]
    tl.store(key_ptr, k.to(key_ptr.dtype.element_ty), mask=mask)
    tl.store(value_ptr, v.to(value_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_keys(
    cache_ptr, table_ptr, j, first, end, stride_block, stride_token,
    E: tl.constexpr, B: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Tokens j of a sequence's head; 0 for those that are not in first .. end, which are not read."""
    cols, mask = tl.arange(0, BLOCK_E), (j >= first) & (j < end)
    block = tl.load(table_ptr + j // B, mask=mask, other=0).to(tl.int64)
    at = cache_ptr + (block * stride_block + (j % B).to(tl.int64) * stride_token)[:, None] + cols[None, :]
    return tl.load(at, mask=mask[:, None] & (cols < E)[None, :], other=0.0)


@triton.jit
def _attend(
    acc, norm, top, q, key_ptr, value_ptr, table_ptr, i, n0, first, end, window, scale2,
    stride_kb, stride_ko, stride_vb, stride_vo,
    MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr, E: tl.constexpr, B: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """(acc, norm, top) with one more block of keys: sums of p v and p, p = 2^(score - top), and the largest score.
    i: the positions of q's rows."""
    j = n0 + tl.arange(0, BLOCK_N)
    k = _load_keys(key_ptr, table_ptr, j, first, end, stride_kb, stride_ko, E, B, BLOCK_E)
    score = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        seen = j[None, :] <= i[:, None]
        if HAS_WINDOW:
            seen &= j[None, :] > i[:, None] - window
        score = tl.where(seen, score, float("-inf"))
    new = tl.maximum(top, tl.max(score, axis=1) * scale2)
    base = new
    if MASKED and HAS_WINDOW:
        base = tl.where(new == float("-inf"), 0.0, new)  # a query that sees nothing so far
    p = tl.math.exp2(score * scale2 - base[:, None])
    shrink = tl.math.exp2(top - base)
    v = _load_keys(value_ptr, table_ptr, j, first, end, stride_vb, stride_vo, E, B, BLOCK_E)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, norm * shrink + tl.sum(p, axis=1), new


@triton.jit
def paged_prefill_kernel(
    q_ptr, key_ptr, value_ptr, out_ptr, tables_ptr, cu_seqlens_ptr, context_lens_ptr,
    group, window, scale2,
    stride_qt, stride_qh, stride_kb, stride_ko, stride_kk, stride_vb, stride_vo, stride_vk, stride_ot, stride_table,
    HAS_WINDOW: tl.constexpr, E: tl.constexpr, B: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Sequences of several queries: BLOCK_M pairs of a query and a head of the group a program."""
    # The last queries of a sequence have the most keys: they start first.
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    key_head, s = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    start = tl.load(cu_seqlens_ptr + s).to(tl.int64)
    queries = (tl.load(cu_seqlens_ptr + s + 1) - start).to(tl.int32)
    if (queries <= 1) | (m0 >= queries * group):
        return
    context = tl.load(context_lens_ptr + s)
    rows, cols = m0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_E)
    query, head = rows // group, key_head * group + rows % group
    mask = (query < queries)[:, None] & (cols < E)[None, :]
    q = tl.load(q_ptr + ((start + query) * stride_qt + head * stride_qh)[:, None] + cols[None, :], mask=mask, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.float32)
    norm = tl.zeros([BLOCK_M], dtype=tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)

    key_ptr += key_head * stride_kk
    value_ptr += key_head * stride_vk
    tables_ptr += s * stride_table
    i, offset = context - queries + query, context - queries
    low, high = offset + m0 // group, offset + (m0 + BLOCK_M - 1) // group  # positions of the first and last row
    end = tl.minimum(high + 1, context)
    # Blocks of keys: `edge` that the window's edge cuts, `full` that all rows see whole, the rest the diagonal cuts.
    first, begin, edge = m0 * 0, m0 * 0, m0 * 0  # a Python 0 would be no tensor in the interpreter
    whole = (low + 1) // BLOCK_N
    if HAS_WINDOW:
        first = tl.maximum(low - window + 1, 0)
        begin = first // BLOCK_N
        whole = tl.maximum(whole, begin)
        edge = tl.minimum(tl.cdiv(tl.maximum(high - window + 1, 0), BLOCK_N), whole) - begin
    full, diagonal = whole - begin - edge, tl.cdiv(end, BLOCK_N) - whole
    for block in range(full):
        acc, norm, top = _attend(
            acc, norm, top, q, key_ptr, value_ptr, tables_ptr, i, (begin + edge + block) * BLOCK_N, first, end,
            window, scale2, stride_kb, stride_ko, stride_vb, stride_vo, False, HAS_WINDOW, E, B, BLOCK_N, BLOCK_E,
        )  # fmt: skip
    for block in range(edge + diagonal):
        n0 = (begin + tl.where(block < edge, block, block + full)) * BLOCK_N
        acc, norm, top = _attend(
            acc, norm, top, q, key_ptr, value_ptr, tables_ptr, i, n0, first, end,
            window, scale2, stride_kb, stride_ko, stride_vb, stride_vo, True, HAS_WINDOW, E, B, BLOCK_N, BLOCK_E,
        )  # fmt: skip
    norm = tl.where(norm == 0.0, 1.0, norm)  # rows that are not stored, and sequences without context
    out_ptr += ((start + query) * stride_ot + head * E)[:, None] + cols[None, :]
    tl.store(out_ptr, (acc / norm[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def paged_decode_kernel(
    q_ptr, key_ptr, value_ptr, out_ptr, parts_ptr, lse_ptr, tables_ptr, cu_seqlens_ptr, context_lens_ptr,
    group, window, scale2,
    stride_qt, stride_qh, stride_kb, stride_ko, stride_kk, stride_vb, stride_vo, stride_vk, stride_ot, stride_table,
    ONE_SPLIT: tl.constexpr, HAS_WINDOW: tl.constexpr, E: tl.constexpr, B: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Sequences of one query: a split of the context and the heads of a group a program. Where there may be several
    splits, each stores its own result and the logarithm of its sum, base 2, at parts [S, H, splits, E], lse."""
    split, key_head, s = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    start = tl.load(cu_seqlens_ptr + s).to(tl.int64)
    context = tl.load(context_lens_ptr + s)
    first = split * 0
    if HAS_WINDOW:
        first = tl.maximum(context - window, 0)
    n0 = (first // SPLIT + split) * SPLIT
    if (tl.load(cu_seqlens_ptr + s + 1) != start + 1) | ((n0 >= context) & (split > 0)):
        return
    rows, cols = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_E)
    mask = (rows < group)[:, None] & (cols < E)[None, :]
    head = key_head * group + rows
    q = tl.load(q_ptr + (start * stride_qt + head * stride_qh)[:, None] + cols[None, :], mask=mask, other=0.0)
    acc = tl.zeros([BLOCK_G, BLOCK_E], dtype=tl.float32)
    norm = tl.zeros([BLOCK_G], dtype=tl.float32)
    top = tl.full([BLOCK_G], float("-inf"), dtype=tl.float32)
    end = tl.minimum(n0 + SPLIT, context)
    i = context - 1 + rows * 0
    for block in range(tl.maximum(n0, first) // BLOCK_N, tl.cdiv(end, BLOCK_N)):
        acc, norm, top = _attend(
            acc, norm, top, q, key_ptr + key_head * stride_kk, value_ptr + key_head * stride_vk,
            tables_ptr + s * stride_table, i, block * BLOCK_N, first, end, window, scale2,
            stride_kb, stride_ko, stride_vb, stride_vo, True, HAS_WINDOW, E, B, BLOCK_N, BLOCK_E,
        )  # fmt: skip
    norm = tl.where(norm == 0.0, 1.0, norm)  # a sequence without context
    acc /= norm[:, None]
    if ONE_SPLIT:
        out_ptr += (start * stride_ot + head * E)[:, None] + cols[None, :]
        tl.store(out_ptr, acc.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        at = (s * tl.num_programs(1) * group + head) * tl.num_programs(0) + split
        tl.store(parts_ptr + at[:, None] * E + cols[None, :], acc, mask=mask)
        tl.store(lse_ptr + at, top + tl.math.log2(norm), mask=rows < group)


@triton.jit
def paged_combine_kernel(
    parts_ptr, lse_ptr, out_ptr, cu_seqlens_ptr, context_lens_ptr,
    splits, window,
    stride_ot,
    HAS_WINDOW: tl.constexpr, E: tl.constexpr, SPLIT: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A head's result from those of its splits, BLOCK_S at a time, in order."""
    head, s = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    start = tl.load(cu_seqlens_ptr + s).to(tl.int64)
    if tl.load(cu_seqlens_ptr + s + 1) != start + 1:
        return
    context = tl.load(context_lens_ptr + s)
    used = tl.maximum(tl.cdiv(context, SPLIT), 1)
    if HAS_WINDOW:
        used -= tl.maximum(context - window, 0) // SPLIT
    first = (s * tl.num_programs(0) + head) * splits
    cols = tl.arange(0, BLOCK_E)
    acc, norm = tl.zeros([BLOCK_E], dtype=tl.float32), tl.full((), 0.0, tl.float32)
    top = tl.full((), float("-inf"), tl.float32)
    for s0 in range(0, used, BLOCK_S):
        rows = s0 + tl.arange(0, BLOCK_S)
        lse = tl.load(lse_ptr + first + rows, mask=rows < used, other=float("-inf"))
        mask = (rows < used)[:, None] & (cols < E)[None, :]
        parts = tl.load(parts_ptr + (first + rows)[:, None] * E + cols[None, :], mask=mask, other=0.0)
        new = tl.maximum(top, tl.max(lse, axis=0))
        base = tl.where(new == float("-inf"), 0.0, new)  # a sequence without context
        weight, shrink = tl.math.exp2(lse - base), tl.math.exp2(top - base)
        acc = acc * shrink + tl.sum(parts * weight[:, None], axis=0)
        norm = norm * shrink + tl.sum(weight, axis=0)
        top = new
    norm = tl.where(norm == 0.0, 1.0, norm)
    tl.store(out_ptr + start * stride_ot + head * E + cols, (acc / norm).to(out_ptr.dtype.element_ty), mask=cols < E)


# (BLOCK_M, BLOCK_N, num_warps, num_stages) for heads of up to 64, 128 and 256 elements, as in attention.py. More stages
# than there: the number of a block is loaded some stages before its keys are.
_PREFILL = {
    "float32": ((32, 32, 4, 1), (32, 32, 8, 1), (32, 32, 16, 1)),
    "ampere": ((128, 64, 8, 3), (64, 64, 8, 3), (64, 32, 8, 3)),
    "hopper": ((128, 64, 8, 5), (128, 64, 8, 5), (64, 32, 8, 3)),  # and later
}


def launch_config(E: int, dtype: torch.dtype, which: str, capability: tuple[int, int], group: int) -> dict[str, int]:
    """Blocks, warps and stages of kernel `which` ("write", "prefill", "decode", "combine")."""
    block, wide = max(16, block_size(E)), dtype == torch.float32
    if which == "write":
        return {"BLOCK_R": 4096 // block, "BLOCK_E": block, "num_warps": 4}
    if which == "combine":
        return {"BLOCK_S": 16, "BLOCK_E": block, "num_warps": 2}
    if which == "decode":  # float32 takes no tensor cores: its blocks are held and multiplied in registers
        G, N = max(16, block_size(group)), (16 if block > 128 else 32) if wide else 32 if block > 128 else 64
        warps, stages = min(G // 4, 16), 1 if wide else 5
        return {"BLOCK_G": G, "BLOCK_N": N, "BLOCK_E": block, "num_warps": warps, "num_stages": stages}
    table = _PREFILL["float32" if wide else "hopper" if capability >= (9, 0) else "ampere"]
    M, N, warps, stages = table[0 if block <= 64 else 1 if block <= 128 else 2]
    return {"BLOCK_M": M, "BLOCK_N": N, "BLOCK_E": block, "num_warps": warps, "num_stages": stages}


def _capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; a stand-in where there is none (the interpreter)."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def _paged_triton(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, block_tables: Tensor, cu_seqlens: Tensor, context_lens: Tensor,
    max_query: int, max_context: int, scale: float, window: int | None,
) -> Tensor:  # fmt: skip
    (_, H, E), (B, K), S = q.shape, key_cache.shape[1:3], len(context_lens)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    group, capability, windowed = H // K, _capability(q.device), {"HAS_WINDOW": window is not None}
    metadata, sizes = (block_tables, cu_seqlens, context_lens), (group, window or 0, scale * LOG2_E)
    strides = (
        *q.stride()[:2], *key_cache.stride()[:3], *value_cache.stride()[:3], H * E, block_tables.stride(0)
    )  # fmt: skip
    if max_query > 1:
        config = launch_config(E, q.dtype, "prefill", capability, group)
        paged_prefill_kernel[(cdiv(max_query * group, config["BLOCK_M"]), K, S)](
            q, key_cache, value_cache, out, *metadata, *sizes, *strides, E=E, B=B, **windowed, **config
        )
    splits = cdiv(max_context, SPLIT) if window is None else min(cdiv(max_context, SPLIT), cdiv(window - 1, SPLIT) + 1)
    splits = max(1, splits)
    parts, lse = (torch.empty(S, H, splits, n, dtype=torch.float32, device=q.device) for n in (E, 1))
    config = launch_config(E, q.dtype, "decode", capability, group)
    paged_decode_kernel[(splits, K, S)](
        q, key_cache, value_cache, out, parts, lse, *metadata, *sizes, *strides,
        ONE_SPLIT=splits == 1, E=E, B=B, SPLIT=SPLIT, **windowed, **config,
    )  # fmt: skip
    if splits > 1:
        paged_combine_kernel[(H, S)](
            parts, lse, out, cu_seqlens, context_lens, splits, window or 0, H * E,
            E=E, SPLIT=SPLIT, **windowed, **launch_config(E, q.dtype, "combine", capability, group),
        )  # fmt: skip
    return out


def _check_caches(key_cache: Tensor, value_cache: Tensor) -> None:
    if key_cache.dim() != 4 or key_cache.shape != value_cache.shape or key_cache.dtype != value_cache.dtype:
        shapes = f"{tuple(key_cache.shape)} {key_cache.dtype}, {tuple(value_cache.shape)} {value_cache.dtype}"
        raise ValueError(f"paged_attention: key_cache and value_cache must both be [N, B, K, E], not {shapes}")
    if key_cache.stride(3) != 1 or value_cache.stride(3) != 1:
        raise ValueError("paged_attention: the last dimension of the caches must be contiguous")
    B, E = key_cache.shape[1], key_cache.shape[3]
    if B == 0 or B & (B - 1) or not 1 <= E <= 256:
        raise ValueError(f"paged_attention: blocks of a power of two of tokens, heads of 1 to 256, not {B} and {E}")


@torch.no_grad()
def write_kv(k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """Write each token's keys and values to block slots[t] // B, offset slots[t] % B; skip it if slots[t] < 0.

    k, v: [T, K, E], last dimension contiguous, the other strides free. key_cache, value_cache: [N, B, K, E], the same,
    B a power of two, of any floating dtype. slots: int64 [T], no two of them equal. Raises ValueError on shapes and
    dtypes that do not match, and on the CPU on slots past the end, which a GPU leaves out.
    """
    _check_caches(key_cache, value_cache)
    (N, B, K, E), T = key_cache.shape, len(k)
    if k.shape != (T, K, E) or v.shape != (T, K, E) or slots.shape != (T,) or slots.dtype != torch.int64:
        given = ", ".join(f"{x.dtype} {list(x.shape)}" for x in (k, v, slots))
        raise ValueError(f"write_kv: k, v [T, {K}, {E}] and int64 slots [T], not {given}")
    if k.stride(2) != 1 or v.stride(2) != 1:
        raise ValueError("write_kv: the last dimension of k and v must be contiguous")
    if not use_triton(k, v, key_cache, value_cache, slots):
        low, high = (int(slot) for slot in slots.aminmax()) if T else (0, 0)
        if high >= N * B:
            raise ValueError(f"write_kv: slot {high} of {N * B}")
        if low < 0:
            used = slots >= 0
            k, v, slots = k[used], v[used], slots[used]
        place = slots // B, slots % B
        for cache, x in ((key_cache, k), (value_cache, v)):
            cache.index_put_(place, x.to(cache.dtype))
    elif T:
        config = launch_config(E, key_cache.dtype, "write", (0, 0), 1)
        write_kv_kernel[(cdiv(T * K, config["BLOCK_R"]),)](
            k, v, key_cache, value_cache, slots, T, N, K, *k.stride()[:2], *v.stride()[:2],
            *key_cache.stride()[:3], *value_cache.stride()[:3], E=E, B=B, **config,
        )  # fmt: skip


@torch.no_grad()
def paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    max_query: int,
    max_context: int,
    scale: float | None = None,
    window: int | None = None,
    row_independent: bool = False,
    shared: dict[int | None, list[Tiles]] | None = None,
) -> Tensor:
    """Causal attention of the last tokens of each sequence over its keys and values in blocks: [T, H, E], contiguous.

    q: [T, H, E], H a multiple of K; key_cache, value_cache: [N, B, K, E], B a power of two, E at most 256, of q's dtype
    (on the CPU of any); last dimensions contiguous, the other strides free. What write_kv writes of the queries' own
    tokens must be there already. block_tables: int32 [S, M], rows contiguous; entries past a context are not read.
    cu_seqlens: int32 [S + 1], rising from 0: where each sequence's queries are. context_lens: int32 [S], at least the
    number of its queries; rows of a sequence of context 0 (which pads a captured graph) are zero, whereas rows past
    cu_seqlens[S] are undefined. max_query, max_context: no sequence has more; they may be capacities.
    scale: above 0, E ** -0.5 unless given. window: a query sees itself and the window - 1 tokens before it, or all.
    row_independent: on the CPU, a query's bits depend on nothing but it and the keys and values it sees: neither on
    the other sequences nor on how its own was cut into calls. On a GPU they may differ between a call in which a
    sequence has one query and one in which it has more, whatever is given here.
    shared: a dict, empty at first, for calls that differ in q and the contents and place of the caches alone, and in
    the window, such as those of a model's layers: on the CPU what follows from the rest is then worked out once.
    Raises ValueError on shapes, dtypes and devices that do not match. What the int32 tensors hold is checked on the
    CPU only: the host does not read it from a GPU.
    """
    _check_caches(key_cache, value_cache)
    K, E, S = *key_cache.shape[2:], len(context_lens)
    if q.dim() != 3 or q.shape[2] != E or K == 0 or q.shape[1] == 0 or q.shape[1] % K:
        raise ValueError(f"paged_attention: q {tuple(q.shape)} must be [T, multiple of {K}, {E}]")
    if q.stride(2) != 1:
        raise ValueError("paged_attention: the last dimension of q must be contiguous")
    metadata = {"block_tables": (S, block_tables.shape[-1]), "cu_seqlens": (S + 1,), "context_lens": (S,)}
    for (name, shape), x in zip(metadata.items(), (block_tables, cu_seqlens, context_lens), strict=True):
        if x.dtype != torch.int32 or x.shape != shape or (x.numel() and x.stride(-1) != 1):
            raise ValueError(f"paged_attention: {name} must be int32 {shape}, not {x.dtype} {tuple(x.shape)}")
    if max_query < 0 or max_context < 0 or (scale is not None and not scale > 0) or (window is not None and window < 1):
        given = f"{max_query}, {max_context}, {scale}, {window}"
        raise ValueError(f"paged_attention: max_query, max_context >= 0, scale > 0, window >= 1, not {given}")
    factor = E**-0.5 if scale is None else scale
    args = (q, key_cache, value_cache, block_tables, cu_seqlens, context_lens, max_query, max_context, factor, window)
    if not use_triton(*args[:6]):
        return paged_attention_cpu(*args, row_independent, shared)
    if q.dtype != key_cache.dtype or q.dtype == torch.float64:
        raise ValueError(f"paged_attention: one dtype, 16 bits or float32, not {q.dtype} and {key_cache.dtype}")
    return _paged_triton(*args) if q.numel() and S else torch.empty_like(q)
