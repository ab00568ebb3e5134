"""attention.py on the CPU: torch's flash kernel, on padded batches of short sequences and on long ones one by one.

The kernel is called through `aten`: autograd through slices of the packed stream would fill a whole stream of zeros for
each sequence. In a batch a sequence's bits depend on the longest one, which sets the kernel's blocks, so that
batch-invariant attention takes every sequence by itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

# Queries a chunk with a window. Below 512, the keys of one block of the flash kernel: a query whose first block of
# keys lay wholly before its window would have no maximum to start from.
CHUNK = 256
SHORT = 256  # tokens: longer sequences fill the machine by themselves
LEAST_SHARE = 0.7  # of a batch's longest sequence: shorter ones go into the next batch


@dataclass(frozen=True)
class Sequences:
    """A plan for a packed stream: short sequences in padded batches, the others one by one."""

    unbatched: list[tuple[int, int]]  # (first token, end)
    batches: list[tuple[int, int]]  # (sequences, tokens of the longest): consecutive in the padded stream
    sources: Tensor  # [P] int64: the token that a row of the padded stream holds; padding holds its sequence's last
    rows: Tensor  # [n] int64: where in the padded stream each batched token is
    tokens: Tensor  # [n] int64: these tokens

    @staticmethod
    def read(cu_seqlens: Tensor, T: int, max_seqlen: int, window: int | None, batch_invariant: bool) -> "Sequences":
        """Makes the plan from cu_seqlens, on the CPU. Raises ValueError if it does not rise from 0 to T."""
        bounds = cu_seqlens.tolist()
        spans = [(start, end) for start, end in pairwise(bounds) if end != start]
        if bounds[0] != 0 or bounds[-1] != T or any(end < start for start, end in spans):
            raise ValueError(f"attention: cu_seqlens must rise from 0 to {T}, not {bounds}")
        if any(end - start > max_seqlen for start, end in spans):
            raise ValueError(f"attention: max_seqlen is {max_seqlen}, the longest sequence is longer")
        if batch_invariant:
            return _plan(tuple(spans), 0)
        return _plan(tuple(spans), SHORT if window is None else min(SHORT, window))

    def padded(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x [T, ...] -> [P, ...]: the rows of the batched sequences, padding included."""
        return x.index_select(0, self.sources).to(dtype)

    def each(self, *padded: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """For each batch, the padded streams [P, H, E] as [sequences, H, tokens, E]."""
        first = 0
        for count, width in self.batches:
            rows = slice(first, first + count * width)
            yield tuple(x[rows].view(count, width, *x.shape[1:]).transpose(1, 2) for x in padded)
            first = rows.stop


@lru_cache(maxsize=16)  # the layers of a pass ask for the same
def _plan(spans: tuple[tuple[int, int], ...], limit: int) -> Sequences:
    """Sequences of up to `limit` tokens in batches, by length; the others unbatched."""
    short = sorted((span for span in spans if span[1] - span[0] <= limit), key=lambda span: span[0] - span[1])
    batches: list[tuple[int, int]] = []
    for start, end in short:
        if batches and end - start >= LEAST_SHARE * batches[-1][1]:
            batches[-1] = batches[-1][0] + 1, batches[-1][1]
        else:
            batches.append((1, end - start))
    widths = torch.tensor([width for count, width in batches for _ in range(count)], dtype=torch.int64)
    starts, ends = torch.tensor(short, dtype=torch.int64).reshape(-1, 2).unbind(1)
    within = torch.arange(int(widths.sum())) - torch.repeat_interleave(widths.cumsum(0) - widths, widths)
    sources = torch.repeat_interleave(starts, widths) + within
    last = torch.repeat_interleave(ends, widths) - 1
    rows = (sources <= last).nonzero().squeeze(1)
    unbatched = [span for span in spans if span[1] - span[0] > limit]
    return Sequences(unbatched, batches, sources.minimum(last), rows, sources[rows])


def _chunks(sequences: list[tuple[int, int]], window: int | None) -> Iterator[tuple[slice, slice, bool]]:
    """(queries, keys, windowed): a sequence whole, or the queries of a chunk with the keys that they can see."""
    for start, end in sequences:
        if window is None or window >= end - start:
            yield slice(start, end), slice(start, end), False
        else:
            for i in range(start, end, CHUNK):
                stop = min(i + CHUNK, end)
                yield slice(i, stop), slice(max(start, i - window + 1), stop), True


def _window_mask(queries: slice, keys: slice, window: int, dtype: torch.dtype) -> Tensor:
    """0 where the query sees the key, -inf elsewhere: [queries, keys]."""
    distance = torch.arange(queries.start, queries.stop)[:, None] - torch.arange(keys.start, keys.stop)[None, :]
    hidden = (distance < 0) | (distance >= window)
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))


