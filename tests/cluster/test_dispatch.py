"""The dispatcher over simulated workers: every item once, whoever dies, hangs or has too little memory."""

import math
import random

import pytest

from seal_engine.cluster.dispatch import Dispatcher, Event, Kind
from seal_engine.cluster.simulation import SimulatedTransport
from seal_engine.errors import RunError


def dispatcher(transport, workers):
    lines = []
    made = Dispatcher(transport, [f"worker {i}" for i in range(workers)], lines.append)
    made.wait_until_ready()
    return made, lines


def test_all_workers_end_together():
    """300 items of one second on 4 workers, one of them at half speed: 300 / 3.5 = 85.7 s are the least. The last batch
    has an eighth of an even share, 9.4 items, which the slow worker takes 19 s for."""
    transport = SimulatedTransport(lambda worker, items: len(items) * (2 if worker == 0 else 1))
    pool, _ = dispatcher(transport, 4)
    assert pool.run(None, list(range(300)), [1.0] * 300) == list(range(300))
    assert 300 / 3.5 <= transport.now() <= 300 / 3.5 + 19
    assert sum(worker.items for worker in pool.workers) == 300
    assert pool.workers[0].items < min(worker.items for worker in pool.workers[1:])


def test_the_longest_items_are_begun_first():
    """One item of 50 s among 50 of one second, two workers: begun last, it would make 75 s of 50."""
    transport = SimulatedTransport(lambda worker, items: sum(items))
    pool, _ = dispatcher(transport, 2)
    costs = [1.0] * 50 + [50.0]
    pool.run(None, costs, costs)
    assert transport.now() <= 51


def test_batches_are_large_where_each_costs_much():
    """768 items of 25 ms on 32 workers, and 46 ms for each batch: the first run measures that, and from the second one
    on a worker has all its 24 items in one batch, 0.646 s, where two would take 0.692 s."""
    transport = SimulatedTransport(lambda worker, items: 0.046 + 0.025 * len(items))
    pool, _ = dispatcher(transport, 32)
    times, batches = [], []
    for _ in range(2):
        start = transport.now()
        pool.run(None, list(range(768)), [1.0] * 768)
        times.append(transport.now() - start)
        batches.append(sum(worker.batches_done for worker in pool.workers))
    assert batches[1] - batches[0] == 32
    assert times[0] > times[1] == pytest.approx(0.646)


def test_a_slow_worker_gets_less_from_the_second_run_on():
    """As above, with one worker of half the speed: 31.5 even shares of 24.4 items, which take 0.656 s. The slow one's
    would be 12.2; it gets fewer, as the fixed part of others is taken for its own, and the rest counts by the item."""
    transport = SimulatedTransport(lambda worker, items: (0.046 + 0.025 * len(items)) * (2 if worker == 0 else 1))
    pool, _ = dispatcher(transport, 32)
    for _ in range(2):
        start, before = transport.now(), pool.workers[0].items
        pool.run(None, list(range(768)), [1.0] * 768)
    assert transport.now() - start < 0.72
    assert 9 <= pool.workers[0].items - before <= 12


@pytest.mark.parametrize("seed", range(20))
def test_no_item_is_lost_or_counted_twice(seed):
    """Each of 3 workers dies a few times at random moments, and takes 5 s to start again."""
    draw = random.Random(seed)
    deaths = {worker: sorted(draw.uniform(0, 60) for _ in range(2)) for worker in range(3)}
    transport = SimulatedTransport(lambda worker, items: len(items), start_seconds=5, deaths=deaths)
    pool, lines = dispatcher(transport, 3)
    done = []
    assert pool.run(None, list(range(100)), [1.0] * 100, report=done.append) == list(range(100))
    assert sum(worker.items for worker in pool.workers) == 100
    assert done == sorted(done)
    restarts = sum(worker.restarts for worker in pool.workers)
    assert len([line for line in lines if "is lost, and is started again" in line]) == restarts <= 6


def test_a_batch_that_hangs_is_done_by_another():
    hung = []

    def seconds(worker, items):
        if worker == 1 and not hung:
            hung.append(items)
            return math.inf
        return len(items)

    transport = SimulatedTransport(seconds)
    pool, lines = dispatcher(transport, 3)
    assert pool.run(None, list(range(60)), [1.0] * 60) == list(range(60))
    assert any("worker 1 has been at a batch" in line for line in lines)
    assert pool.workers[1].restarts == 1


class Refusing(SimulatedTransport):
    """Worker 0 has memory for two items at once."""

    def submit(self, worker, batch, call, items):
        super().submit(worker, batch, call, items)
        if worker == 0 and len(items) > 2:
            self._lost.add(batch)
            self._add(self.now(), Event(Kind.MEMORY, worker, batch, "no memory"))


def test_a_batch_that_needs_too_much_memory_is_cut():
    pool, lines = dispatcher(Refusing(lambda worker, items: len(items)), 2)
    assert pool.run(None, list(range(40)), [1.0] * 40) == list(range(40))
    assert pool.workers[0].limit in (1, 2)
    assert "worker 0 ran out of memory" in lines[0]


def test_an_item_that_ends_every_worker_ends_the_run():
    """After three tries, each in a smaller batch: the others have gone on without it meanwhile."""

    class Poisoned(SimulatedTransport):
        def submit(self, worker, batch, call, items):
            super().submit(worker, batch, call, items)
            if 7 in items:
                self.kill(worker)

    pool, _ = dispatcher(Poisoned(lambda worker, items: len(items)), 2)
    with pytest.raises(RunError, match="failed 3 times"):
        pool.run(None, list(range(20)), [1.0] * 20)


def test_without_any_worker_the_run_ends():
    class Refused(SimulatedTransport):
        def start(self, worker):
            self._add(self.now(), Event(Kind.REFUSED, worker, None, "another base"))

    with pytest.raises(RunError, match="no worker is left"):
        dispatcher(Refused(lambda worker, items: 1.0), 2)


def test_an_error_of_a_batch_is_raised_and_what_is_in_flight_is_dropped_later():
    class Failing(SimulatedTransport):
        failed = False

        def submit(self, worker, batch, call, items):
            super().submit(worker, batch, call, items)
            if not self.failed and 3 in items:
                self.failed = True
                self._lost.add(batch)
                self._add(self.now(), Event(Kind.FAILED, worker, batch, ValueError("a mistake")))

    pool, _ = dispatcher(Failing(lambda worker, items: len(items)), 2)
    with pytest.raises(ValueError, match="a mistake"):
        pool.run(None, list(range(20)), [1.0] * 20)
    assert pool.run(None, list(range(100, 120)), [1.0] * 20) == list(range(100, 120))
