"""Names of served adapters, and the directories that adapters may be loaded from.

All methods run on the event loop, so that a lookup and what follows from it are one. Loading itself is the worker's. A
name that is loaded again is a new Adapter with a uid of its own: nothing cached for the old one is ever met.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from seal_engine.model.adapters import Adapter
from seal_engine.serve.errors import UnknownModelError
from seal_engine.types import InputError, require

FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter by its name."""

    name: str
    adapter: Adapter
    directory: Path


class AdapterNames:
    """The names that requests may call a model by: the base's, and those of adapters."""

    def __init__(self, base_names: Sequence[str], allowed: Sequence[Path] = (), max_adapters: int | None = None):
        """base_names: the first is the one that is listed. allowed: directories that adapters may be loaded from.
        max_adapters: names at once; None: no limit.
        """
        self.base_names = base_names
        self.allowed = [Path(os.path.realpath(directory)) for directory in allowed]
        self.max_adapters = max_adapters
        self.served: dict[str, ServedAdapter] = {}
        self._loading: set[str] = set()

    def resolve(self, model: str | None) -> Adapter | None:
        """The adapter that a request's `model` names; None for the base, which None names, too. UnknownModelError."""
        if model is None or model in self.base_names:
            return None
        if model not in self.served:
            raise UnknownModelError(f"The model `{model:.200}` does not exist.")
        return self.served[model].adapter

    def allowed_directory(self, path: str) -> Path:
        """The directory that a path leads to. InputError unless it and an adapter's files in it are below an allowed
        one, all symbolic links resolved."""
        accepted = "a directory below those of --allow-adapters-from"
        try:
            directory = Path(os.path.realpath(path))
            paths = [directory, *(Path(os.path.realpath(directory / name)) for name in FILES)]
        except ValueError:  # a NUL in it
            raise InputError(f"lora_path: found {path!r:.100}; accepted: {accepted}") from None
        inside = any(all(path.is_relative_to(root) for path in paths) for root in self.allowed)
        require(inside, "lora_path", path, accepted)
        return directory

    def begin_load(self, name: str, replace: bool = False) -> None:
        """Reserve a name for an adapter that is being loaded; `finish_load` or `abandon_load` follows. InputError."""
        require(name not in self.base_names, "lora_name", name, "a name other than the base model's")
        taken = name in self._loading or (name in self.served and not replace)
        require(not taken, "lora_name", name, "a name that is not loaded, or load_inplace=true")
        count = len({*self.served, *self._loading, name})
        if self.max_adapters is not None and count > self.max_adapters:
            raise InputError(f"lora_name: {count - 1} adapters are loaded; accepted: {self.max_adapters}; unload one")
        self._loading.add(name)

    def finish_load(self, name: str, adapter: Adapter, directory: Path) -> None:
        """Serve the adapter under the reserved name, in place of one that had it."""
        self._loading.discard(name)
        self.served[name] = ServedAdapter(name, adapter, directory)

    def abandon_load(self, name: str) -> None:
        """Give up a reserved name."""
        self._loading.discard(name)

    def unload(self, name: str) -> None:
        """Forget a name; requests that run with its adapter go on. UnknownModelError."""
        if name not in self.served:
            raise UnknownModelError(f"The lora adapter `{name:.200}` does not exist.")
        del self.served[name]
