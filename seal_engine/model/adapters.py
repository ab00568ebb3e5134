"""LoRA adapters: one flat float32 tensor each, which the trainer trains and the sampler reads.

The flat tensor holds, layer by layer and group by group (a group: projections that share their input), A of the
group's adapted projections as consecutive rows, then their B. Gradients and the optimizer's moments are tensors of the
same layout that exist while the adapter is trained. So an optimizer step is one pass over flat memory, a copy is one
copy, and memory is exactly linear in the adapters that are alive.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from seal_engine.files import complete_directory, read_json, save_tensors, show, write_errors
from seal_engine.model.adapter_layout import adapter_layout, module_name, projection_sizes
from seal_engine.model.config import ModelConfig
from seal_engine.model.peft_config import read_peft_config
from seal_engine.types import InputError, LoraConfig
from seal_kernels.lora_tables import AdapterViews, adapter_views

PEFT_PREFIX = "base_model.model."
_uids = itertools.count(1)


class Adapter:
    """A LoRA adapter on a device. `uid` is its own for good; `version` rises with every change of its parameters.

    The engine raises `version` itself when it trains; whoever writes into `params` calls `touch`.
    """

    def __init__(self, model: ModelConfig, config: LoraConfig, device: torch.device):
        """All zeros: `Adapter.create` draws A."""
        self.uid = next(_uids)
        self.version = 0
        self.config = config
        self.model_config = model
        self.layout = adapter_layout(model, config)
        self._params = torch.zeros(self.layout.size, device=device)
        self._device = self._params.device
        self.grads: Tensor | None = None  # like params, while trained
        self.moments: tuple[Tensor, Tensor] | None = None  # exp_avg, exp_avg_sq
        self.steps = 0  # optimizer steps taken with these moments
        self.optimizer_state: Tensor | None = None  # [3, layout.size]: what gradients and moments are rows of
        self._views: tuple[Tensor | None, dict[tuple[int, int], AdapterViews]] | None = None

    @property
    def params(self) -> Tensor:
        """The parameters, [layout.size] float32, on the adapter's device; an offloaded adapter comes back."""
        if self._params.device != self._device:
            self._params = self._params.to(self._device, non_blocking=True)
        return self._params

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters; gradients and moments take three times as much, while there are any."""
        return 4 * self.layout.size

    def offload(self) -> int:
        """Move the parameters of an adapter that is not trained to host memory; returns the bytes that this freed."""
        if self._params.device.type != "cuda" or self.grads is not None:
            return 0
        host = torch.empty(self._params.shape, pin_memory=True)
        self._params, self._views = host.copy_(self._params), None
        return self.nbytes

    @staticmethod
    def create(model: ModelConfig, config: LoraConfig, device: torch.device, seed: int = 0) -> "Adapter":
        """A drawn from kaiming-uniform with a = sqrt(5), that is U(-1, 1) / sqrt(inputs), and B zero, as PEFT does."""
        adapter = Adapter(model, config, device)
        layout, inputs = adapter.layout, [inputs for inputs, _ in projection_sizes(model)]
        lengths = layout.ranks.sum(2) * inputs  # [L, 4] elements of A
        generator = torch.Generator(device).manual_seed(seed)
        drawn = torch.empty(int(lengths.sum()), device=device).uniform_(-1, 1, generator=generator)
        # Layers that are alike are written at once: a launch takes longer than its numbers.
        L = len(lengths)
        alike = bool((layout.ranks == layout.ranks[0]).all())
        start = 0
        for layer in range(1 if alike else L):
            count = L if alike else 1
            for group in np.flatnonzero(lengths[layer]).tolist():
                length, offset = int(lengths[layer, group]), int(layout.offsets[layer, group, 0])
                a = adapter.params.as_strided((count, length), (layout.size // L, 1), offset)
                numbers = drawn.as_strided((count, length), (len(drawn) // L, 1), start)
                torch.mul(numbers, inputs[group] ** -0.5, out=a)
                start += length
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

    def touch(self) -> None:
        """Say that `params`, or a view into them, were changed in place: whatever was computed before is not reused."""
        self.version += 1

    def allocate_optimizer_state(self, state: Tensor | None = None) -> None:
        """Make zero gradients and moments unless they exist, in `state` if given: memory that a release returned."""
        if self.grads is None:
            state = torch.zeros(3, self.layout.size, device=self.params.device) if state is None else state.zero_()
            self.grads, *moments = state
            self.moments, self.optimizer_state, self.steps = (moments[0], moments[1]), state, 0

    def release_optimizer_state(self) -> Tensor | None:
        """Drop gradients and moments; returns their memory, [3, layout.size], or None if there was none."""
        state, self.optimizer_state = self.optimizer_state, None
        self.grads, self.moments, self._views = None, None, None
        return state

    def save(self, directory: str | Path) -> None:
        """Write PEFT's adapter_config.json and adapter_model.safetensors, float32, to a new or empty directory."""
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.model_config.directory,
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
        with write_errors(Path(directory)), complete_directory(Path(directory)) as partial:
            (partial / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
            save_tensors(tensors, partial / "adapter_model.safetensors", {"format": "pt"})

    @staticmethod
    def load(directory: str | Path, model: ModelConfig, device: torch.device) -> "Adapter":
        """Read an adapter in PEFT's format. Raises InputError naming the file and the field or tensor."""
        directory = Path(directory)
        file, weights = directory / "adapter_config.json", directory / "adapter_model.safetensors"
        config = read_peft_config(read_json(file), model, str(file))
        try:
            tensors = load_file(weights)
        except FileNotFoundError:
            raise InputError(f"{weights}: missing; pickled adapters (.bin) are not read") from None
        except (SafetensorError, OSError) as error:
            raise InputError(f"{weights}: not a readable safetensors file (truncated?): {error}") from None
        return Adapter.from_tensors(tensors, config, model, device, str(file), str(weights))

    @staticmethod
    def from_tensors(
        tensors: Mapping[str, Tensor],
        config: LoraConfig,
        model: ModelConfig,
        device: torch.device,
        config_source: str = "config",
        source: str = "tensors",
    ) -> "Adapter":
        """An adapter of tensors by PEFT's names. Errors name `config_source`, or `source` and the tensor."""
        try:
            adapter = Adapter(model, config, device)
        except InputError as error:
            raise InputError(f"{config_source}: {error}") from None
        unread = dict(tensors)
        for name, a, b in adapter.projections():
            for part, view in (("lora_A", a), ("lora_B", b.T)):
                key = f"{PEFT_PREFIX}{name}.{part}.weight"
                if key not in unread:
                    raise InputError(f"{source}: tensor {key} is missing")
                tensor = unread.pop(key)
                if not isinstance(tensor, Tensor) or tensor.shape != view.shape or not tensor.is_floating_point():
                    found = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else show(tensor)
                    raise InputError(f"{source}: tensor {key}: found {found}; accepted: {list(view.shape)}, floating")
                view.copy_(tensor.detach())
        if unread:
            name = min(unread, key=str)
            raise InputError(f"{source}: tensor {name} has no place in this model and {Path(config_source).name}")
        return adapter
