"""Many adapters on one frozen projection, forward with backward, beside the frozen product alone and a loop in torch.

Every adapter owns one segment of T tokens; segments are ragged. Three rows a case:

    whole      lora_linear; its floor is of the fewest bytes and FLOPs that products and adapters can do together
    low-rank   what adapters add: whole less frozen_linear at the same shape, the two taking turns (percent_on_top). The
               product being the vendor's, that takes passes of its own: its floor reads x twice and dy once, reads and
               writes y and dx once, writes h and dh once, reads h twice and dh once, and moves the adapters as below
    loop       torch's product and a Python loop over the segments, under autograd

Adapters are float32: A and B are read in forward and in backward, their gradients read and written.
"""

from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch

import measure
from seal_engine.model.adapter_layout import GROUPS, ProjectionGroup, projection_sizes
from seal_engine.model.adapters import Adapter
from seal_engine.model.config import ModelConfig
from seal_engine.model.lora_batch import LoraBatch
from seal_engine.types import LoraConfig
from seal_kernels.linear import frozen_linear
from seal_kernels.lora import LoraGroup, lora_linear, lora_linear_ref
from shapes import SHAPES

GPU = measure.DEVICE.type == "cuda"
# (shape, dtype, tokens, group of projections, adapters, rank)
if GPU:
    SETTING = ("qwen2.5-7b", torch.bfloat16, 8192)
    CASES = [(*SETTING, name, adapters, 32) for name in ("qkv", "down") for adapters in (1, 8, 64, 256, 512)]
    CASES += [(*SETTING, "gate_up", 64, rank) for rank in (8, 32, 64, 128)] + [(*SETTING, "o", 64, 32)]
else:
    SETTINGS = [(shape, torch.float32, 1024) for shape in ("2m", "97m")]
    CASES = [(*s, "qkv", adapters, rank) for s in SETTINGS for rank in (8, 32) for adapters in (1, 8, 32, 128)]
    CASES += [(*s, name, 32, 32) for s in SETTINGS for name in ("gate_up", "down")]


@cache
def ceilings(dtype: torch.dtype) -> tuple[float, float]:
    """Bytes/s and FLOP/s, measured once for all cases: each takes seconds on a CPU."""
    return measure.copy_rate(), measure.matrix_rate(dtype)


def ragged(T: int, count: int) -> list[int]:
    """`count` lengths between about a fifth and nine fifths of their mean, T together."""
    jitter = 0.8 * torch.rand(count - 1, generator=torch.Generator().manual_seed(0)) - 0.4
    cuts = [int((1 + s + jitter[s]) * T / count) for s in range(count - 1)]
    return [end - start for start, end in pairwise([0, *cuts, T])]


def loop(x: torch.Tensor, weight: torch.Tensor, group: LoraGroup, factors: list[torch.Tensor]) -> torch.Tensor:
    """factors: A and B of every projection of every segment, in x's dtype already."""
    M, updates = len(group.columns), []
    segments = x.split([end - start for start, end in pairwise(group.bounds)])
    for m in range(M):
        pairs = zip(factors[2 * m :: 2 * M], factors[2 * m + 1 :: 2 * M], group.scales[:, m].tolist(), strict=True)
        parts = zip(segments, pairs, strict=True)
        updates.append(torch.cat([scale * (given @ a.T) @ b for given, (a, b, scale) in parts]))
    return torch.nn.functional.linear(x, weight) + torch.cat(updates, 1)


def check(whole, looped, x, weight, group, bound):
    """Outputs, dx and every adapter's gradient against float32 autograd of the reference."""

    def reference(x, *params):
        return lora_linear_ref(x, weight.float(), None, replace(group, params=list(params)))

    for grads in group.grads:
        grads.zero_()
    got = (*whole(), *group.grads)
    truth = measure.forward_backward(reference, x.float(), *group.params)()
    for out, expected in [*zip(got, truth, strict=True), *zip(looped()[:2], truth[:2], strict=True)]:
        error = ((out.float() - expected).norm() / expected.norm()).item()
        assert error <= bound, f"error {error:.2e}, bound {bound:.0e}: no figure for a wrong result"


@pytest.mark.parametrize(("shape", "dtype", "T", "name", "count", "rank"), CASES, ids=str)
def test_lora(benchmark, record, shape, dtype, T, name, count, rank):
    config = ModelConfig.from_dict(SHAPES[shape] | {"num_hidden_layers": 1}, shape)
    projections = ProjectionGroup[name.upper()]
    I, widths = projection_sizes(config)[projections]
    lora, O = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=GROUPS[projections]), sum(widths)
    adapters = [Adapter(config, lora, measure.DEVICE) for _ in range(count)]
    generator = torch.Generator(measure.DEVICE).manual_seed(0)
    for adapter in adapters:
        adapter.params.normal_(0, 0.02, generator=generator)
        adapter.grads = torch.zeros_like(adapter.params)
    batch = LoraBatch.make(adapters, ragged(T, count), train=True)  # on a GPU with its tables, as once a step
    assert batch is not None
    group = batch.groups[0, projections]
    x = torch.randn(T, I, device=measure.DEVICE, generator=generator).to(dtype)
    weight = (torch.randn(O, I, device=measure.DEVICE, generator=generator) * 0.02).to(dtype)
    factors = [factor.to(dtype) for adapter in adapters for _, *pair in adapter.projections() for factor in pair]

    whole = measure.forward_backward(lambda x: lora_linear(x, weight, None, group, batch.anchor), x)
    base = measure.forward_backward(lambda x: frozen_linear(x, weight), x)
    looped = measure.forward_backward(lambda x, *factors: loop(x, weight, group, list(factors)), x, *factors)
    check(whole, looped, x, weight, group, bound=2e-2 if GPU else 1e-5)

    repeats = max(1, int(0.02 / measure.fastest(whole, rounds=1)))
    seconds, base_seconds = measure.side_by_side(benchmark, [whole, base], rounds=7, repeats=repeats)
    loop_seconds = measure.fastest(looped, rounds=3)

    b = x.element_size()
    h = T * rank * len(widths)
    factors_bytes = 4 * 4 * sum(adapter.layout.num_parameters for adapter in adapters)
    extra_bytes = b * (2 * T * O + T * O + 2 * T * I + 2 * T * I + 5 * h) + factors_bytes
    extra_flops = 6 * T * rank * sum(I + width for width in widths)
    base_bytes, base_flops = b * (2 * T * I + 2 * T * O + 2 * O * I), 4 * T * O * I
    together_bytes = base_bytes + b * T * I + factors_bytes  # backward reads x again, for dA
    byte_rate, flop_rate = ceilings(dtype)
    for who, time, moved, flops in (
        ("whole", seconds, together_bytes, base_flops + extra_flops),
        ("low-rank", seconds - base_seconds, extra_bytes, extra_flops),
        ("loop", loop_seconds, together_bytes, base_flops + extra_flops),
    ):
        floors = {"bytes": moved / byte_rate, "FLOPs": flops / flop_rate}
        limit = max(floors, key=floors.__getitem__)
        rates = {
            "gb_per_s": moved / time / 1e9,
            "tflops": flops / time / 1e12,
            "limit": limit,
            "percent_of_floor": 100 * floors[limit] / time,
        }
        record(
            case=f"{shape} {name}", dtype=str(dtype).removeprefix("torch."), T=T, adapters=count, rank=rank, who=who,
            us=time * 1e6, percent_on_top=100 * (time if who == "low-rank" else time - base_seconds) / base_seconds,
            **(rates if time > 0 else {}),  # a difference of two measured times may be below zero
        )  # fmt: skip
