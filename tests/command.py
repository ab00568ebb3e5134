"""seal-engine as a process of its own, warnings being errors."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_command(*arguments):
    """The running process; pytest shows what it prints."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-m", "seal_engine", *map(str, arguments)]
    return subprocess.Popen(command, env=environment)
