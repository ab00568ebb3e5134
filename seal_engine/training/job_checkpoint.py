"""Checkpoints of jobs: a job that was killed goes on from its last one with the same numbers."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from seal_engine.files import complete_file, save_tensors
from seal_engine.training.schedule import JobState
from seal_engine.types import InputError


def _fingerprint(state: JobState) -> str:
    """What a checkpoint must match to be gone on from: everything that decides the job's numbers.

    How passes are cut is not among it: another device has another token budget, and changes numbers by rounding alone.
    """
    job, layout = state.job, state.adapter.layout
    fields: dict[str, Any] = {name: getattr(job, name) for name in job.__dataclass_fields__}
    for name in ("sequences", "init_from", "on_top_of", "checkpoint_dir", "checkpoint_every", "lora"):
        del fields[name]
    fields |= {"ids": state.ids, "targets": state.targets, "size": layout.size}
    fields |= {"ranks": layout.ranks.tolist(), "scales": layout.scales.tolist(), "dropout": job.lora.lora_dropout}
    if any(pair is not None for pair in state.soft):
        fields["soft"] = [None if pair is None else [part.tolist() for part in pair] for pair in state.soft]
    for name, other in (("init", job.init_from), ("below", job.on_top_of)):
        if other is not None:
            fields[name] = hashlib.sha256(other.params.cpu().numpy().tobytes()).hexdigest()
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def save_checkpoint(state: JobState) -> None:
    """Parameters, moments, losses and the place in the job, in one file that is replaced whole."""
    if state.adapter.moments is None or state.job.checkpoint_dir is None:
        return
    directory = Path(state.job.checkpoint_dir)
    tensors = {
        "params": state.adapter.params.cpu(),
        "exp_avg": state.adapter.moments[0].cpu(),
        "exp_avg_sq": state.adapter.moments[1].cpu(),
        "losses": torch.tensor(state.losses, dtype=torch.float64),
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with complete_file(directory / "checkpoint.safetensors") as partial:
            save_tensors(tensors, partial, {"fingerprint": _fingerprint(state)})
    except OSError as error:
        raise InputError(f"checkpoint_dir: {directory}: cannot be written: {error}") from None


def load_checkpoint(state: JobState) -> None:
    """Go on from the job's checkpoint if there is one. Raises InputError if it is broken or another job's."""
    file = Path(state.job.checkpoint_dir or ".") / "checkpoint.safetensors"
    if state.job.checkpoint_dir is None or not file.exists() or state.adapter.moments is None:
        return
    try:
        with safe_open(file, framework="pt") as stored:
            if (stored.metadata() or {}).get("fingerprint") != _fingerprint(state):
                raise InputError(
                    f"{file}: a checkpoint of another job; accepted: one of this job, or an empty directory"
                )
            state.adapter.params.copy_(stored.get_tensor("params"))
            state.adapter.moments[0].copy_(stored.get_tensor("exp_avg"))
            state.adapter.moments[1].copy_(stored.get_tensor("exp_avg_sq"))
            state.losses = stored.get_tensor("losses").tolist()
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a readable checkpoint: {error}") from None
    state.adapter.steps = len(state.losses)
    steps = 0
    while steps < len(state.losses) and state.next is not None:
        steps += state.next.ends_step
        state.advance()
