"""Which tokens of a packed batch belong to which adapter, as the LoRA kernels take it."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from seal_engine.model.adapter_layout import GROUPS, AdapterLayout, ProjectionGroup, projection_sizes
from seal_engine.model.adapters import Adapter
from seal_kernels.dispatch import use_triton
from seal_kernels.lora_tables import NO_VIEWS, BatchTables, LoraGroup, device_tables


@dataclass(frozen=True)
class LoraBatch:
    """Which tokens of a packed batch belong to which adapter, as `lora_linear` takes it."""

    groups: dict[tuple[int, ProjectionGroup], LoraGroup]  # by layer and group; only groups that some adapter adapts
    anchor: Tensor
    tables: BatchTables | None = None  # of all groups, in their order; on a GPU
    # Called with (layer, group, inputs [T, I]) of every product, in the order in which they are computed.
    observe: Callable[[int, ProjectionGroup, Tensor], None] | None = None

    @staticmethod
    def observing(observe: Callable[[int, ProjectionGroup, Tensor], None], device: torch.device) -> "LoraBatch":
        """No adapter on any token; `observe` sees what each group of projections multiplies."""
        return LoraBatch({}, torch.zeros(1, device=device), observe=observe)

    @staticmethod
    def make(
        adapters: Sequence[Adapter | None],
        tokens: Sequence[int],
        train: bool = False,
        dropout_keys: Sequence[tuple[int, int]] | None = None,
        overwrite: Sequence[bool] | None = None,
    ) -> "LoraBatch | None":
        """adapters, tokens: of consecutive segments; None for tokens of the base. An adapter has one segment at most.

        train: backward adds to the adapters' gradients, and dropout is drawn from dropout_keys (two integers per
        segment, such as a job's seed and its number of passes so far). overwrite: the segments whose gradients begin
        with this pass: a CPU writes them without reading them. None if no segment has an adapter.
        """
        present = [adapter for adapter in adapters if adapter is not None]
        if not present:
            return None
        if len({adapter.uid for adapter in present}) != len(present):
            raise ValueError("an adapter's tokens must be one segment")
        groups = _groups(adapters, present[0], tokens, train, dropout_keys if train else None)
        tables, device = None, present[0].params.device
        if use_triton(present[0].params):
            sizes = projection_sizes(present[0].model_config)
            tables = device_tables(list(groups.values()), [sizes[group][0] for _, group in groups], device)
            for key, group_tables in zip(groups, tables.groups, strict=True):
                groups[key] = replace(groups[key], tables=group_tables)
        else:
            views = [{} if adapter is None else adapter.views(train) for adapter in adapters]
            for key in groups:
                of_group = [of_adapter.get(key, NO_VIEWS) for of_adapter in views]
                groups[key] = replace(groups[key], views=of_group, overwrite=overwrite)
        return LoraBatch(groups, torch.zeros(1, device=device, requires_grad=train), tables)


def _groups(
    adapters: Sequence[Adapter | None],
    example: Adapter,
    tokens: Sequence[int],
    train: bool,
    dropout_keys: Sequence[tuple[int, int]] | None,
) -> dict[tuple[int, ProjectionGroup], LoraGroup]:
    """The groups of all layers that some adapter adapts, with the same lists of tensors. example: one of adapters."""
    device, sizes = example.params.device, projection_sizes(example.model_config)
    layouts = [_no_layout(example.layout) if adapter is None else adapter.layout for adapter in adapters]
    offsets = np.stack([layout.offsets for layout in layouts], 2)  # [L, 4, S, 1 + 3]
    ranks = np.stack([layout.ranks for layout in layouts], 2)  # [L, 4, S, 3]
    scales = np.stack([layout.scales for layout in layouts], 2)  # [L, 4, S, 3]
    dropout, seeds = _dropout(adapters, dropout_keys, ranks)
    params = [torch.empty(0, device=device) if adapter is None else adapter.params for adapter in adapters]
    grads = [adapter.grads if adapter is not None and train else None for adapter in adapters]
    bounds = (0, *itertools.accumulate(tokens))
    groups = {}
    for layer, number in np.argwhere(ranks.any((2, 3))).tolist():
        group, M = ProjectionGroup(number), len(GROUPS[number])
        ends = itertools.accumulate(sizes[group][1], initial=0)
        groups[layer, group] = LoraGroup(
            bounds=bounds,
            columns=tuple(itertools.pairwise(ends)),
            params=params,
            grads=grads,
            offsets=offsets[layer, group, :, : 1 + M],
            ranks=ranks[layer, group, :, :M],
            scales=scales[layer, group, :, :M],
            dropout=dropout,
            seeds=None if seeds is None else seeds[layer, group, :, :M],
        )
    return groups


def _dropout(
    adapters: Sequence[Adapter | None], keys: Sequence[tuple[int, int]] | None, ranks: np.ndarray
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(probabilities [S], seeds [L, 4, S, 3]), a segment's seeds drawn from its key; None without dropout."""
    probabilities = [0.0 if adapter is None else adapter.config.lora_dropout for adapter in adapters]
    if keys is None or not any(probabilities):
        return None, None
    streams = [np.random.Generator(np.random.Philox(key=key)) for key in keys]
    draws = [stream.integers(0, 2**32, ranks[:, :, 0].shape, dtype=np.uint32) for stream in streams]
    return np.array(probabilities), np.stack(draws, 2)


def _no_layout(like: AdapterLayout) -> AdapterLayout:
    """The layout of no adapter: rank 0 everywhere."""
    ranks = np.zeros_like(like.ranks)
    return AdapterLayout(0, np.zeros_like(like.offsets), ranks, np.zeros_like(like.scales), 0)
