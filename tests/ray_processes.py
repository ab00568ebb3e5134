"""Runs on workers as processes of their own: begun, looked at, killed."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from seal_engine.loop.ledger import Ledger
from seal_engine.types import InputError

ROOT = Path(__file__).parents[1]


def begin(*arguments, **options):
    """The command line with these arguments, as a process whose engines have one thread each. options: of Popen."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "seal_engine", *arguments], env=environment, **options)


def wait_for(condition, process, seconds=120):
    """Until the condition holds or the process has ended."""
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.05)


def num_steps(directory):
    """How many steps of a run are recorded; 0 before it has begun."""
    with suppress(InputError), Ledger.read(directory) as ledger:
        return len(ledger.steps())
    return 0


def snapshot(directory):
    """What equal runs have in common, on whatever workers."""
    with Ledger.read(directory) as ledger:
        content = ledger.snapshot()
    for name in ("workers", "ray_address"):
        del content["config"][name]
    return content


def children(pid):
    """Processes whose parent is pid, with their command lines."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, IndexError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == pid:
                    found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
    return found


def descendants(pid):
    """All processes below pid."""
    below = children(pid)
    return below | {k: v for child in list(below) for k, v in descendants(child).items()}


def worker_pids(driver):
    """Processes of the actors of a driver that started its own Ray."""
    return [pid for pid, command in descendants(driver).items() if command.startswith("ray::_Actor")]


def kill_one(driver, draw):
    """SIGKILL for a random worker; returns whether there was one."""
    pids = worker_pids(driver)
    with suppress(ProcessLookupError):
        if pids:
            os.kill(draw.choice(pids), signal.SIGKILL)
            return True
    return False
