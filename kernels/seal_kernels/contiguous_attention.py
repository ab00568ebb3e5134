"""Attention of one new token per sequence over contiguous keys and values: a CPU's decode step.

    out[n, h] = softmax(scale q[n, h] . K[n, h / G]^T) V[n, h / G]    over the first context_lens[n] tokens, G = H / K

The paged kernel gathers a sequence's blocks for every token and layer; where they lie one behind the other, attention
reads them as they are, a head's tokens one behind the other. A new token's keys and values are written first.

Shapes: q [n, H, E]; kv [2, S, K, W, E], keys and values of S >= n sequences of at most W tokens. Bytes: 2 w K E per
sequence of w tokens. It has no Triton form: on a GPU the paged kernel reads blocks in place.

torch's flash kernel multiplies a head's few queries at a time. On a CPU of AMD products of all heads at once are faster
in float32 where slots are short (docs/decisions.md). They read whole slots.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from seal_kernels.packed import packs_all_rows

BATCHED_ELEMENTS = 1 << 13  # of a head's slot, W E, up to which products of all heads at once are faster


class DecodeRows(NamedTuple):
    """Which tokens of a step are the newest of the first n sequences of `kv`, the same in every layer."""

    kv: Tensor  # [L, 2, S, K, W, E]
    tokens: Tensor | None  # [n] int64: sequence i's row of the step's tokens; None: rows 0 .. n - 1, all there are
    places: Tensor  # [n 2 K] int64: where among a layer's 2 S K W vectors those of the newest tokens are
    batched: bool  # whether attention is by products of all heads at once, over whole slots
    mask: Tensor  # [n, 1, 1, w] in kv's dtype, w = W if batched: 0 for a sequence's tokens, -inf behind them


def decode_rows(kv: Tensor, tokens: Tensor | None, context_lens: Tensor) -> DecodeRows:
    """kv: [L, 2, S, K, W, E]. context_lens: [n] int64, from 1 to W, new tokens included."""
    n, (S, K, W, E) = len(context_lens), kv.shape[2:]
    batched = kv.dtype == torch.float32 and packs_all_rows() and W * E <= BATCHED_ELEMENTS
    width = W if batched else min(W, -(-int(context_lens.max()) // 16) * 16)
    unseen = torch.arange(width) >= context_lens[:, None]
    mask = torch.zeros(n, 1, 1, width, dtype=kv.dtype).masked_fill_(unseen[:, None, None], float("-inf"))
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
    """q [n, K, G, E], kv [2, S, K, W, E], mask [n, 1, 1, W]: [n, K, G, E], by three operations on all heads."""
    n, K, G, E = q.shape
    keys, values = kv[:, :n].flatten(1, 2)  # [n K, W, E] each
    scores = torch.bmm(q.reshape(n * K, G, E), keys.mT).view(n, K, G, -1)
    weights = torch.add(mask, scores, alpha=E**-0.5).softmax(-1)
    return torch.bmm(weights.view(n * K, G, -1), values).view(n, K, G, E)
