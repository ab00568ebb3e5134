"""The decode step as CUDA graphs: one launch for a whole pass of the model, where the host would need hundreds.

A graph replays what was launched once, at the same addresses and grids. So a step's arrays are padded, sequences to a
power of two, contexts to a power of four of blocks, and written into static tensors in one copy. A padded sequence has
no query, no slot and no adapter, so it neither reads nor writes another's K/V. There is a graph for each such size and
for each kind of adapters, as far as the kind decides a launch: its groups, its largest number of rank rows, its
alignment. A size is captured when it occurs for the second time.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from seal_engine.model.lora_batch import LoraBatch
from seal_engine.model.transformer import Model
from seal_engine.types import PagedArrays, PagedBatch, paged_batch
from seal_kernels.dispatch import INTERPRET
from seal_kernels.lora_tables import BLOCK_FIELDS, BatchTables, block_records
from seal_kernels.transfer import pack, views

MAX_GRAPHS = 64  # kept at once; the least recently used is dropped first, because each holds its activations' memory


@dataclass
class _Graph:
    """One size of decode step. Its arrays are written to `buffer`, which batch and lora consist of views of."""

    buffer: Tensor
    batch: PagedBatch
    lora: LoraBatch | None
    copied_table: Tensor | None = None  # the factor table that lora's was copied from
    replay: Callable[[], Tensor] | None = None  # once captured; returns the hidden states [S, D]


class DecodeGraphs:
    """Runs decode steps (one new token per sequence) of a model, on a GPU or, in tests, in Triton's interpreter."""

    def __init__(self, model: Model):
        self.model = model
        self._graphs: OrderedDict[tuple, _Graph] = OrderedDict()
        self._pool = None if INTERPRET else torch.cuda.graph_pool_handle()

    def hidden_states(
        self, arrays: PagedArrays, keys: Tensor, values: Tensor, lora: LoraBatch | None, tokens: Sequence[int]
    ) -> Tensor:
        """Return Model.hidden_states of a step with one new token per sequence: [T, D], overwritten by the next call.

        lora: of the step's adapters, and maybe of others. tokens: how many of the step's tokens each of its segments
        has.
        """
        T, M = arrays.block_tables.shape
        S, width = padded_sequences(T), 4
        while width < M:
            width *= 4
        written = [*arrays.padded(S, width)]
        if lora is not None:
            written.append(_padded_blocks(tokens, S))
        key = S, width, keys.data_ptr(), _kind(lora)
        first_time = key not in self._graphs
        if first_time:
            if len(self._graphs) == MAX_GRAPHS:
                self._graphs.popitem(last=False)
            self._graphs[key] = self._make(written, keys, values, lora)
        self._graphs.move_to_end(key)
        graph = self._graphs[key]
        graph.buffer.copy_(pack(written, pin_memory=graph.buffer.device.type == "cuda")[0], non_blocking=True)
        if lora is not None and graph.lora is not None and lora.tables is not None and graph.lora.tables is not None:
            factor_table = lora.tables.factor_table
            if factor_table is not graph.copied_table:
                graph.lora.tables.factor_table[:, : factor_table.shape[1]].copy_(factor_table)
                graph.copied_table = factor_table
        if first_time or self._pool is None:  # compiles the kernels, which a capture must not do
            return self.model.hidden_states(graph.batch, graph.lora)[:T]
        if graph.replay is None:
            graph.replay = self._capture(graph)
        return graph.replay()[:T]

    def _make(self, written: Sequence[np.ndarray], keys: Tensor, values: Tensor, lora: LoraBatch | None) -> _Graph:
        packed, starts = pack(written, pin_memory=False)
        buffer = torch.empty_like(packed, device=keys.device)
        tensors = views(buffer, written, starts)
        S, width = written[4].shape
        batch = paged_batch(tensors[:6], 1, width * keys.shape[2], keys, values)
        if lora is None or lora.tables is None:
            return _Graph(buffer, batch, None)
        blocks, records = tensors[6], lora.tables.factor_table
        records = records.new_zeros(len(records), S, *records.shape[2:])
        tables = [
            replace(t, factor_table=r, token_blocks=blocks, segment_blocks=blocks)
            for t, r in zip(lora.tables.groups, records, strict=True)
        ]
        groups = zip(lora.groups.items(), tables, strict=True)
        groups = {key: replace(group, bounds=(0, S), params=[], grads=[], tables=t) for (key, group), t in groups}
        return _Graph(buffer, batch, replace(lora, groups=groups, tables=BatchTables(tables, records, blocks)))

    def _capture(self, graph: _Graph) -> Callable[[], Tensor]:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured, pool=self._pool):
            hidden = self.model.hidden_states(graph.batch, graph.lora)

        def replay() -> Tensor:
            captured.replay()
            return hidden

        return replay


def padded_sequences(S: int) -> int:
    """The number of sequences that S are padded to: a power of two."""
    return 1 << (S - 1).bit_length()


def _padded_blocks(tokens: Sequence[int], S: int) -> np.ndarray:
    """[S, BLOCK_FIELDS]: the blocks of tokens of each segment, then empty ones: token 0 to token 0 of segment 0."""
    blocks = block_records([0, *accumulate(tokens)])
    return np.concatenate([blocks, np.zeros((S - len(blocks), int(BLOCK_FIELDS)), blocks.dtype)])


def _kind(lora: LoraBatch | None) -> tuple:
    """Everything about a step's adapters that is fixed in a captured launch."""
    if lora is None:
        return ()
    tables = ((key, group.columns, group.tables) for key, group in lora.groups.items())
    return tuple((key, columns, t.h_width, *t.a, t.b, t.aligned, t.aligned_h) for key, columns, t in tables if t)
