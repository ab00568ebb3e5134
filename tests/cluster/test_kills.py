"""A run on workers whose workers and driver are killed: it ends with the ledger of a run on no workers, bit for bit."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from ray_processes import begin, descendants, kill_one, num_steps, snapshot, wait_for

SMALL = ["--rounds=1", "--contexts=6", "--self-edits=3", "--held-out-contexts=6", "--passage-copies=0"]
pytest.importorskip("ray", reason="Ray is not installed: pip install 'seal-engine[ray]'")
pytestmark = pytest.mark.xdist_group("ray")


@pytest.fixture
def start():
    """Begins a run in a directory on so many workers, in a process group of its own as in a terminal; whatever is not
    over at the end of the test is killed."""
    begun = []

    def start(directory, workers):
        options = f"--out={directory}", f"--workers={workers}", "--deterministic", "--quiet"
        begun.append(begin("run", "miniature", *options, *SMALL, process_group=0))
        return begun[-1]

    yield start
    for process in begun:
        process.kill()
        process.wait()


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


def test_a_run_whose_workers_and_driver_are_killed(tmp_path, start):
    """A worker is killed soon after two steps are recorded, the driver after four, and another worker after six, in the
    second attempt. The kill of the driver ends its workers, for nobody else would; two agents of Ray's stay for a
    minute."""
    draw, directory = random.Random(0), tmp_path / "there"
    here, there = start(tmp_path / "here", 0), start(directory, 2)
    wait_for(lambda: num_steps(directory) >= 2, there)
    time.sleep(draw.uniform(0, 0.3))
    assert kill_one(there.pid, draw)
    wait_for(lambda: num_steps(directory) >= 4, there)
    processes = [pid for pid, command in descendants(there.pid).items() if "Agent" not in command]
    assert there.poll() is None
    there.kill()
    there.wait()
    again = start(directory, 2)
    wait_for(lambda: num_steps(directory) >= 6, again)
    time.sleep(draw.uniform(0, 0.3))
    assert kill_one(again.pid, draw)
    assert (here.wait(), again.wait()) == (0, 0)
    assert snapshot(tmp_path / "here") == snapshot(directory)
    assert gone(processes)


@pytest.mark.parametrize("at_work", [False, True], ids=["while Ray starts", "while workers are at work"])
def test_an_interrupt_ends_a_run_and_all_its_processes(tmp_path, start, at_work):
    """Ctrl-C: exit status 130, and nothing is left. Without that, two of Ray's agents would stay for a minute."""
    process, processes = start(tmp_path / "run", 2), {}

    def ray_starts():
        processes.update(descendants(process.pid))
        return any("/ray/" in command for command in processes.values())

    wait_for(lambda: num_steps(tmp_path / "run") >= 1 if at_work else ray_starts(), process)
    interrupted = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    while process.poll() is None:
        assert time.monotonic() < interrupted + 60
        processes |= descendants(process.pid)
        time.sleep(0.05)
    print(f"ended {time.monotonic() - interrupted:.1f} s after the interrupt")
    assert process.returncode == 130
    assert processes
    assert gone(processes)
