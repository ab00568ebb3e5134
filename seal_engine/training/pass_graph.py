"""A training pass as CUDA graphs (model/graphs.py): forward, log-probabilities and backward in one launch.

For passes of so few tokens that the host, which launches each kernel, takes longer than the device. Padded tokens
belong to no sequence and no adapter, and padded targets have no gradient.
"""

from collections.abc import Sequence
from itertools import chain
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from seal_engine.model.graphs import Graphs, Segments, power_of_two
from seal_engine.model.lora_batch import LoraBatch
from seal_engine.model.transformer import Model
from seal_engine.training.losses import job_losses, loss_gradient
from seal_engine.training.verbs import AdapterBatch
from seal_engine.types import PackedBatch, packed_arrays
from seal_kernels.dispatch import ceil_div
from seal_kernels.lora_tables import BLOCK_T

MIN_TOKENS = 64  # that a pass or a sequence is padded to


class PassGraphs:
    """Runs training passes of a model with one target a token. They belong to the model: trainers come and go."""

    def __init__(self, device: torch.device):
        self._graphs = Graphs(device)

    @staticmethod
    def of(model: Model) -> "PassGraphs":
        """The model's, made when it is first asked for."""
        if model not in _graphs_of_models:
            _graphs_of_models[model] = PassGraphs(model.device)
        return _graphs_of_models[model]

    def backward(self, model: Model, batches: Sequence[AdapterBatch], weights: Sequence[float]) -> Tensor:
        """Add the gradients of the jobs' losses to their adapters; returns these losses. weights: see `job_losses`."""
        sequences = list(chain.from_iterable(part.sequences for part in batches))
        targets = chain.from_iterable(chain.from_iterable(part.targets for part in batches))
        counts = [sum(map(sum, part.targets)) for part in batches]
        tokens = [sum(map(len, part.sequences)) for part in batches]
        T, n, S, J = padded_tokens(sum(tokens)), sum(counts), power_of_two(len(sequences)), power_of_two(len(batches))
        N = T if n > T // 2 else min(T, power_of_two(max(1, n)))
        longest = max(MIN_TOKENS, power_of_two(max(map(len, sequences))))
        token_ids, positions, cu_seqlens = packed_arrays(sequences)
        is_target = np.fromiter(targets, np.bool_, len(token_ids))
        arrays = [
            np.pad(token_ids, (0, T - len(token_ids))),
            np.pad(positions, (0, T - len(token_ids))),
            np.pad(cu_seqlens, (0, S - len(sequences)), mode="edge"),
            np.pad(is_target.nonzero()[0] - 1, (0, N - n)),
            np.pad(token_ids[is_target], (0, N - n)),
            np.pad(loss_gradient(counts, weights), (0, N - n)),
        ]
        keys = [part.dropout_key for part in batches]
        lora = LoraBatch.make([part.adapter for part in batches], tokens, train=True, dropout_keys=keys)

        def compute(tensors: list[Tensor], lora: LoraBatch | None) -> Tensor:
            token_ids, positions, cu_seqlens, rows, target_ids, gradient = tensors
            batch = PackedBatch(token_ids, positions, cu_seqlens, (longest,) * S)
            hidden = model.hidden_states(batch, lora).index_select(0, rows)
            logprobs = model.token_logprobs(hidden, target_ids)
            logprobs.backward(gradient)
            return logprobs.detach()

        segments = None if lora is None else Segments(lora, tokens, num_segments=J, num_blocks=J + T // BLOCK_T)
        return job_losses(self._graphs.run((longest,), arrays, segments, compute)[:n], counts, weights)[0]


_graphs_of_models: WeakKeyDictionary[Model, PassGraphs] = WeakKeyDictionary()


def padded_tokens(count: int) -> int:
    """The number of tokens that so many are padded to: at most an eighth more, of eight sizes between powers of two."""
    unit = max(MIN_TOKENS // 4, power_of_two(count + 1) // 16)
    return ceil_div(count, unit) * unit
