"""CUDA graphs of passes of the model: one launch for a whole pass, where the host would need hundreds.

A graph replays what was launched once, at the same addresses and grids. So a pass's arrays are padded to sizes that
recur and written into static tensors in one copy; what is padded belongs to no sequence and no adapter. There is a
graph for each size, and for each kind of adapters, as far as the kind decides a launch: its groups, its largest number
of rank rows, its alignment. A size is captured when it occurs for the second time.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from seal_engine.model.lora_batch import LoraBatch
from seal_kernels.dispatch import INTERPRET
from seal_kernels.lora_tables import BLOCK_START, SEGMENT_START, BatchTables, block_records
from seal_kernels.transfer import pack, views

MAX_GRAPHS = 64  # kept at once; the least recently used is dropped first, because each holds its results' memory

# What a pass computes from its arrays as tensors, and from its adapters.
Compute = Callable[[list[Tensor], LoraBatch | None], Tensor]


@dataclass(frozen=True)
class Segments:
    """The adapters of a pass, and the sizes to which their tables are padded."""

    lora: LoraBatch  # may have more segments than this pass has
    tokens: Sequence[int]  # of each of the pass's segments
    num_segments: int  # at least those of the pass
    num_blocks: int  # at least the blocks of BLOCK_T tokens of all segments together


@dataclass
class _Graph:
    """One size of a pass. Its arrays are written to `buffer`, which tensors and lora consist of views of."""

    buffer: Tensor
    tensors: list[Tensor]
    lora: LoraBatch | None
    copied_table: Tensor | None = None  # the factor table that lora's was copied from
    replay: Callable[[], Tensor] | None = None  # once captured; returns what the pass computed


class Graphs:
    """Runs passes on a GPU or, in tests and without graphs, in Triton's interpreter."""

    def __init__(self, device: torch.device):
        self.device = device
        self._graphs: OrderedDict[tuple, _Graph] = OrderedDict()
        self._pool = None if INTERPRET else torch.cuda.graph_pool_handle()

    def __len__(self) -> int:
        """How many sizes there are."""
        return len(self._graphs)

    def run(
        self,
        key: tuple,
        arrays: Sequence[np.ndarray],
        segments: Segments | None,
        compute: Compute,
        token_ids: Tensor | None = None,
    ) -> Tensor:
        """What compute returns, a tensor that the next call with this key overwrites.

        arrays: padded; compute gets them as tensors. key: everything that compute's launches depend on, beside the
        shapes of arrays and the adapters. token_ids: on the device, over the first numbers of the first array; a token
        that is -1, as none could be drawn, is computed as 0.
        """
        written = [*arrays]
        if segments is not None:
            written += _padded_blocks(segments)
        key = *key, *(array.shape for array in written), _kind(segments)
        first_time = key not in self._graphs
        if first_time:
            if len(self._graphs) == MAX_GRAPHS:
                self._graphs.popitem(last=False)
            self._graphs[key] = self._make(written, segments)
        self._graphs.move_to_end(key)
        graph = self._graphs[key]
        graph.buffer.copy_(pack(written, pin_memory=self.device.type == "cuda")[0], non_blocking=True)
        if token_ids is not None:
            torch.clamp(token_ids, min=0, out=graph.tensors[0][: len(token_ids)])
        if segments is not None:
            _copy_factors(segments.lora, graph)
        if first_time or self._pool is None:  # compiles the kernels, which a capture must not do
            return compute(graph.tensors, graph.lora)
        if graph.replay is None:
            graph.replay = self._capture(graph, compute)
        return graph.replay()

    def _make(self, written: Sequence[np.ndarray], segments: Segments | None) -> _Graph:
        packed, starts = pack(written, pin_memory=False)
        buffer = torch.empty_like(packed, device=self.device)
        tensors = views(buffer, written, starts)
        if segments is None:
            return _Graph(buffer, tensors, None)
        *tensors, token_blocks, segment_blocks = tensors
        lora, tables = segments.lora, segments.lora.tables
        assert tables is not None, "adapters on a GPU have tables"
        records = tables.factor_table
        records = records.new_zeros(len(records), segments.num_segments, *records.shape[2:])
        own = [
            replace(t, factor_table=r, token_blocks=token_blocks, segment_blocks=segment_blocks)
            for t, r in zip(tables.groups, records, strict=True)
        ]
        bounds = (0, len(tensors[0]))
        groups = {
            key: replace(group, bounds=bounds, params=[], grads=[], tables=t)
            for (key, group), t in zip(lora.groups.items(), own, strict=True)
        }
        return _Graph(buffer, tensors, replace(lora, groups=groups, tables=BatchTables(own, records, token_blocks)))

    def _capture(self, graph: _Graph, compute: Compute) -> Callable[[], Tensor]:
        """`torch.cuda.graph` would first give all cached memory back to the device, which then allocates it anew."""
        captured, stream, current = torch.cuda.CUDAGraph(), _capture_stream(self.device), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            captured.capture_begin(pool=self._pool)
            try:
                result = compute(graph.tensors, graph.lora)
            finally:
                captured.capture_end()
        current.wait_stream(stream)

        def replay() -> Tensor:
            captured.replay()
            return result

        return replay


@lru_cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: the vendor's products keep a workspace for each stream that they are launched on."""
    return torch.cuda.Stream(device)


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least size."""
    return 1 << (size - 1).bit_length()


def _padded_blocks(segments: Segments) -> list[np.ndarray]:
    """Blocks of tokens, and the first of each segment, then empty ones: token 0 to token 0 of segment 0."""
    blocks = block_records([0, *accumulate(segments.tokens)])
    first = blocks[blocks[:, SEGMENT_START] == blocks[:, BLOCK_START]]
    sizes = segments.num_blocks, segments.num_segments
    return [np.pad(own, ((0, size - len(own)), (0, 0))) for own, size in zip((blocks, first), sizes, strict=True)]


def _copy_factors(lora: LoraBatch, graph: _Graph) -> None:
    """Write the addresses of the pass's adapters where the graph reads them, unless they are there."""
    if lora.tables is None or graph.lora is None or graph.lora.tables is None:
        return
    factor_table = lora.tables.factor_table
    if factor_table is not graph.copied_table:
        graph.lora.tables.factor_table[:, : factor_table.shape[1]].copy_(factor_table)
        graph.copied_table = factor_table


def _kind(segments: Segments | None) -> tuple:
    """Everything about a pass's adapters that is fixed in a captured launch."""
    if segments is None:
        return ()
    tables = ((key, group.columns, group.tables) for key, group in segments.lora.groups.items())
    return tuple((key, columns, t.h_width, *t.a, t.b, t.aligned, t.aligned_h) for key, columns, t in tables if t)
