"""What is submitted to the worker, and the errors that its futures raise."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from seal_engine.model.adapters import Adapter
from seal_engine.sampling.requests import Delta, RequestOutput, SamplingParams
from seal_engine.training.jobs import TrainJob, TrainResult


class QueueFullError(RuntimeError):
    """More requests are waiting than the worker accepts; the same request may be sent again later."""


class ClosedError(RuntimeError):
    """The worker takes no new requests, or stopped before this one was done."""


class CancelledError(RuntimeError):
    """The request was cancelled by the caller."""


class FailedError(RuntimeError):
    """The engine failed on a request that is valid."""


def running_future() -> "Future[Any]":
    """A future that its waiter cannot cancel behind the worker's back: `Worker.cancel` does that."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future


@dataclass(eq=False)
class SampleRequest:
    """A prompt for the worker's sampler. future: its RequestOutput; InputError if the prompt cannot be run.

    on_delta is called on the worker's thread with every Delta, and must return at once. output: the RequestOutput as it
    grows, from the first delta on. patience: seconds that it may wait while jobs train, to share its steps with what
    they ask then.
    """

    token_ids: Sequence[int]
    params: SamplingParams
    adapter: Adapter | None = None
    prompt: str | None = None
    patience: float = 0.0
    on_delta: Callable[[Delta], None] | None = None
    output: RequestOutput | None = None
    future: "Future[RequestOutput]" = field(default_factory=running_future)
    number: int | None = None  # the sampler's id, while it is there


@dataclass(eq=False)
class TrainRequest:
    """A job for the worker's trainer. future: its TrainResult, which has the error of a job that failed."""

    job: TrainJob
    future: "Future[TrainResult]" = field(default_factory=running_future)
    number: int | None = None  # the trainer's id, while it is there


@dataclass(eq=False)
class VerbRequest:
    """One call of a verb of the engine, which may run together with calls of the same verb on other adapters."""

    verb: str  # "forward", "forward_backward" or "optim_step"
    items: Sequence[Any]  # Datum, or (Adapter, AdamParams)
    adapters: set[int]  # uids of those that the call reads or changes
    num_tokens: int = 0  # that it computes
    future: "Future[list[Any]]" = field(default_factory=running_future)
