"""Attention over a paged cache, decoding and chunked prefill, beside torch on a gathered and padded copy of it."""

import pytest
import torch

import measure
from seal_kernels.paged_attention import paged_attention

GPU = measure.DEVICE.type == "cuda"
H, K, E, B = (28, 4, 128, 16) if GPU else (14, 2, 64, 16)
DTYPE = torch.bfloat16 if GPU else torch.float32
# Contexts and queries of each sequence: short answers, long ones, and the next chunk of prompts that are half read.
CASES = {
    "decode, short": ([200 + 7 * i % 300 for i in range(256)], 1),
    "decode, long": ([1000 + 97 * i % 7000 for i in range(64)], 1),
    "decode, one": ([8000], 1),
    "chunk": ([1024] * 16, 512),
} if GPU else {
    "decode, short": ([30 + 7 * i % 71 for i in range(64)], 1),
    "decode, long": ([1000 + 97 * i % 1000 for i in range(8)], 1),
    "chunk": ([256] * 4, 128),
}  # fmt: skip


def sdpa(q, key_cache, value_cache, tables, contexts, n):
    """All sequences in one call, padded to the longest; the mask keeps to what each query sees."""
    S, width = tables.shape[0], tables.shape[1] * B
    k, v = (cache[tables.long()].view(S, width, K, E).transpose(1, 2) for cache in (key_cache, value_cache))
    last = contexts[:, None] - n + torch.arange(n, device=q.device)  # [S, n]: the position of each query
    seen = torch.arange(width, device=q.device) <= last[:, :, None]
    queries = q.view(S, n, H, E).transpose(1, 2)
    out = torch.nn.functional.scaled_dot_product_attention(queries, k, v, attn_mask=seen[:, None], enable_gqa=True)
    return out.transpose(1, 2).reshape(S * n, H, E)


@pytest.mark.parametrize("case", CASES)
def test_paged_attention(benchmark, record, case):
    sizes, n = CASES[case]
    S, M, generator = len(sizes), -(-max(sizes) // B), torch.Generator().manual_seed(0)
    tables = torch.randperm(S * M, generator=generator).view(S, M).to(measure.DEVICE, torch.int32)
    k, v = (torch.randn(S * M, B, K, E, device=measure.DEVICE, dtype=DTYPE) for _ in range(2))
    q = torch.randn(S * n, H, E, device=measure.DEVICE, dtype=DTYPE)
    contexts = torch.tensor(sizes, dtype=torch.int32, device=measure.DEVICE)
    cu_seqlens = torch.arange(0, S * n + 1, n, dtype=torch.int32, device=measure.DEVICE)
    pairs = sum(n * size - n * (n - 1) // 2 for size in sizes)
    measure.kernel_rows(
        benchmark, record, f"{case}: S={S} T={S * n} context {min(sizes)} to {max(sizes)}",
        lambda: paged_attention(q, k, v, tables, cu_seqlens, contexts, n, max(sizes)),
        lambda: sdpa(q, k, v, tables, contexts, n),
        bound=2e-2 if GPU else 1e-5, moved=2 * q.nbytes + 2 * sum(sizes) * K * E * q.element_size(),
        flops=4 * pairs * H * E, dtype=DTYPE,
    )  # fmt: skip
