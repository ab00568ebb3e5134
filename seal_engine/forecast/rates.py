"""What a forecast takes for granted: rates of GPUs, costs of launches, and how many launches and waits there are."""

from typing import NamedTuple


class Gpu(NamedTuple):
    """Memory in bytes, FLOP/s of bfloat16 products, and bytes/s of a copy on the device, read and written."""

    memory: int
    matrix_rate: float
    copy_rate: float
    source: str


_MEASURED = "measured with torch 2.11: an 8192 x 8192 x 8192 bfloat16 product of random data, a copy on the device"
GPUS = {
    "h100": Gpu(78 << 30, 798e12, 3.0e12, f"NVIDIA H100 80GB HBM3; {_MEASURED}"),
    "h200": Gpu(139 << 30, 788e12, 4.3e12, f"NVIDIA H200; {_MEASURED}"),
}


class Assumption(NamedTuple):
    """A number and where it is from; seconds unless its name says otherwise."""

    value: float
    source: str


_HOST = "measured on a CPU: benchmarks/results/bench_forecast_cpu.json"
_H100 = "measured on a machine with an H100: benchmarks/results/bench_forecast_cuda.json"
ASSUMED = {
    "host: launch of torch": Assumption(13e-6, _H100),
    "host: launch of Triton": Assumption(85e-6, f"{_H100}; in training, with its share of autograd"),
    "host: launch of a graph": Assumption(3e-6, _H100),
    "host: wait": Assumption(10e-6, f"{_H100}; once the device is idle"),
    "host: training pass": Assumption(1.6e-3, _HOST),
    "host: adapter of a training pass": Assumption(23e-6, _HOST),
    "host: sampling step": Assumption(0.19e-3, _HOST),
    "host: sequence of a sampling step": Assumption(6.5e-6, _HOST),
    "host: page-locking, bytes/s": Assumption(3.35e9, _H100),
    "link of host and device, bytes/s": Assumption(55e9, f"{_H100}; page-locked memory"),
    "device: kernel": Assumption(2e-6, "a guess: its start and end, in which no other kernel runs"),
    "device: kernel of a graph": Assumption(1.0e-6, _H100),
    "device: share of its rates": Assumption(0.87, f"{_H100}; products of Qwen2.5-7B's layers for three seconds"),
}  # fmt: skip


class Count(NamedTuple):
    """Launches of torch's and of Triton's kernels, and waits of the host for the device, which come first."""

    torch: int = 0
    triton: int = 0
    waits: int = 0


# A phase's count is the sum over its units; "group" is an adapted group of projections of a layer. Counted on the
# pretended device with Qwen2's layers: tests/gpu/test_forecast_counts.py compares exactly, and where something has
# changed its message is this table as it should be. The -1: the first layer's input has no gradient.
COUNTS: dict[str, dict[str, Count]] = {
    "adapter made": {"adapter": Count(3, 0, 0), "kind of group": Count(1, 0, 0)},
    "graphed pass": {"once": Count(8, 0, 0)},
    "packing": {"once": Count(3, 0, 0)},
    "forward": {"once": Count(4, 1, 0), "layer": Count(4, 5, 0), "group": Count(0, 2, 0)},
    "loss": {"once": Count(6, 0, 0), "job": Count(0, 0, 0), "chunk": Count(2, 1, 0)},
    "backward": {"once": Count(4, -1, 0), "job": Count(0, 0, 0), "layer": Count(5, 7, 0), "group": Count(0, 4, 0)},
    "MLP again": {"layer": Count(1, 1, 0), "adapted_layer": Count(2, 5, 0)},
    "layer again": {"layer": Count(3, 7, 0), "adapted_layer": Count(4, 13, 0)},
    "optimizer": {"once": Count(2, 3, 0)},
    "batch": {"once": Count(1, 0, 0), "new_adapters": Count(2, 0, 0)},
    "paged forward": {"once": Count(4, 1, 0), "layer": Count(4, 7, 0), "group": Count(0, 2, 0)},
    "graph's tensors": {"once": Count(2, 0, 0), "adapters": Count(0, 0, 0)},
    "sample": {"once": Count(2, 1, 0), "prompts": Count(1, 0, 0)},
    "merge": {"projection": Count(12, 0, 1)},
}


def assumed(name: str) -> float:
    """The value of an assumption."""
    return ASSUMED[name].value


def launches(phase: str, **units: int) -> Count:
    """The count of a phase with so many of its units."""
    rows = [(COUNTS[phase][unit], n) for unit, n in units.items()]
    return Count(*(sum(n * count[i] for count, n in rows) for i in range(3)))
