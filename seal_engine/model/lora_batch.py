"""Which tokens of a packed batch belong to which adapter, as the LoRA kernels take it."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from seal_engine.model.adapter_layout import GROUPS, AdapterLayout, projection_sizes
from seal_engine.model.adapters import Adapter
from seal_kernels.dispatch import use_triton
from seal_kernels.lora_tables import NO_VIEWS, BatchTables, LoraGroup, device_tables


@dataclass(frozen=True)
class LoraBatch:
    """Which tokens of a packed batch belong to which adapter, as `lora_linear` takes it."""

    groups: dict[tuple[int, int], LoraGroup]  # (layer, group of projections): left out where nothing is adapted
    anchor: Tensor
    tables: BatchTables | None = None  # of all groups, in their order; on a GPU

    @staticmethod
    def make(
        adapters: Sequence[Adapter | None],
        tokens: Sequence[int],
        train: bool = False,
        dropout_keys: Sequence[tuple[int, int]] | None = None,
    ) -> "LoraBatch | None":
        """adapters, tokens: of consecutive segments, each adapter in one at most; None for tokens of the base alone.

        train: backward adds to the adapters' gradients, and dropout is drawn from dropout_keys (two integers a
        segment, such as a job's seed and its number of passes so far). None if no segment has an adapter.
        """
        named = [adapter for adapter in adapters if adapter is not None]
        if not named:
            return None
        if len({adapter.uid for adapter in named}) != len(named):
            raise ValueError("an adapter's tokens must be one segment")
        device = named[0].params.device
        sizes = projection_sizes(named[0].model_config)
        stacked = [_no_layout(named[0].layout) if adapter is None else adapter.layout for adapter in adapters]
        offsets = np.stack([layout.offsets for layout in stacked], 2)  # [L, 4, S, 1 + 3]
        ranks = np.stack([layout.ranks for layout in stacked], 2)  # [L, 4, S, 3]
        scales = np.stack([layout.scales for layout in stacked], 2)
        dropout, seeds = None, None
        probabilities = [0.0 if adapter is None else adapter.config.lora_dropout for adapter in adapters]
        if train and any(probabilities) and dropout_keys is not None:
            dropout = np.array(probabilities)
            streams = [np.random.Generator(np.random.Philox(key=key)) for key in dropout_keys]
            draws = [stream.integers(0, 2**32, ranks[:, :, 0].shape, dtype=np.uint32) for stream in streams]
            seeds = np.stack(draws, 2)  # [L, 4, S, 3]
        params = [torch.empty(0, device=device) if adapter is None else adapter.params for adapter in adapters]
        grads = [adapter.grads if adapter is not None and train else None for adapter in adapters]
        bounds = (0, *itertools.accumulate(tokens))
        groups = {}
        for layer, group in np.argwhere(ranks.any((2, 3))).tolist():
            M = len(GROUPS[group])
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
        tables = None
        if not use_triton(named[0].params):
            views = [{} if adapter is None else adapter.views(train) for adapter in adapters]
            groups = {key: replace(g, views=[own.get(key, NO_VIEWS) for own in views]) for key, g in groups.items()}
        else:
            tables = device_tables(list(groups.values()), [sizes[group][0] for _, group in groups], device)
            groups = {key: replace(g, tables=t) for (key, g), t in zip(groups.items(), tables.groups, strict=True)}
        return LoraBatch(groups, torch.zeros(1, device=device, requires_grad=train), tables)


def _no_layout(like: AdapterLayout) -> AdapterLayout:
    """The layout of no adapter: rank 0 everywhere."""
    ranks = np.zeros_like(like.ranks)
    return AdapterLayout(0, np.zeros_like(like.offsets), ranks, np.zeros_like(like.scales), 0)
