"""Attention of one new token per sequence over contiguous keys and values: a CPU's decode step.

    out[n, h] = softmax(scale q[n, h] . K[n, h / G]^T) V[n, h / G]    over the first context_lens[n] tokens, G = H / K

The paged kernel gathers a sequence's blocks for every token and layer; where they lie one behind the other, attention
reads them as they are. A new token's keys and values are written first.

Shapes: q [n, H, E]; kv [S, W, 2 K, E], S >= n sequences of at most W tokens, the keys' heads before the values'; mask
[n, 1, 1, w]. Bytes: 2 w K E per sequence. It has no Triton form: on a GPU the paged kernel reads blocks in place.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class DecodeRows(NamedTuple):
    """Which tokens of a step are the newest of the first n sequences of `kv`, the same in every layer."""

    kv: Tensor  # [L, S, W, 2 K, E]
    tokens: Tensor | None  # [n] int64: sequence i's row of the step's tokens; None: rows 0 .. n - 1, all there are
    slots: Tensor  # [n] int64: i W + the token's position
    mask: Tensor  # [n, 1, 1, w] in kv's dtype: 0 for a sequence's tokens, -inf behind them


def decode_rows(kv: Tensor, tokens: Tensor | None, context_lens: Tensor) -> DecodeRows:
    """kv: [L, S, W, 2 K, E]. context_lens: [n] int64, from 1 to W, new tokens included."""
    n, W = len(context_lens), kv.shape[2]
    width = min(W, -(-int(context_lens.max()) // 16) * 16)
    unseen = torch.arange(width) >= context_lens[:, None]
    mask = torch.zeros(n, 1, 1, width, dtype=kv.dtype).masked_fill_(unseen[:, None, None], float("-inf"))
    return DecodeRows(kv, tokens, torch.arange(n) * W + context_lens - 1, mask)


def contiguous_attention(q: Tensor, k: Tensor, v: Tensor, layer: int, rows: DecodeRows) -> Tensor:
    """Writes each sequence's new keys and values and attends: [n, H, E] in q's dtype.

    q: [T, H, E], k and v: [T, K, E], of a whole step; the result has the rows of `rows` alone, in its order.
    """
    if rows.tokens is not None:
        q, k, v = (x.index_select(0, rows.tokens) for x in (q, k, v))
    kv = rows.kv[layer]
    (n, H, E), (S, W), K = q.shape, kv.shape[:2], k.shape[1]
    places = kv.view(S * W, 2 * K, E)
    places[:, :K].index_copy_(0, rows.slots, k.to(kv.dtype))
    places[:, K:].index_copy_(0, rows.slots, v.to(kv.dtype))
    seen = kv[:n, : rows.mask.shape[3]].transpose(1, 2)  # [n, 2 K, w, E]
    queries = q.to(kv.dtype).reshape(n, K, H // K, E)  # the heads of a group are queries of one key head
    out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries, seen[:, :K], seen[:, K:], attn_mask=rows.mask, scale=E**-0.5
    )[0]
    return out.reshape(n, H, E).to(q.dtype)
