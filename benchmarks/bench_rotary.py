"""Rotary embedding of queries and keys, forward alone and with backward, at the heads of Qwen2.5-7B."""

import pytest
import torch

import measure
from seal_kernels.rotary import rotary, rotary_ref

GPU = measure.DEVICE.type == "cuda"
T, H, K, E = (16384, 28, 4, 128) if GPU else (2048, 14, 2, 64)
DTYPE = torch.bfloat16 if GPU else torch.float32


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_rotary(benchmark, record, backward):
    q = torch.randn(T, H, E, device=measure.DEVICE, dtype=DTYPE)
    k = torch.randn(T, K, E, device=measure.DEVICE, dtype=DTYPE)
    angles = torch.rand(T, E // 2, device=measure.DEVICE) * 100
    cos, sin = angles.cos(), angles.sin()
    calls = []
    for fn in (rotary, rotary_ref):
        call = lambda q, k, fn=fn: fn(q, k, cos, sin)  # noqa: E731
        calls.append(measure.forward_backward(call, q, k) if backward else lambda call=call: call(q, k))
    moved = (4 if backward else 2) * (q.nbytes + k.nbytes)
    measure.kernel_rows(
        benchmark, record, f"T={T} H={H} K={K} E={E} {'forward+backward' if backward else 'forward'}", *calls,
        bound=2e-2 if GPU else 1e-5, moved=moved, flops=0, dtype=DTYPE,
    )  # fmt: skip
