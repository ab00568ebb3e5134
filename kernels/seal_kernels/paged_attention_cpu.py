"""paged_attention.py on the CPU: tiles of queries, with the keys they see gathered, through torch's flash kernel."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Queries of a sequence that the CPU takes at once, and the most that a sequence of such tiles has in a call.
TILES = ((1, 1), (16, 64), (64, 1 << 31))
INDEPENDENT_TILES = ((8, 1 << 31),)  # if rows must be independent: a lone query is then padded to a tile too
MOST_GATHERED = 1 << 19  # elements of keys gathered at once, 2 MiB of float32: what is read next is in the cache


def _lengths(
    cu_seqlens: Tensor, context_lens: Tensor, T: int, max_query: int, max_context: int, capacity: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(first row, queries, context) of every sequence, checked."""
    bounds, context = cu_seqlens.numpy().astype(np.int64), context_lens.numpy().astype(np.int64)
    queries = np.diff(bounds)
    if bounds[0] != 0 or bounds[-1] > T or (queries < 0).any() or (queries > max_query).any():
        raise ValueError(f"paged_attention: cu_seqlens must rise from 0 to at most {T}, by at most {max_query} each")
    if ((context < queries) & (context != 0)).any() or (context > min(max_context, capacity)).any():
        raise ValueError(f"paged_attention: context_lens must hold the queries and be at most {max_context} and M B")
    return bounds[:-1], queries, context


