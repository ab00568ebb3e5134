"""SwiGLU, forward alone and forward with backward, at the intermediate size of Qwen2.5-7B."""

import pytest
import torch

import measure
from seal_kernels.swiglu import swiglu, swiglu_ref

GPU = measure.DEVICE.type == "cuda"
T, F = (8192, 18944) if GPU else (1024, 4864)
DTYPE = torch.bfloat16 if GPU else torch.float32


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_swiglu(benchmark, record, backward):
    gate_up = torch.randn(T, 2 * F, device=measure.DEVICE, dtype=DTYPE)
    calls = [
        measure.forward_backward(fn, gate_up) if backward else lambda fn=fn: fn(gate_up) for fn in (swiglu, swiglu_ref)
    ]
    moved = gate_up.nbytes * (4 if backward else 1.5)
    measure.kernel_rows(
        benchmark, record, f"T={T} F={F} {'forward+backward' if backward else 'forward'}", *calls,
        bound=2e-2 if GPU else 1e-5, moved=moved, flops=0, dtype=DTYPE,
    )  # fmt: skip
