"""Workers as Ray actors: where they are, how batches reach them, and how one that is dead or silent is noticed.

Ray restarts an actor whenever its process or its machine dies; what it was doing comes back to the dispatcher, which
gives it to whoever is free, so Ray itself retries no batch. Nothing else imports Ray.
"""

import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from threading import current_thread, main_thread
from time import perf_counter, sleep
from typing import Any
from weakref import WeakKeyDictionary

import ray
import ray._private.services
import ray._private.worker

# After Ray, which has it with it.
import psutil  # pyright: ignore[reportMissingImports]  # isort: skip
import torch
from ray.exceptions import ActorDiedError, RayError, RayTaskError

import seal_engine
from seal_engine.cluster.dispatch import Event, Kind
from seal_engine.cluster.wire import AdapterState, pack, unpack
from seal_engine.cluster.worker import Call, Identity, Reply, Worker, WorkerConfig
from seal_engine.errors import InputError
from seal_engine.model.adapters import Adapter
from seal_engine.model.config import ModelConfig

START_SECONDS = 120.0  # in which an actor may die while it starts, and is started again
BEAT_SECONDS, SILENT_SECONDS = 10.0, 60.0  # between two questions whether a worker is alive; until it counts as dead
MAX_STEP_SECONDS = 5.0  # between two readings of the clock, which is read about once per second
CONNECT_SECONDS = 5.0  # in which something must answer at the address of a Ray
CPU = torch.device("cpu")
INHERITED = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # environment variables that workers have as the driver does


@dataclass(frozen=True)
class Placement:
    """How many workers there are, and what each holds of its machine."""

    workers: int
    gpus: int  # 1 or 0
    threads: int


@dataclass
class Traffic:
    """What went through, of all batches."""

    messages: int = 0
    bytes_sent: int = 0  # items, and adapters that were not on their way before
    bytes_received: int = 0


class _Actor(Worker):
    """A Worker whose policies are references into Ray's object store."""

    def __init__(self, config: WorkerConfig):
        super().__init__(config, fetch=ray.get)


def connect(address: str, workers: int, device: str) -> tuple[Placement, Callable[[], None]]:
    """Join the Ray at `address`, or start one for this process: where workers go, and what leaves that Ray again.

    A Ray that this process has joined already is used as it is. workers 0: one for each GPU or, without any, for each
    machine. InputError where Ray cannot be reached or has no room for so many.
    """
    threads = int(os.environ.get("OMP_NUM_THREADS", 0))
    leave = (lambda: None) if ray.is_initialized() else _join(address, max(1, workers), threads)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes)) if device != "cpu" else 0
    workers = workers or gpus or len(nodes)
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    if not threads:
        threads = max(1, min(cpus) // -(-workers // len(nodes)))
    placement = Placement(workers, min(gpus, 1), max(1, threads))
    room = gpus if gpus else sum(count // placement.threads for count in cpus)
    if workers > room:
        leave()
        what = "one GPU each" if gpus else f"{placement.threads} CPUs each (OMP_NUM_THREADS sets that)"
        raise InputError(f"workers: found {workers}; accepted: at most {room} in this Ray, with {what}")
    return placement, leave


def _join(address: str, workers: int, threads: int) -> Callable[[], None]:
    """Join the Ray at `address`, or start one with CPUs for so many workers. Returns what leaves it again."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray repeats deaths on stdout, where a command's last line may be JSON; the dispatcher names them itself.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    cpus = workers * (threads or max(1, len(os.sched_getaffinity(0)) // workers))
    here = {"address": "local", "num_cpus": cpus, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    where: dict[str, Any] = {"address": address} if address else here
    others = psutil.Process().children()

    def started() -> list[Any]:
        return [process for process in psutil.Process().children() if process not in others]

    try:
        if address:
            _validate_address(address)
        with nullcontext() if address else _interrupts_wait():
            ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
    except BaseException as error:  # an interrupt, or whatever went wrong: Ray raises bare Exceptions, too
        _leave(started())
        if not isinstance(error, Exception):
            raise
        reason = f"{error}" if address else f"it did not start: {error}"
        raise InputError(f"ray_address: found {address or 'none'}: {reason}; accepted: a Ray that runs") from None
    return partial(_leave, started())


def _validate_address(address: str) -> None:
    """OSError where nothing listens there: Ray itself would go on trying for two minutes, and not mind Ctrl-C."""
    where = ray._private.services.canonicalize_bootstrap_address(address)
    if where is None:
        raise ConnectionError("none was started on this machine")
    host, _, port = where.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C takes effect at the end of the block: a driver crashes if its own Ray ends while it connects to it."""
    interrupts: list[int] = []
    main = current_thread() is main_thread()
    before = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number)) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGINT, before)
    if interrupts:
        raise KeyboardInterrupt