def _grouped(x: Tensor, K: int, G: int, dtype: torch.dtype) -> Tensor:
    """x [N, K G, E] or [N, K, E] as [G, K, N, E]: the heads of a group are a batch, keys are expanded, not copied."""
    return x.to(dtype).unflatten(1, (K, -1)).permute(2, 1, 0, 3).expand(G, -1, -1, -1)


def attention_forward_cpu(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """(out, lse [T, H]). 16-bit tensors are widened chunk by chunk, which makes backward faster, and exact."""
    (T, H, _), K = q.shape, k.shape[1]
    G, wide = H // K, torch.promote_types(q.dtype, torch.float32)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty(T, H, dtype=wide)
    if sequences.batches:
        padded = (sequences.padded(x, wide) for x in (q, k, v))
        outs, lses = [], []
        for qs, ks, vs in sequences.each(*padded):
            o, part = flash(qs, _repeated(ks, G), _repeated(vs, G), 0.0, True, scale=scale)
            outs.append(o.transpose(1, 2).reshape(-1, *q.shape[1:]))
            lses.append(part.transpose(1, 2).reshape(-1, H))
        for whole, parts in ((out, outs), (lse, lses)):
            whole.index_copy_(0, sequences.tokens, torch.cat(parts)[sequences.rows].to(whole.dtype))
    for queries, keys, windowed in _chunks(sequences.unbatched, window):
        o, part = flash(
            _grouped(q[queries], K, G, wide), _grouped(k[keys], K, G, wide), _grouped(v[keys], K, G, wide),
            0.0, not windowed, scale=scale,
            attn_mask=_window_mask(queries, keys, window, wide) if windowed and window else None,
        )
        out[queries].unflatten(1, (K, G)).copy_(o.permute(2, 1, 0, 3))
        lse[queries].unflatten(1, (K, G)).copy_(part.permute(2, 1, 0))
    return out, lse


def _repeated(x: Tensor, G: int) -> Tensor:
    """[S, K, N, E] -> [S, K G, N, E]: each key head for the G query heads that read it."""
    return x if G == 1 else x.repeat_interleave(G, 1)


def attention_backward_cpu(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    sequences: Sequences, scale: float, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv). The heads of a group, and chunks that share keys, are summed in lse's dtype."""
    (H, E), K = q.shape[1:], k.shape[1]
    G, wide = H // K, lse.dtype
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    dq = torch.empty(q.shape, dtype=q.dtype)
    dk, dv = torch.zeros(k.shape, dtype=wide), torch.zeros(k.shape, dtype=wide)
    if sequences.batches:
        padded = [sequences.padded(x, wide) for x in (q, k, v, out, lse[..., None])]
        # Padding has no gradient: with zeros there, its queries add nothing to keys and values.
        padded.append(padded[3].new_zeros(padded[3].shape))
        padded[-1][sequences.rows] = dout.index_select(0, sequences.tokens).to(wide)
        parts: list[list[Tensor]] = [[], [], []]
        for qs, ks, vs, outs, lses, douts in sequences.each(*padded):
            grads = flash(douts, qs, _repeated(ks, G), _repeated(vs, G), outs, lses.squeeze(3), 0.0, True, scale=scale)
            for i, grad in enumerate(grads):
                grad = grad.transpose(1, 2).reshape(-1, H, E)
                parts[i].append(grad if i == 0 or G == 1 else grad.unflatten(1, (K, G)).sum(2))
        for whole, part in zip((dq, dk, dv), parts, strict=True):
            whole.index_copy_(0, sequences.tokens, torch.cat(part)[sequences.rows].to(whole.dtype))
    for queries, keys, windowed in _chunks(sequences.unbatched, window):
        dq_part, dk_part, dv_part = flash(
            _grouped(dout[queries], K, G, wide),
            _grouped(q[queries], K, G, wide), _grouped(k[keys], K, G, wide), _grouped(v[keys], K, G, wide),
            _grouped(out[queries], K, G, wide), lse[queries].unflatten(1, (K, G)).permute(2, 1, 0),
            0.0, not windowed, scale=scale,
            attn_mask=_window_mask(queries, keys, window, wide) if windowed and window else None,
        )
        dq[queries].unflatten(1, (K, G)).copy_(dq_part.permute(2, 1, 0, 3))
        dk[keys] += dk_part.sum(0).transpose(0, 1)
        dv[keys] += dv_part.sum(0).transpose(0, 1)
    return dq, dk.to(k.dtype), dv.to(v.dtype)
