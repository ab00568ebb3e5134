"""lm_head and loss together, forward with backward, at the vocabulary of Qwen2.5-7B on a GPU."""

import torch

import measure
from seal_kernels.cross_entropy import cross_entropy, cross_entropy_ref

GPU = measure.DEVICE.type == "cuda"
T, D, V = (4096, 3584, 152064) if GPU else (1024, 896, 8192)
DTYPE = torch.bfloat16 if GPU else torch.float32


def test_cross_entropy(benchmark, record):
    hidden = torch.randn(T, D, device=measure.DEVICE, dtype=DTYPE)
    weight = torch.randn(V, D, device=measure.DEVICE, dtype=DTYPE) * 0.02
    targets = torch.randint(V, (T,), device=measure.DEVICE)
    calls = [
        measure.forward_backward(lambda h, fn=fn: fn(h, weight, targets)[0], hidden)
        for fn in (cross_entropy, cross_entropy_ref)
    ]
    measure.kernel_rows(
        benchmark, record, f"T={T} D={D} V={V} forward+backward", *calls,
        bound=2e-2 if GPU else 1e-5, moved=2 * weight.nbytes, flops=4 * T * D * V, dtype=DTYPE,
    )  # fmt: skip
