"""A run on workers whose workers and driver are killed: it ends with the ledger of a run on no workers, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray_processes import descendants, kill_one, worker_pids

from seal_engine.loop.ledger import Ledger

ROOT = Path(__file__).parents[2]
SMALL = ["--rounds=1", "--contexts=3", "--self-edits=2", "--held-out-contexts=3", "--passage-copies=0"]
pytest.importorskip("ray", reason="Ray is not installed: pip install 'seal-engine[ray]'")
pytestmark = pytest.mark.xdist_group("ray")


def begin(directory, workers):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "seal_engine", "run", "miniature", "--out", str(directory), "--deterministic"]
    return subprocess.Popen([*command, f"--workers={workers}", "--quiet", *SMALL], env=environment)


def wait_for(condition, process, seconds=120):
    """Until the condition holds or the process has ended."""
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.05)


def snapshot(directory):
    with Ledger.read(directory) as ledger:
        shown = ledger.snapshot()
    del shown["config"]["workers"]
    return shown


def is_running(pid):
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(processes, seconds=30):
    """Whether all processes end: Ray's agents look every few seconds whether their parent is there."""
    end = time.monotonic() + seconds
    while any(map(is_running, processes)) and time.monotonic() < end:
        time.sleep(0.1)
    return not any(map(is_running, processes))


def test_a_run_whose_workers_and_driver_are_killed(tmp_path):
    """A worker is killed at a random moment, then the driver, in the second attempt another worker. The kill of the
    driver leaves no process, for nobody would end them."""
    draw = random.Random(0)
    here = begin(tmp_path / "here", 0)
    there = begin(tmp_path / "there", 2)
    wait_for(lambda: len(worker_pids(there.pid)) == 2, there)
    time.sleep(draw.uniform(2, 4))
    assert kill_one(there.pid, draw)
    time.sleep(draw.uniform(0, 2))
    processes = list(descendants(there.pid))
    there.kill()
    there.wait()
    again = begin(tmp_path / "there", 2)
    wait_for(lambda: len(worker_pids(again.pid)) == 2, again)
    time.sleep(draw.uniform(3, 5))
    assert kill_one(again.pid, draw)
    assert (here.wait(), again.wait()) == (0, 0)
    assert snapshot(tmp_path / "here") == snapshot(tmp_path / "there")
    assert gone(processes)


def test_an_interrupt_ends_a_run_and_all_its_processes(tmp_path):
    """Ctrl-C while workers are at work: exit status 130, and within seconds nothing is left."""
    process = begin(tmp_path / "run", 2)
    wait_for(lambda: len(worker_pids(process.pid)) == 2, process)
    time.sleep(2)
    processes = list(descendants(process.pid))
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    print(f"ended {time.monotonic() - start:.1f} s after the interrupt")
    assert gone(processes)
