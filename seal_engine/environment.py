"""What a run goes on: versions, commit and machine, for its report."""

import json
import os
import platform
import subprocess
from pathlib import Path

import torch

import seal_engine
from seal_engine.files import read_json, replace_file

ENVIRONMENT = "environment.json"  # in a run's directory, the last one being the latest


def describe_environment(device: torch.device) -> dict[str, str]:
    """Name -> text: of this program, what it is written with, and the machine with the device that computes."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "none used"
    return {
        "seal_engine": seal_engine.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "CPU": f"{_cpu_name()}, cores: {os.cpu_count()}, threads used: {torch.get_num_threads()}",
        "GPU": name,
    }


def record_environment(directory: Path, device: torch.device) -> None:
    """Add the environment to those that a run has gone on in, unless it is still the latest of them."""
    known, now = read_environments(directory), describe_environment(device)
    if known[-1:] != [now]:
        replace_file(directory / ENVIRONMENT, (json.dumps({"environments": [*known, now]}, indent=1) + "\n").encode())


def read_environments(directory: Path) -> list[dict[str, str]]:
    """Those that a run has gone on in; none for a run of an earlier version."""
    return read_json(directory / ENVIRONMENT, required=False).get("environments", [])


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    """Of the checkout that this package is part of; an installed copy has none."""
    package = Path(__file__).parent
    try:
        for command in (["ls-files", "--error-unmatch", Path(__file__).name], ["describe", "--always", "--dirty"]):
            done = subprocess.run(["git", *command], cwd=package, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "none: not a checkout"
    return done.stdout.strip()
