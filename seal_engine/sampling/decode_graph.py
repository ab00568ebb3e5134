"""The decode step as CUDA graphs: one launch for a whole pass of the model, where the host would need hundreds.

A graph replays what was launched once, at the same addresses and grids. So a step's sequences, one row each, and the
tables that assign adapters to rows are copied into static tensors, padded: rows to a power of two, contexts to a power
of four of blocks. A padded row has no query, no slot and no adapter, so it neither reads nor writes another row's K/V.
There is a graph for each such size and for each kind of adapters, as far as the kind decides a launch: its groups, its
largest number of rank rows, its alignment.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from seal_engine.model.lora_batch import LoraBatch
from seal_engine.model.transformer import Model
from seal_engine.types import PagedBatch
from seal_kernels.dispatch import INTERPRET
from seal_kernels.lora_tables import BatchTables

MAX_GRAPHS = 64  # kept at once; the least recently used is dropped first, because each holds its activations' memory


@dataclass(frozen=True)
class _Graph:
    batch: PagedBatch  # of static tensors
    lora: LoraBatch | None  # with static tables
    replay: Callable[[], Tensor]  # returns the hidden states [rows, D] of what the tensors hold


class DecodeGraphs:
    """Runs decode steps (one new token per sequence) of a model, on a GPU or, in tests, in Triton's interpreter."""

    def __init__(self, model: Model):
        self.model = model
        self._graphs: OrderedDict[tuple, _Graph] = OrderedDict()
        self._pool = None if INTERPRET else torch.cuda.graph_pool_handle()

    def hidden_states(self, batch: PagedBatch, lora: LoraBatch | None) -> Tensor:
        """Return Model.hidden_states of a batch with max_query 1: [T, D], overwritten by the next call."""
        T = len(batch.token_ids)
        rows, width = 1 << (T - 1).bit_length(), 4
        while width < batch.block_tables.shape[1]:
            width *= 4
        key = rows, width, batch.keys.data_ptr(), _kind(lora)
        if key not in self._graphs:
            if len(self._graphs) == MAX_GRAPHS:
                self._graphs.popitem(last=False)
            self._graphs[key] = self._make(rows, width, batch, lora)
        self._graphs.move_to_end(key)
        graph = self._graphs[key]
        _fill(graph, batch, lora)
        return graph.replay()[:T]

    def _make(self, rows: int, width: int, batch: PagedBatch, lora: LoraBatch | None) -> _Graph:
        def empty(like: Tensor, *shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=like.dtype, device=like.device)

        static = replace(
            batch,
            token_ids=empty(batch.token_ids, rows),
            positions=empty(batch.positions, rows),
            cu_seqlens=empty(batch.cu_seqlens, rows + 1),
            context_lens=empty(batch.context_lens, rows),
            block_tables=empty(batch.block_tables, rows, width),
            slot_mapping=empty(batch.slot_mapping, rows),
            max_query=1,
            max_context=width * batch.keys.shape[2],
        )
        static_lora = None
        if lora is not None and lora.tables is not None:
            tables, records, blocks = lora.tables
            records, blocks = empty(records, len(records), rows, *records.shape[2:]), empty(blocks, rows, 4)
            tables = [
                replace(t, factor_table=r, token_blocks=blocks, segment_blocks=blocks)
                for t, r in zip(tables, records, strict=True)
            ]
            groups = zip(lora.groups.items(), tables, strict=True)
            groups = {key: replace(group, bounds=(0, rows), tables=t) for (key, group), t in groups}
            static_lora = replace(lora, groups=groups, tables=BatchTables(tables, records, blocks))

        def run() -> Tensor:
            return self.model.hidden_states(static, static_lora)

        graph = _Graph(static, static_lora, run)
        if self._pool is None:
            return graph
        _fill(graph, batch, lora)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()  # compiles kernels and makes the library's workspaces, neither of which a capture may do
        torch.cuda.current_stream().wait_stream(stream)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured, pool=self._pool):
            out = run()

        def replay() -> Tensor:
            captured.replay()
            return out

        return replace(graph, replay=replay)


def _kind(lora: LoraBatch | None) -> tuple:
    """Everything about a step's adapters that is fixed in a captured launch."""
    if lora is None:
        return ()
    tables = ((key, group.columns, group.tables) for key, group in lora.groups.items())
    return tuple((key, columns, t.h_width, *t.a, t.b, t.aligned, t.aligned_h) for key, columns, t in tables if t)


def _fill(graph: _Graph, batch: PagedBatch, lora: LoraBatch | None) -> None:
    """Copy a step into the static tensors, and make the rows behind it empty."""
    T, static = len(batch.token_ids), graph.batch
    for name, padding in (("token_ids", 0), ("positions", 0), ("context_lens", 0), ("slot_mapping", -1)):
        target, source = getattr(static, name), getattr(batch, name)
        target[:T].copy_(source, non_blocking=True)
        target[T:].fill_(padding)
    static.cu_seqlens[: T + 1].copy_(batch.cu_seqlens)
    static.cu_seqlens[T + 1 :].fill_(T)
    static.block_tables[:T, : batch.block_tables.shape[1]].copy_(batch.block_tables)
    if lora is not None and lora.tables is not None and graph.lora is not None and graph.lora.tables is not None:
        (_, records, blocks), (_, static_records, static_blocks) = lora.tables, graph.lora.tables
        static_records[:, : records.shape[1]].copy_(records)
        static_blocks[: len(blocks)].copy_(blocks)
        static_blocks[len(blocks) :].zero_()  # an empty range: token 0 to token 0 of segment 0
