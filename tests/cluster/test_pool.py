"""A pool of real workers on a local Ray: what it computes is what one engine computes, whoever computes it.

All tests share one Ray, so they run in one worker of pytest-xdist.
"""

import os
import random
import signal
import sys

import pytest
import torch

from ray_processes import kill_one, worker_pids
from seal_engine import Engine, InputError, LoraConfig, SamplingParams, TrainJob
from seal_engine.cluster.pool import Pool
from seal_engine.loop.domain import Candidate
from seal_engine.loop.inner import InnerLoop
from seal_engine.tiny import MODEL

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.filterwarnings("ignore")]
LORA = LoraConfig(r=4, target_modules="all-linear")
GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def engine():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Engine.from_pretrained(MODEL, "cpu", deterministic=True)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pool(engine):
    """Two workers of one thread, on a Ray that this process has started."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'seal-engine[ray]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        lines = []
        with Pool(Engine.from_pretrained(MODEL, "cpu", deterministic=True), workers=2, log=lines.append) as pool:
            pool.lines = lines
            yield pool


def jobs(count):
    texts = [f"Ann {i} collects coins. Bob {i} plays the flute in the evening." for i in range(count)]
    return [TrainJob([text, text[:20]], LORA, num_epochs=1 + i % 3, seed=i) for i, text in enumerate(texts)]


def candidates(count):
    questions = ["What does Ann collect?", "What does Bob play?"]
    return [(Candidate(f"{i}", job, questions[: 1 + i % 2]), i) for i, job in enumerate(jobs(count))]


def equal(one, other):
    return torch.equal(one.adapter.params, other.adapter.params) and one.losses == other.losses


def test_training_and_sampling_are_the_engines_bit_for_bit(pool, engine):
    """Adapters come back whole, and go out again to be asked, to start from and to be trained on top of."""
    here, there = engine.train(jobs(7), progress=False), pool.train(jobs(7), progress=False)
    assert all(map(equal, here, there))
    prompts, params = ["What?", "Who?"] * 7, [SamplingParams(seed=i, max_tokens=9) for i in range(14)]
    answers = [
        one.generate(prompts, params, [result.adapter for result in results for _ in range(2)], progress=False)
        for one, results in ((engine, here), (pool, there))
    ]
    assert answers[0] == answers[1]
    start, base = here[0].adapter, here[1].adapter
    further = [TrainJob(["Eve sings."], LORA, init_from=start), TrainJob(["Eve sings."], LORA, on_top_of=base)]
    assert all(map(equal, engine.train(further, progress=False), pool.train(further, progress=False)))


def test_trials_follow_the_merged_policy(pool, engine):
    """Trials are those of the same inner loop here, before an update, after it, and after it is undone."""

    def grade(answered):
        return [[float(len(answer)) for answer in answers] for _, answers in answered]

    def trials(one, loop):
        results = loop(GREEDY, grade, progress=False).run([*candidates(6), (Candidate("base", None, ["Who?"]), 0)])
        return [(r.error, r.num_tokens, r.final_loss, r.answers, r.grades) for r in results]

    def both():
        here = trials(engine, lambda *parts, **options: InnerLoop(engine, *parts, **options))
        assert here == trials(pool, pool.inner_loop)
        return here

    before, update = both(), engine.train(jobs(1), progress=False)[0].adapter
    engine.merge(update)
    pool.merge(update)
    assert both() != before
    engine.reload()
    pool.reload()
    assert both() == before


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "asked to end"])
def test_a_worker_that_dies_is_replaced(pool, engine, signal_number):
    """The new one starts from the checkpoint, so it has to fetch the merged update itself."""
    update = engine.train(jobs(1), progress=False)[0].adapter
    for one in (engine, pool):
        one.merge(update)
    pool._dispatcher.wait_until_ready()
    os.kill(worker_pids(os.getpid())[0], signal_number)
    for _ in range(2):  # in the first round the other worker may do it all
        assert all(map(equal, engine.train(jobs(12), progress=False), pool.train(jobs(12), progress=False)))
    pool._dispatcher.wait_until_ready()
    assert all(map(equal, engine.train(jobs(12), progress=False), pool.train(jobs(12), progress=False)))
    assert sum(share.restarts for share in pool.shares()) >= 1
    assert "is lost, and is started again" in "".join(pool.lines)
    for one in (engine, pool):
        one.reload()


def test_equal_jobs_are_trained_once(pool):
    """As in the loop here: candidates with one job and seed go to one worker together."""
    before = pool.shares()
    job = TrainJob(["Ann collects coins."], LORA)
    loop = pool.inner_loop(GREEDY, lambda answered: [[1.0] for _ in answered], progress=False)
    results = loop.run([(Candidate(f"{i}", job, ["What?"]), 3) for i in range(20)])
    assert len({result.answers for result in results}) == 1
    assert sum(share.batches for share in pool.shares()) - sum(share.batches for share in before) == 1


def test_a_job_that_fails_fails_alone(pool):
    results = pool.train([*jobs(2), TrainJob(["x"], LoraConfig(r=0))], progress=False)
    assert [result.error is None for result in results] == [True, True, False]
    assert "lora.r" in results[2].error


def test_messages_and_bytes_are_counted(pool):
    before = pool.traffic()
    pool.inner_loop(GREEDY, lambda answered: [[1.0] for _ in answered], progress=False).run(candidates(4))
    after = pool.traffic()
    assert after["messages"] > before["messages"]
    assert 100 < after["bytes_received"] - before["bytes_received"] < 10_000  # texts and losses, no adapters


def test_too_many_workers_for_the_ray_at_hand(pool, engine):
    with Pool(engine, workers=99) as other, pytest.raises(InputError, match="workers: found 99; accepted: at most"):
        other.train(jobs(1), progress=False)


def test_workers_with_another_base_are_refused(pool, engine, tmp_path):
    """By the digests of the checkpoint's files: a worker's machine may have another checkpoint under the same path."""
    identity = pool._transport.identities[0]
    assert identity.mismatch(identity.version, identity.base) is None
    assert "seal_engine: found" in identity.mismatch("9.9", identity.base)
    other = {**identity.base, "model.safetensors": "0"}
    assert "base: found another model.safetensors" in identity.mismatch(identity.version, other)


def test_without_ray_one_line_names_the_extra(engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"^workers: found no Ray; .*pip install 'seal-engine\[ray\]'$"):
        Pool(engine, workers=2)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [({}, "workers"), ({"workers": -1}, "workers"), ({"workers": 2, "device": "cuda:1"}, "device")],
    ids=["neither workers nor an address", "less than none", "one device for all"],
)
def test_mistakes_are_named(engine, arguments, field):
    with pytest.raises(InputError, match=f"^{field}: found"):
        Pool(engine, **arguments)


def test_a_random_worker_is_found():
    """The helper of the tests that kill: it must not find processes of other runs."""
    assert kill_one(2**22 + 1, random.Random(0)) is False
