"""Workers that only take time, in virtual time: the dispatcher's code on clusters that are not here.

A batch takes its worker as long as `batch_seconds` says. Sending batches and receiving their results takes the driver's
time, one after another, which is all that is serial.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from seal_engine.cluster.dispatch import Event, Kind


class SimulatedTransport:
    """A Transport whose clock jumps to whatever happens next. The results of a batch are its items."""

    def __init__(
        self,
        batch_seconds: Callable[[int, Sequence[Any]], float],
        send_seconds: float = 0.0,
        receive_seconds: float = 0.0,
        start_seconds: float = 0.0,
        deaths: Mapping[int, Sequence[float]] | None = None,
    ):
        """batch_seconds: of a worker and its items; infinite: the batch hangs. start_seconds: of a worker that starts.
        deaths: times at which a worker dies, in order."""
        self.batch_seconds, self.start_seconds = batch_seconds, start_seconds
        self.send_seconds, self.receive_seconds = send_seconds, receive_seconds
        self._clock = 0.0
        self._free: dict[int, float] = {}  # worker -> when it has done what it has
        self._due: list[tuple[float, int, Event]] = []  # a heap by time; the number keeps the order of equal times
        self._lost: set[int] = set()  # batches whose worker died
        self._running: dict[int, int] = {}  # batch -> worker
        self._count = 0
        for worker, times in (deaths or {}).items():
            for time in times:
                self._add(time, Event(Kind.LOST, worker, -1))

    def now(self) -> float:
        return self._clock

    def start(self, worker: int) -> None:
        self._free[worker] = self._clock + self.start_seconds
        self._add(self._free[worker], Event(Kind.READY, worker, None, f"worker {worker}"))

    def submit(self, worker: int, batch: int, call: Any, items: Sequence[Any]) -> None:
        self._clock += self.send_seconds
        seconds = self.batch_seconds(worker, items)
        self._free[worker] = max(self._free[worker], self._clock) + seconds
        self._running[batch] = worker
        self._add(self._free[worker], Event(Kind.DONE, worker, batch, list(items), seconds))

    def kill(self, worker: int) -> None:
        """All batches of the worker are lost at once."""
        for batch in [batch for batch, owner in self._running.items() if owner == worker]:
            self._lost.add(batch)
            del self._running[batch]
            self._add(self._clock, Event(Kind.LOST, worker, batch, "killed"))

    def wait(self, seconds: float) -> list[Event]:
        if not self._due or self._due[0][0] > self._clock + seconds:
            self._clock += seconds
            return []
        time, _, event = heapq.heappop(self._due)
        self._clock = max(self._clock, time)
        if event.kind is Kind.LOST and event.batch == -1:
            self.kill(event.worker)
            return []
        if event.kind is Kind.DONE and event.batch in self._lost:
            return []
        if event.batch is not None:
            self._running.pop(event.batch, None)
            self._clock += self.receive_seconds
        return [event]

    def _add(self, time: float, event: Event) -> None:
        self._count += 1
        heapq.heappush(self._due, (time, self._count, event))
