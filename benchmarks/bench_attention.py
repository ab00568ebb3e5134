"""Packed causal attention on ragged sequences, beside torch's scaled_dot_product_attention, one sequence at a time."""

from itertools import pairwise

import pytest
import torch

import measure
from seal_kernels.attention import attention

GPU = measure.DEVICE.type == "cuda"
H, K, E = (28, 4, 128) if GPU else (14, 2, 64)
DTYPE = torch.bfloat16 if GPU else torch.float32
# The second is what an inner loop sees: many sequences of about 50 tokens.
LENGTHS = {"long": [2048] * 8, "short": [20 + i % 61 for i in range(256)]} if GPU else {
    "long": [512] * 4, "short": [20 + i % 61 for i in range(32)]
}  # fmt: skip


def sdpa(q, k, v, bounds):
    outs = []
    for start, end in pairwise(bounds):
        parts = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_attention(benchmark, record, lengths, backward):
    sizes = LENGTHS[lengths]
    T, pairs = sum(sizes), sum(n * (n + 1) // 2 for n in sizes)
    bounds = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=measure.DEVICE)
    q = torch.randn(T, H, E, device=measure.DEVICE, dtype=DTYPE)
    k, v = (torch.randn(T, K, E, device=measure.DEVICE, dtype=DTYPE) for _ in range(2))
    ours = lambda q, k, v: attention(q, k, v, cu_seqlens, max(sizes))  # noqa: E731
    theirs = lambda q, k, v: sdpa(q, k, v, bounds)  # noqa: E731
    calls = [measure.forward_backward(fn, q, k, v) if backward else lambda fn=fn: fn(q, k, v) for fn in (ours, theirs)]
    forward_bytes = 2 * q.nbytes + k.nbytes + v.nbytes
    measure.kernel_rows(
        benchmark, record, f"{lengths}: S={len(sizes)} T={T} {'forward+backward' if backward else 'forward'}", *calls,
        bound=2e-2 if GPU else 1e-5, moved=forward_bytes * (3.5 if backward else 1),
        flops=(14 if backward else 4) * pairs * H * E, dtype=DTYPE,
    )  # fmt: skip
