"""The Worker: the one thread that owns an engine. Requests come in through one queue, results go out through futures.

One Sampler and one Trainer live as long as the worker. Prompts of all callers decode in the same steps and share one
prefix cache; jobs of all callers train in the same passes. While both kinds of work are due they share time, not turns:
the kind runs next that has used less of its share so far (`training_share` for training, the rest for sampling; one
step or one pass is never interrupted). A kind that was idle gets no credit for it. So a burst of prompts waits for at
most the pass that is running, and training never stops. Samples that have patience begin when nothing trains, or when
the first of them has waited for as long as it may: those of several callers then decode together.
"""

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from time import perf_counter
from typing import Any, TypeVar

import torch

from seal_engine.engine import Engine
from seal_engine.model.adapters import Adapter
from seal_engine.model.devices import free_memory, release_threads, return_freed_memory
from seal_engine.sampling.kv_cache import KVCache
from seal_engine.sampling.requests import Delta
from seal_engine.serve.requests import (
    CancelledError,
    ClosedError,
    FailedError,
    QueueFullError,
    SampleRequest,
    TrainRequest,
    VerbRequest,
    running_future,
)
from seal_engine.training.jobs import AdamParams, Datum, DatumResult, TrainJob
from seal_engine.training.trainer import Trainer
from seal_engine.types import InputError

T = TypeVar("T")
SAMPLING, TRAINING = "sampling", "training"
KEPT_STEP_TIMES = 1024
CPU_BLOCKS = 4096  # 65,536 tokens
TRIM_TURNS = 1000  # between two times that free memory goes back to the system
IDLE_SECONDS = 5.0  # with nothing due, after which it goes back, too
log = logging.getLogger("seal_engine")


