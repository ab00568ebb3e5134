"""Attention of one new token per sequence over contiguous keys and values: a CPU's decode step.

    out[n, h] = softmax(scale q[n, h] . K[n, h / G]^T) V[n, h / G]    over the first context_lens[n] tokens, G = H / K

The paged kernel gathers a sequence's blocks for every token and layer; where they lie one behind the other, attention
reads them as they are, a head's tokens one behind the other. A new token's keys and values are written first.

Shapes: q [n, H, E]; kv [2, S, K, W, E], keys and values of S >= n sequences of at most W tokens. Bytes: 2 w K E per
sequence of w tokens. It has no Triton form: on a GPU the paged kernel reads blocks in place.

torch's flash kernel multiplies a head's few queries at a time. On a CPU of AMD products of all heads at once are faster
where slots are short and sequences many (docs/decisions.md). They read whole slots.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from seal_kernels.packed import multiplies_bfloat16, packs_all_rows, pad_rows

BATCHED_ELEMENTS = 1 << 13  # of a head's slot, W E, up to which products of all heads at once are faster
BATCHED_ROWS = 32  # sequences from which they are, in bfloat16


class DecodeRows(NamedTuple):
    """Which tokens of a step are the newest of the first n sequences of `kv`, the same in every layer."""

    kv: Tensor  # [L, 2, S, K, W, E]
    tokens: Tensor | None  # [n] int64: sequence i's row of the step's tokens; None: rows 0 .. n - 1, all there are
    places: Tensor  # [n 2 K] int64: where among a layer's 2 S K W vectors those of the newest tokens are
    batched: bool  # whether attention is by products of all heads at once, over whole slots: those of m >= n sequences
    mask: Tensor  # [n, 1, 1, w] in kv's dtype; if batched, [m, 1, W] float32: 0 for what a sequence has, -inf behind it


def decode_rows(kv: Tensor, tokens: Tensor | None, context_lens: Tensor) -> DecodeRows:
    """kv: [L, 2, S, K, W, E]. context_lens: [n] int64, from 1 to W, new tokens included."""
    n, (S, K, W, E) = len(context_lens), kv.shape[2:]
    batched = packs_all_rows() and W * E <= BATCHED_ELEMENTS
    if kv.dtype != torch.float32:
        batched &= kv.dtype == torch.bfloat16 and multiplies_bfloat16() and n >= BATCHED_ROWS
    width = W if batched else min(W, -(-int(context_lens.max()) // 16) * 16)
    unseen = torch.arange(width) >= context_lens[:, None]
    mask = torch.zeros(n, width, dtype=torch.float32 if batched else kv.dtype).masked_fill_(unseen, float("-inf"))
    mask = pad_rows(mask)[:, None] if batched else mask[:, None, None]
    heads = torch.arange(n)[:, None] * K + torch.tensor([range(K), range(S * K, (S + 1) * K)]).flatten()  # [n, 2 K]
    return DecodeRows(kv, tokens, (heads * W + context_lens[:, None] - 1).flatten(), batched, mask)


def contiguous_attention(q: Tensor, k: Tensor, v: Tensor, layer: int, rows: DecodeRows) -> Tensor:
    """Writes each sequence's new keys and values and attends: [n, H, E] in q's dtype.

    q: [T, H, E], k and v: [T, K, E], of a whole step; the result has the rows of `rows` alone, in its order.
    """
    if rows.tokens is not None:
        q, k, v = (x.index_select(0, rows.tokens) for x in (q, k, v))
    kv = rows.kv[layer]
    (n, H, E), K = q.shape, k.shape[1]
    kv.view(-1, E).index_copy_(0, rows.places, torch.cat([k, v], 1).to(kv.dtype).view(-1, E))
    queries = q.to(kv.dtype).reshape(n, K, H // K, E)  # the heads of a group are queries of one key head
    if rows.batched:
        return _batched_attention(queries, kv, rows.mask).view(n, H, E).to(q.dtype)
    keys, values = kv[:, :n, :, : rows.mask.shape[3]]  # [n, K, w, E]
    out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries, keys, values, attn_mask=rows.mask, scale=E**-0.5
    )[0]
    return out.reshape(n, H, E).to(q.dtype)


def _batched_attention(q: Tensor, kv: Tensor, mask: Tensor) -> Tensor:
    """q [n, K, G, E], kv [2, S, K, W, E], mask [m, 1, W]: [n, K, G, E], by three or four operations on all heads."""
    n, K, G, E = q.shape
    rows = pad_rows(q.reshape(n, -1))  # S is a power of two: there are slots for them, and no one reads the results
    queries, (keys, values) = rows.reshape(-1, G, E), kv[:, : len(rows)].flatten(1, 2)  # [m K, G, E], [m K, W, E] each
    scores = torch.bmm(queries, keys.mT)
    if scores.dtype == torch.bfloat16:  # whose rounding would be felt: another product gives what it took away
        scores = torch.baddbmm(scores, queries, keys.mT, beta=-1).float().add_(scores)
    weights = torch.add(mask, scores.view(len(rows), K * G, -1), alpha=E**-0.5).softmax(-1)
    out = torch.bmm(weights.to(q.dtype).view(-1, G, weights.shape[-1]), values)
    return out.view(-1, K, G, E)[:n]
