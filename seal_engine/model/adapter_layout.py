"""Where the parts of a LoRA adapter lie in its flat tensor, and which modules it targets.

The flat tensor holds, layer by layer and group by group (a group: projections that share their input), A of the
group's adapted projections as consecutive rows, then their B.
"""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any

import numpy as np

from seal_engine.model.config import ModelConfig
from seal_engine.types import InputError, LoraConfig, require
from seal_kernels.dispatch import ceil_div


class ProjectionGroup(IntEnum):
    """The groups of projections that share their input and are one matrix in the model; GROUPS is indexed by them."""

    QKV = 0
    O = 1
    GATE_UP = 2
    DOWN = 3


# The projections of each group, in the order of their outputs in the group's matrix.
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
PARENTS = ("self_attn", "self_attn", "mlp", "mlp")
ALIGNMENT = 16  # elements: every A and B starts at 64 bytes, for whole vector loads


def projection_sizes(config: ModelConfig) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """The sizes of each group, in ProjectionGroup's order: of the shared input, and of each projection's output."""
    D, F, Q, KV = config.hidden_size, config.intermediate_size, config.query_size, config.key_value_size
    return ((D, (Q, KV, KV)), (Q, (D,)), (D, (F, F)), (F, (D,)))


def module_name(layer: int, group: int, projection: int) -> str:
    """Transformers' name of a projection: model.layers.0.self_attn.q_proj."""
    return f"model.layers.{layer}.{PARENTS[group]}.{GROUPS[group][projection]}"


def projection_names(model: ModelConfig) -> tuple[str, ...]:
    """The names of all projections that an adapter may have, layer by layer and group by group."""
    at = itertools.product(range(model.num_hidden_layers), ProjectionGroup)
    return tuple(module_name(layer, group, m) for layer, group in at for m in range(len(GROUPS[group])))


@dataclass(frozen=True)
class AdapterLayout:
    """The places of an adapter's parts in its flat tensor; projections that it does not adapt have rank 0."""

    size: int  # elements
    offsets: np.ndarray  # [L, 4, 1 + 3] int64: where the rows of A of a group begin, and each projection's B
    ranks: np.ndarray  # [L, 4, 3] int64
    scales: np.ndarray  # [L, 4, 3] float64
    num_parameters: int  # elements that are not padding


def adapter_layout(model: ModelConfig, lora: LoraConfig) -> AdapterLayout:
    """Lay out an adapter for a model. Raises InputError for fields out of range and targets that match nothing."""
    for name in ("rank_pattern", "alpha_pattern"):
        check_pattern(getattr(lora, name), f"lora.{name}")
    lora.check()
    for name, rank in [("r", lora.r), *((f"rank_pattern[{k!r}]", v) for k, v in lora.rank_pattern.items())]:
        require(rank < 2**31, f"lora.{name}", rank, "an integer below 2**31")  # offsets stay within 64 bits
    targets = lora.target_modules if isinstance(lora.target_modules, str) else tuple(lora.target_modules)
    rank_pattern, alpha_pattern = tuple(lora.rank_pattern.items()), tuple(lora.alpha_pattern.items())
    shape = (model.num_hidden_layers, projection_sizes(model))
    return _layout(shape, targets, lora.r, lora.lora_alpha, lora.use_rslora, rank_pattern, alpha_pattern)


@lru_cache(maxsize=256)
def _layout(shape, targets, r, alpha, use_rslora, rank_pattern, alpha_pattern) -> AdapterLayout:
    layers, sizes = shape
    num_groups, most = len(GROUPS), max(len(projections) for projections in GROUPS)
    offsets = np.zeros((layers, num_groups, 1 + most), dtype=np.int64)
    ranks = np.zeros((layers, num_groups, most), dtype=np.int64)
    scales = np.zeros((layers, num_groups, most))
    matches = _Targets(targets)
    at = parameters = 0
    for layer, group in np.ndindex(layers, num_groups):
        for m in range(len(GROUPS[group])):
            name = module_name(layer, group, m)
            if matches(name):
                rank = _first_match(rank_pattern, name, r)
                divisor = rank**0.5 if use_rslora else rank
                ranks[layer, group, m] = rank
                scales[layer, group, m] = _first_match(alpha_pattern, name, alpha) / divisor
        inputs, outputs = sizes[group]
        lengths = [int(ranks[layer, group].sum()) * inputs]
        lengths += [int(ranks[layer, group, m]) * width for m, width in enumerate(outputs)]
        for i, length in enumerate(lengths):
            offsets[layer, group, i] = at
            at += ceil_div(length, ALIGNMENT) * ALIGNMENT
        parameters += sum(lengths)
    matches.check()
    return AdapterLayout(at, offsets, ranks, scales, parameters)


class _Targets:
    """Which module names target_modules selects, as PEFT reads it; remembers what has matched."""

    def __init__(self, targets: str | tuple[str, ...]):
        self.targets = targets
        self.matched: set[str] = set()
        self.pattern = None
        if isinstance(targets, str) and targets != "all-linear":
            try:
                self.pattern = re.compile(targets)
            except re.error as error:
                raise InputError(f"lora.target_modules: found {targets!r}, no regular expression: {error}") from None

    def __call__(self, name: str) -> bool:
        if self.pattern is not None:
            found = {str(self.targets)} if self.pattern.fullmatch(name) else set()
        elif self.targets == "all-linear":
            found = {"all-linear"}
        else:
            found = {target for target in self.targets if name == target or name.endswith(f".{target}")}
        self.matched |= found
        return bool(found)

    def check(self) -> None:
        wanted = [self.targets] if isinstance(self.targets, str) else self.targets
        unknown = [target for target in wanted if target not in self.matched]
        if unknown:
            names = [name for group in GROUPS for name in group]
            raise InputError(f"lora.target_modules: found {unknown}, which match no module; accepted: {names}")


def check_pattern(pattern: Any, name: str) -> None:
    """InputError unless it is a mapping whose keys can be read as `_first_match` reads them."""
    require(isinstance(pattern, Mapping), name, pattern, "names of modules, each with its own number")
    for key in pattern:
        try:
            re.compile(f"({key})")
        except re.error as error:
            raise InputError(f"{name}: found {key!r}, no regular expression: {error}") from None


def _first_match(pattern: tuple[tuple[str, Any], ...], name: str, default: Any) -> Any:
    """The value of the first key that is, as a regular expression, an end of the module's name (PEFT's rule)."""
    for key, value in pattern:
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default
