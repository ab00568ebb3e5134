"""The same tests run three ways: torch on the CPU, Triton's interpreter (TRITON_INTERPRET=1), Triton on a GPU."""

import pytest
import torch

from seal_kernels.dispatch import INTERPRET


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
