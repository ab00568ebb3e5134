"""RMS norm with residual, forward alone and forward with backward, at the hidden size of Qwen2.5-7B."""

import pytest
import torch

import measure
from seal_kernels.rms_norm import add_rms_norm, add_rms_norm_ref

GPU = measure.DEVICE.type == "cuda"
T, D = (16384, 3584) if GPU else (2048, 896)
DTYPE = torch.bfloat16 if GPU else torch.float32


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_add_rms_norm(benchmark, record, backward):
    x, residual = (torch.randn(T, D, device=measure.DEVICE, dtype=DTYPE) for _ in range(2))
    weight = torch.randn(D, device=measure.DEVICE, dtype=DTYPE)
    calls = []
    for fn in (add_rms_norm, add_rms_norm_ref):
        call = lambda x, r, fn=fn: fn(x, r, weight, 1e-6)  # noqa: E731
        calls.append(measure.forward_backward(call, x, residual) if backward else lambda call=call: call(x, residual))
    moved = (8 if backward else 4) * x.nbytes
    measure.kernel_rows(
        benchmark, record, f"T={T} D={D} {'forward+backward' if backward else 'forward'}", *calls,
        bound=2e-2 if GPU else 1e-5, moved=moved, flops=0, dtype=DTYPE,
    )  # fmt: skip
