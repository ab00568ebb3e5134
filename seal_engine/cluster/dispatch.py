"""Which worker does what: batches for workers, two in flight each, until every item has its result, whoever dies.

The scheduler knows neither Ray nor engines. A Transport carries batches to workers and events back: ray_transport.py
has Ray's, simulation.py one in virtual time.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from seal_engine.cluster.pace import Pace, paces, water_level
from seal_engine.errors import RunError

IN_FLIGHT = 2  # batches per worker: one runs, the next lies ready
SHARES = 3  # a batch is a worker's share of what is left, divided by this: ever smaller, so that all end together,
MIN_SHARE = 1 / 8  # but at least this part of an even share of the whole,
MIN_OVERHEAD = 8  # and at least so many times what any batch takes however small it is
TRIES = 3  # of an item alone: a batch that ends with its worker is halved until it is one, and this tried twice more
HANG_SECONDS, HANG_FACTOR = 120.0, 20.0  # a batch hangs after both: this long, and so many times as long as others took
START_SECONDS = 300.0  # without any worker that is ready, before the run ends


class Kind(Enum):
    """What happened to a worker or to a batch."""

    READY = "a worker has started; value: what it says of itself"
    REFUSED = "a worker that cannot be used, or does not start; value: why"
    DONE = "a batch has its results; value: them"
    LOST = "a batch ended with its worker; value: why"
    MEMORY = "a batch needed more memory than the worker has; value: why"
    FAILED = "a batch raised an error that another worker would raise, too; value: the exception"


@dataclass(frozen=True)
class Event:
    """Something that happened. seconds: what a batch took on its worker."""

    kind: Kind
    worker: int
    batch: int | None = None
    value: Any = None
    seconds: float = 0.0


class Transport(Protocol):
    """Carries batches to workers and events back."""

    def now(self) -> float:
        """The time in seconds."""
        ...

    def start(self, worker: int) -> None:
        """Ask a worker that starts, or starts again, for READY; it comes as an event."""
        ...

    def submit(self, worker: int, batch: int, call: Any, items: Sequence[Any]) -> None:
        """Hand a batch to a worker, which does its batches one after another."""
        ...

    def kill(self, worker: int) -> None:
        """End a worker that hangs; its batches come back as LOST, and it starts again."""
        ...

    def wait(self, seconds: float) -> list[Event]:
        """What has happened since the last call; waits for the first event, at most so long."""
        ...


@dataclass
class WorkerState:
    """What the driver knows of a worker, and what the worker has done."""

    name: str
    state: str = "starting"  # then "ready", and in the end perhaps "gone"
    batches: dict[int, list[int]] = field(default_factory=dict)  # in flight: number -> items, the first one runs
    limit: int | None = None  # items in a batch at most, after a batch that needed too much memory
    since: float = 0.0  # when the batch that runs was begun, or the start
    items: int = 0
    batches_done: int = 0
    busy_seconds: float = 0.0
    restarts: int = 0
    paces: dict[str, Pace] = field(default_factory=dict)  # by kind of run


class Dispatcher:
    """Runs lists of items on workers. One list at a time; workers and what they have done stay."""

    def __init__(self, transport: Transport, names: Sequence[str], log: Callable[[str], None] = print):
        """names: of the workers, which begin to start. log: takes a line on a worker that died, hung or was refused."""
        self.transport, self.log = transport, log
        self.workers = [WorkerState(name) for name in names]
        self.seconds = 0.0  # of all runs
        self._numbers, self._send_seconds = 0, 0.0  # of all batches so far
        for i in range(len(names)):
            self._start(i)

    def wait_until_ready(self) -> None:
        """Returns when every worker is ready or refused. RunError if none is left."""
        while any(worker.state == "starting" for worker in self.workers):
            self._handle_events(None)

    def run(
        self,
        call: Any,
        items: Sequence[Any],
        costs: Sequence[float],
        limits: Mapping[int, int] | None = None,
        report: Callable[[int], None] = lambda done: None,
        kind: str = "",
    ) -> list[Any]:
        """The result of every item, in order. call: what workers are to do with items, as the transport takes it.

        costs: how much work each item is, in any unit. limits: items in a batch at most, by worker. report: called
        with the number of items that are done. kind: runs of one kind have costs that take equally long. RunError where
        an item alone ends three workers, or no worker is left.
        """
        start = self.transport.now()
        run = _Run(call, items, costs, limits or {}, kind)
        try:
            while len(run.results) < len(items):
                self._hand_out(run)
                self._handle_events(run)
                report(len(run.results))
        finally:
            self.seconds += self.transport.now() - start
        return [run.results[i] for i in range(len(items))]

    def _start(self, number: int) -> None:
        worker = self.workers[number]
        worker.state, worker.since = "starting", self.transport.now()
        self.transport.start(number)

    def _hand_out(self, run: "_Run") -> None:
        """Give batches to whoever is free, then second ones to those that would be done before the others."""
        ready = {i: worker for i, worker in enumerate(self.workers) if worker.state == "ready"}
        if not run.queue or not ready:
            return
        fixed, slopes = paces({i: worker.paces.get(run.kind) for i, worker in ready.items()})
        workers = sum(worker.state != "gone" for worker in self.workers)
        # What a batch costs beside its items: while the driver sends it, all others may have to wait.
        overhead = fixed + workers * self._send_seconds / max(1, self._numbers)
        backlogs = {i: self._backlog(run, worker, fixed, slopes[i]) for i, worker in ready.items()}
        end = water_level(backlogs, slopes, run.left)
        for in_flight in range(IN_FLIGHT):
            for i, worker in ready.items():
                room = end - backlogs[i]
                if run.queue and len(worker.batches) <= in_flight and (room > fixed or not worker.batches):
                    limit = min(filter(None, (worker.limit, run.limits.get(i))), default=len(run.items))
                    batch = run.take(run.share(room, overhead, slopes[i], workers), limit)
                    self._send(run, i, batch)
                    backlogs[i] += fixed + slopes[i] * run.cost(batch)
                    end = water_level(backlogs, slopes, run.left)

    def _send(self, run: "_Run", number: int, batch: list[int]) -> None:
        worker, start = self.workers[number], self.transport.now()
        if not worker.batches:
            worker.since = start
        self._numbers += 1
        worker.batches[self._numbers] = batch
        run.batches.add(self._numbers)
        self.transport.submit(number, self._numbers, run.call, [run.items[j] for j in batch])
        self._send_seconds += self.transport.now() - start

    def _backlog(self, run: "_Run", worker: WorkerState, fixed: float, slope: float) -> float:
        """Seconds until a worker has done its batches; those of a run that was interrupted are not counted."""
        seconds = [fixed + slope * run.cost(batch) for number, batch in worker.batches.items() if number in run.batches]
        if seconds:
            seconds[0] = max(0.0, seconds[0] - (self.transport.now() - worker.since))
        return sum(seconds)

    def _handle_events(self, run: "_Run | None") -> None:
        for event in self.transport.wait(1.0):
            worker = self.workers[event.worker]
            if event.kind is Kind.READY:
                self._ready(worker, event.value)
            elif event.kind is Kind.REFUSED:
                worker.state = "gone"
                self.log(f"{worker.name} is refused: {event.value}")
            else:
                self._end_batch(run, event)
        self._validate_workers()
        if run is not None:
            self._kill_hanging(run)

    def _ready(self, worker: WorkerState, name: str) -> None:
        if worker.restarts:
            self.log(f"{name} is ready again")
        worker.name, worker.state = name, "ready"

    def _end_batch(self, run: "_Run | None", event: Event) -> None:
        """A batch has come back, with results or without."""
        worker, now = self.workers[event.worker], self.transport.now()
        assert event.batch is not None
        was_first = event.batch == next(iter(worker.batches), None)
        batch = worker.batches.pop(event.batch, None)
        if batch is None:
            return
        taken, worker.since = now - worker.since, now if was_first else worker.since
        if event.kind is Kind.LOST and worker.state == "ready":
            worker.restarts += 1
            self.log(f"{worker.name} is lost, and is started again: {event.value}")
            self._start(event.worker)
        if run is None or event.batch not in run.batches:  # of a run that was interrupted
            return
        if event.kind is Kind.DONE:
            run.results.update(zip(batch, event.value, strict=True))
            run.slowest = max(run.slowest, taken / run.cost(batch))
            if worker.batches_done == 1:
                worker.paces.clear()  # its first batch warmed it up
            worker.paces.setdefault(run.kind, Pace()).add(run.cost(batch), event.seconds)
            worker.items += len(batch)
            worker.batches_done += 1
            worker.busy_seconds += event.seconds
        elif event.kind is Kind.FAILED:
            raise event.value
        else:
            if event.kind is Kind.MEMORY:
                worker.limit = max(1, len(batch) // 2)
                self.log(f"{worker.name} ran out of memory with {len(batch)} at once, now at most {worker.limit}")
            run.put_back(batch, was_first, f"{worker.name}: {event.value}")

    def _validate_workers(self) -> None:
        """RunError where no worker is left, or none has become ready for long."""
        states = {worker.state for worker in self.workers}
        if states == {"gone"}:
            raise RunError("no worker is left; the reasons are above")
        if "ready" not in states:
            waited = self.transport.now() - max(w.since for w in self.workers if w.state == "starting")
            if waited > START_SECONDS:
                raise RunError(f"no worker has been ready for {waited:.0f} s")

    def _kill_hanging(self, run: "_Run") -> None:
        """End workers whose batch takes many times as long as others have."""
        now = self.transport.now()
        for i, worker in enumerate(self.workers):
            number, batch = next(iter(worker.batches.items()), (0, []))
            if worker.state == "ready" and number in run.batches and run.slowest:
                taken, usual = now - worker.since, run.slowest * run.cost(batch)
                if taken > max(HANG_SECONDS, HANG_FACTOR * usual):
                    self.log(f"{worker.name} has been at a batch for {taken:.0f} s, usual are {usual:.0f} s: it ends")
                    worker.since = now
                    self.transport.kill(i)


class _Run:
    """The items of one run: waiting, in flight, done."""

    def __init__(self, call: Any, items: Sequence[Any], costs: Sequence[float], limits: Mapping[int, int], kind: str):
        self.call, self.items, self.limits, self.kind = call, items, limits, kind
        self.costs = [max(cost, 1e-9) for cost in costs]  # nothing is free
        # The longest first: begun last, they would be waited for alone.
        self.queue = deque(sorted(range(len(items)), key=lambda i: -costs[i]))
        self.left = self.total = sum(self.costs)  # cost of what is not handed out, and of all
        self.results: dict[int, Any] = {}
        self.batches: set[int] = set()  # numbers of all batches of this run
        self.tries = [0] * len(items)
        self.together = [len(items)] * len(items)  # how many an item may be in a batch with: fewer after a failure
        self.slowest = 0.0  # seconds per cost, of the batches that are done

    def cost(self, batch: Sequence[int]) -> float:
        return sum(self.costs[i] for i in batch)

    def share(self, room: float, overhead: float, slope: float, workers: int) -> float:
        """Cost of a worker's next batch, of all that it has room for if that is little or nobody else works.

        room: seconds until all are done, after what the worker has. overhead: seconds of a batch beside its items.
        """
        least = max(MIN_SHARE * self.total * slope / workers, MIN_OVERHEAD * overhead)
        seconds = room if workers == 1 or room < 2 * least else max(room / SHARES, least)
        return seconds / slope

    def take(self, share: float, limit: int) -> list[int]:
        """The next batch: about `share`, at least one item, at most `limit` of them."""
        batch, cost = [], 0.0
        while self.queue:
            item = self.queue[0]
            limit, cost = min(limit, self.together[item]), cost + self.costs[item]
            if batch and (len(batch) >= limit or cost - self.costs[item] / 2 > share):
                break
            batch.append(self.queue.popleft())
        self.left -= self.cost(batch)
        return batch

    def put_back(self, batch: Sequence[int], charged: bool, reason: str) -> None:
        """The items of a batch that failed are the next, in smaller batches if it may have been their fault (charged).

        Only an item that was alone is known to be at fault.
        """
        for i in reversed(batch):
            if charged and len(batch) == 1:
                self.tries[i] += 1
            if self.tries[i] >= TRIES:
                raise RunError(f"a batch of one item failed {TRIES} times, the last time at {reason}")
            if charged:
                self.together[i] = max(1, len(batch) // 2)
            self.queue.appendleft(i)
        self.left += self.cost(batch)
