"""Checkpoints on disk, by tinker:// paths.

tinker://RUN/weights/NAME holds a model with its optimizer, tinker://RUN/sampler_weights/NAME an adapter to sample from;
RUN is the model's id. Each is a directory ROOT/RUN/KIND/NAME that appears whole or not at all: an adapter in PEFT's
format, checkpoint.json with what PEFT has no field for, and for `weights` optimizer.safetensors, the moments. Blocking
calls: they run beside the event loop.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from seal_engine.files import complete_directory, read_json, replace_file, save_tensors, write_errors
from seal_engine.model.adapters import Adapter
from seal_engine.serve.errors import ApiError
from seal_engine.types import InputError, require

TYPES = {"weights": "training", "sampler_weights": "sampler"}  # folder -> the SDK's name
PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,199}")
ACCEPTED = "tinker://RUN/weights/NAME or tinker://RUN/sampler_weights/NAME"


@dataclass(frozen=True)
class CheckpointPath:
    """A parsed tinker:// path."""

    run: str
    kind: str
    name: str

    def __str__(self) -> str:
        return f"tinker://{self.run}/{self.kind}/{self.name}"

    @staticmethod
    def parse(path: str) -> "CheckpointPath":
        """InputError for what is no such path."""
        run, kind, name = [*path.removeprefix("tinker://").split("/"), "", ""][:3]
        parsed = CheckpointPath(run, kind, name)
        require(str(parsed) == path and kind in TYPES and _is_name(run) and _is_name(name), "path", path, ACCEPTED)
        return parsed


@dataclass
class Stored:
    """What a checkpoint holds. moments: (exp_avg, exp_avg_sq), None in one without an optimizer."""

    adapter: Adapter
    moments: tuple[Tensor, Tensor] | None
    info: dict[str, Any]


def _is_name(text: str) -> bool:
    return PART.fullmatch(text) is not None


class Checkpoints:
    """The checkpoints below a directory."""

    def __init__(self, root: Path):
        self.root = root

    def path_for(self, run: str, kind: str, name: str | None) -> CheckpointPath:
        """The path of a checkpoint that is to be saved. InputError for the name."""
        accepted = "1 to 200 letters, digits, '_', '.', ':' and '-', the first no '.', ':' or '-'"
        require(name is not None and _is_name(name), "path", name, accepted)
        return CheckpointPath(run, kind, str(name))

    def directory(self, path: CheckpointPath) -> Path:
        """Where a checkpoint lies."""
        return self.root / path.run / path.kind / path.name

    def save(self, path: CheckpointPath, stored: Stored, ttl_seconds: int | None, overwrite: bool) -> None:
        """Write a checkpoint. InputError if there is one of this name, unless it is to be overwritten."""
        directory = self.directory(path)
        if directory.exists() and not overwrite:
            raise InputError(f"path: {path} exists; accepted: a new name, or overwrite=True")
        now = datetime.now(UTC)
        expires = None if ttl_seconds is None else (now + timedelta(seconds=ttl_seconds)).isoformat()
        info = {**stored.info, "time": now.isoformat(), "expires_at": expires}
        with write_errors(directory):
            if overwrite:
                shutil.rmtree(directory, ignore_errors=True)
            with complete_directory(directory) as partial:
                stored.adapter.save(partial)
                if stored.moments is not None:
                    tensors = {"exp_avg": stored.moments[0].cpu(), "exp_avg_sq": stored.moments[1].cpu()}
                    save_tensors(tensors, partial / "optimizer.safetensors", {})
                (partial / "checkpoint.json").write_text(json.dumps(info, indent=2) + "\n", "utf-8")

    def load(self, path: CheckpointPath, load_adapter: Callable[[Path], Adapter], optimizer: bool) -> Stored:
        """Read a checkpoint; optimizer: with its moments. InputError naming what is wrong with it."""
        info = self.info(path)
        directory = self.directory(path)
        adapter = load_adapter(directory)
        if not optimizer:
            return Stored(adapter, None, info)
        file = directory / "optimizer.safetensors"
        require(file.exists(), "path", str(path), "a checkpoint of save_state, which has an optimizer's state")
        try:
            tensors = load_file(file)
            moments = tensors["exp_avg"], tensors["exp_avg_sq"]
        except (SafetensorError, OSError, KeyError) as error:
            raise InputError(f"{file}: not an optimizer's state: {error}") from None
        require(
            moments[0].shape == adapter.params.shape == moments[1].shape, str(file), "another size", "the adapter's"
        )
        return Stored(adapter, moments, info)

    def info(self, path: CheckpointPath) -> dict[str, Any]:
        """What checkpoint.json holds. ApiError 404 for a checkpoint that is not there, or whose time is over."""
        directory = self.directory(path)
        info = read_json(directory / "checkpoint.json", required=False)
        expires = info.get("expires_at")
        if expires is not None and datetime.fromisoformat(expires) < datetime.now(UTC):
            shutil.rmtree(directory, ignore_errors=True)
            info = {}
        if not info:
            raise ApiError(404, f"path: {path} does not exist", "path")
        return info

    def delete(self, path: CheckpointPath) -> None:
        """Remove a checkpoint. ApiError 404."""
        self.info(path)
        shutil.rmtree(self.directory(path))

    def set_ttl(self, path: CheckpointPath, ttl_seconds: int | None) -> None:
        """Let a checkpoint expire so long from now; None: never."""
        expires = None
        if ttl_seconds is not None:
            expires = (datetime.now(UTC) + timedelta(seconds=ttl_seconds)).isoformat()
        info = {**self.info(path), "expires_at": expires}
        replace_file(self.directory(path) / "checkpoint.json", (json.dumps(info, indent=2) + "\n").encode())

    def list(self, run: str | None = None) -> list[dict[str, Any]]:
        """The checkpoints of a run, or of all, the newest first, as the SDK's Checkpoint has them."""
        found = []
        for file in self.root.glob("*/*/*/checkpoint.json"):
            path = CheckpointPath(*file.parent.relative_to(self.root).parts)
            if path.kind in TYPES and _is_name(path.name) and run in (None, path.run):
                try:
                    info = self.info(path)
                except ApiError:  # its time is over
                    continue
                found.append(_describe(path, info, file.parent))
        return sorted(found, key=lambda checkpoint: checkpoint["time"], reverse=True)


def _describe(path: CheckpointPath, info: dict[str, Any], directory: Path) -> dict[str, Any]:
    return {
        "checkpoint_id": f"{path.kind}/{path.name}",
        "checkpoint_type": TYPES[path.kind],
        "time": info["time"],
        "tinker_path": str(path),
        "size_bytes": sum(file.stat().st_size for file in directory.iterdir()),
        "user_metadata": info.get("user_metadata"),
        "expires_at": info.get("expires_at"),
    }