def _tiles(
    queries: np.ndarray, context: np.ndarray, tile: int, window: int | None, block: int, limit: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, int]]:
    """(sequences, first queries, first keys, width): tiles of queries that see about as many keys, at most `limit` keys
    in all. Tiles lie at multiples of their size in the sequence, and width follows from place and window alone. Keys
    are whole blocks."""
    first_tile = (context - queries) // tile
    counts = np.where(queries > 0, -(-context // tile) - first_tile, 0)
    sequences = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(sequences)) - np.repeat(counts.cumsum() - counts, counts)
    low = (first_tile[sequences] + within) * tile
    first = np.maximum(low - window + 1, 0) // block * block if window else np.zeros_like(low)
    keys = low + tile - first
    step = 2 ** np.maximum(
        max(6, block.bit_length() - 1), np.ceil(np.log2(keys)).astype(np.int64) - 3
    )  # few widths, and little for nothing
    widths = -(-keys // step) * step
    for width in np.unique(widths).tolist():
        (found,) = np.nonzero(widths == width)
        n = max(1, limit // width)
        for part in (found[i : i + n] for i in range(0, len(found), n)):
            yield sequences[part], low[part], first[part], width


def _gather(cache: Tensor, blocks: Tensor, unseen: Tensor, dtype: torch.dtype) -> Tensor:
    """The tokens of blocks [n, m]: [n, K, m B, E]. Those numbered in unseen are zero: what lies there may be NaN."""
    K, E = cache.shape[2:]
    rows = cache.index_select(0, blocks.flatten()).to(dtype)
    rows.view(-1, K * E).index_fill_(0, unseen, 0)
    return rows.view(len(blocks), -1, K, E).transpose(1, 2)


class Tiles(NamedTuple):
    """n tiles of queries, each of its own sequence, that see about as many keys."""

    blocks: Tensor  # [n, m] int64: where their keys are
    unseen: Tensor  # numbers of those of the n m B tokens there that no query of the tile sees
    rows: Tensor  # [n tile] int64: the queries; what pads a tile repeats one
    mask: Tensor  # [n, 1, tile G, m B]: 0 where a query sees a key, -inf elsewhere
    keep: Tensor | None  # [n tile]: not what pads a tile; None where nothing does


def make_tiles(
    block_tables: Tensor, cu_seqlens: Tensor, context_lens: Tensor, T: int, max_query: int, max_context: int,
    cache_shape: tuple[int, ...], group: int, window: int | None, row_independent: bool, dtype: torch.dtype,
) -> Iterator[Tiles]:  # fmt: skip
    """All tiles of a batch: they are the same in every layer with the same window."""
    (N, B, K, E), M = cache_shape, block_tables.shape[1]
    start, queries, context = _lengths(cu_seqlens, context_lens, T, max_query, max_context, M * B)
    tables, shift = block_tables.numpy(), B.bit_length() - 1
    queries = np.where(context > 0, queries, 0)
    lowest = np.maximum(context - queries - (window or M * B) + 1, 0)  # first token that a sequence's queries see
    least = 0
    for tile, most in INDEPENDENT_TILES if row_independent else TILES:
        counts, least = np.where((queries > least) & (queries <= most), queries, 0), most
        for s, low, first, width in _tiles(counts, context, tile, window, B, MOST_GATHERED // (K * E)):
            s = s[:, None]
            i, j = low[:, None] + np.arange(tile), first[:, None] + np.arange(width)  # [n, tile], [n, width]
            known = np.clip(j[:, ::B] >> shift, lowest[s] >> shift, (context[s] - 1) >> shift)
            blocks = tables[s, known].astype(np.int64)
            if blocks.min() < 0 or blocks.max() >= N:
                raise ValueError(f"paged_attention: block_tables name blocks that are not among {N}")
            row = i - (context - queries)[s]
            valid = (row >= 0) & (row < queries[s])
            hidden = j[:, None, :] > i[:, :, None]
            if window is not None:
                hidden |= j[:, None, :] <= i[:, :, None] - window
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(torch.from_numpy(hidden), float("-inf"))
            yield Tiles(
                torch.from_numpy(blocks),
                torch.from_numpy(np.flatnonzero((j < lowest[s]) | (j >= context[s]))),
                torch.from_numpy(start[s] + row.clip(0, queries[s] - 1)).flatten(),
                (mask.repeat_interleave(group, 1) if tile > 1 else mask)[:, None],  # of a row a query and head
                None if valid.all() else torch.from_numpy(valid.reshape(-1)),
            )


def paged_attention_cpu(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, block_tables: Tensor, cu_seqlens: Tensor, context_lens: Tensor,
    max_query: int, max_context: int, scale: float, window: int | None, row_independent: bool,
    shared: dict[int | None, list[Tiles]] | None,
) -> Tensor:  # fmt: skip
    """Tiles of queries of all sequences, those of one shape together: torch's flash kernel for the CPU works for one
    of them (and a key head) at a time, in one thread, so that its bits do not depend on the others. Keys that a tile
    must not see are those of its own sequence, to which it gives no weight: what lies elsewhere may be anything."""
    (T, H, E), K = q.shape, key_cache.shape[2]
    group, wide = H // K, torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(q.shape, dtype=q.dtype)
    every: Iterable[Tiles] | None = None if shared is None else shared.get(window)
    if every is None:
        every = make_tiles(
            block_tables, cu_seqlens, context_lens, T, max_query, max_context,
            tuple(key_cache.shape), group, window, row_independent, wide,
        )  # fmt: skip
        if shared is not None and max_query == 1:  # masks of longer queries are too large to keep
            shared[window] = every = list(every)
    for blocks, unseen, rows, mask, keep in every:
        n, tile = len(blocks), len(rows) // len(blocks)
        k, v = (_gather(cache, blocks, unseen, wide) for cache in (key_cache, value_cache))
        tiles = q.index_select(0, rows).to(wide).view(n, tile, K, group, E).transpose(1, 2)  # [n, K, tile, G, E]
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            tiles.reshape(n, K, tile * group, E), k, v, attn_mask=mask, scale=scale
        )[0]
        found = found.view(n, K, tile, group, E).transpose(1, 2).reshape(-1, H, E).to(q.dtype)
        if keep is not None:
            rows, found = rows[keep], found[keep]
        out.index_copy_(0, rows, found)
    return out
