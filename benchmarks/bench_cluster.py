"""A round on W workers: what a batch takes on one worker, what Ray adds, 1 to 4 real workers, and up to 256 simulated.

Trials are those of the miniature's task on notes of the best style. Workers have one thread each. The simulation runs
the dispatcher itself on a clock that jumps (seal_engine/cluster/simulation.py): 750 trials, each as long as one of 32
recorded ones took by itself ("one by one"), or as its share of a batch, beside what any batch takes ("in batches").
docs/scaling.md has the model and what follows from it.
"""

import os
from itertools import cycle, islice
from statistics import fmean
from time import perf_counter, process_time
from typing import Any

import numpy as np
import pytest
import torch

import measure
from seal_engine import Engine, LoraConfig
from seal_engine.cluster.dispatch import Dispatcher
from seal_engine.cluster.pool import Pool, _group_cost
from seal_engine.cluster.simulation import SimulatedTransport
from seal_engine.cluster.worker import Call, Policy
from seal_engine.domains.knowledge.task import KnowledgeConfig
from seal_engine.loop.domain import Candidate
from seal_engine.loop.inner import InnerLoop
from seal_engine.loop.settings import make
from seal_engine.sampling.requests import SamplingParams
from seal_engine.tiny import MODEL
from seal_engine.tiny.demo import BEST_STYLE, MINIATURE, make_miniature

EMPTY_BATCHES = 500
TRIALS = 750  # of a published round
SIZES = (1, 2, 4, 8, 16, 32)
WORKERS = (1, 2, 3, 4)
SIMULATED = (1, 2, 4, 8, 16, 32, 64, 128, 256)
UPDATE = LoraConfig(r=32, lora_alpha=64, target_modules="all-linear")  # the miniature's policy update
RECORDED: dict[str, Any] = {}  # of earlier cases, for the simulation


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


def task(engine: Engine) -> Any:
    return make_miniature(make(KnowledgeConfig, MINIATURE), engine)


def trials(domain: Any, count: int) -> list[tuple[Candidate, int]]:
    """So many trials, each of a passage and a seed of its own."""
    contexts = domain.contexts("train")
    notes = [texts[0] for texts in domain.sources()[BEST_STYLE].write(contexts, None)]
    made = [Candidate(c, domain.job(c, text), domain.questions(c)) for c, text in zip(contexts, notes, strict=True)]
    return [(candidate, i) for i, candidate in enumerate(islice(cycle(made), count))]


def load() -> Engine:
    return Engine.from_pretrained(MODEL, "cpu", "float32")


def test_batches(benchmark, record):
    """Seconds of a batch of k trials on one worker, and the line through them: so much per batch, so much per trial."""
    engine = load()
    domain = task(engine)
    loop = InnerLoop(engine, domain.answer_params, domain.grade, progress=False)
    all_trials = trials(domain, max(SIZES))

    def measured() -> None:
        times = [measure.fastest(lambda k=k: loop.attempt(all_trials[:k]), rounds=2) for k in SIZES]
        per_trial, per_batch = np.polyfit(SIZES, times, 1, w=1 / np.array(times))
        for k, seconds in zip(SIZES, times, strict=True):
            record(what="a batch", trials=k, seconds=seconds)
        record(what="line through batches", per_batch_seconds=float(per_batch), per_trial_seconds=float(per_trial))
        alone = [measure.fastest(lambda one=one: loop.attempt([one]), rounds=1) for one in all_trials]
        RECORDED.update(alone=alone, per_batch=float(per_batch), per_trial=float(per_trial))
        record(what="a trial by itself", seconds=fmean(alone), longest_seconds=max(alone))

    benchmark.pedantic(measured, rounds=1, iterations=1)


