"""The worker: training and sampling side by side, calls that share passes, cancellation, failures that stay apart."""

from concurrent.futures import wait
from time import monotonic, sleep

import pytest
import torch

from seal_engine import AdamParams, Datum, InputError, LoraConfig, SamplingParams, TrainJob
from seal_engine.serve.requests import CancelledError, ClosedError, FailedError, QueueFullError, SampleRequest
from seal_engine.serve.worker import Worker

IDS = [5, 17, 300, 40]
LONG = SamplingParams(max_tokens=300, ignore_eos=True, seed=1)
SHORT = SamplingParams(max_tokens=5, seed=1)


@pytest.fixture
def worker(engine):
    made = Worker(engine, num_blocks=500, max_queue=20)
    made.start()
    yield made
    made.stop(30)
    assert not made.alive


def job(epochs=3, **fields):
    return TrainJob([[5, 6, 7, 8], [9, 10, 11]], LoraConfig(r=4), num_epochs=epochs, **fields)


def test_jobs_and_prompts_at_once(worker, engine):
    """Each result is what the engine alone gives: an adapter to rounding, tokens exactly."""
    jobs = [job(seed=i, learning_rate=1e-2) for i in range(5)]
    trained = worker.train(jobs)
    requests = [SampleRequest(IDS, SamplingParams(max_tokens=20, seed=i)) for i in range(5)]
    worker.sample(requests)
    for request, alone in zip(trained, engine.train(jobs, progress=False), strict=True):
        assert torch.allclose(request.future.result(30).adapter.params, alone.adapter.params, atol=1e-5)
    outs = engine.generate([IDS] * 5, [request.params for request in requests], progress=False)
    for request, out in zip(requests, outs, strict=True):
        assert request.future.result(30).outputs[0].token_ids == out.outputs[0].token_ids
    assert not worker.busy
    assert worker.trainer.num_done == 0  # released


def test_an_adapter_is_sampled_as_soon_as_it_is_trained(worker, engine):
    """Nothing goes through files: the result's adapter is the next request's."""
    (request,) = worker.train([job(20, learning_rate=1e-2)])
    adapter = request.future.result(30).adapter
    sample = SampleRequest(IDS, SHORT, adapter)
    worker.sample([sample])
    (out,) = engine.generate([IDS], SHORT, adapter, progress=False)
    assert sample.future.result(30).outputs[0].token_ids == out.outputs[0].token_ids


def test_a_call_that_is_submitted_while_others_are_taken_is_not_lost(worker, engine, monkeypatch):
    """The worker takes its calls from the queue at the moment that a client submits one: it is run in a later turn."""
    data = [Datum(engine.create_adapter(LoraConfig(r=4), seed), IDS) for seed in range(2)]
    together, late = worker._together, []

    def meanwhile():
        if not late:
            late.append(worker.forward(data[1:]))
        return together()

    monkeypatch.setattr(worker, "_together", meanwhile)
    assert len(worker.forward(data[:1]).result(30)) == 1
    assert len(late[0].result(30)) == 1
    assert not worker.busy


def test_a_patient_prompt_begins_when_nothing_trains(worker, engine):
    """Beside a job of seconds one with an hour's patience ends after the job, one with 20 ms before it;
    cancelled while it waits, it is counted out.
    """
    (trained,) = worker.train([job(60)])
    patient, hasty, dropped = (SampleRequest(IDS, SHORT, patience=seconds) for seconds in (3600, 0.02, 3600))
    ends = {}
    for name, request in (("job", trained), ("patient", patient), ("hasty", hasty)):
        request.future.add_done_callback(lambda _, name=name: ends.setdefault(name, monotonic()))
    worker.sample([hasty])
    assert hasty.future.result(120) is not None
    worker.sample([patient, dropped])
    worker.cancel(dropped)
    with pytest.raises(CancelledError):
        dropped.future.result(30)
    assert patient.future.result(120).outputs[0].token_ids == hasty.future.result().outputs[0].token_ids
    assert ends["hasty"] < ends["job"] <= ends["patient"]
    assert not worker.busy


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_time_is_shared_as_set(engine, share):
    """While both are due, training gets its share of the time, within what single long passes make of it."""
    made = Worker(engine, num_blocks=500, training_share=share)
    made.start()
    (training,) = made.train([job(2000)])
    requests = [SampleRequest(IDS, SamplingParams(max_tokens=1500, ignore_eos=True, seed=i)) for i in range(4)]
    made.sample(requests)
    while made.turns["sampling"] < 10:
        sleep(0.01)
    before, passes = dict(made.seconds), made.turns["training"]
    wait_until = monotonic() + 30
    while made.turns["training"] < passes + 30 and monotonic() < wait_until:
        sleep(0.01)
    after = dict(made.seconds)
    assert not any(request.future.done() for request in (training, *requests))
    spent = {kind: after[kind] - before[kind] for kind in after}
    assert spent["training"] / sum(spent.values()) == pytest.approx(share, abs=0.15)
    made.stop(30)
    with pytest.raises(ClosedError):
        training.future.result()


