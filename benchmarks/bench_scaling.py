"""Training at a fixed number of tokens a step, from one adapter to 512: throughput and memory."""

from typing import Any

import pytest
import torch

import measure
from bench_train import GPU, QV, SEVEN
from seal_engine import Engine, LoraConfig, TrainJob
from shapes import SHAPES, random_model

# (shape, rank, targets): all powers of two of adapters for the first of each shape, every eighth for the others.
SCALING = [("2m", rank, QV) for rank in (8, 1, 32, 128)] + [("2m", 8, SEVEN), ("2m", 32, SEVEN)]
SCALING += [("97m", 8, QV), ("97m", 32, SEVEN)]
TOKENS = {"2m": 4096, "97m": 1024, "qwen2.5-7b": 8192}
if GPU:
    SCALING = [("qwen2.5-7b", rank, QV) for rank in (32, 8, 128)] + [("qwen2.5-7b", 8, SEVEN)]


@pytest.mark.parametrize(("shape", "rank", "targets"), SCALING, ids=str)
def test_scaling(benchmark, record, shape, rank, targets):
    """Adapters 1, 2, 4 ... 512 at the same number of tokens a step: throughput against one adapter, and memory.

    Sequences are of at most 256 tokens, so that attention costs much the same whoever owns them. The counts take turns.
    Memory: the most that a run adds, its results included.
    """
    engine = Engine(random_model(shape, torch.bfloat16 if GPU else torch.float32, measure.DEVICE))
    generator = torch.Generator().manual_seed(0)
    total, lora = TOKENS[shape], LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
    state = 16 * engine.create_adapter(lora).layout.size  # float32: itself, its gradient, two moments
    counts = [2**k for k in range(0, 10, 1 if (shape, rank, targets) == SCALING[0] else 3)]
    counts = [count for count in counts if count * state < (60e9 if GPU else 6e9)]

    def step_of(count: int) -> Any:
        length = min(256, total // count)
        owned = total // count // length
        jobs = []
        for i in range(count):
            ids = torch.randint(SHAPES[shape]["vocab_size"], (owned, length), generator=generator).tolist()
            jobs.append(TrainJob(ids, lora, num_epochs=4, batch_size=owned, seed=i))

        def step() -> None:
            results = engine.train(jobs, progress=False, token_budget=total)
            assert all(result.error is None for result in results)

        return step

    steps = [step_of(count) for count in counts]
    times = measure.side_by_side(benchmark, steps, rounds=1)
    peaks = [measure.peak_memory(step) for step in steps]
    for count, seconds, peak in zip(counts, times, peaks, strict=True):
        record(
            shape=shape, rank=rank, projections=len(targets), adapters=count, tokens_a_step=total,
            tokens_per_s=4 * total / seconds, of_one_adapter=times[0] / seconds,
            state_mib=count * state / 2**20, peak_mib=peak / 2**20,
        )  # fmt: skip
