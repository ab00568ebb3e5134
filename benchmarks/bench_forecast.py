"""What the forecast of a round assumes, measured: on a CPU what the engine does in Python for a pass on a GPU, on a GPU
what launches, waits and copies cost.

On a CPU, a training pass: 8,192 tokens are packed, and the LoRA tables of Qwen2.5-7B's shape are made for 16 and for
164 adapters of q and v, one sequence each; then each job's bookkeeping. A sampling step: the whole step of a tiny
model, less the time in the model and in the draw, for 1 and for 256 sequences. Two sizes give a part per pass and one
per adapter or sequence. One thread; copies to the device cost nothing.

On a GPU: launches of torch and of Triton, alone and as the engine's operations make them; a CUDA graph of 300 kernels,
on the host and on the device; a read of one number once the device is idle; page-locking and copies of a GiB; products
of Qwen2.5-7B's layers, forward and backward, for three seconds; and a training pass of 180 tokens, which the host
takes longer for than the device.
"""

from collections.abc import Callable
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import measure
import seal_engine.sampling.draw
from seal_engine import Engine, LoraConfig, SamplingParams, TrainJob, TrainSequence
from seal_engine.model.adapter_layout import projection_sizes
from seal_engine.model.adapters import Adapter
from seal_engine.model.config import ModelConfig
from seal_engine.model.lora_batch import _groups
from seal_engine.model.transformer import Model
from seal_engine.training.schedule import JobState
from seal_engine.types import PackedBatch
from seal_kernels.attention import attention
from seal_kernels.lora_tables import device_tables
from seal_kernels.rms_norm import rms_norm
from seal_kernels.swiglu import swiglu
from shapes import SHAPES, random_model

CPU = torch.device("cpu")
TOKENS = 8192
QV = LoraConfig(r=32, lora_alpha=64, target_modules=("q_proj", "v_proj"))
on_a_cpu = pytest.mark.skipif(measure.DEVICE.type == "cuda", reason="measures the host alone, on a CPU")
on_a_gpu = pytest.mark.skipif(measure.DEVICE.type != "cuda", reason="needs a CUDA device")


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
    adapters = [Adapter(config, QV, CPU) for _ in range(count)]
    ids = [list(range(TOKENS // count))] * count
    job = TrainJob([ids[0]], QV, num_epochs=1000)
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
    timed(seal_engine.sampling.draw, "sample_tokens")
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


@on_a_cpu
def test_forecast(benchmark, record, monkeypatch):
    def measured() -> None:
        a, b = both((16, training_pass(16)), (164, training_pass(164)))
        record(what="training pass", per_pass_ms=1e3 * a, per_adapter_us=1e6 * b)
        a, b = both((1, sampling_step(1, monkeypatch)), (256, sampling_step(256, monkeypatch)))
        record(what="sampling step", per_step_ms=1e3 * a, per_sequence_us=1e6 * b)

    benchmark.pedantic(measured, rounds=1, iterations=1)


def host_seconds(fn: Callable[[], Any], calls: int = 1500) -> float:
    """Seconds that the host takes for a call whose work the device does in less."""
    fn()
    measure.synchronize()
    start = perf_counter()
    for _ in range(calls):
        fn()
    seconds = (perf_counter() - start) / calls
    measure.synchronize()
    return seconds


def sustained_products(seconds: float = 3.0) -> float:
    """FLOP/s of the products of Qwen2.5-7B's layers, forward and backward, in the last of so many seconds."""
    sizes = [(3584, 4608), (3584, 3584), (3584, 37888), (18944, 3584)]  # inputs and outputs
    drawn = [(torch.randn(TOKENS, i), torch.randn(TOKENS, o), torch.randn(o, i) * 0.02) for i, o in sizes * 4]
    layers = [[x.to(measure.DEVICE, torch.bfloat16) for x in tensors] for tensors in drawn]

    def products() -> None:
        for x, dy, weight in layers:
            torch.mm(x, weight.T)
            torch.mm(dy, weight)

    products()
    end, last = perf_counter() + seconds, 0.0
    while perf_counter() < end:
        measure.synchronize()
        start = perf_counter()
        products()
        measure.synchronize()
        last = perf_counter() - start
    return 4 * 4 * TOKENS * sum(i * o for i, o in sizes) / last


@on_a_gpu
def test_gpu(benchmark, record):
    def measured() -> None:
        device = measure.DEVICE
        numbers, rows = torch.zeros(64, device=device), torch.randn(4, 3584, device=device, dtype=torch.bfloat16)
        gate_up, weight = torch.randn(4, 37888, device=device, dtype=torch.bfloat16), torch.ones_like(rows[0])
        q, k, v = (torch.randn(550, n, 128, device=device, dtype=torch.bfloat16) for n in (28, 4, 4))
        bounds = torch.arange(0, 551, 55, dtype=torch.int32, device=device)
        with torch.no_grad():
            launches: dict[str, Callable[[], Any]] = {
                "torch": lambda: numbers.add_(1),
                "swiglu": lambda: swiglu(gate_up),
                "rms_norm": lambda: rms_norm(rows, weight, 1e-5),
                "attention": lambda: attention(q, k, v, bounds, 55),
            }
            for name, fn in launches.items():
                record(what=f"launch of {name}", us=1e6 * host_seconds(fn))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(300):
                numbers.add_(1)
        record(what="graph of 300 kernels, host", us=1e6 * host_seconds(graph.replay, calls=50))
        record(what="graph of 300 kernels, device", us=1e6 * measure.fastest(graph.replay))
        record(what="wait", us=1e6 * host_seconds(lambda: numbers[0].item(), calls=300))
        start = perf_counter()
        host = torch.empty(2**30, dtype=torch.uint8, pin_memory=True)
        record(what="page-locking", gb_per_s=2**30 / (perf_counter() - start) / 1e9)
        copy = torch.empty(2**30, dtype=torch.uint8, device=device)
        record(what="copy to the device", gb_per_s=2**30 / measure.fastest(lambda: copy.copy_(host)) / 1e9)
        record(what="copy to the host", gb_per_s=2**30 / measure.fastest(lambda: host.copy_(copy)) / 1e9)
        peak = measure.matrix_rate(torch.bfloat16)
        record(what="products of layers", tflops=sustained_products() / 1e12, of_the_largest_product=peak / 1e12)
        engine = Engine(random_model("qwen2.5-7b", torch.bfloat16, device))
        jobs = [TrainJob([list(range(60))] * 20, QV, num_epochs=1, seed=i) for i in range(3)]
        seconds = measure.fastest(lambda: engine.train(jobs, progress=False, recompute="mlp"), rounds=2) / 20
        record(what="training pass of 180 tokens, MLPs recomputed", ms=1e3 * seconds)

    benchmark.pedantic(measured, rounds=1, iterations=1)
