"""Many clients of the Tinker API at once: each has the numbers that it has alone, and its share of the time."""

import asyncio
import math
import random
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

pytest.importorskip("tinker", reason="the Tinker SDK is not installed")

import tinker
import torch
from tinker.lib.internal_client_holder import InternalClientHolder
from tinker_cases import (
    BASE,
    SDK_CONNECTIONS,
    ids_of,
    logprobs,
    prompt,
    sampling,
    shifted,
    tinker_server,
)

from seal_engine import Engine, LoraConfig
from seal_engine.tiny import MODEL
from tinker_client import service_client

pytestmark = SDK_CONNECTIONS
STEPS = 2
EPS = 1e-3  # of AdamW: far above a gradient's rounding, whose sign would otherwise be the first step


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
TARGETS = ({}, {"train_mlp": False}, {"train_attn": False})
TENANTS = 64


class Tenant:
    """A client with a rank, a rate, a loss, targets and data by chance, and all numbers that the server gave it."""

    def __init__(self, number):
        rng = random.Random(number)
        self.number = number
        self.rank, self.rate = rng.randint(1, 32), 10 ** rng.uniform(-4, -2)
        self.loss, self.targets = rng.choice(LOSSES), rng.choice(TARGETS)
        make = shifted if self.loss == "cross_entropy" else lambda ids: policy(ids, number + 1)
        self.data = [make(ids) for ids in ids_of(rng.randint(1, 3), rng.randint(4, 40), seed=number)]

    def run(self, server):
        with service_client(server.url) as client:
            model = client.create_lora_training_client(BASE, self.rank, self.number, **self.targets).result()
            numbers = []
            step = tinker.AdamParams(learning_rate=self.rate, eps=EPS)
            for _ in range(STEPS):
                future, stepped = model.forward_backward(self.data, self.loss), model.optim_step(step)
                numbers.append(future.result().metrics["loss:sum"])
                numbers += [value for row in logprobs(future.result()) for value in row]
                numbers.append(stepped.result().metrics["grad_norm"])
            sampler = model.save_weights_and_get_sampling_client().result()
            sample = sampler.sample(prompt([5, 6, 7]), 2, sampling(4, seed=self.number)).result()
            return numbers, [sequence.tokens for sequence in sample.sequences]


def vandal(server):
    """A client whose rate and weights are without measure, and which goes away in the middle of a request: its losses,
    which include NaN."""
    losses = []
    with service_client(server.url) as client:
        model = client.create_lora_training_client(BASE, rank=8, seed=99).result()
        for weight, rate in ((1.0, 1e9), (1.0, 1e30), (3e38, 1e-4), (3e38, 1e-4)):
            datum = shifted([9, 8, 7, 6, 5], weights=[weight] * 4)
            future = model.forward_backward([datum] * 3, "cross_entropy")
            step = model.optim_step(tinker.AdamParams(learning_rate=rate))
            losses.append(future.result().metrics["loss:sum"])
            error = step.future().exception()
            assert error is None or "gradients are dropped: their norm is" in str(error)
        model.forward_backward([datum] * 200, "cross_entropy")
    return losses


@pytest.fixture(scope="module")
def alone(engines, tmp_path_factory):
    """What each tenant gets on a server of its own."""
    directory, numbers = tmp_path_factory.mktemp("alone"), []
    for number in range(TENANTS):
        with tinker_server(engines[True], directory, "--kv-blocks", 16) as server:
            numbers.append(Tenant(number).run(server))
    return numbers


@pytest.mark.parametrize("deterministic", [False, True], ids=["to rounding", "bit for bit"])
def test_each_of_many_is_as_if_alone(deterministic, engines, alone, tmp_path, monkeypatch):
    """64 tenants by chance and one that does damage, at once, beside each by itself. Passes and steps are shared, or
    the test would show nothing. Sums of other lengths round otherwise, by 1e-7; sums that cancel, such as a gradient
    of advantages of both signs, and the step between have it grow to 1e-5 in one number of 10,000."""
    engine = engines[deterministic]
    shared = {"forward_backward": 0, "optim_step": 0}

    def counting(verb, adapter_of):
        run = getattr(engine, verb)

        def count(items):
            shared[verb] = max(shared[verb], len({adapter_of(item).uid for item in items}))
            return run(items)

        monkeypatch.setattr(engine, verb, count)

    counting("forward_backward", lambda datum: datum.adapter)
    counting("optim_step", lambda step: step[0])
    with tinker_server(engine, tmp_path) as server, ThreadPoolExecutor(TENANTS + 1) as pool:
        damage = pool.submit(vandal, server)
        together = list(pool.map(lambda number: Tenant(number).run(server), range(TENANTS)))
        assert any(map(math.isnan, damage.result()))
    assert shared["forward_backward"] > 4
    assert shared["optim_step"] > 4
    for (numbers, texts), (expected, expected_texts) in zip(together, alone, strict=True):
        if deterministic:
            assert (numbers, texts) == (expected, expected_texts)
        assert numbers == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_more_models_than_fit_take_turns(engines, alone, tmp_path, monkeypatch):
    """With memory for one model's state, eight tenants at once: bit for bit what each gets alone, though states leave
    memory for most requests. Their files go with their sessions."""
    files = tmp_path / "files"
    files.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(files))
    with tinker_server(engines[True], tmp_path, "--tinker-model-bytes", 1) as server:
        memory = server.service.tinker.memory
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda number: Tenant(number).run(server), range(8)))
        assert memory.num_moves > 16
        assert memory.nbytes == 0
        assert list(files.iterdir()) == []
    assert together == alone[:8]


