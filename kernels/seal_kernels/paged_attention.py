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
tokens, a program for each, and a second kernel adds up their results, in order. Which kernel serves a sequence, and
where it is cut, depends on that sequence alone, and so do its bits. Nothing outside the window is read, nor anything
past the context: what unwritten places of a block hold does not matter.
"""

import torch
from torch import Tensor

from seal_kernels.attention_common import capability, common_arguments, head_block, launch_config, online_softmax
from seal_kernels.dispatch import ceil_div, tl, triton, use_triton
from seal_kernels.paged_attention_cpu import Tiles, paged_attention_cpu

SPLIT = 256  # tokens of context per program when decoding; the same for every batch, as splits decide bits


def write_kv_ref(k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """The writes, one token after the other."""
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
    """The equation in float32 (float64 for float64 input), in q's dtype: one matrix of scores per sequence and head."""
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
):
    """A program writes BLOCK_R pairs of a token and a head."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_E)
    token, head = rows // K, rows % K
    slot = tl.load(slots_ptr + token, mask=token < T, other=-1)
    block, offset = slot // B, slot % B
    mask = ((slot >= 0) & (block < N))[:, None] & (cols < E)[None, :]
    k = tl.load(k_ptr + (token * stride_kt + head * stride_kh)[:, None] + cols[None, :], mask=mask)  # [BR, BE]
    v = tl.load(v_ptr + (token * stride_vt + head * stride_vh)[:, None] + cols[None, :], mask=mask)  # [BR, BE]
    key_ptr += (block * stride_kb + offset * stride_ko + head * stride_kk)[:, None] + cols[None, :]
    value_ptr += (block * stride_vb + offset * stride_vo + head * stride_vk)[:, None] + cols[None, :]
    tl.store(key_ptr, k.to(key_ptr.dtype.element_ty), mask=mask)
    tl.store(value_ptr, v.to(value_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_keys(
    cache_ptr, table_ptr, j, first, end, stride_block, stride_token,
    E: tl.constexpr, B: tl.constexpr, BLOCK_E: tl.constexpr,
):
    """Tokens j of a sequence's head: [BN, BE]; tokens outside first .. end are 0 and are not read."""
    cols, mask = tl.arange(0, BLOCK_E), (j >= first) & (j < end)
    block = tl.load(table_ptr + j // B, mask=mask, other=0).to(tl.int64)
    at = cache_ptr + (block * stride_block + (j % B).to(tl.int64) * stride_token)[:, None] + cols[None, :]
    return tl.load(at, mask=mask[:, None] & (cols < E)[None, :], other=0.0)


@triton.jit
def _attend(
    acc, l_i, m_i, q, key_ptr, value_ptr, table_ptr, i, n0, first, end, window, scale2,
    stride_kb, stride_ko, stride_vb, stride_vo,
    HAS_WINDOW: tl.constexpr, E: tl.constexpr, B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(acc, l_i, m_i) with one more block of keys: the sums of p v and of p, and the largest score. i: the positions of
    q's rows."""
    # compute q k^T
    j = n0 + tl.arange(0, BLOCK_N)
    k = _load_keys(key_ptr, table_ptr, j, first, end, stride_kb, stride_ko, E, B, BLOCK_E)  # [BN, BE]
    score = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BM, BN]
    if MASKED:
        seen = j[None, :] <= i[:, None]
        if HAS_WINDOW:
            seen &= j[None, :] > i[:, None] - window
        score = tl.where(seen, score, float("-inf"))
    p, alpha, m_i = online_softmax(m_i, score, scale2, MASKED and HAS_WINDOW)
    # rescale the accumulator and add p v
    v = _load_keys(value_ptr, table_ptr, j, first, end, stride_vb, stride_vo, E, B, BLOCK_E)  # [BN, BE]
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")  # [BM, BE]
    return acc, l_i * alpha + tl.sum(p, axis=1), m_i


@triton.jit
def paged_prefill_kernel(
    q_ptr, key_ptr, value_ptr, out_ptr, tables_ptr, cu_seqlens_ptr, context_lens_ptr,
    group, window, scale2,
    stride_qt, stride_qh, stride_kb, stride_ko, stride_kk, stride_vb, stride_vo, stride_vk, stride_ot, stride_table,
    HAS_WINDOW: tl.constexpr, E: tl.constexpr, B: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):
    """Sequences of several queries: a program has BLOCK_M pairs of a query and a head of the group. The last queries
    of a sequence, with the most keys, start first."""
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
    q_at = q_ptr + ((start + query) * stride_qt + head * stride_qh)[:, None] + cols[None, :]
    q = tl.load(q_at, mask=mask, other=0.0)  # [BM, BE]
    acc = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    key_ptr += key_head * stride_kk
    value_ptr += key_head * stride_vk
    tables_ptr += s * stride_table
    i, offset = context - queries + query, context - queries
    low, high = offset + m0 // group, offset + (m0 + BLOCK_M - 1) // group  # positions of the first and last row
    end = tl.minimum(high + 1, context)
    # Blocks of keys: the window's edge cuts `edge`, all rows see `full` whole, the diagonal cuts `diagonal`.
    first, begin, edge = m0 * 0, m0 * 0, m0 * 0  # a Python 0 would be no tensor in the interpreter
    whole = (low + 1) // BLOCK_N
    if HAS_WINDOW:
        first = tl.maximum(low - window + 1, 0)
        begin = first // BLOCK_N
        whole = tl.maximum(whole, begin)
        edge = tl.minimum(tl.cdiv(tl.maximum(high - window + 1, 0), BLOCK_N), whole) - begin
    full, diagonal = whole - begin - edge, tl.cdiv(end, BLOCK_N) - whole
    for block in range(full):
        n0 = (begin + edge + block) * BLOCK_N
        acc, l_i, m_i = _attend(
            acc, l_i, m_i, q, key_ptr, value_ptr, tables_ptr, i, n0, first, end, window, scale2,
            stride_kb, stride_ko, stride_vb, stride_vo, HAS_WINDOW, E, B, BLOCK_N, BLOCK_E, MASKED=False,
        )
    for block in range(edge + diagonal):
        n0 = (begin + tl.where(block < edge, block, block + full)) * BLOCK_N
        acc, l_i, m_i = _attend(
            acc, l_i, m_i, q, key_ptr, value_ptr, tables_ptr, i, n0, first, end, window, scale2,
            stride_kb, stride_ko, stride_vb, stride_vo, HAS_WINDOW, E, B, BLOCK_N, BLOCK_E, MASKED=True,
        )
    l_i = tl.where(l_i == 0.0, 1.0, l_i)  # rows that are not stored, and sequences without context
    out_ptr += ((start + query) * stride_ot + head * E)[:, None] + cols[None, :]
    tl.store(out_ptr, (acc / l_i[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def paged_decode_kernel(
    q_ptr, key_ptr, value_ptr, out_ptr, parts_ptr, lse_ptr, tables_ptr, cu_seqlens_ptr, context_lens_ptr,
    group, window, scale2,
    stride_qt, stride_qh, stride_kb, stride_ko, stride_kk, stride_vb, stride_vo, stride_vk, stride_ot, stride_table,
    ONE_SPLIT: tl.constexpr, HAS_WINDOW: tl.constexpr, E: tl.constexpr, B: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):
    """Sequences of one query: a program has a split of the context and the heads of a group. Where there may be several
    splits, each stores its result in parts [S, H, splits, E] and the logarithm of its sum, base 2, in lse."""
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
    q_at = q_ptr + (start * stride_qt + head * stride_qh)[:, None] + cols[None, :]
    q = tl.load(q_at, mask=mask, other=0.0)  # [BG, BE]
    acc = tl.zeros([BLOCK_G, BLOCK_E], dtype=tl.float32)
    l_i = tl.zeros([BLOCK_G], dtype=tl.float32)
    m_i = tl.full([BLOCK_G], float("-inf"), dtype=tl.float32)
    end = tl.minimum(n0 + SPLIT, context)
    i = context - 1 + rows * 0
    for block in range(tl.maximum(n0, first) // BLOCK_N, tl.cdiv(end, BLOCK_N)):
        acc, l_i, m_i = _attend(
            acc, l_i, m_i, q, key_ptr + key_head * stride_kk, value_ptr + key_head * stride_vk,
            tables_ptr + s * stride_table, i, block * BLOCK_N, first, end, window, scale2,
            stride_kb, stride_ko, stride_vb, stride_vo, HAS_WINDOW, E, B, BLOCK_N, BLOCK_E, MASKED=True,
        )
    l_i = tl.where(l_i == 0.0, 1.0, l_i)  # a sequence without context
    acc /= l_i[:, None]
    if ONE_SPLIT:
        out_ptr += (start * stride_ot + head * E)[:, None] + cols[None, :]
        tl.store(out_ptr, acc.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        at = (s * tl.num_programs(1) * group + head) * tl.num_programs(0) + split
        tl.store(parts_ptr + at[:, None] * E + cols[None, :], acc, mask=mask)
        tl.store(lse_ptr + at, m_i + tl.math.log2(l_i), mask=rows < group)


@triton.jit
def paged_combine_kernel(
    parts_ptr, lse_ptr, out_ptr, cu_seqlens_ptr, context_lens_ptr,
    splits, window,
    stride_ot,
    HAS_WINDOW: tl.constexpr, E: tl.constexpr, SPLIT: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
):
    """A program adds up the splits of one head, BLOCK_S at a time, in order."""
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
    acc, l_i = tl.zeros([BLOCK_E], dtype=tl.float32), tl.full((), 0.0, tl.float32)
    m_i = tl.full((), float("-inf"), tl.float32)
    for s0 in range(0, used, BLOCK_S):
        rows = s0 + tl.arange(0, BLOCK_S)
        lse = tl.load(lse_ptr + first + rows, mask=rows < used, other=float("-inf"))  # [BS]
        mask = (rows < used)[:, None] & (cols < E)[None, :]
        parts = tl.load(parts_ptr + (first + rows)[:, None] * E + cols[None, :], mask=mask, other=0.0)  # [BS, BE]
        m_new = tl.maximum(m_i, tl.max(lse, axis=0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)  # a sequence without context
        weight, alpha = tl.math.exp2(lse - base), tl.math.exp2(m_i - base)
        # rescale the sums and add these splits
        acc = acc * alpha + tl.sum(parts * weight[:, None], axis=0)  # [BE]
        l_i = l_i * alpha + tl.sum(weight, axis=0)
        m_i = m_new
    l_i = tl.where(l_i == 0.0, 1.0, l_i)
    tl.store(out_ptr + start * stride_ot + head * E + cols, (acc / l_i).to(out_ptr.dtype.element_ty), mask=cols < E)


def _paged_triton(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, block_tables: Tensor, cu_seqlens: Tensor, context_lens: Tensor,
    max_query: int, max_context: int, scale: float, window: int | None,
) -> Tensor:
    (_, H, E), (B, K), S = q.shape, key_cache.shape[1:3], len(context_lens)
    group = H // K
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    stride_kb, stride_ko, stride_kk, _ = key_cache.stride()
    stride_vb, stride_vo, stride_vk, _ = value_cache.stride()
    arguments = {
        "q_ptr": q, "key_ptr": key_cache, "value_ptr": value_cache, "out_ptr": out,
        "tables_ptr": block_tables, "cu_seqlens_ptr": cu_seqlens, "context_lens_ptr": context_lens,
        "stride_kb": stride_kb, "stride_ko": stride_ko, "stride_kk": stride_kk,
        "stride_vb": stride_vb, "stride_vo": stride_vo, "stride_vk": stride_vk,
        "stride_qt": q.stride(0), "stride_qh": q.stride(1), "stride_ot": H * E, "stride_table": block_tables.stride(0),
        "B": B, **common_arguments(E, group, scale, window),
    }
    if max_query > 1:
        config = launch_config("prefill", E, q.dtype, capability(q.device))
        paged_prefill_kernel[(ceil_div(max_query * group, config.blocks["BLOCK_M"]), K, S)](
            **arguments, **config.options()
        )
    splits = ceil_div(max_context, SPLIT)
    if window is not None:
        splits = min(splits, ceil_div(window - 1, SPLIT) + 1)
    splits = max(1, splits)
    parts = torch.empty(S, H, splits, E, dtype=torch.float32, device=q.device)
    lse = torch.empty(S, H, splits, dtype=torch.float32, device=q.device)
    config = launch_config("decode", E, q.dtype, group=group)
    paged_decode_kernel[(splits, K, S)](
        **arguments, parts_ptr=parts, lse_ptr=lse, ONE_SPLIT=splits == 1, SPLIT=SPLIT, **config.options()
    )
    if splits > 1:
        config = launch_config("combine", E, q.dtype)
        paged_combine_kernel[(H, S)](
            parts, lse, out, cu_seqlens, context_lens, splits, window or 0, H * E,
            HAS_WINDOW=window is not None, E=E, SPLIT=SPLIT, BLOCK_E=head_block(E), **config.options(),
        )
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

    k, v: [T, K, E], last dimension contiguous, the other strides free. key_cache, value_cache: [N, B, K, E], strides
    likewise, B a power of two, of any floating dtype. slots: int64 [T], no two of them equal. Raises ValueError on
    shapes and dtypes that do not match, and on the CPU on slots past the end, which a GPU leaves out.
    """
    _check_caches(key_cache, value_cache)
    (N, B, K, E), T = key_cache.shape, len(k)
    if k.shape != (T, K, E) or v.shape != (T, K, E) or slots.shape != (T,) or slots.dtype != torch.int64:
        shapes = ", ".join(f"{x.dtype} {list(x.shape)}" for x in (k, v, slots))
        raise ValueError(f"write_kv: k, v [T, {K}, {E}] and int64 slots [T], not {shapes}")
    if k.stride(2) != 1 or v.stride(2) != 1:
        raise ValueError("write_kv: the last dimension of k and v must be contiguous")
    if not use_triton(k, v, key_cache, value_cache, slots):
        if T:
            low, high = slots.aminmax()
            if high >= N * B:
                raise ValueError(f"write_kv: slot {int(high)} of {N * B}")
            if low < 0:
                used = slots >= 0
                k, v, slots = k[used], v[used], slots[used]
        for cache, x in ((key_cache, k), (value_cache, v)):
            if cache.stride(0) == B * cache.stride(1):
                cache.view(N * B, K, E).index_copy_(0, slots, x.to(cache.dtype))
            else:
                cache.index_put_((slots // B, slots % B), x.to(cache.dtype))
    elif T:
        config = launch_config("write", E, key_cache.dtype)
        write_kv_kernel[(ceil_div(T * K, config.blocks["BLOCK_R"]),)](
            k, v, key_cache, value_cache, slots, T, N, K, *k.stride()[:2], *v.stride()[:2],
            *key_cache.stride()[:3], *value_cache.stride()[:3], E=E, B=B, BLOCK_E=head_block(E), **config.options(),
        )


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
    batch_invariant: bool = False,
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
    batch_invariant: on the CPU, a query's bits depend on nothing but the query and the keys and values it sees: neither
    on other sequences nor on how its sequence was cut into calls. On a GPU this changes nothing: bits may differ
    between a call in which a sequence has one query and a call in which it has more.
    shared: a dict, empty at first, for calls that differ only in q, the caches and the window, such as the calls of a
    model's layers: on the CPU the results that follow from the other arguments are computed once and kept in it.
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
        values = f"{max_query}, {max_context}, {scale}, {window}"
        raise ValueError(f"paged_attention: max_query, max_context >= 0, scale > 0, window >= 1, not {values}")
    factor = E**-0.5 if scale is None else scale
    args = (q, key_cache, value_cache, block_tables, cu_seqlens, context_lens, max_query, max_context, factor, window)
    if not use_triton(*args[:6]):
        return paged_attention_cpu(*args, batch_invariant, shared)
    if q.dtype != key_cache.dtype or q.dtype == torch.float64:
        raise ValueError(f"paged_attention: one dtype, 16 bits or float32, not {q.dtype} and {key_cache.dtype}")
    return _paged_triton(*args) if q.numel() and S else torch.empty_like(q)
