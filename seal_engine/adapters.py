"""LoRA adapters: one flat float32 tensor each, which the trainer trains and the sampler reads.

The flat tensor holds, layer by layer and group by group (a group: projections that share their input), A of the
group's adapted projections as consecutive rows, then their B. Gradients and the optimizer's moments are tensors of the
same layout that exist while the adapter is trained. So an optimizer step is one pass over flat memory, a copy is one
copy, and memory is exactly linear in the adapters that are alive.
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from seal_engine.config import ModelConfig
from seal_engine.files import complete_directory, read_json
from seal_engine.types import InputError, LoraConfig, require
from seal_kernels.dispatch import use_triton
from seal_kernels.lora_tables import NO_VIEWS, AdapterViews, BatchTables, LoraGroup, adapter_views, device_tables

# Projections in the order of their outputs in the model's fused matrices.
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
PARENTS = ("self_attn", "self_attn", "mlp", "mlp")
PEFT_PREFIX = "base_model.model."
ALIGNMENT = 16  # elements: every A and B starts at 64 bytes, for whole vector loads
_uids = itertools.count(1)


def projection_sizes(config: ModelConfig) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """For each group: the size of the shared input, and of each projection's output."""
    D, F, Q, KV = config.hidden_size, config.intermediate_size, config.query_size, config.key_value_size
    return ((D, (Q, KV, KV)), (Q, (D,)), (D, (F, F)), (F, (D,)))


def module_name(layer: int, group: int, projection: int) -> str:
    """As Transformers names it: model.layers.0.self_attn.q_proj."""
    return f"model.layers.{layer}.{PARENTS[group]}.{GROUPS[group][projection]}"


@dataclass(frozen=True)
class AdapterLayout:
    """Where the parts of an adapter lie in its flat tensor; projections that it leaves alone have rank 0."""

    size: int  # elements
    offsets: np.ndarray  # [L, 4, 1 + 3] int64: of A's rows of a group, and of each projection's B
    ranks: np.ndarray  # [L, 4, 3] int64
    scales: np.ndarray  # [L, 4, 3] float64
    num_parameters: int  # elements that are not padding