@pytest.mark.parametrize("memory", [None, 1], ids=["both fit", "one fits"])
def test_who_asks_little_does_not_wait_for_who_asks_much(memory, engines, tmp_path):
    """Both are due at once: the small request shares the second pass at the latest, or has it alone where their states
    take turns; the large one takes over ten."""
    ids = ids_of(1, 400, seed=1)[0]
    ends = []
    limit = [] if memory is None else ["--tinker-model-bytes", memory]
    with tinker_server(engines[False], tmp_path, *limit) as server, service_client(server.url) as client:
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
    limit = "--tinker-max-models", 1
    with tinker_server(engines[False], tmp_path, *limit) as server, service_client(server.url) as second:
        with service_client(server.url) as first:
            first.create_lora_training_client(BASE, rank=2).result()
            waiting = second.create_lora_training_client(BASE, rank=3)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.5)
        assert waiting.result(timeout=30).get_info().lora_rank == 3


def test_a_model_that_memory_refuses_fails_alone(engines, tmp_path, monkeypatch):
    """Torch says so in a RuntimeError on a CPU: the client hears of it, and the next model is created."""
    create = type(engines[False]).create_adapter

    def refusing(engine, lora, seed=0):
        if lora.r == 7:
            torch.empty(2**50)
        return create(engine, lora, seed)

    monkeypatch.setattr(type(engines[False]), "create_adapter", refusing)
    with tinker_server(engines[False], tmp_path) as server, service_client(server.url) as client:
        with pytest.raises(tinker.RequestFailedError, match=r"out of memory: .*allocate memory"):
            client.create_lora_training_client(BASE, rank=7).result()
        assert client.create_lora_training_client(BASE, rank=6).result().get_info().lora_rank == 6


def test_samplers_beyond_their_memory_lie_on_the_disk(engines, tmp_path):
    """Room for none but the last one used: all four versions still say what they said, and their files go with the
    session."""
    with tinker_server(engines[False], tmp_path, "--tinker-sampler-bytes", 0) as server:
        with service_client(server.url) as client:
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


def test_a_version_is_copied_once(engines, tmp_path):
    """Two samplers of one version share its copy, which a saved path does not add to; the next version is another.
    Bytes are those of float32 parameters."""
    with tinker_server(engines[False], tmp_path) as server, service_client(server.url) as client:
        model = client.create_lora_training_client(BASE, rank=2, seed=3).result()
        nbytes, samplers = [], []
        for _ in range(2):
            for _ in range(2):
                samplers.append(model.save_weights_and_get_sampling_client().result())
                nbytes.append(server.service.tinker.snapshots.nbytes)
            model.save_weights_for_sampler(f"{len(nbytes)}").result()
            model.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
        size = engines[False].create_adapter(LoraConfig(r=2, target_modules="all-linear")).nbytes
        assert nbytes == [size, size, 2 * size, 2 * size]
        snapshots = [sampler.snapshot for sampler in _samplers(server)]
        assert snapshots[0] is snapshots[1]
        gauges = httpx.get(f"{server.url}/metrics").text
        assert f"seal_engine_tinker_sampler_bytes {float(2 * size)}" in gauges
        assert f"seal_engine_tinker_model_bytes {float(4 * size)}" in gauges


def test_a_close_of_the_sdk_that_never_returns_ends_the_session(engines, tmp_path, monkeypatch):
    """tests/tinker_client.py says when that happens: a test, and a tenant's memory on the server, must not wait."""

    async def never(_):
        await asyncio.Event().wait()

    monkeypatch.setattr(InternalClientHolder, "_async_cleanup", never)
    monkeypatch.setattr("tinker_client.CLOSE_SECONDS", 0.5)
    with tinker_server(engines[False], tmp_path) as server:
        with service_client(server.url) as client:
            client.create_lora_training_client(BASE, rank=2, seed=3).result()
            assert server.service.tinker.sessions
        assert not server.service.tinker.sessions


def _samplers(server):
    (session,) = server.service.tinker.sessions.values()
    return session.samplers.values()
