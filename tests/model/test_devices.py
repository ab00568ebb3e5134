"""How a device's memory is allocated."""

import pytest
import torch

from seal_engine.model.devices import let_memory_grow


@pytest.mark.parametrize(
    ("device", "variable", "asked"),
    [("cuda:0", None, ["expandable_segments:True"]), ("cuda:0", "PYTORCH_CUDA_ALLOC_CONF", []),
     ("cuda:0", "PYTORCH_ALLOC_CONF", []), ("cpu", None, [])],
)  # fmt: skip
def test_a_gpus_memory_grows_unless_the_environment_decides(monkeypatch, device, variable, asked):
    """A CPU's is not touched."""
    settings = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", settings.append)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if variable is not None:
        monkeypatch.setenv(variable, "max_split_size_mb:64")
    let_memory_grow(torch.device(device))
    assert settings == asked
