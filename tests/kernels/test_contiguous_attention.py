"""A CPU's decode step against the equation in float64, in both ways to compute it."""

import pytest
import torch

from seal_kernels import contiguous_attention as module
from seal_kernels.contiguous_attention import contiguous_attention, decode_rows

NAN = float("nan")
# Of bfloat16: torch's flash kernel has 0.0021, products of all heads 0.0038, as their scores are rounded.
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 0.003}


def expected(q, k, v, kv, context_lens):
    """The equation in float64, for the sequences of kv [2, S, K, W, E] with the new keys and values: [n, H, E]."""
    outs = []
    for i, length in enumerate(context_lens.tolist()):
        keys, values = kv[:, i, :, : length - 1].double()
        keys = torch.cat([keys, k[i].double()[:, None]], 1).repeat_interleave(q.shape[1] // k.shape[1], 0)
        values = torch.cat([values, v[i].double()[:, None]], 1).repeat_interleave(q.shape[1] // k.shape[1], 0)
        weights = (torch.einsum("he,hwe->hw", q[i].double(), keys) * q.shape[2] ** -0.5).softmax(-1)
        outs.append(torch.einsum("hw,hwe->he", weights, values))
    return torch.stack(outs)


@pytest.mark.parametrize("ordered", [True, False], ids=["all rows", "some rows"])
@pytest.mark.parametrize(("n", "K", "G", "E", "W"), [(1, 1, 1, 16, 64), (33, 3, 3, 64, 64), (37, 2, 7, 64, 128)])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "flash"])
def test_attention_of_decoded_tokens(monkeypatch, batched, dtype, n, K, G, E, W, ordered):
    monkeypatch.setattr(module, "packs_all_rows", lambda: batched)
    generator = torch.Generator().manual_seed(n)
    S, T = 1 << (n - 1).bit_length(), n if ordered else n + 5
    lengths = torch.randint(1, W + 1, (n,), generator=generator)
    lengths[0] = W
    kv = torch.randn(2, 2, S, K, W, E, generator=generator).to(dtype)
    kv[:, :, n:] = NAN  # slots that are no sequence's
    heads = torch.randn(T, K * (G + 2), E, generator=generator).to(dtype)
    q, k, v = heads.split([K * G, K, K], 1)
    tokens = None if ordered else torch.randperm(T, generator=generator)[:n]
    rows, before = decode_rows(kv, tokens, lengths), kv.clone()
    assert rows.batched == (batched and dtype == torch.float32)
    out = contiguous_attention(q, k, v, 1, rows)
    q, k, v = (x if tokens is None else x[tokens] for x in (q, k, v))
    assert out.dtype == dtype
    reference = expected(q, k, v, before[1], lengths)
    assert (out.double() - reference).norm() < BOUNDS[dtype] * reference.norm()
    before[1, 0, torch.arange(n), :, lengths - 1], before[1, 1, torch.arange(n), :, lengths - 1] = k, v
    assert torch.equal(kv.nan_to_num(), before.nan_to_num()), "one token of each sequence is written, in one layer"


def test_long_slots_are_read_up_to_what_is_seen(monkeypatch):
    """Products of all heads read whole slots, which is worth it for short ones alone."""
    monkeypatch.setattr(module, "packs_all_rows", lambda: True)
    rows = decode_rows(torch.zeros(1, 2, 1, 1, 256, 64), None, torch.tensor([70]))
    assert not rows.batched
    assert rows.mask.shape == (1, 1, 1, 80)
