"""The command line limits how long torch's threads spin, before torch is loaded, unless the user has set it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from seal_engine.cli import threads
from seal_engine.cli.threads import SPIN_COUNT_ALONE, SPIN_COUNT_BESIDE_OTHERS, WAIT_VARIABLES, others_need_cores

ROOT = Path(__file__).parents[2]
SHOW = """
import os, sys
import seal_engine.cli
assert "torch" not in sys.modules
print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY"))
"""


def process(arguments, user):
    """A Python process whose wait variables are the user's alone."""
    environment = {name: value for name, value in os.environ.items() if name not in WAIT_VARIABLES}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", **user}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=True)


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        pytest.param({"GOMP_SPINCOUNT": "7"}, "7 None", id="the user's spin count wins"),
        pytest.param({"OMP_WAIT_POLICY": "ACTIVE"}, "None ACTIVE", id="the user's wait policy wins"),
    ],
)
def test_the_users_setting_wins(user, expected):
    assert process(["-c", SHOW], user).stdout.strip() == expected


def test_one_of_two_counts_is_set():
    """Which one depends on what else runs on the machine. A number of threads says nothing of waiting."""
    for user in ({}, {"OMP_NUM_THREADS": "2"}):
        count, policy = process(["-c", SHOW], user).stdout.split()
        assert int(count) in (SPIN_COUNT_ALONE, SPIN_COUNT_BESIDE_OTHERS)
        assert policy == "None"


@pytest.mark.parametrize(
    ("cores", "usable", "running", "crowded"),
    [
        pytest.param(2, 2, 1, False, id="this process alone"),
        pytest.param(2, 2, 2, True, id="another one runs"),
        pytest.param(64, 2, 63, False, id="two of 64 cores are idle"),
        pytest.param(64, 2, 64, True, id="one of 64 cores is idle"),
    ],
)
def test_others_are_counted(monkeypatch, cores, usable, running, crowded):
    """This process is one of those that run: cores less the others must be as many as it may use."""
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(usable)))
    monkeypatch.setattr(Path, "read_text", lambda path: f"0.1 0.2 0.3 {running}/400 12345\n")
    assert others_need_cores(samples=3, pause=0) is crowded


def test_a_system_that_does_not_count(monkeypatch):
    monkeypatch.setattr(threads, "Path", lambda name: Path("/nonexistent"))
    assert others_need_cores() is False


def test_the_setting_reaches_openmp():
    """OpenMP prints, as it is loaded, what it has read: the variable was there before torch."""
    printed = process(["-m", "seal_engine", "--help"], {"OMP_DISPLAY_ENV": "VERBOSE"}).stderr
    if "GOMP_SPINCOUNT" not in printed:
        pytest.skip("this torch has another OpenMP than GNU's")
    counts = SPIN_COUNT_ALONE, SPIN_COUNT_BESIDE_OTHERS
    assert any(f"GOMP_SPINCOUNT = '{count}'" in printed for count in counts)


def test_tests_run_with_it():
    import torch

    assert any(name in os.environ for name in WAIT_VARIABLES)
    if "PYTEST_XDIST_WORKER" in os.environ:
        assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"].split(",")[0])