def _cpu_blocks(engine: Engine) -> int:
    """Blocks of the K/V cache on a CPU, whose free memory is everybody's."""
    wanted = max(CPU_BLOCKS, 4 * engine.config.max_position_embeddings // 16)
    size = KVCache.block_bytes(engine.config, engine.model.product_dtype)
    return max(1, min(wanted, free_memory(engine.model.device) // 2 // size))


class Worker:
    """`start`, then submit from any thread; `stop` at the end. Every method but `start` and `stop` returns at once."""

    def __init__(
        self,
        engine: Engine,
        num_blocks: int | None = None,
        max_num_seqs: int = 256,
        max_queue: int = 16384,
        training_share: float = 0.2,
    ):
        """num_blocks, max_num_seqs: of the sampler; num_blocks None: on a GPU half of the free memory, on a CPU
        CPU_BLOCKS, or four sequences of the model's length, if half of the free memory holds them. max_queue: samples,
        and jobs, that may be waiting or running. training_share: of the time, while there is sampling to do, too;
        above 0 and below 1.
        """
        self.engine = engine
        if num_blocks is None and engine.model.device.type == "cpu":
            num_blocks = _cpu_blocks(engine)
        self.sampler = engine.sampler(num_blocks, max_num_seqs=max_num_seqs)
        for memory in (self.sampler.cache.keys, self.sampler.cache.values):
            memory.zero_()  # taken now: a process that serves for days does not grow with the prefixes that it keeps
        self.trainer: Trainer | None = None  # made for the first job: its memory is what is free then
        self.max_queue = max_queue
        self.shares = {SAMPLING: 1 - training_share, TRAINING: training_share}
        self.closed = False
        self.verb_tokens = 0  # that forward_backward computed
        self.turns: Counter[str] = Counter()
        self.seconds = {SAMPLING: 0.0, TRAINING: 0.0}  # of turns
        self.step_times: deque[float] = deque(maxlen=KEPT_STEP_TIMES)  # seconds from one sampler step's end to the next
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._samples: dict[int, SampleRequest] = {}
        self._patient: dict[
            SampleRequest, float
        ] = {}  # those that wait while jobs train -> the time at which they begin
        self._jobs: dict[int, TrainRequest] = {}
        self._verbs: deque[VerbRequest] = deque()
        self._verbs_next = True  # of verbs and jobs, which take turns
        self._open: Counter[str] = Counter()  # requests that have no result yet, by kind
        self._lock = threading.Lock()
        self._clock = {SAMPLING: 0.0, TRAINING: 0.0}  # time used, divided by the share
        self._last_step_end: float | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="seal-engine worker", daemon=True)

    def start(self) -> None:
        """Begin to work. The calling thread's own torch threads end; they come again when it needs them."""
        release_threads()
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests can be answered."""
        return self._thread.is_alive()

    @property
    def busy(self) -> bool:
        """Whether a request has no result yet."""
        return any(self._open.values())

    def num_open(self, kind: str) -> int:
        """Samples, or jobs and calls, by the kind "sampling" or "training", that have no result yet."""
        return self._open[kind]

    # What callers submit

    def sample(self, requests: Sequence[SampleRequest], bounded: bool = True) -> None:
        """Queue prompts, all or none. bounded=False: beyond max_queue, too, for callers with a bound of their own.

        Raises QueueFullError and ClosedError.
        """
        self._admit(SAMPLING, sum(request.params.n for request in requests), bounded)
        self._inbox.put(partial(self._add_samples, requests))

    def train(self, jobs: Sequence[TrainJob], bounded: bool = True) -> list[TrainRequest]:
        """Queue jobs, all or none; they join those that are being trained. Raises what `sample` does."""
        self._admit(TRAINING, len(jobs), bounded)
        requests = [TrainRequest(job) for job in jobs]
        self._inbox.put(partial(self._add_jobs, requests))
        return requests

    def forward_backward(self, data: Sequence[Datum], bounded: bool = True) -> "Future[list[DatumResult]]":
        """`Engine.forward_backward`, in order among the calls on the same adapters, in one pass with calls on others.

        Takes and raises what `sample` does; the future raises what the engine does.
        """
        return self._add_verb(_data_request("forward_backward", data), bounded)

    def forward(self, data: Sequence[Datum], bounded: bool = True) -> "Future[list[DatumResult]]":
        """`Engine.forward`, likewise."""
        return self._add_verb(_data_request("forward", data), bounded)

    def optim_step(self, steps: Sequence[tuple[Adapter, AdamParams]], bounded: bool = True) -> "Future[list[float]]":
        """`Engine.optim_step`, likewise."""
        return self._add_verb(VerbRequest("optim_step", steps, {adapter.uid for adapter, _ in steps}), bounded)

    def call(self, function: Callable[[Engine], T]) -> "Future[T]":
        """Run a function of the engine between two steps, such as loading an adapter: it should be short."""
        if self.closed:
            raise ClosedError("the server is shutting down")
        future: Future[T] = running_future()
        self._inbox.put(partial(_settle, future, partial(function, self.engine)))
        return future

    def cancel(self, request: SampleRequest | TrainRequest) -> None:
        """End a request that is not done: its future raises CancelledError, and what it held is free."""
        if not request.future.done():
            self._inbox.put(partial(self._cancel, request, CancelledError("cancelled")))

    def refuse_new(self) -> None:
        """Take no more requests; those that were taken go on."""
        self.closed = True

    def abort(self) -> None:
        """End everything that is not done with ClosedError."""
        self._inbox.put(partial(self._abort, ClosedError("the server is shutting down")))

    def stop(self, timeout: float | None = None) -> None:
        """End everything, and the thread."""
        self.closed = True
        self.abort()
        self._inbox.put(self._stop)
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _admit(self, kind: str, count: int, bounded: bool) -> None:
        if self.closed:
            raise ClosedError("the server is shutting down")
        with self._lock:
            if bounded and self._open[kind] + count > self.max_queue:
                raise QueueFullError(f"the queue is full: {self._open[kind]} are waiting or running")
            self._open[kind] += count

    def _add_verb(self, request: VerbRequest, bounded: bool) -> "Future[list[Any]]":
        self._admit(TRAINING, 1, bounded)
        self._inbox.put(lambda: self._verbs.append(request))  # to the queue that there is when the worker reads this
        return request.future

    # The worker's thread

    def _run(self) -> None:
        try:
            while not self._stopped:
                self._read_inbox()
                self._begin_patient()
                kind = self._next_kind()
                if kind is not None:
                    self._take_turn(kind)
        except BaseException:
            log.exception("the worker has failed; the server answers nothing any more")
        self.closed = True
        while not self._inbox.empty():  # what was submitted meanwhile
            with suppress(Exception):
                self._inbox.get()()
        self._abort(ClosedError("the server is shutting down"))

    def _read_inbox(self) -> None:
        """Run what was submitted since the last turn; where nothing is due, wait for it."""
        if self._next_kind() is None and not self._patient:
            self._last_step_end = None
            try:
                submitted = self._inbox.get(timeout=IDLE_SECONDS)
            except Empty:
                return_freed_memory()
                submitted = self._inbox.get()
            submitted()
        for _ in range(self._inbox.qsize()):
            self._inbox.get()()

    def _training_due(self) -> bool:
        return bool(self._verbs) or (self.trainer is not None and self.trainer.busy)

    def _next_kind(self) -> str | None:
        sampling, training = self.sampler.busy, self._training_due()
        if sampling and training:
            return min((SAMPLING, TRAINING), key=lambda kind: self._clock[kind])
        if sampling:
            return SAMPLING
        return TRAINING if training else None

    def _take_turn(self, kind: str) -> None:
        """One step of the sampler or one pass of training, and account for its time."""
        start = perf_counter()
        if kind == SAMPLING:
            self._sampling_turn()
        else:
            self._training_turn()
            if self.sampler.busy and self.engine.model.device.type == "cuda":
                torch.cuda.synchronize(self.engine.model.device)  # or the next sampler step pays for this pass
        end = perf_counter()
        self.turns[kind] += 1
        if self.turns.total() % TRIM_TURNS == 0:
            return_freed_memory()
        self.seconds[kind] += end - start
        if kind == SAMPLING:
            self.step_times.append(end - (start if self._last_step_end is None else self._last_step_end))
            self._last_step_end = end if self.sampler.busy else None
        self._clock[kind] += (end - start) / self.shares[kind]
        if not (self.sampler.busy and self._training_due()):
            self._clock = {SAMPLING: 0.0, TRAINING: 0.0}

    def _sampling_turn(self) -> None:
        try:
            deltas = self.sampler.step()
        except Exception as error:
            log.exception("a sampler step failed")
            for request in list(self._samples.values()):
                self._cancel(request, FailedError(f"sampling failed: {type(error).__name__}"))
            return
        for delta in deltas:
            self._report(self._samples[delta.request_id], delta)
        ended = [delta.request_id for delta in deltas if delta.finish_reason is not None or delta.error is not None]
        for number in dict.fromkeys(ended):
            self._settle_sample(number)

    def _report(self, request: SampleRequest, delta: Delta) -> None:
        if request.on_delta is not None:
            try:
                request.on_delta(delta)
            except Exception:
                log.exception("a receiver of deltas failed; it gets no more")
                request.on_delta = None

    def _training_turn(self) -> None:
        if self._verbs and (self._verbs_next or self.trainer is None or not self.trainer.busy):
            self._verbs_next = False
            self._run_verbs()
            return
        self._verbs_next = True
        if self.trainer is None:
            return
        try:
            self.trainer.step()
        except Exception as error:
            log.exception("a training pass failed")
            for request in list(self._jobs.values()):
                self._cancel(request, FailedError(f"training failed: {type(error).__name__}"))
            return
        for number in [number for number in self._jobs if self.trainer.poll(number) is not None]:
            self._settle_job(number)

    # Sampling

    def _add_samples(self, requests: Sequence[SampleRequest]) -> None:
        now = perf_counter()
        self._patient |= {request: now + request.patience for request in requests if request.patience > 0}
        self._begin_samples([request for request in requests if request.patience <= 0])

    def _begin_patient(self) -> None:
        if self._patient and not (self._training_due() and perf_counter() < min(self._patient.values())):
            requests, self._patient = list(self._patient), {}
            self._begin_samples(requests)

    def _begin_samples(self, requests: Sequence[SampleRequest]) -> None:
        for request in requests:
            number = self.sampler.add_request(request.prompt, request.token_ids, request.params, request.adapter)
            request.number, request.output = number, self.sampler.output(number)
            self._samples[number] = request
            if self.sampler.poll(number) is not None:  # it cannot be run
                error = request.output.error
                self._cancel(request, InputError(error))

    def _settle_sample(self, number: int) -> None:
        """Hand out the output of a request whose last sample is done."""
        output = self.sampler.poll(number)
        if output is None:
            return
        request = self._samples.pop(number)
        self.sampler.release(number)
        outcome = output if output.error is None else FailedError(output.error)
        self._close(request.future, SAMPLING, outcome, request.params.n)

    # Training

    def _add_jobs(self, requests: Sequence[TrainRequest]) -> None:
        try:
            if self.trainer is None:
                self.trainer = self.engine.trainer()
        except InputError as error:
            for request in requests:
                self._close(request.future, TRAINING, error)
            return
        for request in requests:
            request.number = self.trainer.submit(request.job)
            self._jobs[request.number] = request

    def _settle_job(self, number: int) -> None:
        assert self.trainer is not None
        result, request = self.trainer.result(number), self._jobs.pop(number)
        self.trainer.release(number)
        self._close(request.future, TRAINING, result)

    def _run_verbs(self) -> None:
        """Run the first call, together with later ones of its kind, on other adapters, up to the token budget.

        A call that is not valid fails alone: the engine refuses before it computes, and the calls then run one by one.
        """
        calls = self._together()
        run = getattr(self.engine, calls[0].verb)
        try:
            results = run([item for call in calls for item in call.items])
        except Exception as error:
            if len(calls) == 1:
                self._close(calls[0].future, TRAINING, error)
                return
            for call in calls:
                try:
                    self._close(call.future, TRAINING, run(call.items))
                except Exception as error:
                    self._close(call.future, TRAINING, error)
            return
        for call in calls:
            self._close(call.future, TRAINING, results[: len(call.items)])
            results = results[len(call.items) :]
            self.verb_tokens += call.num_tokens

    def _together(self) -> list[VerbRequest]:
        """Take the calls to run now from the queue: no call overtakes an earlier one on the same adapter."""
        first = self._verbs[0]
        calls: list[VerbRequest] = []
        rest: deque[VerbRequest] = deque()
        blocked: set[int] = set()  # adapters of calls that stay
        tokens = 0
        for call in self._verbs:
            fits = not calls or tokens + call.num_tokens <= self.engine.token_budget
            if call.verb == first.verb and fits and not call.adapters & blocked:
                calls.append(call)
                tokens += call.num_tokens
                if call.verb == "optim_step":
                    blocked |= call.adapters  # optim_step takes an adapter once
            else:
                rest.append(call)
                blocked |= call.adapters
        self._verbs = rest
        return calls

    # Ends

    def _cancel(self, request: SampleRequest | TrainRequest, error: Exception) -> None:
        if isinstance(request, SampleRequest) and self._patient.pop(request, None) is not None:
            self._close(request.future, SAMPLING, error, request.params.n)
        if request.future.done() or request.number is None:
            return
        if isinstance(request, SampleRequest):
            del self._samples[request.number]
            self.sampler.release(request.number)
            self._close(request.future, SAMPLING, error, request.params.n)
        elif self.trainer is not None:
            del self._jobs[request.number]
            self.trainer.release(request.number)
            self._close(request.future, TRAINING, error)

    def _abort(self, error: Exception) -> None:
        for request in [*self._patient, *self._samples.values(), *self._jobs.values()]:
            try:
                self._cancel(request, error)
            except Exception:  # after a failure, sampler and trainer may be in any state
                log.exception("a request could not be cancelled")
                request.future.set_exception(error)
        for call in self._verbs:
            self._close(call.future, TRAINING, error)
        self._verbs.clear()

    def _stop(self) -> None:
        self._stopped = True

    def _close(self, future: "Future[Any]", kind: str, outcome: Any, count: int = 1) -> None:
        """Settle a future, and count out what was admitted for it."""
        with self._lock:
            self._open[kind] -= count
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


def _data_request(verb: str, data: Sequence[Datum]) -> VerbRequest:
    """A call of a verb on data."""
    return VerbRequest(verb, data, {datum.adapter.uid for datum in data}, sum(len(datum.token_ids) for datum in data))


def _settle(future: "Future[T]", function: Callable[[], T]) -> None:
    """Run a function for a future."""
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)
