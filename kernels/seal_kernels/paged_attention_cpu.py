"""paged_attention.py on the CPU: tiles of queries, with the keys they see gathered, through torch's flash kernel."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from seal_kernels.dispatch import ceil_div

# (queries per tile, the most queries of a sequence that is cut into such tiles)
TILES = ((1, 1), (16, 64), (64, 1 << 31))
BATCH_INVARIANT_TILES = ((8, 1 << 31),)  # a single query is padded to a tile, too
MAX_KEPT = 1 << 20  # elements of masks that are kept from layer to layer, 4 MiB, the tiles' padding aside
MAX_GATHERED = 1 << 19  # elements of keys gathered at once, 2 MiB of float32: what is read next is in the cache


def _lengths(
    cu_seqlens: Tensor, context_lens: Tensor, T: int, max_query: int, max_context: int, capacity: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(first row, queries, context) of every sequence. Raises ValueError where they do not match."""
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
    counts = np.where(queries > 0, ceil_div(context, tile) - first_tile, 0)
    sequences = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(sequences)) - np.repeat(counts.cumsum() - counts, counts)
    low = (first_tile[sequences] + within) * tile
    first = np.maximum(low - window + 1, 0) // block * block if window else np.zeros_like(low)
    keys = low + tile - first
    # widths are rounded up to an eighth of a power of two: there are few of them, and they add little work
    step = 2 ** np.maximum(max(6, block.bit_length() - 1), np.ceil(np.log2(keys)).astype(np.int64) - 3)
    widths = ceil_div(keys, step) * step
    for width in np.unique(widths).tolist():
        tiles = np.flatnonzero(widths == width)
        n = max(1, limit // width)
        for i in range(0, len(tiles), n):
            part = tiles[i : i + n]
            yield sequences[part], low[part], first[part], width


def _gather(cache: Tensor, blocks: Tensor, unseen: Tensor, dtype: torch.dtype) -> Tensor:
    """The tokens of blocks [n, m]: [n, K, m B, E]. Tokens numbered in unseen are zero: the cache may hold NaN there."""
    K, E = cache.shape[2:]
    rows = cache.index_select(0, blocks.flatten()).to(dtype)
    rows.view(-1, K * E).index_fill_(0, unseen, 0)
    return rows.view(len(blocks), -1, K, E).transpose(1, 2)


class Tiles(NamedTuple):
    """n tiles of queries, each of one sequence, that see about as many keys."""

    blocks: Tensor  # [n, m] int64: the cache blocks of their keys
    unseen: Tensor  # numbers, among the n m B tokens of these blocks, of the tokens that no query of the tile sees
    rows: Tensor | None  # [n tile] int64: the queries; padding repeats a query. None: all queries, in order
    mask: Tensor  # [n, 1, tile G, m B]: 0 where a query sees a key, -inf elsewhere
    keep: Tensor | None  # [n tile]: False for padding; None without padding


def make_tiles(
    block_tables: Tensor, cu_seqlens: Tensor, context_lens: Tensor, T: int, max_query: int, max_context: int,
    cache_shape: tuple[int, ...], group: int, window: int | None, batch_invariant: bool, dtype: torch.dtype,
) -> Iterator[Tiles]:
    """All tiles of a batch: they are the same in every layer with the same window."""
    (N, B, K, E), M = cache_shape, block_tables.shape[1]
    start, queries, context = _lengths(cu_seqlens, context_lens, T, max_query, max_context, M * B)
    tables, shift = block_tables.numpy(), B.bit_length() - 1
    queries = np.where(context > 0, queries, 0)
    lowest = np.maximum(context - queries - (window or M * B) + 1, 0)  # first token that a sequence's queries see
    least = 0
    for tile, most in BATCH_INVARIANT_TILES if batch_invariant else TILES:
        counts, least = np.where((queries > least) & (queries <= most), queries, 0), most
        for s, low, first, width in _tiles(counts, context, tile, window, B, MAX_GATHERED // (K * E)):
            s = s[:, None]
            i, j = low[:, None] + np.arange(tile), first[:, None] + np.arange(width)  # [n, tile], [n, width]
            numbers = np.clip(j[:, ::B] >> shift, lowest[s] >> shift, (context[s] - 1) >> shift)
            blocks = tables[s, numbers].astype(np.int64)
            if blocks.min() < 0 or blocks.max() >= N:
                raise ValueError(f"paged_attention: block_tables name blocks that are not among {N}")
            row = i - (context - queries)[s]
            valid = (row >= 0) & (row < queries[s])
            hidden = j[:, None, :] > i[:, :, None]
            if window is not None:
                hidden |= j[:, None, :] <= i[:, :, None] - window
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(torch.from_numpy(hidden), float("-inf"))
            rows = (start[s] + row.clip(0, queries[s] - 1)).reshape(-1)
            yield Tiles(
                torch.from_numpy(blocks),
                torch.from_numpy(np.flatnonzero((j < lowest[s]) | (j >= context[s]))),
                None if np.array_equal(rows, np.arange(T)) else torch.from_numpy(rows),
                (mask.repeat_interleave(group, 1) if tile > 1 else mask)[:, None],  # one row per query and head
                None if valid.all() else torch.from_numpy(valid.reshape(-1)),
            )


def paged_attention_cpu(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, block_tables: Tensor, cu_seqlens: Tensor, context_lens: Tensor,
    max_query: int, max_context: int, scale: float, window: int | None, batch_invariant: bool,
    shared: dict[int | None, list[Tiles]] | None,
) -> Tensor:
    """Attention by tiles of queries, tiles of one shape together: torch's flash kernel for the CPU works on one tile
    and key head at a time, in one thread, so that a tile's bits do not depend on the others. A tile reads only keys of
    its sequence, also where it gives them no weight: other places of the cache may hold anything."""
    (T, H, E), K = q.shape, key_cache.shape[2]
    group, wide = H // K, torch.promote_types(q.dtype, torch.float32)
    out: Tensor | None = None
    all_tiles: Iterable[Tiles] | None = None if shared is None else shared.get(window)
    if all_tiles is None:
        all_tiles = make_tiles(
            block_tables, cu_seqlens, context_lens, T, max_query, max_context,
            tuple(key_cache.shape), group, window, batch_invariant, wide,
        )
        if shared is not None and T * group * max_context <= MAX_KEPT:
            shared[window] = all_tiles = list(all_tiles)
    for blocks, unseen, rows, mask, keep in all_tiles:
        tile = (T if rows is None else len(rows)) // len(blocks)
        n = len(blocks)
        k, v = _gather(key_cache, blocks, unseen, wide), _gather(value_cache, blocks, unseen, wide)
        queries = (q if rows is None else q.index_select(0, rows)).to(wide)
        tiles = queries.reshape(n, tile, K, group, E).transpose(1, 2)  # [n, K, tile, G, E]
        tile_out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            tiles.reshape(n, K, tile * group, E), k, v, attn_mask=mask, scale=scale
        )[0]
        tile_out = tile_out.view(n, K, tile, group, E).transpose(1, 2).reshape(-1, H, E).to(q.dtype)
        if rows is None:
            return tile_out
        if keep is not None:
            rows, tile_out = rows[keep], tile_out[keep]
        out = torch.zeros(q.shape, dtype=q.dtype) if out is None else out
        out.index_copy_(0, rows, tile_out)
    return torch.zeros(q.shape, dtype=q.dtype) if out is None else out
