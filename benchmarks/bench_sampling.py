"""Drawing tokens, beside the usual torch: sort, softmax, cumulative sum, and the first token past a random number.

Two kinds of rows: logits of one normal distribution, of which top-p keeps 13,000, and rows in which 300 tokens are
likely, as a language model's mostly are. Without log-probabilities, as the sampler draws.
"""

import pytest
import torch

import measure
from seal_kernels.sampling import sample_tokens, uniform

GPU = measure.DEVICE.type == "cuda"
V = 152_064 if GPU else 8192
SETTINGS = {  # temperature, top_k, top_p
    "greedy": (0.0, 0, 1.0),
    "temperature": (0.7, 0, 1.0),
    "top-p": (1.0, 0, 0.95),
    "top-k and top-p": (1.0, 50, 0.9),
}
CASES = [(name, N, 0) for N in ((256, 50) if GPU else (64,)) for name in SETTINGS]  # settings, rows, likely tokens
CASES += [("top-p", N, 300) for name, N, _ in CASES if name == "top-p"]


def usual(logits, temperature, top_k, top_p, u):
    if temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
    else:
        scores = logits / temperature
        if top_k:
            scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], float("-inf"))
        if top_p < 1:
            ordered, index = scores.sort(dim=-1, descending=True)
            before = ordered.softmax(-1).cumsum(-1).roll(1, -1)
            before[:, 0] = 0
            scores = scores.scatter(1, index, ordered.masked_fill(before >= top_p, float("-inf")))
        mass = scores.softmax(-1).cumsum(-1)
        tokens = torch.searchsorted(mass, u * mass[:, -1:], right=True).clamp_max(logits.shape[1] - 1)
    return tokens.squeeze(1)


@pytest.mark.parametrize(("name", "N", "likely"), CASES)
def test_sampling(benchmark, record, name, N, likely):
    """Both draw by the same random numbers. Where one lies next to a border between two tokens, rounding decides: the
    bound lets some rows of sampled cases differ."""
    temperature, top_k, top_p = SETTINGS[name]
    logits = torch.randn(N, V, generator=torch.Generator().manual_seed(0)) * 3
    if likely:
        logits[:, :likely] = torch.linspace(22, 8, likely)
    logits = logits.to(measure.DEVICE)
    seeds, counters = torch.zeros(N, dtype=torch.int64), torch.arange(N)
    u = uniform(seeds, counters)[:, None].to(measure.DEVICE, torch.float32)
    settings = ((temperature, torch.float32), (top_k, torch.int32), (top_p, torch.float32))
    args = [torch.full((N,), value, dtype=dtype, device=measure.DEVICE) for value, dtype in settings]
    args += [seeds.to(measure.DEVICE), counters.to(measure.DEVICE)]
    measure.kernel_rows(
        benchmark, record, f"{name}{f', {likely} likely' if likely else ''}: N={N} V={V}",
        lambda: sample_tokens(logits, *args, with_logprobs=False)[0],
        lambda: usual(logits, temperature, top_k, top_p, u),
        bound=1e-5 if temperature == 0 else 0.25, moved=logits.nbytes, flops=0, dtype=logits.dtype,
    )  # fmt: skip
