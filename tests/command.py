"""seal-engine as a process of its own."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["seal_engine.cli.run"])


def run_command(*arguments):
    """The running process, warnings being errors; pytest shows what it prints."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-m", "seal_engine", *map(str, arguments)]
    return subprocess.Popen(command, env=environment)


def fork_command(*arguments):
    """The running process, forked from one that has done nothing but import torch and the command line.

    It begins at once, so that a test can kill and begin it many times.
    """
    process = FORKSERVER.Process(target=_main, args=(list(map(str, arguments)),))
    process.start()
    return process


def _main(arguments):
    import torch

    from seal_engine.cli.main import main

    torch.set_num_threads(1)
    sys.exit(main(arguments))
