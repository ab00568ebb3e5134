"""What the process asks of its C libraries: memory back, threads ended. Without glibc and libgomp, nothing."""

import ctypes
from contextlib import suppress
from pathlib import Path


def return_free_memory() -> None:
    """Give the system back what the allocator keeps between live blocks (glibc; elsewhere nothing is done): steps of
    changing shapes would otherwise let a process that serves for days grow by fragmentation."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def release_threads() -> None:
    """End the threads that OpenMP keeps for the calling thread (libgomp; elsewhere nothing is done): with the worker's
    they would be more than the cores, and libgomp then lets all of them sleep at every barrier."""
    with suppress(OSError, StopIteration, AttributeError):
        lines = Path("/proc/self/maps").read_text().splitlines()
        library = ctypes.CDLL(next(line.split()[-1] for line in lines if "libgomp" in line))
        library.omp_pause_resource_all(1)  # omp_pause_soft