def _leave(started: Sequence[Any]) -> None:
    """Leave Ray, and end the processes that were started for it with all below them."""
    family = []
    for process in started:
        with suppress(psutil.Error):
            family += [*process.children(recursive=True), process]
    node: Any = ray._private.worker._global_node
    if node is not None:
        node.kill_monitor(check_alive=False)  # it does not end at SIGTERM, so that Ray would wait a second for it
    ray.shutdown()
    for process in family:  # a raylet that does not end in time leaves agents behind, which would stay for a minute
        with suppress(psutil.Error):
            process.kill()


class RayTransport:
    """A Transport (see dispatch.py) over actors, one for each worker."""

    def __init__(
        self,
        config: WorkerConfig,
        placement: Placement,
        model: ModelConfig,
        base: dict[str, str],
        log: Callable[[str], None],
    ):
        """model: of the base, for adapters that come back. base: the fingerprint that workers must have, too."""
        environment = {name: os.environ[name] for name in INHERITED if name in os.environ}
        environment["OMP_NUM_THREADS"] = str(config.threads)
        resources = {"num_gpus": 1, "num_cpus": 1} if placement.gpus else {"num_cpus": config.threads}
        # A group of its own for beats: they are answered while a batch runs.
        remote: Any = ray.remote
        self._kind: Any = remote(concurrency_groups={"beats": 1})(_Actor).options(
            max_restarts=-1, scheduling_strategy="SPREAD", runtime_env={"env_vars": environment}, **resources
        )
        self.config, self.model, self.base, self.log = config, model, base, log
        self.identities: dict[int, Identity] = {}
        self.traffic = Traffic()
        self._awake, self._last = 0.0, perf_counter()
        self._actors = [self._kind.remote(config) for _ in range(placement.workers)]
        self._pending: dict[Any, tuple[int, int | None]] = {}  # reference -> worker, batch (None: a start)
        self._beats: dict[int, tuple[Any, float]] = {}  # worker -> the last beat, when it was asked for
        self._starts: dict[int, float] = {}  # worker -> when it was asked to start
        self._to_ask: list[int] = []  # workers that did not answer when they were asked to start
        self._sent: WeakKeyDictionary[Adapter, tuple[int, Any]] = WeakKeyDictionary()  # its version, a reference

    @property
    def num_workers(self) -> int:
        """Those that are left out count, too."""
        return len(self._actors)

    def now(self) -> float:
        """Seconds that this process has been awake: one that was stopped for minutes must not take workers for dead."""
        last, self._last = self._last, perf_counter()
        self._awake += min(self._last - last, MAX_STEP_SECONDS)
        return self._awake

    def start(self, worker: int) -> None:
        self._starts[worker] = self.now()
        self._pending[self._actors[worker].hello.remote()] = worker, None

    def submit(self, worker: int, batch: int, call: Call, items: Sequence[Any]) -> None:
        data, adapters = pack(items)
        states = [self.share(adapter) for adapter in adapters]
        self.traffic.messages += 2
        self.traffic.bytes_sent += len(data)
        self._pending[self._actors[worker].work.remote(call, data, *states)] = worker, batch

    def share(self, adapter: Adapter) -> Any:
        """A reference to the adapter as it is now, which is put into the object store once."""
        version, reference = self._sent.get(adapter, (None, None))
        if version != adapter.version:
            state = AdapterState.of(adapter)
            reference = ray.put(state)
            self._sent[adapter] = adapter.version, reference
            self.traffic.bytes_sent += state.params.nbytes
        return reference

    def kill(self, worker: int) -> None:
        ray.kill(self._actors[worker], no_restart=False)

    def wait(self, seconds: float) -> list[Event]:
        self._check_beats()
        for worker in self._to_ask:
            self._pending[self._actors[worker].hello.remote()] = worker, None
        self._to_ask = []
        references = list(self._pending)
        if not references:
            sleep(0.1)
            return []
        ready, _ = ray.wait(references, num_returns=1, timeout=seconds, fetch_local=False)
        if ready:
            ready, _ = ray.wait(references, num_returns=len(references), timeout=0, fetch_local=False)
        events = [self._event(reference, *self._pending.pop(reference)) for reference in ready]
        if not any(events):
            sleep(0.1)  # a start that failed, which is asked for again
        return list(filter(None, events))

    def _check_beats(self) -> None:
        """Ask workers now and then whether they are alive, and end those that do not answer: a process that is stopped
        neither dies nor works."""
        now = self.now()
        for worker in list(self.identities):
            reference, asked = self._beats.get(worker, (None, now - BEAT_SECONDS))
            answered = reference is None or bool(ray.wait([reference], timeout=0)[0])
            if answered and now - asked >= BEAT_SECONDS:
                beat = self._actors[worker].beat.options(concurrency_group="beats")
                self._beats[worker] = beat.remote(), now
            elif not answered and now - asked > SILENT_SECONDS:
                self.log(f"worker {worker} has not answered for {SILENT_SECONDS:.0f} s: it ends")
                self._forget(worker)
                self.kill(worker)

    def _forget(self, worker: int) -> None:
        """A worker that is not ready: it is not asked for beats."""
        self.identities.pop(worker, None)
        self._beats.pop(worker, None)

    def _event(self, reference: Any, worker: int, batch: int | None) -> Event | None:
        try:
            value: Any = ray.get(reference)
        except RayTaskError as error:
            reason = str(error.cause or error)
            kind, value = (Kind.REFUSED, reason) if batch is None else (Kind.FAILED, error)
            return Event(kind, worker, batch, value)
        except RayError as error:
            self._forget(worker)
            reason = " ".join(str(error).split("\n")[0].split())
            if batch is not None:
                return Event(Kind.LOST, worker, batch, reason)
            if self.now() - self._starts[worker] > START_SECONDS:
                return Event(Kind.REFUSED, worker, None, f"it has not started for {START_SECONDS:.0f} s: {reason}")
            if isinstance(error, ActorDiedError):  # for good: Ray restarts all others
                self._actors[worker] = self._kind.remote(self.config)
            self._to_ask.append(worker)  # Ray also says so of an actor that is about to start
            return None
        return self._welcome(worker, value) if batch is None else self._read(worker, batch, value)

    def _welcome(self, worker: int, identity: Identity) -> Event:
        mismatch = identity.mismatch(seal_engine.__version__, self.base)
        if mismatch is not None:
            return Event(Kind.REFUSED, worker, None, f"{identity.host}, process {identity.pid}: {mismatch}")
        self.identities[worker] = identity
        name = f"worker {worker} ({identity.host}, process {identity.pid}, {identity.device})"
        return Event(Kind.READY, worker, None, name)

    def _read(self, worker: int, batch: int, reply: Reply) -> Event:
        for line in reply.lines:
            self.log(f"worker {worker}: {line}")
        if reply.error is not None:
            kind, value = (Kind.MEMORY, str(reply.error)) if reply.memory else (Kind.FAILED, reply.error)
            return Event(kind, worker, batch, value)
        self.traffic.bytes_received += len(reply.data) + sum(state.params.nbytes for state in reply.adapters)
        adapters = [state.load(self.model, CPU) for state in reply.adapters]
        return Event(Kind.DONE, worker, batch, unpack(reply.data, adapters), reply.seconds)

    def close(self) -> None:
        """End all workers."""
        for actor in self._actors:
            ray.kill(actor)
