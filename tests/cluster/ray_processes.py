"""The processes of a local Ray: which are workers, and whether any is left."""

import os
import signal
from contextlib import suppress
from pathlib import Path


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
