"""What every benchmark shares: the machine, its two ceilings, timing, and how results are printed and recorded."""

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from seal_kernels.packed import multiplies_bfloat16, packs

RESULTS = Path(__file__).parent / "results"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def time_rounds(benchmark: Any, fn: Callable[[], Any], rounds: int = 5) -> float:
    """Seconds a call of fn, the fastest of `rounds`, through pytest-benchmark.

    The fastest: on a shared machine everything else only adds.
    """

    def call() -> None:
        fn()
        synchronize()

    benchmark.pedantic(call, rounds=rounds, warmup_rounds=1, iterations=1)
    return benchmark.stats.stats.min


def side_by_side(benchmark: Any, fns: list[Callable[[], Any]], rounds: int = 5, repeats: int = 1) -> list[float]:
    """Seconds a call of each fn, the fastest of `rounds` turns of `repeats` calls; the fns take turns.

    So that a slow spell of the machine meets all of them. A turn of all is what pytest-benchmark sees.
    """
    times = [float("inf")] * len(fns)

    def turn() -> None:
        for i, fn in enumerate(fns):
            start = perf_counter()
            for _ in range(repeats):
                fn()
            synchronize()
            times[i] = min(times[i], (perf_counter() - start) / repeats)

    benchmark.pedantic(turn, rounds=rounds, warmup_rounds=1, iterations=1)
    return times


def fastest(fn: Callable[[], Any], rounds: int = 5) -> float:
    """Seconds a call of fn, the fastest of `rounds`, by the wall clock."""
    fn()
    synchronize()
    times = []
    for _ in range(rounds):
        start = perf_counter()
        fn()
        synchronize()
        times.append(perf_counter() - start)
    return min(times)


def peak_memory(fn: Callable[[], Any]) -> int:
    """Bytes that a call of fn takes at most beyond what is held before it; 0 where the system does not tell."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _status("VmRSS")
        fn()
        return _status("VmHWM") - before
    except OSError:
        fn()
        return 0


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def stolen() -> float:
    """Seconds, a core, in which other machines on the same host had this one's cores; 0 where the system does not tell.

    On a shared host a figure is only as good as this is small.
    """
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        return int(fields[8]) / os.sysconf("SC_CLK_TCK") / (os.cpu_count() or 1)
    except (OSError, IndexError):
        return 0.0


_ceilings: dict[Any, float] = {}


def matrix_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product of random data by the vendor's library: the ceiling for matrix work.

    The best of all calls in this run. On the CPU also of oneDNN's product with a packed matrix, and in float32 unless
    the CPU multiplies bfloat16.
    """
    if DEVICE.type == "cpu" and not multiplies_bfloat16():
        dtype = torch.float32
    n = 8192 if DEVICE.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=DEVICE).to(dtype) for _ in range(2))
    products: list[Callable[[], Any]] = [lambda: a @ b]
    if DEVICE.type == "cpu" and packs(dtype):
        packed = torch.ops.mkldnn._reorder_linear_weight(b, n)
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], ""))
    rate = 2 * n**3 / min(fastest(product, rounds=15) for product in products)
    _ceilings[dtype] = max(rate, _ceilings.get(dtype, 0.0))
    return _ceilings[dtype]


def copy_rate() -> float:
    """Bytes/s of a large device-to-device copy, bytes read plus bytes written: the ceiling for moving data.

    The best of all calls in this run.
    """
    elements = 2**30 if DEVICE.type == "cuda" else 2**26
    a = torch.randn(elements, device=DEVICE)
    b = torch.empty_like(a)
    rate = 2 * a.nbytes / fastest(lambda: b.copy_(a))
    _ceilings["copy"] = max(rate, _ceilings.get("copy", 0.0))
    return _ceilings["copy"]


def kernel_rows(
    benchmark: Any,
    record: Callable[..., None],
    case: str,
    fn: Callable[[], Any],
    baseline: Callable[[], Any],
    bound: float,
    moved: float,
    flops: float,
    dtype: torch.dtype,
) -> None:
    """Check fn against baseline, time both, and record both with their share of the floor.

    fn and baseline return a tensor or a tuple of tensors; they must agree to `bound`, relative, in norm. moved and
    flops: the fewest bytes and FLOPs the job can do; its floor is the longer of the two times at this machine's rates.
    """
    for out, truth in zip(_tensors(fn()), _tensors(baseline()), strict=True):
        error = ((out.double() - truth.double()).norm() / truth.double().norm()).item()
        assert error <= bound, f"{case}: error {error:.2e}, bound {bound:.0e}: no figure for a wrong result"
    repeats = max(1, int(0.02 / max(fastest(fn, rounds=1), 1e-6)))
    bytes_per_s = copy_rate()
    matrix_rate(dtype)
    ours, theirs = side_by_side(benchmark, [fn, baseline], rounds=7, repeats=repeats)
    bytes_floor, flops_floor = moved / max(bytes_per_s, copy_rate()), flops / matrix_rate(dtype)
    floor, limit = max(bytes_floor, flops_floor), "bytes" if bytes_floor > flops_floor else "FLOPs"
    for who, seconds in (("seal_kernels", ours), ("torch", theirs)):
        record(
            case=case,
            dtype=str(dtype).removeprefix("torch."),
            who=who,
            us=seconds * 1e6,
            gb_per_s=moved / seconds / 1e9,
            tflops=flops / seconds / 1e12,
            limit=limit,
            percent_of_floor=100 * floor / seconds,
        )


def _tensors(outs: Any) -> tuple[torch.Tensor, ...]:
    return outs if isinstance(outs, tuple) else (outs,)


def forward_backward(fn: Callable[..., Any], *inputs: torch.Tensor) -> Callable[[], tuple[torch.Tensor, ...]]:
    """A call that runs fn(*inputs) and its backward with a fixed random gradient, and returns outputs and gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.no_grad():
        outs = _tensors(fn(*inputs))
    generator = torch.Generator(inputs[0].device).manual_seed(0)
    grads = [torch.randn(out.shape, device=out.device, generator=generator).to(out.dtype) for out in outs]

    def call() -> tuple[torch.Tensor, ...]:
        outs = _tensors(fn(*leaves))
        return tuple(out.detach() for out in outs) + torch.autograd.grad(outs, leaves, grads)

    return call


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    if DEVICE.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=RESULTS).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as text columns; numbers to four figures."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [[_cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def report(name: str, rows: list[dict[str, Any]], directory: Path | None) -> str:
    """The machine line, the table and one JSON line; the JSON also goes to directory/<name>.json if given."""
    where = machine()
    result = {"benchmark": name, "machine": where, "rows": rows}
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    return "\n".join([f"{name}: " + ", ".join(map(str, where.values())), table(rows), json.dumps(result)])