def adapter_layout(model: ModelConfig, lora: LoraConfig) -> AdapterLayout:
    """Lay out an adapter for a model. Raises InputError for fields out of range and targets that match nothing."""
    for name in ("rank_pattern", "alpha_pattern"):
        _check_pattern(getattr(lora, name), f"lora.{name}")
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
    offsets = np.zeros((layers, 4, 4), dtype=np.int64)
    ranks = np.zeros((layers, 4, 3), dtype=np.int64)
    scales = np.zeros((layers, 4, 3))
    matches = _Targets(targets)
    at = parameters = 0
    for layer, group in np.ndindex(layers, 4):
        for m in range(len(GROUPS[group])):
            name = module_name(layer, group, m)
            if matches(name):
                rank = _first_match(rank_pattern, name, r)
                divisor = rank**0.5 if use_rslora else rank
                ranks[layer, group, m], scales[layer, group, m] = (
                    rank,
                    _first_match(alpha_pattern, name, alpha) / divisor,
                )
        inputs, outputs = sizes[group]
        lengths = [int(ranks[layer, group].sum()) * inputs]
        lengths += [int(ranks[layer, group, m]) * width for m, width in enumerate(outputs)]
        for i, length in enumerate(lengths):
            offsets[layer, group, i] = at
            at += -(-length // ALIGNMENT) * ALIGNMENT
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


def _check_pattern(pattern: Any, name: str) -> None:
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


class Adapter:
    """A LoRA adapter on a device. `uid` is its own for good; `version` rises with every change of its parameters."""

    def __init__(self, model: ModelConfig, config: LoraConfig, device: torch.device):
        """All zeros: `Adapter.create` draws A."""
        self.uid = next(_uids)
        self.version = 0
        self.config = config
        self.model_config = model
        self.layout = adapter_layout(model, config)
        self.params = torch.zeros(self.layout.size, device=device)  # [layout.size] float32
        self.grads: Tensor | None = None  # like params, while trained
        self.moments: tuple[Tensor, Tensor] | None = None  # exp_avg, exp_avg_sq
        self.steps = 0  # optimizer steps taken with these moments
        self._state: Tensor | None = None  # [3, layout.size]: what gradients and moments are rows of
        self._views: tuple[Tensor | None, dict[tuple[int, int], AdapterViews]] | None = None

    @staticmethod
    def create(model: ModelConfig, config: LoraConfig, device: torch.device, seed: int = 0) -> "Adapter":
        """A drawn from kaiming-uniform with a = sqrt(5), that is U(-1, 1) / sqrt(inputs), and B zero, as PEFT does."""
        adapter = Adapter(model, config, device)
        generator = torch.Generator(device).manual_seed(seed)
        for _, a, _ in adapter.projections():
            a.uniform_(-1, 1, generator=generator).mul_(a.shape[1] ** -0.5)
        return adapter

    def copy(self) -> "Adapter":
        """A new adapter with the same parameters, no gradients and no moments."""
        adapter = Adapter(self.model_config, self.config, self.params.device)
        adapter.params.copy_(self.params)
        return adapter

    def check_model(self, model: ModelConfig, name: str) -> None:
        """InputError, calling the adapter `name`, if it was made for a model of other sizes."""

        def shape(config: ModelConfig) -> Any:
            return config.num_hidden_layers, projection_sizes(config)

        if shape(self.model_config) != shape(model):
            found = f"{shape(self.model_config)}; accepted: {shape(model)}"
            raise InputError(f"{name}: an adapter of another model: layers and sizes of projections: found {found}")

    def projections(self, flat: Tensor | None = None) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(module name, A [r, in], B [r, out]) views into the parameters, or into another tensor of their layout."""
        flat = self.params if flat is None else flat
        sizes = projection_sizes(self.model_config)
        for layer, group in np.ndindex(self.layout.ranks.shape[:2]):
            inputs, outputs = sizes[group]
            a_offset, *b_offsets = self.layout.offsets[layer, group].tolist()
            for m, width in enumerate(outputs):
                rank = int(self.layout.ranks[layer, group, m])
                if rank:
                    a = flat.as_strided((rank, inputs), (inputs, 1), a_offset)
                    a_offset += rank * inputs
                    yield module_name(layer, group, m), a, flat.as_strided((rank, width), (width, 1), b_offsets[m])

    def projections_with_scales(self) -> Iterator[tuple[str, Tensor, Tensor, float]]:
        """(module name, A [r, in], B [r, out], scale): the projection's update is scale x A^T B."""
        scales = self.layout.scales[self.layout.ranks > 0].tolist()
        for (name, a, b), scale in zip(self.projections(), scales, strict=True):
            yield name, a, b, scale

    def views(self, train: bool) -> dict[tuple[int, int], AdapterViews]:
        """(layer, group) -> views into the parameters and, to train, the gradients; made once for either."""
        grads = self.grads if train else None
        if self._views is None or self._views[0] is not grads:
            sizes, layout = projection_sizes(self.model_config), self.layout
            at = np.argwhere(layout.ranks.any(2)).tolist()
            made = {
                (i, g): adapter_views(self.params, grads, layout.offsets[i, g], layout.ranks[i, g], *sizes[g])
                for i, g in at
            }
            self._views = grads, made
        return self._views[1]

    def start_training(self, state: Tensor | None = None) -> None:
        """Make gradients (zero) and moments (zero), unless they are there; in `state`, if given, of stop_training."""
        if self.grads is None:
            state = torch.zeros(3, self.layout.size, device=self.params.device) if state is None else state.zero_()
            self.grads, *moments = state
            self.moments, self._state, self.steps = (moments[0], moments[1]), state, 0

    def stop_training(self) -> Tensor | None:
        """Let go of gradients and moments; returns their memory, [3, layout.size], if there was any."""
        state, self._state = self._state, None
        self.grads, self.moments, self._views = None, None, None
        return state

    def save(self, directory: str | Path) -> None:
        """Write PEFT's adapter_config.json and adapter_model.safetensors, float32, to a new or empty directory."""
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": None,
            "r": self.config.r,
            "lora_alpha": self.config.lora_alpha,
            "lora_dropout": self.config.lora_dropout,
            "target_modules": self.config.target_modules
            if isinstance(self.config.target_modules, str)
            else list(self.config.target_modules),
            "use_rslora": self.config.use_rslora,
            "rank_pattern": dict(self.config.rank_pattern),
            "alpha_pattern": dict(self.config.alpha_pattern),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        }
        tensors = {}
        for name, a, b in self.projections():
            tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = a.cpu().contiguous()
            tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = b.T.cpu().contiguous()
        with complete_directory(Path(directory)) as partial:
            (partial / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
            save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})

    @staticmethod
    def load(directory: str | Path, model: ModelConfig, device: torch.device) -> "Adapter":
        """Read an adapter in PEFT's format. Raises InputError naming the file and the field or tensor."""
        directory = Path(directory)
        file = directory / "adapter_config.json"
        config = _lora_config(read_json(file), file)
        try:
            adapter = Adapter(model, config, device)
        except InputError as error:
            raise InputError(f"{file}: {error}") from None
        weights = directory / "adapter_model.safetensors"
        try:
            tensors = load_file(weights)
        except FileNotFoundError:
            raise InputError(f"{weights}: missing; pickled adapters (.bin) are not read") from None
        except (SafetensorError, OSError) as error:
            raise InputError(f"{weights}: not a readable safetensors file (truncated?): {error}") from None
        for name, a, b in adapter.projections():
            for part, view in (("lora_A", a), ("lora_B", b.T)):
                key = f"{PEFT_PREFIX}{name}.{part}.weight"
                if key not in tensors:
                    raise InputError(f"{weights}: tensor {key} is missing")
                tensor = tensors.pop(key)
                if tensor.shape != view.shape or not tensor.is_floating_point():
                    found = f"{tensor.dtype} {list(tensor.shape)}"
                    raise InputError(f"{weights}: tensor {key}: found {found}; accepted: {list(view.shape)}, floating")
                view.copy_(tensor)
        if tensors:
            raise InputError(f"{weights}: tensor {min(tensors)} has no place in this model and adapter_config.json")
        return adapter


