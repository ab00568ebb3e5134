"""Training many adapters at once, beside PEFT training the same jobs one after another.

Useful FLOPs are 4 N a token, N the base's matrix parameters: low-rank products, optimizer steps and everything else
count for nothing. PEFT gets its best case: one model, whose adapter is reset for each job, no padding, and torch's
fused AdamW; "padded" is the published recipe instead, every sequence padded to 2048 tokens. PEFT's jobs cost alike, so
some of them are timed, and the figure is a token's.
"""

from typing import Any

import pytest
import torch

import measure
from seal_engine import Adapter, Engine, LoraConfig, TrainJob
from seal_engine.checkpoint import save_model
from shapes import SHAPES, random_model

GPU = measure.DEVICE.type == "cuda"
QV = ("q_proj", "v_proj")
SEVEN = (*QV, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STEPS, PADDED = 10, 2048  # as published: 10 epochs
# (shape, dtype, jobs, rank, targets)
CASES = [
    ("97m", torch.float32, 32, 32, SEVEN),
    ("97m", torch.bfloat16, 32, 32, SEVEN),
    ("2m", torch.float32, 128, 32, SEVEN),
    ("2m", torch.float32, 128, 32, QV),
]
if GPU:
    CASES = [("qwen2.5-7b", torch.bfloat16, 128, 32, QV), ("qwen2.5-7b", torch.bfloat16, 64, 32, SEVEN)]


def make_sequences(count: int, vocab_size: int) -> list[list[int]]:
    """One sequence of 20 to 80 random tokens for each job."""
    generator = torch.Generator().manual_seed(0)
    lengths = (20 + torch.randint(61, (count,), generator=generator)).tolist()
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]


class OneAtATime:
    """PEFT on Transformers: jobs one after another."""

    def __init__(self, engine: Engine, lora: LoraConfig, directory):
        from peft import LoraConfig as PeftConfig
        from peft import get_peft_model
        from transformers import AutoModelForCausalLM

        save_model(engine.model, directory)
        base = AutoModelForCausalLM.from_pretrained(directory, dtype=engine.model.dtype, attn_implementation="sdpa")
        config = PeftConfig(r=lora.r, lora_alpha=int(lora.lora_alpha), target_modules=list(lora.target_modules))
        self.model: Any = get_peft_model(base, config).to(measure.DEVICE)
        self.named = {n.replace(".default", ""): p for n, p in self.model.named_parameters() if p.requires_grad}
        for parameter in self.named.values():
            parameter.data = parameter.data.float()

    def train(self, start: Adapter, ids: list[int], steps: int) -> list[float]:
        """The losses of `steps` steps on one sequence, from the parameters of `start`."""
        with torch.no_grad():
            for name, a, b in start.projections():
                self.named[f"base_model.model.{name}.lora_A.weight"].copy_(a)
                self.named[f"base_model.model.{name}.lora_B.weight"].copy_(b.T)
        parameters = list(self.named.values())
        optimizer = torch.optim.AdamW(parameters, TrainJob.learning_rate, weight_decay=0.0, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
        tokens = torch.tensor([ids], device=measure.DEVICE)
        losses = []
        for _ in range(steps):
            loss = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses


@pytest.mark.parametrize(("shape", "dtype", "count", "rank", "targets"), CASES, ids=str)
def test_train(benchmark, record, tmp_path, shape, dtype, count, rank, targets):
    engine = Engine(random_model(shape, dtype, measure.DEVICE))
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    sequences = make_sequences(count, engine.config.vocab_size)
    starts = [engine.create_adapter(lora, seed=i) for i in range(count)]
    jobs = [
        TrainJob([ids], init_from=start, num_epochs=STEPS, seed=None)
        for ids, start in zip(sequences, starts, strict=True)
    ]
    baseline = OneAtATime(engine, lora, tmp_path / "checkpoint")
    sample = slice(None, None, 8)
    timed = list(zip(starts[sample], sequences[sample], strict=True))
    bound = 1e-3 if dtype == torch.float32 else 3e-2
    for result, (start, ids) in zip(engine.train(jobs, progress=False)[sample], timed, strict=True):
        assert result.losses == pytest.approx(baseline.train(start, ids, STEPS), rel=bound), "a wrong result"

    def ours() -> None:
        assert all(result.error is None for result in engine.train(jobs, progress=False))

    def theirs() -> None:
        for start, ids in timed:
            baseline.train(start, ids, STEPS)

    def padded() -> None:
        baseline.train(starts[0], sequences[0] + [0] * (PADDED - len(sequences[0])), 1)

    measure.matrix_rate(dtype)
    times = measure.side_by_side(benchmark, [ours, theirs, padded], rounds=2)
    tokens = sum(map(len, sequences))
    done = (STEPS * tokens, STEPS * sum(len(ids) for _, ids in timed), tokens / count)  # real tokens in each
    flops, rate = 4 * engine.config.num_matrix_parameters, measure.matrix_rate(dtype)
    for who, real, seconds in zip(("seal_engine", "peft", f"peft, padded to {PADDED}"), done, times, strict=True):
        record(
            shape=shape,
            dtype=str(dtype).removeprefix("torch."),
            adapters=count,
            rank=rank,
            projections=len(targets),
            who=who,
            tokens_per_s=real / seconds,
            useful_gflops=flops * real / seconds / 1e9,
            matrix_gflops=rate / 1e9,
            percent_of_matrix_rate=100 * flops * real / seconds / rate,
            seal_engine_times_faster=(done[0] / times[0]) / (real / seconds),
        )


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