def test_workers(benchmark, record):
    """The same trials without Ray and with 1 to 4 workers, in turns; what the driver does, and a broadcast."""
    engine = load()
    domain = task(engine)
    some, cores = trials(domain, 96), len(os.sched_getaffinity(0))
    here = InnerLoop(engine, domain.answer_params, domain.grade, progress=False)
    update = engine.create_adapter(UPDATE)

    def measured() -> None:
        times: dict[int, list[float]] = {}
        sent: dict[int, dict[str, int]] = {}
        for count in (0, *WORKERS, *reversed(WORKERS), 0):
            if count == 0:
                times.setdefault(0, []).append(measure.fastest(lambda: here.attempt(some), rounds=1))
                continue
            with Pool(load(), workers=count) as pool:
                loop = pool.inner_loop(domain.answer_params, domain.grade, progress=False)
                loop.attempt(some)
                before = counted(pool)
                start = perf_counter()
                loop.attempt(some)
                times.setdefault(count, []).append(perf_counter() - start)
                after = counted(pool)
                sent[count] = {name: after[name] - before[name] for name in before}
                if count == 1:
                    RECORDED["driver"] = driver_seconds(pool)  # to send a batch and to receive its results
                    start = perf_counter()
                    pool.merge(update)
                    pool.generate(["a"], progress=False)
                    RECORDED["broadcast"] = perf_counter() - start
        costs = [_group_cost([one], 6) for one in some]
        shares = [RECORDED["per_trial"] * cost / fmean(costs) for cost in costs]
        for count, own in sorted(times.items()):
            crowded = max(1.0, count / cores)  # how much longer everything takes, where workers share cores
            parts = [crowded * share for share in shares], crowded * RECORDED["per_batch"], RECORDED["driver"]
            record(
                what="real workers", workers=count, cores=cores, trials=len(some), seconds=min(own),
                predicted_seconds=simulated(max(1, count), *parts)[1], of_one=min(times[1]) / min(own),
                **{f"{name}_per_trial": value / len(some) for name, value in sent.get(count, {}).items()},
            )  # fmt: skip
        send, receive = RECORDED["driver"]
        record(what="the driver, per batch", send_ms=1e3 * send, receive_ms=1e3 * receive)
        record(what="broadcast and merge of an update", mib=update.nbytes / 2**20, seconds=RECORDED["broadcast"])

    benchmark.pedantic(measured, rounds=1, iterations=1)


def counted(pool: Pool) -> dict[str, int]:
    """Messages, bytes and batches so far."""
    return {**pool.traffic(), "batches": sum(share.batches for share in pool.shares())}


def driver_seconds(pool: Pool) -> tuple[float, float]:
    """Seconds of this process's time to send a batch and to receive its results, over batches with nothing to do."""
    call = Call("attempt", Policy(), {"answer_params": SamplingParams(temperature=0)})
    items = [[(Candidate("no context", None, [], rejected="nothing to train on"), 0)]] * EMPTY_BATCHES
    sending, submit = 0.0, pool._transport.submit

    def timed(*batch: Any) -> None:
        nonlocal sending
        start = process_time()
        submit(*batch)
        sending += process_time() - start

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool._transport, "submit", timed)
        start = process_time()
        pool._dispatcher.run(call, items, [1.0] * EMPTY_BATCHES, {0: 1})
        whole = process_time() - start
    return sending / EMPTY_BATCHES, (whole - sending) / EMPTY_BATCHES


def simulated(workers: int, seconds: list[float], per_batch: float, driver: tuple[float, float]) -> tuple[float, float]:
    """Seconds of a round on simulated workers: the first one, which measures them, and the second."""
    transport = SimulatedTransport(lambda _, items: per_batch + sum(items), *driver)
    dispatcher = Dispatcher(transport, [f"worker {i}" for i in range(workers)], lambda line: None)
    dispatcher.wait_until_ready()
    times = [transport.now()]
    for _ in range(2):
        dispatcher.run(None, seconds, seconds)
        times.append(transport.now())
    return times[1] - times[0], times[2] - times[1]


def test_simulated(benchmark, record):
    """Up to 256 workers in virtual time, with what the other cases have measured."""
    engine = load()
    domain = task(engine)
    alone = list(islice(cycle(RECORDED["alone"]), TRIALS))
    costs = [_group_cost([one], 6) for one in trials(domain, TRIALS)]
    shares = [RECORDED["per_trial"] * cost / fmean(costs) for cost in costs]

    def measured() -> None:
        kinds = {"one by one": (alone, 0.0), "in batches": (shares, RECORDED["per_batch"])}
        for kind, (seconds, per_batch) in kinds.items():
            one = per_batch + sum(seconds)
            for workers in SIMULATED:
                first, second = simulated(workers, seconds, per_batch, RECORDED["driver"])
                # One batch each, all of one length, the last one sent after all others; or the longest trial.
                least = max(per_batch + sum(seconds) / workers + workers * RECORDED["driver"][0], max(seconds))
                record(
                    what="simulated", trials_taken=kind, workers=workers, seconds=second,
                    efficiency=one / workers / second, first_round=one / workers / first,
                    attainable=one / workers / least,
                )  # fmt: skip

    benchmark.pedantic(measured, rounds=1, iterations=1)
