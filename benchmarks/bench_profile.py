"""Where a CPU's time goes: shares of torch's operations, by torch's profiler, in training and in decoding.

The profiler sees no Python between operations, and slows what it watches: it is for comparing states of the engine.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import measure
from bench_train import SEVEN, make_sequences
from seal_engine import Engine, LoraConfig, SamplingParams, TrainJob
from shapes import random_model

RANK, JOBS, STEPS = 32, 32, 2
ROWS, TOKENS = 32, 32
CALLS, SPARE_BYTES = 5, 2 << 30
KINDS = {
    "products": "mm addmm addmm_ mv addmv_ _linear_pointwise",
    "attention": "bmm baddbmm _softmax softmax",
    "copies and conversions": "copy_ cat constant_pad_nd",
    "reads and writes by index": "index index_select index_put_ _index_put_impl_ index_copy_ gather scatter_ embedding",
    "zeroing": "fill_ zero_",
    "optimizer": "_fused_adamw_",
    "norms": "linalg_vector_norm",
}
LOW_RANK, REST = "low-rank products", "all else"


def kind_of(name: str, shapes: list[Any], rank: int | None) -> str:
    """What an operation is for. A product is low-rank if the adapters' rank, which is no size of the base, is among its
    sizes."""
    name = name.split("::")[-1].split(".")[0]
    if "scaled_dot_product" in name:
        return "attention"
    kind = next((kind for kind, names in KINDS.items() if name in names.split()), REST)
    return LOW_RANK if kind == "products" and any(rank in shape for shape in shapes if shape) else kind


def training(engine: Engine) -> tuple[Any, int, int | None]:
    """(a call that trains all jobs, its steps, the adapters' rank)"""
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=SEVEN)
    sequences = make_sequences(JOBS, engine.config.vocab_size)
    jobs = [
        TrainJob([ids], init_from=engine.create_adapter(lora, seed=i), num_epochs=STEPS, seed=None)
        for i, ids in enumerate(sequences)
    ]
    return lambda: engine.train(jobs, progress=False), STEPS, RANK


def decoding(engine: Engine) -> tuple[Any, int, int | None]:
    """(a call of the base that answers short prompts, its tokens per prompt, None)"""
    prompts = torch.randint(engine.config.vocab_size, (ROWS, 8), generator=torch.Generator().manual_seed(0)).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    return lambda: engine.generate(prompts, params, progress=False), TOKENS, None


def watched(run: Callable[[], Any]) -> Any:
    """The profiler's averages by operation and shapes, of the fastest of some calls: on a shared machine low-rank
    products of the 97M shape take up to twice as long at times.

    The profiler's records lie between the blocks that passes free, so that passes find no large ones and take new
    memory, whose pages the system clears. Room for both is made before each call.
    """

    def once() -> Any:
        torch.ones(SPARE_BYTES // 4)  # glibc keeps them (configure_allocator)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            run()
        return profiler.key_averages(group_by_input_shape=True)

    calls = (once() for _ in range(CALLS))
    return min(calls, key=lambda averages: sum(event.self_cpu_time_total for event in averages))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("what", [training, decoding], ids=lambda what: what.__name__)
def test_shares(benchmark, record, what, dtype):
    if measure.DEVICE.type != "cpu":
        pytest.skip("of the CPU path")
    run, steps, rank = what(Engine(random_model("97m", dtype, measure.DEVICE)))
    benchmark.pedantic(run)
    seconds: Counter[str] = Counter()
    for event in watched(run):
        seconds[kind_of(event.key, event.input_shapes, rank)] += event.self_cpu_time_total / 1e6
    for kind in (*KINDS, LOW_RANK, REST):
        share = seconds[kind] / seconds.total()
        record(
            what=what.__name__,
            shape="97m",
            dtype=str(dtype).removeprefix("torch."),
            kind=kind,
            ms=1e3 * seconds[kind] / steps,
            share=share,
        )
