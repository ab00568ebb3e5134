"""The blocks that a step of the continual experiment added, in one file that is complete or not there."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from seal_engine.engine import Engine
from seal_engine.files import complete_file, flush, save_tensors, write_errors
from seal_engine.loop.continual_methods import Block
from seal_engine.model.adapters import Adapter
from seal_engine.types import InputError, LoraConfig

Key = tuple[int, int]  # (number of the method, number of the sequence)


class AdapterStore:
    """adapters/seed-S-step-T.safetensors: "M S" -> the parameters of a block, "M S factor" -> its factor."""

    def __init__(self, directory: Path, seed: int, step: int):
        self.file = directory / "adapters" / f"seed-{seed}-step-{step}.safetensors"

    def save(self, blocks: Mapping[Key, Block]) -> None:
        """Write all blocks of the step; what an unfinished attempt left is replaced. InputError if the disk refuses."""
        tensors = {}
        for (m, s), block in blocks.items():
            tensors[f"{m} {s}"] = block.adapter.params.cpu().clone()
            tensors[f"{m} {s} factor"] = torch.tensor(block.factor, dtype=torch.float64)
        with write_errors(self.file):
            self.file.parent.mkdir(exist_ok=True)
            with complete_file(self.file) as partial:
                save_tensors(tensors, partial, {})
            flush(self.file.parent)

    def load(self, engine: Engine, loras: Mapping[Key, LoraConfig]) -> dict[Key, Block]:
        """The step's blocks, in the order in which they were adopted. loras: the shape of each that may be there."""
        if not self.file.is_file():
            raise InputError(f"{self.file}: missing; accepted: the file that its step wrote, or a new directory")
        tensors, blocks = load_file(self.file), {}
        for (m, s), lora in loras.items():
            if f"{m} {s}" in tensors:
                adapter = Adapter(engine.config, lora, engine.model.device)
                adapter.params.copy_(tensors[f"{m} {s}"])
                blocks[m, s] = Block(adapter, float(tensors[f"{m} {s} factor"]))
        return blocks
