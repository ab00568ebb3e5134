"""Assumptions of the forecast that a CPU can measure: what the engine does in Python for a pass on a GPU.

A training pass: 8,192 tokens are packed, and the LoRA tables of Qwen2.5-7B's shape are made for 16 and for 164 adapters
of q and v, one sequence each; then each job's bookkeeping. A sampling step: the whole step of a tiny model, less the
time in the model and in the draw, for 1 and for 256 sequences. Two sizes give a part per pass and one per adapter or
sequence. One thread; on a CPU, where copies to the device cost nothing.
"""

from time import perf_counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import measure
import seal_engine.sampling.sampler
from seal_engine import Engine, LoraConfig, SamplingParams, TrainJob, TrainSequence
from seal_engine.model.adapter_layout import projection_sizes
from seal_engine.model.adapters import Adapter
from seal_engine.model.config import ModelConfig
from seal_engine.model.lora_batch import _groups
from seal_engine.model.transformer import Model
from seal_engine.training.schedule import JobState
from seal_engine.types import PackedBatch
from seal_kernels.lora_tables import device_tables
from shapes import SHAPES, random_model

CPU = torch.device("cpu")
TOKENS = 8192
pytestmark = pytest.mark.skipif(measure.DEVICE.type == "cuda", reason="measures the host alone, on a CPU")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def both(small: tuple[int, float], large: tuple[int, float]) -> tuple[float, float]:
    """(seconds per pass, seconds per unit) of the line through two measurements."""
    unit = (large[1] - small[1]) / (large[0] - small[0])
    return small[1] - unit * small[0], unit


def training_pass(count: int) -> float:
    """Seconds of Python for a pass over `count` adapters."""
    config = ModelConfig.from_dict(SHAPES["qwen2.5-7b"])
    lora = LoraConfig(r=32, lora_alpha=64, target_modules=("q_proj", "v_proj"))
    adapters = [Adapter(config, lora, CPU) for _ in range(count)]
    ids = [list(range(TOKENS // count))] * count
    job = TrainJob([ids[0]], lora, num_epochs=1000)
    states = [JobState(i, job, [TrainSequence(ids[0])], a, TOKENS) for i, a in enumerate(adapters)]
    sizes = projection_sizes(config)

    def python() -> None:
        for state in states:
            assert state.next is not None
            _ = state.next_tokens, [state.targets[i] for i in state.next.members]
        PackedBatch.pack(ids, CPU)
        targets = [target for state in states for target in state.targets]
        torch.tensor([t for target in targets for t in target], dtype=torch.bool).nonzero().squeeze(1)
        groups = _groups(adapters, adapters[0], [len(s) for s in ids], False, None)
        device_tables(list(groups.values()), [sizes[group][0] for _, group in groups], CPU)
        for state in states:
            state.adam()
            state.advance()

    return measure.fastest(python)


def sampling_step(count: int, monkeypatch: Any) -> float:
    """Seconds of a step over `count` sequences, outside the model and the draw."""
    SHAPES["host"] = {**SHAPES["2m"], "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 1}
    sampler = Engine(random_model("host", torch.float32, CPU)).sampler(num_blocks=20_000)
    spent = SimpleNamespace(seconds=0.0)

    def timed(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            start = perf_counter()
            out = function(*args, **options)
            spent.seconds += perf_counter() - start
            return out

        monkeypatch.setattr(owner, name, call)

    timed(Model, "hidden_states")
    timed(Model, "logits")
    timed(seal_engine.sampling.sampler, "sample_tokens")
    for _ in range(count):
        sampler.add_request(None, list(range(20)), SamplingParams(temperature=0, max_tokens=200, ignore_eos=True))
    sampler.step()
    best = float("inf")
    for _ in range(60):
        spent.seconds, start = 0.0, perf_counter()
        sampler.step()
        best = min(best, perf_counter() - start - spent.seconds)
    monkeypatch.undo()
    return best


def test_forecast(benchmark, record, monkeypatch):
    def measured() -> None:
        a, b = both((16, training_pass(16)), (164, training_pass(164)))
        record(what="training pass", per_pass_ms=1e3 * a, per_adapter_us=1e6 * b)
        a, b = both((1, sampling_step(1, monkeypatch)), (256, sampling_step(256, monkeypatch)))
        record(what="sampling step", per_step_ms=1e3 * a, per_sequence_us=1e6 * b)

    benchmark.pedantic(measured, rounds=1, iterations=1)
