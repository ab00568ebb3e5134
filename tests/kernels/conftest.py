"""The same tests run three ways: torch on the CPU, Triton's interpreter (TRITON_INTERPRET=1), Triton on a GPU.

The interpreter computes bfloat16 as a GPU does here, and runs the programs of a launch in a random order, with an error
where two of them meet: see tests/gpu.
"""

import os
import random

import pytest
import torch

from seal_kernels.dispatch import INTERPRET

if INTERPRET:
    from gpu import interpreter_bfloat16, interpreter_speed, program_order

    interpreter_bfloat16.install()
    interpreter_speed.install()

SEED = os.environ.get("PROGRAM_ORDER_SEED") or str(random.SystemRandom().randrange(10**6))


@pytest.fixture(autouse=True)
def random_program_order(request):
    """In the interpreter, every launch of a test runs its programs in an order of the seed and the test's name."""
    if not INTERPRET:
        yield
        return
    print(f"programs of launches ran in a random order: PROGRAM_ORDER_SEED={SEED} repeats it")  # shown if it fails
    with program_order.random_program_order(f"{SEED} {request.node.nodeid}"):
        yield


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """Memory that a launcher allocates comes filled with NaN: what a kernel does not write is seen."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor):
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))


def pytest_report_header(config):
    how = "Triton on " + torch.cuda.get_device_name() if torch.cuda.is_available() else "torch on the CPU"
    return f"kernels: {'Triton in its interpreter, on the CPU' if INTERPRET else how}"
