"""What lora.py is told: which tokens meet which adapter, and the tables of addresses that its kernels read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

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
    views: Sequence["AdapterViews"] | None = None  # for the CPU, which otherwise makes them in each pass


class BatchTables(NamedTuple):
    """The tables of all G groups of a batch, and the two tensors that they are views of."""

    groups: list[LoraTables]
    records: Tensor  # [G, S, units, 9]
    blocks: Tensor  # [n, 4]


class AdapterViews(NamedTuple):
    """Where an adapter's factors on one group lie in its flat tensors."""

    a: Tensor  # [R, I]: all projections' rows
    da: Tensor | None
    ranks: list[int]  # of the projections that are adapted, like what follows
    projections: list[int]  # which of the group's M
    b: list[Tensor]  # [r, width]
    db: list[Tensor | None]


NO_VIEWS = AdapterViews(torch.empty(0, 0), None, [], [], [], [])  # of an adapter that leaves the group alone


def adapter_views(
    params: Tensor, grads: Tensor | None, offsets: np.ndarray, ranks: np.ndarray, inputs: int, widths: Sequence[int]
) -> AdapterViews:
    """offsets [1 + M], ranks [M] and widths (M): as LoraGroup's of one segment; inputs: I."""
    (a_start, *b_starts), rank_list = offsets.tolist(), ranks.tolist()
    adapted = [m for m, rank in enumerate(rank_list) if rank]
    shape = (sum(rank_list), inputs), (inputs, 1), a_start
    parts = [((rank_list[m], widths[m]), (widths[m], 1), b_starts[m]) for m in adapted]
    return AdapterViews(
        a=params.as_strided(*shape),
        da=None if grads is None else grads.as_strided(*shape),
        ranks=[rank_list[m] for m in adapted],
        projections=adapted,
        b=[params.as_strided(*part) for part in parts],
        db=[None if grads is None else grads.as_strided(*part) for part in parts],
    )


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


def device_tables(groups: Sequence[LoraGroup], inputs: Sequence[int], device: torch.device) -> BatchTables:
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
    return BatchTables(made, table, blocks[:n])
