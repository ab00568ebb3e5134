"""How a device's memory is allocated."""

import os
import subprocess
import sys

import pytest
import torch

from seal_engine.model import devices
from seal_engine.model.devices import configure_allocator, free_memory

# Frees and takes again 64 MiB a hundred times, more than glibc keeps by any threshold, and prints how many pages the
# system had to clear.
FAULTS = """
import resource, torch
from seal_engine.model.devices import configure_allocator, return_freed_memory

def cleared():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    return int(open("/proc/self/statm").read().split()[1])

configure_allocator(torch.device("cpu"))
before = cleared()
for _ in range(100):
    tensor = torch.ones(2**24)
    del tensor
faults, kept = cleared() - before, resident()
return_freed_memory()
print(faults, kept - resident())
"""
PAGES = 2**26 // os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("device", "variable", "asked"),
    [("cuda:0", None, ["expandable_segments:True"]), ("cuda:0", "PYTORCH_CUDA_ALLOC_CONF", []),
     ("cuda:0", "PYTORCH_ALLOC_CONF", []), ("cpu", None, [])],
)  # fmt: skip
def test_a_gpus_memory_grows_unless_the_environment_decides(monkeypatch, device, variable, asked):
    """A CPU's is glibc's."""
    settings = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", settings.append)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if variable is not None:
        monkeypatch.setenv(variable, "max_split_size_mb:64")
    configure_allocator(torch.device(device))
    assert settings == asked


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="counts pages as Linux does")
def test_a_cpu_keeps_freed_memory_until_it_is_returned():
    """A hundred passes over 64 MiB: their pages are cleared about once, where glibc by itself clears them each time;
    what is kept goes back when it is asked for. A user's setting stands."""

    def run(**environment: str) -> tuple[int, int]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        command = [sys.executable, "-c", FAULTS]
        out = subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=True).stdout
        faults, returned = out.split()
        return int(faults), int(returned)

    faults, returned = run()
    assert faults < 4 * PAGES, "pages are cleared again and again"
    assert returned > PAGES // 2, "free pages stay"
    assert run(MALLOC_MMAP_THRESHOLD_="1000000")[0] > 50 * PAGES, "a user's setting is overruled"


@pytest.mark.parametrize(("available", "trims"), [(6, 0), (4, 1)])
def test_a_cpus_kept_memory_goes_back_before_it_is_counted_only_where_memory_is_short(monkeypatch, available, trims):
    """Of 10 bytes 6 are free, or 4 and 5 once what is kept has gone back."""
    returned = []
    monkeypatch.setattr(devices, "total_memory", lambda device: 10)
    monkeypatch.setattr(devices, "return_freed_memory", lambda: returned.append(1))
    monkeypatch.setattr(devices, "_available_memory", lambda device: available + len(returned))
    assert free_memory(torch.device("cpu")) == available + trims
    assert len(returned) == trims


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="counts threads as Linux does")
def test_the_threads_of_a_thread_that_computes_no_more_end():
    """Three of four: they come again with the next parallel loop."""
    program = """
import os, torch
from seal_engine.model.devices import release_threads
torch.set_num_threads(4)
def threads():
    torch.ones(2**22).exp_()
    return len(os.listdir("/proc/self/task"))
before = threads()
release_threads()
released = len(os.listdir("/proc/self/task"))
print(before - released, threads() - released)
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["3", "3"]
