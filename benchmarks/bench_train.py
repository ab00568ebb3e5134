"""Training many adapters at once, beside PEFT training the same jobs one after another.

Useful FLOPs are 4 N a token, N the base's matrix parameters: low-rank products, optimizer steps and everything else
count for nothing. PEFT gets its best case: one model, whose adapter is reset for each job, no padding, and torch's
fused AdamW; "padded" is the published recipe instead, every sequence padded to 2048 tokens. PEFT's jobs cost alike, so
some of them are timed, and the figure is a token's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import measure
from seal_engine import Adapter, Engine, LoraConfig, TrainJob
from seal_engine.model.checkpoint import save_model
from shapes import random_model

GPU = measure.DEVICE.type == "cuda"
QV = ("q_proj", "v_proj")
SEVEN = (*QV, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STEPS, PADDED = 10, 2048  # as published: 10 epochs
# (shape, dtype, jobs, rank, targets)
CASES = [
    ("97m", torch.float32, 32, 32, SEVEN),
    ("97m", torch.bfloat16, 32, 32, SEVEN),
    ("smollm2-135m", torch.bfloat16, 32, 32, QV),
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


# Token ids and labels of a step's sequences, padded on the right; a label of -100 counts for nothing.
Batch = tuple[list[list[int]], list[list[int]]]


def load_base(engine: Engine, directory: Path) -> Any:
    """The engine's model in Transformers, on the same device. No token ends what it generates."""
    from transformers import AutoModelForCausalLM

    save_model(engine.model, directory)
    base: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=engine.model.dtype, attn_implementation="sdpa")
    base.generation_config.eos_token_id = None
    return base.to(measure.DEVICE)


class OneAtATime:
    """PEFT on Transformers: jobs one after another."""

    def __init__(self, base: Any, lora: LoraConfig):
        from peft import LoraConfig as PeftConfig
        from peft import get_peft_model

        config = PeftConfig(r=lora.r, lora_alpha=int(lora.lora_alpha), target_modules=list(lora.target_modules))
        self.model: Any = get_peft_model(base, config).to(measure.DEVICE)
        self.named = {n.replace(".default", ""): p for n, p in self.model.named_parameters() if p.requires_grad}
        for parameter in self.named.values():
            parameter.data = parameter.data.float()

    @torch.no_grad()
    def load(self, adapter: Adapter) -> None:
        """Take the parameters of an adapter."""
        for name, a, b in adapter.projections():
            self.named[f"base_model.model.{name}.lora_A.weight"].copy_(a)
            self.named[f"base_model.model.{name}.lora_B.weight"].copy_(b.T)

    def train(
        self,
        batches: Sequence[Batch],
        rate: float = TrainJob.learning_rate,
        scheduler: str = TrainJob.lr_scheduler,
        warmup_steps: int = 0,
    ) -> list[float]:
        """The losses of a step on each batch."""
        from transformers import get_scheduler

        parameters, losses = list(self.named.values()), []
        optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.0, fused=True)
        schedule = get_scheduler(scheduler, optimizer, warmup_steps, len(batches))
        for batch in batches:
            tokens, labels = (torch.tensor(rows, device=measure.DEVICE) for rows in batch)
            loss = self.model(input_ids=tokens, labels=labels, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses


def close_to(losses: Sequence[float], dtype: torch.dtype) -> Any:
    """What losses of the same training compare equal to: to 1e-3; in 16 bits to 3e-2, or to that of a hundredth of the
    first loss, as of what is learned by heart little but rounding is left."""
    if dtype == torch.float32:
        return pytest.approx(losses, rel=1e-3)
    return pytest.approx(losses, rel=3e-2, abs=3e-2 * losses[0] / 100)


def alone(ids: list[int]) -> Batch:
    """A step on one sequence, the loss on every token."""
    return [ids], [ids]


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
    baseline = OneAtATime(load_base(engine, tmp_path / "checkpoint"), lora)
    sample = slice(None, None, 8)
    timed = list(zip(starts[sample], sequences[sample], strict=True))
    for result, (start, ids) in zip(engine.train(jobs, progress=False)[sample], timed, strict=True):
        baseline.load(start)
        assert result.losses == close_to(baseline.train([alone(ids)] * STEPS), dtype), "a wrong result"

    def ours() -> None:
        assert all(result.error is None for result in engine.train(jobs, progress=False))

    def theirs() -> None:
        for start, ids in timed:
            baseline.load(start)
            baseline.train([alone(ids)] * STEPS)

    def padded() -> None:
        baseline.train([alone(sequences[0] + [0] * (PADDED - len(sequences[0])))])

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
