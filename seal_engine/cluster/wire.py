"""What goes between driver and workers: pickled, with adapters apart from it as flat arrays, which are sent once."""

import io
import pickle
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from seal_engine.model.adapters import Adapter
from seal_engine.model.config import ModelConfig
from seal_engine.types import LoraConfig


class AdapterState(NamedTuple):
    """An adapter on its way."""

    lora: LoraConfig
    params: np.ndarray  # [layout.size] float32

    @staticmethod
    def of(adapter: Adapter) -> "AdapterState":
        """The parameters of an adapter; gradients and moments stay where they are."""
        return AdapterState(adapter.config, adapter.params.cpu().numpy())

    def load(self, model: ModelConfig, device: torch.device) -> Adapter:
        """An adapter of its own, on a device."""
        adapter = Adapter(model, self.lora, device)
        adapter.params.copy_(torch.tensor(self.params))
        adapter.touch()
        return adapter


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO):
        super().__init__(file, protocol=5)
        self.adapters: dict[Adapter, int] = {}  # by identity -> number

    def persistent_id(self, obj: Any) -> int | None:
        return self.adapters.setdefault(obj, len(self.adapters)) if isinstance(obj, Adapter) else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, adapters: Sequence[Adapter]):
        super().__init__(file)
        self.adapters = adapters

    def persistent_load(self, pid: Any) -> Adapter:
        return self.adapters[pid]


def pack(value: Any) -> tuple[bytes, list[Adapter]]:
    """The value as bytes, and the adapters in it, each once, in the order in which `unpack` takes them."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    return file.getvalue(), list(pickler.adapters)


def unpack(data: bytes, adapters: Sequence[Adapter]) -> Any:
    """The value that was packed, with these adapters in it. Only for what a process of the same run has packed."""
    return _Unpickler(io.BytesIO(data), adapters).load()
