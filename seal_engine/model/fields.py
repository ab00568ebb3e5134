"""Typed access to what a configuration file says, and the refusal of anything else."""

from dataclasses import dataclass
from typing import Any

import torch

from seal_engine.files import show
from seal_engine.types import InputError


@dataclass
class Fields:
    """Typed access to a mapping's fields; every refusal names the source and the field."""

    values: dict[str, Any]
    source: str

    def refuse(self, name: str, accepted: str) -> InputError:
        found = show(self.values[name]) if name in self.values else "nothing"
        return InputError(f"{self.source}: {name}: found {found}; accepted: {accepted}")

    def integer(self, name: str, below: int = 2**31) -> int:
        value = self.values.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < below:
            raise self.refuse(name, f"a positive integer below {below}")
        return value

    def number(self, name: str, least: float = torch.finfo(torch.float32).tiny) -> float:
        value = self.values.get(name)
        most = torch.finfo(torch.float32).max  # beyond these bounds, float32 turns a number into 0 or infinity
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
            raise self.refuse(name, f"a number from {least:g} to {most:g}")
        return float(value)

    def boolean(self, name: str) -> bool:
        value = self.values.get(name)
        if not isinstance(value, bool):
            raise self.refuse(name, "true or false")
        return value