def test_the_two_verbs(worker, engine):
    """Calls on different adapters share passes; calls on one adapter keep their order. Equal to the engine's."""
    lora = LoraConfig(r=4)
    ours = [engine.create_adapter(lora, seed=i) for i in range(3)]
    theirs = [adapter.copy() for adapter in ours]
    params = AdamParams(learning_rate=1e-2)
    futures = []
    for step in range(3):
        for adapter in ours:
            futures.append(worker.forward_backward([Datum(adapter, IDS), Datum(adapter, [7, 8, step])]))
            futures.append(worker.optim_step([(adapter, params)]))
    wait(futures, 30)
    for step in range(3):
        for i, adapter in enumerate(theirs):
            results = engine.forward_backward([Datum(adapter, IDS), Datum(adapter, [7, 8, step])])
            assert futures[6 * step + 2 * i].result()[0].loss == pytest.approx(results[0].loss, abs=1e-5)
            norms = engine.optim_step([(adapter, params)])
            assert futures[6 * step + 2 * i + 1].result() == pytest.approx(norms, rel=1e-3)
    for adapter, other in zip(ours, theirs, strict=True):
        assert torch.allclose(adapter.params, other.params, atol=1e-5)
    assert worker.turns["training"] < 18  # calls


def test_a_call_that_is_not_valid_fails_alone(worker, engine):
    adapters = [engine.create_adapter(LoraConfig(r=4), seed=i) for i in range(3)]
    hold = worker.call(lambda _: sleep(0.2))  # so that the next ones wait together
    good, bad, other = (
        worker.forward_backward([Datum(adapter, ids)])
        for adapter, ids in zip(adapters, (IDS, [99999, 1], IDS), strict=True)
    )
    hold.result(30)
    assert len(good.result(30)) == len(other.result(30)) == 1
    with pytest.raises(InputError, match="id"):
        bad.result(30)
    with pytest.raises(InputError, match="no gradients"):
        worker.optim_step([(adapters[1], AdamParams())]).result(30)


def test_prompts_that_cannot_run(worker):
    requests = [SampleRequest(ids, SHORT) for ids in ([], [99999], [1] * 5000)]
    worker.sample(requests)
    for request in requests:
        with pytest.raises(InputError, match="prompt"):
            request.future.result(30)


def test_cancelled_work_holds_nothing(worker):
    requests = [SampleRequest(IDS, LONG) for _ in range(4)]
    worker.sample(requests)
    trained = worker.train([job(10_000), job(10_000)])
    while worker.sampler.cache.pool.num_available == worker.sampler.cache.pool.num_blocks:
        sleep(0.01)
    for request in (*requests, *trained):
        worker.cancel(request)
        worker.cancel(request)
    for request in (*requests, *trained):
        with pytest.raises(CancelledError):
            request.future.result(30)
    assert not worker.busy
    pool = worker.sampler.cache.pool
    assert pool.num_available == pool.num_blocks
    assert worker.trainer.num_resident == 0


def test_a_full_queue_takes_all_or_none(worker):
    requests = [SampleRequest(IDS, LONG) for _ in range(19)]
    worker.sample(requests)
    with pytest.raises(QueueFullError):
        worker.sample([SampleRequest(IDS, SHORT) for _ in range(2)])
    worker.sample([SampleRequest(IDS, SHORT)])
    worker.sample([SampleRequest(IDS, SHORT)], bounded=False)
    for request in requests:
        worker.cancel(request)
    with pytest.raises(QueueFullError):
        worker.train([job()] * 21)


def test_deltas_add_up(worker):
    deltas = []
    request = SampleRequest(IDS, SamplingParams(n=3, max_tokens=9, seed=4), on_delta=deltas.append)
    broken = SampleRequest(IDS, SHORT, on_delta=lambda _: 1 / 0)
    worker.sample([request, broken])
    out = request.future.result(30)
    broken.future.result(30)
    for i, completion in enumerate(out.outputs):
        assert [token for d in deltas if d.index == i for token in d.token_ids] == completion.token_ids


def test_a_step_that_fails_fails_its_requests_and_no_later_one(worker, monkeypatch):
    def fail(*_):
        monkeypatch.undo()
        raise MemoryError

    monkeypatch.setattr(worker.sampler, "_compute", fail)
    request = SampleRequest(IDS, SHORT)
    worker.sample([request])
    with pytest.raises(FailedError, match="MemoryError"):
        request.future.result(30)
    again = SampleRequest(IDS, SHORT)
    worker.sample([again])
    assert again.future.result(30).outputs[0].finish_reason


def test_an_idle_worker_returns_memory_once(worker, monkeypatch):
    """What its last work took belongs to others then."""
    returned = []
    monkeypatch.setattr("seal_engine.serve.worker.IDLE_SECONDS", 0.05)
    monkeypatch.setattr("seal_engine.serve.worker.return_freed_memory", lambda: returned.append(worker.busy))
    (request,) = worker.train([job()])
    request.future.result(30)
    sleep(0.5)
    assert returned == [False]


def test_after_the_end_nothing_is_taken(engine):
    made = Worker(engine, num_blocks=50)
    made.start()
    request = SampleRequest(IDS, LONG)
    made.sample([request])
    verb = made.forward_backward([])
    made.stop(30)
    with pytest.raises(ClosedError):
        request.future.result()
    assert verb.done()
    for submit in (lambda: made.sample([request]), lambda: made.train([job()]), lambda: made.call(lambda _: 1)):
        with pytest.raises(ClosedError):
            submit()


def test_a_worker_that_breaks_says_so(engine, monkeypatch, caplog):
    """Whatever waits is told, nothing new is taken."""
    made = Worker(engine, num_blocks=50)
    made.start()
    request = SampleRequest(IDS, LONG)
    made.sample([request])
    monkeypatch.setattr(made, "_next_kind", lambda: 1 / 0)
    with pytest.raises(ClosedError):
        request.future.result(30)
    deadline = monotonic() + 10
    while made.alive and monotonic() < deadline:
        sleep(0.01)
    assert not made.alive
    assert made.closed
    assert "the worker has failed" in caplog.text
