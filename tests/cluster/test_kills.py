"""A run on workers whose workers and driver are killed: it ends with the ledger of a run on no workers, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from ray_processes import descendants, kill_one

from seal_engine.loop.ledger import Ledger
from seal_engine.types import InputError

ROOT = Path(__file__).parents[2]
SMALL = ["--rounds=1", "--contexts=6", "--self-edits=3", "--held-out-contexts=6", "--passage-copies=0"]
pytest.importorskip("ray", reason="Ray is not installed: pip install 'seal-engine[ray]'")
pytestmark = pytest.mark.xdist_group("ray")


@pytest.fixture
def begin():
    """Begins a run in a directory on so many workers; whatever is not over at the end of the test is killed."""
    begun = []

    def start(directory, workers):
        environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "seal_engine", "run", "miniature", "--out", str(directory), "--deterministic"]
        begun.append(subprocess.Popen([*command, f"--workers={workers}", "--quiet", *SMALL], env=environment))
        return begun[-1]

    yield start
    for process in begun:
        process.kill()
        process.wait()


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
    """Whether all processes end."""
    end = time.monotonic() + seconds
    while any(map(is_running, processes)) and time.monotonic() < end:
        time.sleep(0.1)
    return not any(map(is_running, processes))


def test_a_run_whose_workers_and_driver_are_killed(tmp_path, begin):
    """A worker is killed soon after two steps are recorded, the driver after four, and another worker after six, in the
    second attempt. The kill of the driver ends its workers, for nobody else would; two agents of Ray's stay for a
    minute."""
    draw, directory = random.Random(0), tmp_path / "there"
    here, there = begin(tmp_path / "here", 0), begin(directory, 2)
    wait_for(lambda: num_steps(directory) >= 2, there)
    time.sleep(draw.uniform(0, 0.3))
    assert kill_one(there.pid, draw)
    wait_for(lambda: num_steps(directory) >= 4, there)
    processes = [pid for pid, command in descendants(there.pid).items() if "Agent" not in command]
    assert there.poll() is None
    there.kill()
    there.wait()
    again = begin(directory, 2)
    wait_for(lambda: num_steps(directory) >= 6, again)
    time.sleep(draw.uniform(0, 0.3))
    assert kill_one(again.pid, draw)
    assert (here.wait(), again.wait()) == (0, 0)
    assert snapshot(tmp_path / "here") == snapshot(directory)
    assert gone(processes)


def test_an_interrupt_ends_a_run_and_all_its_processes(tmp_path, begin):
    """Ctrl-C while workers are at work: exit status 130, and nothing is left."""
    process = begin(tmp_path / "run", 2)
    wait_for(lambda: num_steps(tmp_path / "run") >= 1, process)
    processes = list(descendants(process.pid))
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    print(f"ended {time.monotonic() - start:.1f} s after the interrupt")
    assert gone(processes)
