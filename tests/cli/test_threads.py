"""The command line limits how long torch's threads spin, before torch is loaded, unless the user has set it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from seal_engine.cli.threads import SPIN_COUNT, WAIT_VARIABLES

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
        pytest.param({}, f"{SPIN_COUNT} None", id="nothing set"),
        pytest.param({"GOMP_SPINCOUNT": "7"}, "7 None", id="the user's spin count wins"),
        pytest.param({"OMP_WAIT_POLICY": "ACTIVE"}, "None ACTIVE", id="the user's wait policy wins"),
        pytest.param({"OMP_NUM_THREADS": "2"}, f"{SPIN_COUNT} None", id="a number of threads says nothing of waiting"),
    ],
)
def test_the_users_setting_wins(user, expected):
    assert process(["-c", SHOW], user).stdout.strip() == expected


def test_the_setting_reaches_openmp():
    """OpenMP prints, as it is loaded, what it has read: the variable was there before torch."""
    printed = process(["-m", "seal_engine", "--help"], {"OMP_DISPLAY_ENV": "VERBOSE"}).stderr
    if "GOMP_SPINCOUNT" not in printed:
        pytest.skip("this torch has another OpenMP than GNU's")
    assert f"GOMP_SPINCOUNT = '{SPIN_COUNT}'" in printed


def test_tests_run_with_it():
    import torch

    assert any(name in os.environ for name in WAIT_VARIABLES)
    if "PYTEST_XDIST_WORKER" in os.environ:
        assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"].split(",")[0])
