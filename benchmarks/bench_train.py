"""Training many adapters at once, beside PEFT training the same jobs one after another without padding.

Useful FLOPs are 4 N a token, N the base's matrix parameters: low-rank products, optimizer steps and everything else
count for nothing. PEFT gets its best case: one model, whose adapter is reset for each job, and torch's fused AdamW.
"""

import time
from typing import Any

import pytest
import torch

import measure
from seal_engine import Adapter, Engine, LoraConfig, TrainJob
from seal_engine.checkpoint import save_model
from shapes import SHAPES, random_model

GPU = measure.DEVICE.type == "cuda"
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STEPS = 3
# (shape, dtype, jobs, rank, targets)
CASES = [
    ("97m", torch.float32, 32, 32, SEVEN),
    ("97m", torch.bfloat16, 32, 32, SEVEN),
    ("2m", torch.float32, 128, 32, SEVEN),
    ("2m", torch.float32, 128, 32, ("q_proj", "v_proj")),
]
if GPU:
    CASES = [
        ("qwen2.5-7b", torch.bfloat16, 128, 32, ("q_proj", "v_proj")),
        ("qwen2.5-7b", torch.bfloat16, 64, 32, SEVEN),
    ]


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
    sample = max(4, count // 8)
    baseline.train(starts[0], sequences[0], 1)
    begin = time.perf_counter()
    expected = [
        baseline.train(start, ids, STEPS) for start, ids in zip(starts[:sample], sequences[:sample], strict=True)
    ]
    measure.synchronize()
    theirs = (time.perf_counter() - begin) / sum(map(len, sequences[:sample]))  # seconds a token
    bound = 1e-3 if dtype == torch.float32 else 3e-2
    for result, losses in zip(engine.train(jobs[:sample], progress=False), expected, strict=True):
        assert result.losses == pytest.approx(losses, rel=bound), "no figure for a wrong result"

    seconds = measure.time_rounds(benchmark, lambda: engine.train(jobs, progress=False), rounds=3)
    tokens = sum(map(len, sequences))
    flops, rate = 4 * engine.config.num_matrix_parameters * STEPS, measure.matrix_rate(dtype)
    for who, per_token in (("peft", theirs), ("seal_engine", seconds / tokens)):
        record(
            shape=shape,
            dtype=str(dtype).removeprefix("torch."),
            adapters=count,
            rank=rank,
            projections=len(targets),
            who=who,
            tokens_per_s=STEPS / per_token,
            useful_gflops=flops / per_token / 1e9,
            matrix_gflops=rate / 1e9,
            percent_of_matrix_rate=100 * flops / per_token / rate,
            times_faster=theirs / per_token,
        )


SCALING_TOKENS = {"2m": 4096, "97m": 1024, "qwen2.5-7b": 8192}


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), SEVEN], ids=["q,v", "seven"])
@pytest.mark.parametrize("rank", [8, 32])
def test_scaling(benchmark, record, rank, targets):
    """Adapters 1, 2, 4 ... 512 at the same number of tokens a step, equally long sequences; throughput and memory."""
    shape, dtype = ("qwen2.5-7b", torch.bfloat16) if GPU else ("2m", torch.float32)
    engine = Engine(random_model(shape, dtype, measure.DEVICE))
    generator = torch.Generator().manual_seed(0)
    total = SCALING_TOKENS[shape]
    first = None
    counts = [1, 8, 64, 512] if GPU else [2**k for k in range(10)]
    for count in counts:
        lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
        # Sequences of at most 256 tokens, so that attention costs the same whoever owns them.
        length = min(256, total // count)
        jobs = []
        for i in range(count):
            owned = total // count // length
            ids = torch.randint(SHAPES[shape]["vocab_size"], (owned, length), generator=generator).tolist()
            jobs.append(TrainJob(ids, lora, num_epochs=2, batch_size=owned, seed=i))

        def step(jobs=jobs):
            results = engine.train(jobs, progress=False, token_budget=total)
            assert all(result.error is None for result in results)

        seconds = measure.fastest(step, rounds=2)
        state = 16 * sum(engine.create_adapter(lora).layout.size for _ in jobs)  # float32: itself, gradient, moments
        first = first or seconds
        record(
            shape=shape, rank=rank, projections=len(targets), adapters=count, tokens_a_step=total,
            tokens_per_s=2 * total / seconds, of_one_adapter=first / seconds, state_mib=state / 2**20,
        )  # fmt: skip
    benchmark.pedantic(lambda: None, rounds=1)
