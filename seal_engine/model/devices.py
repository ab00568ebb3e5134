"""Where a model runs: devices, their memory, dtypes, as callers name them."""

import ctypes
import os
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

import torch

from seal_engine.files import show
from seal_engine.model.config import DTYPES
from seal_engine.types import InputError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of glibc's mallopt


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated now.

    On a CPU memory that glibc keeps is not counted while half of the machine's is free without it. Otherwise it goes
    back to the system first, which must clear its pages when they are taken again.
    """
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reusable
    if _available_memory(device) < total_memory(device) // 2:
        return_freed_memory()
    return _available_memory(device)


def _available_memory(device: torch.device) -> int:
    """What the system gives without swapping, in bytes."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return total_memory(device) // 2  # no such file on this system


def is_memory_error(error: Exception) -> bool:
    """Whether a device or the host refused memory; on a CPU torch says so in a RuntimeError."""
    refused = isinstance(error, RuntimeError) and "allocate memory" in str(error)
    return refused or isinstance(error, MemoryError | torch.OutOfMemoryError)


def on_device(device: torch.device) -> AbstractContextManager:
    """Makes the device the current one for the block: kernels are launched on the current CUDA device, whatever device
    their tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def configure_allocator(device: torch.device) -> None:
    """Prepare the device's allocator for passes, unless the environment says how it allocates.

    A GPU's memory is allocated in segments that grow: adapters and passes of many sizes come and go, and would leave
    holes in segments of fixed size, 9 of an H100's 79 GiB after ten sizes of passes. On a CPU glibc keeps what is
    freed: passes free and take the same tensors, whose pages the system would have to clear each time.
    """
    if device.type == "cuda":
        if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
            torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    elif not any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, -1)


def return_freed_memory() -> None:
    """Give the system back what glibc's allocator keeps between live blocks; elsewhere nothing is done."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def release_threads() -> None:
    """End the threads that OpenMP keeps for the calling thread, which come again when it needs them (libgomp; elsewhere
    nothing is done): with another thread's they would be more than the cores, and then all sleep at every barrier."""
    with suppress(OSError, StopIteration, AttributeError):
        lines = Path("/proc/self/maps").read_text().splitlines()
        library = ctypes.CDLL(next(line.split()[-1] for line in lines if "libgomp" in line))
        library.omp_pause_resource_all(1)  # omp_pause_soft


def total_memory(device: torch.device) -> int:
    """Bytes of the device's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def parse_path(path: str | Path) -> Path:
    """A path, or InputError."""
    try:
        return Path(path)
    except TypeError:
        raise InputError(f"path: found {show(path)}; accepted: a str or a Path") from None


def parse_device(device: str | torch.device) -> torch.device:
    """ "auto", "cpu", "cuda", "cuda:N" or a torch.device that is here. InputError otherwise."""
    if device == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        made = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        made = None
    if made is None or made.type not in ("cpu", "cuda"):
        raise InputError(f"device: found {show(device)}; accepted: 'auto', 'cpu', 'cuda', 'cuda:0', ...")
    if made.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not 0 <= (made.index or 0) < count:  # torch takes an index modulo 256, so it may be negative
            raise InputError(f"device: found {show(device)}; accepted: 'auto', 'cpu' (CUDA devices here: {count})")
        made = torch.device("cuda", torch.cuda.current_device() if made.index is None else made.index)
    return made


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """A dtype of parameters; None for "auto". InputError for any other."""
    if dtype == "auto":
        return None
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    if dtype in DTYPES.values():
        return dtype  # pyright: ignore[reportReturnType]
    raise InputError(f"dtype: found {show(dtype)}; accepted: 'auto' or one of {sorted(DTYPES)}")
