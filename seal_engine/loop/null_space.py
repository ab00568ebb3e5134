"""Adapters that leave alone what the base does with its own texts: A is drawn from the directions these hardly use.

An update of a projection adds scale x A^T B to its output. Where the rows of A are orthogonal to x the output stays as
it is, whatever B is. So A is drawn in the space of the inputs' eigenvectors of least energy and kept, and B alone is
trained (LoRA-FA, arXiv 2308.03303). The idea is that of gradient projection memory (arXiv 2103.09762), for edits of
language models that of AlphaEdit (arXiv 2410.02355).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from seal_engine.engine import Engine
from seal_engine.model.adapter_layout import GROUPS, ProjectionGroup, adapter_layout, module_name
from seal_engine.model.adapters import Adapter
from seal_engine.model.lora_batch import LoraBatch
from seal_engine.types import LoraConfig, PackedBatch, chunks

Covariances = dict[tuple[int, int], Tensor]  # (layer, group) -> [I, I] float32: mean of x^T x over tokens
PASS_TOKENS = 4096


@torch.no_grad()
def input_covariances(engine: Engine, sequences: Sequence[Sequence[int]], lora: LoraConfig) -> Covariances:
    """The mean outer product with themselves of the inputs of every group that `lora` adapts, over all tokens.

    A group of I inputs takes 4 I^2 bytes: with the wide inputs of a large model's down_proj, adapt some layers only.
    """
    adapted = {(int(i), int(g)) for i, g in np.argwhere(adapter_layout(engine.config, lora).ranks.any(2))}
    sums: Covariances = {}

    def observe(layer: int, group: ProjectionGroup, x: Tensor) -> None:
        if (layer, group) not in adapted:
            return
        x = x.float()
        sums[layer, group] = sums.get((layer, group), torch.zeros((), device=x.device)) + x.T @ x

    model = engine.model
    for chunk in chunks([len(s) for s in sequences], PASS_TOKENS):
        batch = PackedBatch.pack([sequences[i] for i in chunk], model.device)
        model.hidden_states(batch, LoraBatch.observing(observe, model.device))
    tokens = sum(map(len, sequences))
    return {key: total / tokens for key, total in sums.items()}


def least_used(covariance: Tensor, energy: float) -> Tensor:
    """[I, n] orthonormal: the eigenvectors that are left when the largest hold `energy` of the trace; at least one."""
    values, vectors = torch.linalg.eigh(covariance.double())
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    shares = values.cumsum(0) / values.sum()
    used = min(int((shares < energy).sum()) + 1, len(values) - 1)
    return vectors[:, used:].float()


def null_space_adapter(
    engine: Engine, lora: LoraConfig, covariances: Sequence[tuple[Mapping, float]], energy: float, seed: int
) -> Adapter:
    """An adapter with B zero and rows of A drawn in the space that the weighted sum of covariances leaves over.

    Rows of A are as long as PEFT's initialisation makes them on average.
    """
    adapter = engine.create_adapter(lora, seed)
    generator = torch.Generator().manual_seed(seed)
    places = {module_name(i, g, m): (i, g) for i, g, m in _projections(engine)}
    spaces: dict[tuple[int, int], Tensor] = {}
    for name, a, _ in adapter.projections():
        key = places[name]
        if key not in spaces:
            total = torch.stack([weight * of[key] for of, weight in covariances]).sum(0)
            spaces[key] = least_used(total.cpu(), energy)
        drawn = torch.randn(len(a), spaces[key].shape[1], generator=generator) @ spaces[key].T
        a.copy_(drawn / drawn.norm(dim=1, keepdim=True) * 3**-0.5)
    return adapter


def _projections(engine: Engine) -> list[tuple[int, int, int]]:
    layers = range(engine.config.num_hidden_layers)
    return [(i, g, m) for i in layers for g in ProjectionGroup for m in range(len(GROUPS[g]))]
