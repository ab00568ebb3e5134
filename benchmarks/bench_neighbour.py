"""Training and sampling beside a busy process on one of the cores that they use, as the command line starts them.

A process of its own trains and samples: on a quiet machine; beside a Python loop that ran before it; and beside one
that comes later, when how threads wait for each other is settled (`seal_engine/cli/threads.py`). The three take turns.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import pytest
import torch

import measure
from seal_engine import Engine, LoraConfig, SamplingParams, TrainJob
from shapes import random_model

CHILD = """
import sys
from seal_engine.cli.threads import limit_spinning
limit_spinning()  # before torch is imported
import bench_neighbour
bench_neighbour.work(*sys.argv[1:])
"""
LATER = "comes later"
WHEN = ("none", "is there before", LATER)
ROUNDS = 3
# (shape, dtype, adapters, optimizer steps of each)
CASES = [("miniature", "float32", 64, 16), ("97m", "bfloat16", 8, 4)]
pytestmark = pytest.mark.skipif(measure.DEVICE.type == "cuda", reason="a busy core is a CPU's concern")


def work(shape: str, dtype: str, adapters: str, steps: str) -> None:
    """Print a line when all is warm; after a line on stdin train, then sample, and print tokens a second of both."""
    engine = Engine(random_model(shape, getattr(torch, dtype), measure.DEVICE))
    ids = torch.randint(engine.config.vocab_size, (int(adapters), 48)).tolist()
    lora = LoraConfig(r=16, target_modules="all-linear")
    params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)

    def train(epochs: int) -> list:
        jobs = [TrainJob([own], lora, num_epochs=epochs, seed=i) for i, own in enumerate(ids)]
        return [result.adapter for result in engine.train(jobs, progress=False)]

    engine.generate(ids, params, train(1), progress=False)
    print("warm", flush=True)
    sys.stdin.readline()
    times = [perf_counter()]
    owners = train(int(steps))
    times.append(perf_counter())
    engine.generate(ids, params, owners, progress=False)
    times.append(perf_counter())
    tokens = sum(map(len, ids)) * int(steps), 32 * len(ids)
    print(json.dumps([n / (b - a) for n, a, b in zip(tokens, times, times[1:], strict=False)]))


@contextmanager
def busy_core(wanted: bool) -> Iterator[None]:
    """A Python loop on the last core that this process may use."""
    if not wanted:
        yield
        return
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        os.sched_setaffinity(process.pid, {max(os.sched_getaffinity(0))})
        try:
            yield
        finally:
            process.kill()


def tokens_per_s(when: str, *case: object) -> list[float]:
    """[trained, sampled] by a process of its own."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-c", CHILD, *map(str, case)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with busy_core(when not in (WHEN[0], LATER)), subprocess.Popen(command, env=environment, **pipes) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "warm\n"
        with busy_core(when == LATER):
            out, _ = child.communicate("\n")
    return json.loads(out)


@pytest.mark.parametrize(("shape", "dtype", "adapters", "steps"), CASES, ids=str)
def test_busy_core(benchmark, record, shape, dtype, adapters, steps):
    best = {when: [0.0, 0.0] for when in WHEN}

    def turn() -> None:
        for when in WHEN:
            rates = tokens_per_s(when, shape, dtype, adapters, steps)
            best[when] = [max(pair) for pair in zip(best[when], rates, strict=True)]

    benchmark.pedantic(turn, rounds=ROUNDS, iterations=1)
    for when, (trained, sampled) in best.items():
        record(
            shape=shape, dtype=dtype, adapters=adapters, busy_process=when,
            training_tokens_per_s=trained, sampled_tokens_per_s=sampled,
            training_share_of_quiet=trained / best[WHEN[0]][0], sampling_share_of_quiet=sampled / best[WHEN[0]][1],
        )  # fmt: skip
