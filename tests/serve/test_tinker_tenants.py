"""Many clients of the Tinker API at once: each has the numbers that it has alone, and its share of the time."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

pytest.importorskip("tinker", reason="the Tinker SDK is not installed")

import tinker
from tinker_cases import (
    BASE,
    SDK_CONNECTIONS,
    ids_of,
    logprobs,
    prompt,
    sampling,
    service_client,
    shifted,
    tinker_server,
)

from seal_engine import Engine
from seal_engine.tiny import MODEL

pytestmark = SDK_CONNECTIONS
STEPS = 3


@pytest.fixture(scope="module")
def engines():
    """One that rounds with its company, and one that does not."""
    make = Engine.from_pretrained
    return {flag: make(MODEL, device="cpu", dtype="float32", deterministic=flag) for flag in (False, True)}


@contextmanager
def held(worker):
    """The worker does nothing until the block has ended, so that what is submitted there is due at once."""
    release, started = threading.Event(), threading.Event()

    def wait(_):
        started.set()
        release.wait(60)

    worker.call(wait)
    started.wait(60)
    try:
        yield
    finally:
        release.set()


def policy(ids, seed):
    old = [-2.0 - (i * seed) % 3 / 2 for i in range(len(ids) - 1)]
    return shifted(ids, logprobs=old, advantages=[(-1.0) ** i for i in range(len(ids) - 1)])


LOSSES = ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro")


class Tenant:
    """A client with a rank, a rate, a loss and data of its own, and all numbers that the server gave it."""

    def __init__(self, number, rate=None):
        self.number = number
        self.rank = (1, 3, 8, 16, 5, 2)[number % 6]
        self.loss = LOSSES[number % len(LOSSES)]
        self.rate = 10 ** -(2 + number % 3) if rate is None else rate
        make = shifted if self.loss == "cross_entropy" else lambda ids: policy(ids, number + 1)
        self.data = [make(ids) for ids in ids_of(2 + number % 3, 6 + 3 * number, seed=number)]

    def run(self, server):
        with service_client(server) as client:
            model = client.create_lora_training_client(BASE, rank=self.rank, seed=self.number).result()
            numbers = []
            step = tinker.AdamParams(learning_rate=self.rate)
            for _ in range(STEPS):
                future, stepped = model.forward_backward(self.data, self.loss), model.optim_step(step)
                numbers.append(future.result().metrics["loss:sum"])
                numbers += [value for row in logprobs(future.result()) for value in row]
                numbers.append(stepped.result().metrics["grad_norm"])
            sampler = model.save_weights_and_get_sampling_client().result()
            sample = sampler.sample(prompt([5, 6, 7]), 2, sampling(6, seed=self.number)).result()
            return numbers, [sequence.tokens for sequence in sample.sequences]


def vandal(server):
    """A client whose rate and weights are without measure, and which goes away in the middle of a request."""
    with service_client(server) as client:
        model = client.create_lora_training_client(BASE, rank=8, seed=99).result()
        for weight, rate in ((1.0, 1e9), (1.0, 1e30), (3e38, 1e-4), (3e38, 1e-4)):
            datum = shifted([9, 8, 7, 6, 5], weights=[weight] * 4)
            future = model.forward_backward([datum] * 3, "cross_entropy")
            step = model.optim_step(tinker.AdamParams(learning_rate=rate))
            future.result()
            error = step.future().exception()
            assert error is None or "gradients are dropped: their norm is" in str(error)
        model.forward_backward([datum] * 200, "cross_entropy")


@pytest.mark.parametrize("deterministic", [False, True], ids=["to rounding", "bit for bit"])
def test_each_of_many_is_as_if_alone(deterministic, engines, tmp_path, monkeypatch):
    """Six tenants of other ranks, rates and losses and one that does damage, at once, beside each by itself. Passes
    and steps are shared, or the test would show nothing."""
    engine = engines[deterministic]
    tenants = [Tenant(number) for number in range(6)]
    alone = []
    for tenant in tenants:
        with tinker_server(engine, tmp_path) as server:
            alone.append(tenant.run(server))
    shared = {"forward_backward": 0, "optim_step": 0}

    def counting(verb, adapter_of):
        run = getattr(engine, verb)

        def count(items):
            shared[verb] = max(shared[verb], len({adapter_of(item).uid for item in items}))
            return run(items)

        monkeypatch.setattr(engine, verb, count)

    counting("forward_backward", lambda datum: datum.adapter)
    counting("optim_step", lambda step: step[0])
    with tinker_server(engine, tmp_path) as server, ThreadPoolExecutor(7) as pool:
        damage = pool.submit(vandal, server)
        together = list(pool.map(lambda tenant: tenant.run(server), tenants))
        damage.result()
    assert shared["forward_backward"] > 1
    assert shared["optim_step"] > 1
    for (numbers, texts), (expected, expected_texts) in zip(together, alone, strict=True):
        if deterministic:
            assert (numbers, texts) == (expected, expected_texts)
        assert numbers == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_who_asks_little_does_not_wait_for_who_asks_much(engines, tmp_path):
    """Both are due at once: the small request shares the second pass at the latest, the large one takes over ten."""
    ids = ids_of(1, 400, seed=1)[0]
    ends = []
    with tinker_server(engines[False], tmp_path) as server, service_client(server) as client:
        large, small = (client.create_lora_training_client(BASE, rank=2, seed=i).result() for i in range(2))
        with held(server.service.worker):
            futures = [large.forward_backward([shifted(ids)] * 60, "cross_entropy")]
            futures += [small.forward_backward([shifted(ids[:20])], "cross_entropy") for _ in range(4)]
            for name, future in zip(("large", *["small"] * 4), futures, strict=True):
                future.future().add_done_callback(lambda _, name=name: ends.append(name))
        for future in futures:
            future.result()
    assert ends[-1] == "large"


def test_one_model_too_many_waits(engines, tmp_path):
    """With room for one, the second client's model is created when the first client goes; nothing fails."""
    with tinker_server(engines[False], tmp_path, "--tinker-max-models", 1) as server, service_client(server) as second:
        with service_client(server) as first:
            first.create_lora_training_client(BASE, rank=2).result()
            waiting = second.create_lora_training_client(BASE, rank=3)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.5)
        assert waiting.result(timeout=30).get_info().lora_rank == 3


def test_samplers_beyond_their_memory_lie_on_the_disk(engines, tmp_path):
    """Room for none but the last one used: all four versions still say what they said, and their files go with the
    session."""
    with tinker_server(engines[False], tmp_path, "--tinker-sampler-bytes", 0) as server:
        with service_client(server) as client:
            model = client.create_lora_training_client(BASE, rank=2, seed=3).result()
            samplers = []
            for _ in range(4):
                model.forward_backward([shifted([5, 6, 7, 8])], "cross_entropy")
                model.optim_step(tinker.AdamParams(learning_rate=1e-2))
                samplers.append(model.save_weights_and_get_sampling_client().result())
            first, again = ([s.compute_logprobs(prompt([5, 6, 7])).result()[1:] for s in samplers] for _ in range(2))
            snapshots = [sampler.snapshot for sampler in _samplers(server)]
            directories = [snapshot.directory for snapshot in snapshots if snapshot.directory is not None]
            assert [snapshot.adapter is None for snapshot in snapshots] == [True, True, True, False]
            assert all(directory.exists() for directory in directories)
        assert not any(directory.exists() for directory in directories)
        assert not server.service.tinker.sessions
    assert first == again
    assert len({tuple(row) for row in first}) == 4


def _samplers(server):
    (session,) = server.service.tinker.sessions.values()
    return session.samplers.values()
