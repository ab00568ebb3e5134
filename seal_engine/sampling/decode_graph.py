"""The decode step as CUDA graphs (model/graphs.py): sequences are padded to a power of two, their contexts to a power
of four of blocks. A padded sequence has no query, no slot and no adapter, so it neither reads nor writes another's K/V.
"""

from collections.abc import Sequence

from torch import Tensor

from seal_engine.model.graphs import Graphs, Segments, power_of_two
from seal_engine.model.lora_batch import LoraBatch
from seal_engine.model.transformer import Model
from seal_engine.types import PagedArrays, paged_batch


class DecodeGraphs:
    """Runs decode steps (one new token per sequence) of a model, on a GPU or, in tests, in Triton's interpreter."""

    def __init__(self, model: Model):
        self.model = model
        self._graphs = Graphs(model.device)

    def hidden_states(
        self,
        arrays: PagedArrays,
        keys: Tensor,
        values: Tensor,
        lora: LoraBatch | None,
        tokens: Sequence[int],
        token_ids: Tensor | None = None,
    ) -> Tensor:
        """Return Model.hidden_states of a step with one new token per sequence: [T, D], overwritten by the next call.

        lora: of the step's adapters, and maybe of others. tokens: how many of the step's tokens each of its segments
        has. token_ids: [T] on the device, in place of those of arrays.
        """
        T, M = arrays.block_tables.shape
        S, width = power_of_two(T), 4
        while width < M:
            width *= 4

        def compute(tensors: list[Tensor], lora: LoraBatch | None) -> Tensor:
            batch = paged_batch(tensors, 1, width * keys.shape[2], keys, values)
            return self.model.hidden_states(batch, lora)

        segments = None if lora is None else Segments(lora, tokens, num_segments=S, num_blocks=S)
        return self._graphs.run((keys.data_ptr(),), arrays.padded(S, width), segments, compute, token_ids)[:T]
