"""The LoRA adapters of a batch, as lora.py takes them, and the tables of addresses that its kernels read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from seal_kernels.dispatch import ceil_div, tl, triton
from seal_kernels.transfer import to_device

BLOCK_T = 64  # tokens per block: the rows of Hopper's matrix instruction, and about the length of a segment

# A factor's record in the factor table: FACTOR_FIELDS int64 numbers, which host and kernels read by these names.
ADDRESS = tl.constexpr(0)  # of the factor P [rank, width], float32
GRAD_ADDRESS = tl.constexpr(1)  # of dP; 0 where the factor is not trained
RANK = tl.constexpr(2)  # rows of P; 0 where the segment has no such factor
H_COLUMN = tl.constexpr(3)  # first column of h that belongs to P
COLUMN = tl.constexpr(4)  # first column of x or y that P meets
WIDTH = tl.constexpr(5)  # columns of P
SCALE = tl.constexpr(6)  # the bits of a float32
DROPOUT_SEED = tl.constexpr(7)
DROPOUT_LIMIT = tl.constexpr(8)  # an element is dropped if its 32-bit hash is below this
FACTOR_FIELDS = tl.constexpr(9)

# A block's record in a table of blocks: BLOCK_FIELDS int32 numbers. Tokens are numbered through the whole batch.
SEGMENT = tl.constexpr(0)
SEGMENT_START = tl.constexpr(1)  # the segment's first token
BLOCK_START = tl.constexpr(2)  # the block's first token
SEGMENT_END = tl.constexpr(3)
BLOCK_FIELDS = tl.constexpr(4)


@triton.jit
def load_factor(factors_ptr, segment, factor, stride, ALIGNED: tl.constexpr, ALIGNED_H: tl.constexpr):
    """(P, dP, rank, first column in h, first column in x or y, columns, scale, dropout's seed and limit)."""
    record = factors_ptr + segment * stride + factor * FACTOR_FIELDS
    p = tl.load(record + ADDRESS).to(tl.pointer_type(tl.float32))
    dp = tl.load(record + GRAD_ADDRESS).to(tl.pointer_type(tl.float32))
    column, width = tl.load(record + COLUMN).to(tl.int32), tl.load(record + WIDTH).to(tl.int32)
    if ALIGNED:
        p, dp = tl.multiple_of(p, 16), tl.multiple_of(dp, 16)
        column, width = tl.multiple_of(column, 16), tl.multiple_of(width, 16)
    scale = tl.load(record + SCALE).to(tl.int32).to(tl.float32, bitcast=True)
    rank, h_column = tl.load(record + RANK).to(tl.int32), tl.load(record + H_COLUMN).to(tl.int32)
    if ALIGNED_H:
        rank, h_column = tl.multiple_of(rank, 8), tl.multiple_of(h_column, 8)
    seed, limit = tl.load(record + DROPOUT_SEED).to(tl.uint32), tl.load(record + DROPOUT_LIMIT).to(tl.uint32)
    return p, dp, rank, h_column, column, width, scale, seed, limit


@triton.jit
def load_block(blocks_ptr, index):
    """(segment, its first token, the block's first token, the segment's end)"""
    record = blocks_ptr + index.to(tl.int64) * BLOCK_FIELDS
    segment, start = tl.load(record + SEGMENT).to(tl.int64), tl.load(record + SEGMENT_START)
    return segment, start, tl.load(record + BLOCK_START), tl.load(record + SEGMENT_END)


class LaunchRange(NamedTuple):
    """The factors that one launch works on: records first .. first + count of every segment."""

    first: int
    count: int
    max_rank: int
    max_width: int
    dropout: bool


@dataclass(frozen=True)
class LoraTables:
    """The tables that the kernels read for one group, on its device; see device_tables."""

    factor_table: Tensor  # [S, U, FACTOR_FIELDS] int64: U records per segment
    token_blocks: Tensor  # [n, BLOCK_FIELDS] int32: the blocks of BLOCK_T tokens of every segment
    segment_blocks: (
        Tensor  # [m, BLOCK_FIELDS] int32: the first block of every segment, which stands for the whole segment
    )
    a: list[LaunchRange]  # one factor for all projections; for segments with dropout, one factor per projection
    b: LaunchRange  # one factor per projection
    h_width: int  # the most rows of A that any segment has
    aligned: bool  # to 16 bytes: every row of every factor, and the columns that it meets
    aligned_h: bool  # to 16 bytes: all ranks are multiples of 8


@dataclass(frozen=True)
class LoraGroup:
    """The adapters of S segments on one group of M projections that share their input.

    params, grads: one flat float32 tensor per segment (grads: None where nothing is trained). All tokens of an adapter
    are one segment. offsets: the elements of these tensors at which A (the consecutive rows of all projections) and
    each B begin.
    """

    bounds: tuple[int, ...]  # S + 1: segment s is tokens bounds[s] .. bounds[s + 1]
    columns: tuple[tuple[int, int], ...]  # M ranges of the output
    params: Sequence[Tensor]
    grads: Sequence[Tensor | None]
    offsets: np.ndarray  # [S, 1 + M] int64
    ranks: np.ndarray  # [S, M] int64
    scales: np.ndarray  # [S, M] float64
    dropout: np.ndarray | None = None  # [S] probability that an input element is dropped
    seeds: np.ndarray | None = None  # [S, M] uint32: one random stream per segment and projection
    tables: LoraTables | None = None  # for the GPU: without them, each forward makes them
    views: Sequence["AdapterViews"] | None = None  # for the CPU: without them, each pass makes them
    overwrite: Sequence[bool] | None = None  # [S], for the CPU: gradients are written, whatever is there, not added to


class BatchTables(NamedTuple):
    """The tables of all G groups of a batch, and the two tensors that they are views of."""

    groups: list[LoraTables]
    factor_table: Tensor  # [G, S, U, FACTOR_FIELDS]
    token_blocks: Tensor  # [n, BLOCK_FIELDS]


class AdapterViews(NamedTuple):
    """Views of an adapter's factors on one group; the lists have one entry per adapted projection."""

    a: Tensor  # [R, I]: the rows of all projections
    da: Tensor | None
    ranks: list[int]
    projections: list[int]  # their numbers among the group's M
    b: list[Tensor]  # [r, width]
    db: list[Tensor | None]


NO_VIEWS = AdapterViews(torch.empty(0, 0), None, [], [], [], [])  # of an adapter that does not adapt the group


def adapter_views(
    params: Tensor, grads: Tensor | None, offsets: np.ndarray, ranks: np.ndarray, inputs: int, widths: Sequence[int]
) -> AdapterViews:
    """Views of one segment's adapter: offsets [1 + M], ranks [M] and widths (M) are LoraGroup's; inputs: I."""
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


def _addresses(tensor_lists: list[Sequence[Tensor | None]], device: torch.device) -> np.ndarray:
    """[G, S, 2] int64: address (0 for None) and size in elements. Kernels trust them, so they are checked here."""
    device = torch.empty(0, device=device).device  # "cuda" is the current one
    tables: list[np.ndarray] = []
    for i, tensors in enumerate(tensor_lists):
        if i > 0 and tensors is tensor_lists[i - 1]:  # the groups of a batch share one list of tensors
            tables.append(tables[-1])
            continue
        pairs = []
        for t in tensors:
            if t is None or not t.numel():  # an empty tensor stands for no adapter
                pairs.append((0, 0))
            elif t.device != device or t.dtype != torch.float32 or not t.is_contiguous():
                raise ValueError(f"lora: adapters must be contiguous float32 on {device}, not {t.dtype} on {t.device}")
            else:
                pairs.append((t.data_ptr(), t.numel()))
        tables.append(np.array(pairs, dtype=np.int64).reshape(-1, 2))
    return np.stack(tables)


class _Stack:
    """The arrays of G groups as one. Projections that a group lacks have rank 0."""

    def __init__(self, groups: Sequence[LoraGroup], inputs: Sequence[int], device: torch.device):
        G, S, M = len(groups), len(groups[0].bounds) - 1, max(len(group.columns) for group in groups)
        self.ranks = np.zeros((G, S, M), dtype=np.int64)
        self.offsets = np.zeros((G, S, 1 + M), dtype=np.int64)
        self.scales = np.zeros((G, S, M), dtype=np.float32)
        self.seeds = np.zeros((G, S, M), dtype=np.int64)
        self.dropout = np.zeros((G, S, 1))
        self.columns = np.zeros((G, 1, M, 2), dtype=np.int64)
        for i, group in enumerate(groups):
            m = len(group.columns)
            self.ranks[i, :, :m] = group.ranks
            self.offsets[i, :, : 1 + m] = group.offsets
            self.scales[i, :, :m] = group.scales
            self.columns[i, :, :m] = group.columns
            if group.dropout is not None and group.seeds is not None:
                self.dropout[i, :, 0] = group.dropout
                self.seeds[i, :, :m] = group.seeds
        self.params = _addresses([group.params for group in groups], device)
        self.grads = _addresses([group.grads for group in groups], device)
        self.inputs = np.array(inputs, dtype=np.int64).reshape(G, 1, 1)
        self.widths = self.columns[..., 1] - self.columns[..., 0]  # [G, 1, M]
        self.total_ranks = self.ranks.sum(2, keepdims=True)  # [G, S, 1]
        self.has_dropout = bool(self.dropout.any())

    def validate(self) -> None:
        """ValueError on probabilities out of range, and on factors that reach beyond their tensor."""
        if not ((self.dropout >= 0) & (self.dropout < 1)).all():
            raise ValueError("lora: the probability of dropout must be at least 0 and below 1")
        lengths = np.concatenate([self.total_ranks * self.inputs, self.ranks * self.widths], axis=2)
        used = np.concatenate([self.total_ranks, self.ranks], axis=2) > 0
        grad_sizes = np.where(self.grads[..., :1] == 0, self.params[..., 1:], self.grads[..., 1:])
        for sizes in (self.params[..., 1:], grad_sizes):
            if (used & ((self.offsets < 0) | (self.offsets + lengths > sizes))).any():
                raise ValueError("lora: an adapter's offsets reach beyond its tensor")

    def factor_records(self) -> np.ndarray:
        """[G, S, U, FACTOR_FIELDS]: A of all projections, each B and, if any segment has dropout, each A by itself.

        A segment without dropout has one record for all rows of A, whether or not other segments have dropout.
        """
        G, S, M = self.ranks.shape
        U = 1 + 2 * M if self.has_dropout else 1 + M
        records = np.zeros((G, S, U, FACTOR_FIELDS), dtype=np.int64)
        whole_a, b, split_a = records[:, :, :1], records[:, :, 1 : 1 + M], records[:, :, 1 + M :]
        first_ranks = self.ranks.cumsum(2) - self.ranks  # [G, S, M]: rank rows of the projections before each

        def write_addresses(factors: np.ndarray, offsets: np.ndarray) -> None:
            params, grads = self.params[..., :1], self.grads[..., :1]
            factors[..., ADDRESS] = params + 4 * offsets
            factors[..., GRAD_ADDRESS] = np.where(grads == 0, 0, grads + 4 * offsets)

        write_addresses(whole_a, self.offsets[..., :1])
        whole_a[..., RANK] = np.where(self.dropout > 0, 0, self.total_ranks)
        whole_a[..., WIDTH] = self.inputs
        whole_a[..., SCALE] = np.float32(1).view(np.int32)

        write_addresses(b, self.offsets[..., 1:])
        b[..., RANK] = self.ranks
        b[..., H_COLUMN] = first_ranks
        b[..., COLUMN] = self.columns[..., 0]
        b[..., WIDTH] = self.widths
        b[..., SCALE] = self.scales.view(np.int32)

        if self.has_dropout:
            write_addresses(split_a, self.offsets[..., :1] + first_ranks * self.inputs)
            split_a[..., RANK] = np.where(self.dropout > 0, self.ranks, 0)
            split_a[..., H_COLUMN] = first_ranks
            split_a[..., WIDTH] = self.inputs
            split_a[..., SCALE] = (np.float32(1) / (1 - self.dropout).astype(np.float32)).view(np.int32)
            split_a[..., DROPOUT_SEED] = self.seeds
            split_a[..., DROPOUT_LIMIT] = np.floor(self.dropout * (1 << 32))
        return records

    def aligned(self, records: np.ndarray) -> list[bool]:
        """For each group, whether all rows of its factors, and the columns that they meet, begin at 16 bytes."""
        # The bitwise OR of numbers is a multiple of 16 exactly if all of them are.
        addresses = np.bitwise_or.reduce(records[..., ADDRESS] | records[..., GRAD_ADDRESS], axis=(1, 2))
        columns = np.bitwise_or.reduce(self.columns, axis=(1, 2, 3))
        return ((addresses | columns | self.inputs[:, 0, 0]) % 16 == 0).tolist()


def block_records(bounds: Sequence[int]) -> np.ndarray:
    """[n, BLOCK_FIELDS] int32: the blocks of every segment that has tokens; bounds as LoraGroup has them."""
    starts, ends = np.array((bounds[:-1], bounds[1:]), dtype=np.int64)
    counts = ceil_div(ends - starts, BLOCK_T)
    segments = np.repeat(np.arange(len(starts)), counts)
    within = np.arange(len(segments)) - (counts.cumsum() - counts)[segments]  # number of a block in its segment
    blocks = np.zeros((len(segments), BLOCK_FIELDS), dtype=np.int32)
    blocks[:, SEGMENT], blocks[:, SEGMENT_START], blocks[:, SEGMENT_END] = segments, starts[segments], ends[segments]
    blocks[:, BLOCK_START] = starts[segments] + BLOCK_T * within
    return blocks


def device_tables(groups: Sequence[LoraGroup], inputs: Sequence[int], device: torch.device) -> BatchTables:
    """Tables for LoraGroup.tables of groups that share their segments, such as all groups of a batch.

    inputs: I of each group. The host's work is numpy over all groups at once; its result is one copy to the device.
    Raises ValueError on adapters that are not as LoraGroup says. At most 65535 blocks of tokens.
    """
    if any(group.bounds != groups[0].bounds for group in groups):
        raise ValueError("lora: groups must have the same bounds")
    stack = _Stack(groups, inputs, device)
    stack.validate()
    records, blocks = stack.factor_records(), block_records(groups[0].bounds)
    first_blocks = blocks[blocks[:, SEGMENT_START] == blocks[:, BLOCK_START]]
    factor_table, token_blocks, segment_blocks = to_device(device, records, blocks, first_blocks)
    aligned, aligned_h = stack.aligned(records), (stack.ranks % 8 == 0).all((1, 2)).tolist()
    h_widths, max_ranks = stack.total_ranks.max((1, 2), initial=0).tolist(), stack.ranks.max((1, 2), initial=0).tolist()
    tables = []
    for i, group in enumerate(groups):
        M = len(group.columns)
        a = [LaunchRange(0, 1, h_widths[i], inputs[i], dropout=False)]
        if stack.has_dropout:
            a.append(LaunchRange(1 + stack.ranks.shape[2], M, max_ranks[i], inputs[i], dropout=True))
        b = LaunchRange(1, M, max_ranks[i], int(stack.widths[i].max()), dropout=False)
        tables.append(
            LoraTables(factor_table[i], token_blocks, segment_blocks, a, b, h_widths[i], aligned[i], aligned_h[i])
        )
    return BatchTables(tables, factor_table, token_blocks)
