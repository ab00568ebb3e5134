"""Several adapters as one: their factors side by side, so that the update is the sum of theirs.

    sum_i scale_i A_i^T B_i = scale [A_1; A_2; ...]^T [B_1 scale_1 / scale; B_2 scale_2 / scale; ...]

The ranks add up. Nothing is rounded where the scales are equal: what was merged into a base, as weights, can so be kept
beside a base that stays as it is, and be trained on top of.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from seal_engine.model.adapters import Adapter
from seal_engine.types import LoraConfig, require


def stack_adapters(parts: Sequence[tuple[Adapter, float]]) -> Adapter:
    """One adapter whose update is the sum of the parts' updates, each times its factor.

    All parts must be of one model and adapt the same modules, each with one rank and alpha for all (InputError).
    """
    _validate_parts(parts)
    first = parts[0][0]
    rank, scale = sum(adapter.config.r for adapter, _ in parts), _scale(first.config)
    config = replace(first.config, r=rank, lora_alpha=scale * rank, use_rslora=False)
    stacked = Adapter(first.model_config, config, first.params.device)
    factors = [factor * _scale(adapter.config) / scale for adapter, factor in parts]
    projections = zip(stacked.projections(), *(adapter.projections() for adapter, _ in parts), strict=True)
    for (_, a, b), *own in projections:
        torch.cat([part for _, part, _ in own], out=a)
        torch.cat([part * factor for (_, _, part), factor in zip(own, factors, strict=True)], out=b)
    return stacked


def compact(adapter: Adapter) -> Adapter:
    """The same update in as few rank rows as hold any update: those of the smaller side of the largest projection.

    One factor becomes the identity, the other the update itself, so nothing is lost but float32 rounding. An adapter
    that has no more rows than that is returned as it is.
    """
    rank = max(min(a.shape[1], b.shape[1]) for _, a, b in adapter.projections())
    if adapter.config.r <= rank:
        return adapter
    scale = _scale(adapter.config)
    config = replace(adapter.config, r=rank, lora_alpha=scale * rank, use_rslora=False)
    smaller = Adapter(adapter.model_config, config, adapter.params.device)
    for (_, a, b), (_, a_all, b_all) in zip(smaller.projections(), adapter.projections(), strict=True):
        inputs, outputs = a.shape[1], b.shape[1]
        if outputs <= inputs:
            b[:outputs].fill_diagonal_(1.0)
            a[:outputs] = b_all.T @ a_all
        else:
            a[:inputs].fill_diagonal_(1.0)
            b[:inputs] = a_all.T @ b_all
    return smaller


def top_block(stacked: Adapter, rank: int, config: LoraConfig) -> Adapter:
    """The last `rank` rank rows of a stacked adapter as an adapter of their own, of this config."""
    block = Adapter(stacked.model_config, config, stacked.params.device)
    for (_, a, b), (_, a_all, b_all) in zip(block.projections(), stacked.projections(), strict=True):
        a.copy_(a_all[-rank:])
        b.copy_(b_all[-rank:])
    return block


def top_mask(stacked: Adapter, rank: int, b_only: bool = False) -> Tensor:
    """[layout.size] float32: 1 for the last `rank` rank rows of each projection (b_only: of B), 0 elsewhere."""
    mask = torch.zeros_like(stacked.params)
    for _, a, b in stacked.projections(mask):
        a[-rank:] = 0.0 if b_only else 1.0
        b[-rank:] = 1.0
    return mask


def _scale(config: LoraConfig) -> float:
    return config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)


def _validate_parts(parts: Sequence[tuple[Adapter, float]]) -> None:
    require(len(parts) > 0, "parts", parts, "at least one adapter")
    first = parts[0][0]
    for i, (adapter, _) in enumerate(parts):
        config, name = adapter.config, f"parts[{i}]"
        adapter.check_model(first.model_config, name)
        patterns = {**config.rank_pattern, **config.alpha_pattern}
        require(not patterns, f"{name}.config", patterns, "one rank and alpha for all modules")
        same = (adapter.layout.ranks > 0).tolist() == (first.layout.ranks > 0).tolist()
        require(same, f"{name}.config.target_modules", config.target_modules, f"{first.config.target_modules}")
    require(_scale(first.config) != 0, "parts[0].config.lora_alpha", first.config.lora_alpha, "other than 0")