def _lora_config(raw: dict[str, Any], file: Path) -> LoraConfig:
    """The parts of PEFT's LoraConfig that change the forward pass; what is not supported is refused, not ignored."""
    accepted = {
        "peft_type": ("LORA",),
        "bias": (None, "none"),
        "fan_in_fan_out": (None, False),
        "use_dora": (None, False),
        "modules_to_save": (None, []),
        "layers_to_transform": (None, []),
        "layer_replication": (None, []),
        "exclude_modules": (None, []),
        "target_parameters": (None, []),
        "lora_bias": (None, False),
        "trainable_token_indices": (None, []),
        "use_rslora": (None, True, False),
        "use_qalora": (None, False),
        "use_bdlora": (None, False),
        "alora_invocation_tokens": (None,),
        "arrow_config": (None,),
        "kasa_config": (None,),
    }
    for name, values in accepted.items():
        if raw.get(name) not in values:
            raise InputError(f"{file}: {name}: found {raw.get(name)!r:.80}; accepted: {values[-1]!r}")
    targets = raw.get("target_modules")
    config = LoraConfig(
        r=raw.get("r", 8),
        lora_alpha=raw.get("lora_alpha", 8),
        lora_dropout=raw.get("lora_dropout", 0.0),
        target_modules=tuple(targets) if isinstance(targets, list) else targets or ("q_proj", "v_proj"),
        use_rslora=raw.get("use_rslora") is True,
        rank_pattern=raw.get("rank_pattern") or {},
        alpha_pattern=raw.get("alpha_pattern") or {},
    )
    try:
        for name in ("rank_pattern", "alpha_pattern"):
            _check_pattern(getattr(config, name), f"lora.{name}")
        config.check()
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    return config


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
