"""Small training passes as CUDA graphs, beside the same passes launched kernel by kernel. Needs a GPU.

Jobs of one adapter on q and v each, a sequence of 55 tokens a step, so a pass has 55 tokens a job. Both sides take
turns and must give the same losses.
"""

import pytest
import torch

import measure
from bench_train import QV, close_to
from seal_engine import Engine, LoraConfig, TrainJob
from shapes import SHAPES, random_model

STEPS, LENGTH = 20, 55
CASES = [("97m", 16), ("qwen3-0.6b", 16), ("llama-3.2-1b", 16), ("qwen2.5-7b", 4), ("qwen2.5-7b", 16)]


@pytest.mark.skipif(measure.DEVICE.type != "cuda", reason="CUDA graphs are of GPUs")
@pytest.mark.parametrize(("shape", "jobs"), CASES)
def test_pass_graph(benchmark, record, shape, jobs):
    engine = Engine(random_model(shape, torch.bfloat16, measure.DEVICE))
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randint(SHAPES[shape]["vocab_size"], (jobs, LENGTH), generator=generator).tolist()
    lora = LoraConfig(r=32, lora_alpha=64, target_modules=QV)
    wanted = [TrainJob([ids], lora, num_epochs=STEPS, seed=i) for i, ids in enumerate(sequences)]

    def run(recompute: str) -> list[list[float]]:
        return [result.losses for result in engine.train(wanted, progress=False, recompute=recompute)]

    for launched, replayed in zip(run("none"), run("auto"), strict=True):
        assert replayed[:10] == close_to(launched[:10], torch.bfloat16), "a wrong result"  # then rounding grows
    times = measure.side_by_side(benchmark, [lambda: run("none"), lambda: run("auto")], rounds=2)
    for who, seconds in zip(("launched", "graphs"), times, strict=True):
        record(
            shape=shape, tokens_a_pass=jobs * LENGTH, who=who, ms_a_pass=1e3 * seconds / STEPS,
            tokens_per_s=jobs * LENGTH * STEPS / seconds, times_faster=times[0] / seconds,
        )  # fmt: skip
