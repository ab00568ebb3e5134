"""One AdamW step on many adapters, beside torch's fused AdamW and clip_grad_norm_, one optimizer an adapter.

The first call is checked: random gradients on zero moments. It zeroes them, so that timed calls read zeros as gradients
(8 of the 36 bytes an element). The limit on norms is so low that even those are clipped, which costs more on a CPU.
The smaller of the CPU's cases fits in a large last-level cache: it may be faster than its floor, which is of memory.
"""

import pytest
import torch

import measure
from seal_kernels.adamw import Hyper, adamw_step

GPU = measure.DEVICE.type == "cuda"
# (slots, mean number of elements): at most 2**30 elements, 32 GiB with torch's copies
CASES = [(8, 10**7), (64, 10**7), (512, 2**21)] if GPU else [(8, 10**5), (64, 10**5)]
MAX_NORM = 1e-7


@pytest.mark.parametrize(("S", "elements"), CASES)
def test_adamw(benchmark, record, S, elements):
    sizes = [elements // 48 * 16 * (2 + s % 3) for s in range(S)]  # as of adapters with different ranks
    sizes = [size * S * elements // sum(sizes) // 16 * 16 for size in sizes]
    generator = torch.Generator(measure.DEVICE).manual_seed(0)

    def draw():
        return [torch.randn(size, device=measure.DEVICE, generator=generator) for size in sizes]

    params, grads = draw(), draw()
    exp_avgs, exp_avg_sqs = ([torch.zeros_like(p) for p in params] for _ in range(2))
    hyper = Hyper(
        learning_rate=[0.1 + 1e-4 * s for s in range(S)],
        beta1=[0.9] * S,
        beta2=[1 - 2**-10] * S,  # torch's CUDA step rounds beta2 to float32, then subtracts: 1.3e-5 off for 0.999
        eps=[1e-12] * S,
        weight_decay=[0.01] * S,
        step=[7 + s for s in range(S)],
        max_grad_norm=[MAX_NORM] * S,
    )
    leaves = [p.clone().requires_grad_() for p in params]
    optimizers = []
    for s, leaf in enumerate(leaves):
        leaf.grad = grads[s].clone()
        betas = hyper.beta1[s], hyper.beta2[s]
        optimizer = torch.optim.AdamW(
            [leaf], hyper.learning_rate[s], betas, hyper.eps[s], hyper.weight_decay[s], fused=True
        )
        optimizer.state[leaf] = {
            "step": torch.tensor(hyper.step[s] - 1.0, device=measure.DEVICE),
            "exp_avg": exp_avgs[s].clone(),
            "exp_avg_sq": exp_avg_sqs[s].clone(),
        }
        optimizers.append(optimizer)

    def ours():
        norms = adamw_step(params, grads, exp_avgs, exp_avg_sqs, hyper)
        return (norms, *params, *exp_avgs, *exp_avg_sqs)

    def theirs():
        norms = []
        for leaf, optimizer in zip(leaves, optimizers, strict=True):
            norms.append(torch.nn.utils.clip_grad_norm_([leaf], MAX_NORM))
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        states = [optimizer.state[leaf] for leaf, optimizer in zip(leaves, optimizers, strict=True)]
        return (
            torch.stack(norms),
            *(leaf.detach() for leaf in leaves),
            *(state["exp_avg"] for state in states),
            *(state["exp_avg_sq"] for state in states),
        )

    measure.kernel_rows(
        benchmark, record, f"S={S} elements={sum(sizes):.3g}", ours, theirs,
        bound=1e-5, moved=36 * sum(sizes), flops=0, dtype=torch.float32,
    )  # fmt: skip
