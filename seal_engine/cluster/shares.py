"""Who did how much of a run: workers.json in its directory, beside the ledger, which equal runs have in common."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from seal_engine.files import read_json, replace_file

WORKERS = "workers.json"


@dataclass(frozen=True)
class WorkerShare:
    """What a worker has done, from one start of a run to its end."""

    name: str
    items: int  # trials, trainings and samples
    batches: int
    busy_seconds: float
    idle_seconds: float  # while others, or the driver's loop over them, were at work
    restarts: int


def record_workers(directory: Path, shares: Sequence[WorkerShare]) -> None:
    """Add what workers have done to what others did when the run was at work before."""
    if shares:
        known = [*read_workers(directory), *shares]
        content = json.dumps({"workers": [asdict(share) for share in known]}, indent=1)
        replace_file(directory / WORKERS, f"{content}\n".encode())


def read_workers(directory: Path) -> list[WorkerShare]:
    """What workers did, each time that the run was at work; none for a run without."""
    return [WorkerShare(**share) for share in read_json(directory / WORKERS, required=False).get("workers", [])]
