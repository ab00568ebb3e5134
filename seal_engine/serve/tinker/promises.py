"""Promises: what was submitted, until its result has been fetched.

A request is answered at once with the id of a promise, and its result is fetched by that id with a long poll. Ids are
numbers in the order of submission, so that an id whose promise is gone is told from one that never was.
"""

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from seal_engine.serve.errors import ApiError, as_api_error

LONG_POLL_SECONDS = 30.0  # clients hang up after 45
KEPT_BYTES = 2**26  # of results that were fetched, for clients whose connection was cut while they fetched
PROMISE_BYTES = 2**11  # that a promise takes beside its result, about
LARGE_RESULT = 2**20  # bytes, from which on clients first get the size of a result, if they ask for that
PROTOBUF, JSON = "application/x-protobuf", "application/json"


@dataclass(frozen=True)
class Reply:
    """The body of a response."""

    content: bytes
    media_type: str = JSON


def json_reply(body: Mapping[str, Any]) -> Reply:
    """A body of JSON."""
    return Reply(json.dumps(body, allow_nan=False).encode())


def _failure(error: Exception) -> Reply:
    """What a client gets for a request that was accepted and failed: an error of the user's, or of the server's."""
    known = as_api_error(error)
    return json_reply({"error": str(known), "category": "user" if known.status < 500 else "server"})


@dataclass(eq=False)
class Promise:
    """A request that was accepted. key: what a retry of the request is recognised by."""

    request_id: str
    key: tuple[str, int]  # (model or sampler, seq_id)
    kind: str  # the route that it came by
    fields: dict[str, Any] = field(default_factory=dict)  # of the reply to its submission
    queue_state: str = "active"
    result: "asyncio.Future[Reply]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def settle(self, outcome: Reply | Exception) -> None:
        """Set the result, unless there is one."""
        if not self.result.done():
            self.result.set_result(outcome if isinstance(outcome, Reply) else _failure(outcome))

    @property
    def submitted(self) -> dict[str, Any]:
        """The reply to the submission, and to every retry of it."""
        return {"request_id": self.request_id, **self.fields}


class Promises:
    """All promises of a server. Its methods run on the event loop."""

    def __init__(self) -> None:
        self._by_id: dict[str, Promise] = {}
        self._by_key: dict[tuple[str, int], Promise] = {}
        self._fetched: OrderedDict[str, int] = OrderedDict()  # request id -> bytes
        self._fetched_bytes = 0
        self._count = time.time_ns()  # so that the ids of a server that ran before are none of this one's

    def __len__(self) -> int:
        return len(self._by_id)

    def add(self, key: tuple[str, int], kind: str, **fields: Any) -> Promise:
        """A new promise. fields: of the reply to the submission."""
        promise = Promise(f"promise-{self._count}", key, kind, fields)
        self._count += 1
        self._by_id[promise.request_id] = self._by_key[key] = promise
        return promise

    def retried(self, key: tuple[str, int], kind: str) -> Promise | None:
        """The promise of the same request, if it was submitted before. ApiError if another request had its seq_id."""
        promise = self._by_key.get(key)
        if promise is not None and promise.kind != kind:
            raise ApiError(400, f"seq_id: found {key[1]}, which was a {promise.kind}; accepted: the next", "seq_id")
        return promise

    def get(self, request_id: str) -> Promise:
        """The promise of an id. ApiError: 410 if its result was fetched long ago, or its session ended; 404."""
        if request_id in self._by_id:
            return self._by_id[request_id]
        number = request_id.removeprefix("promise-")
        if number.isdecimal() and len(number) < 20:
            raise ApiError(410, f"request_id: {request_id} is gone; submit the request again", "request_id")
        raise ApiError(404, f"request_id: found {request_id!r:.100}; accepted: what a submission was answered with")

    async def fetch(self, request_id: str, metadata_only: bool) -> Reply:
        """The result of a request, or word that there is none yet after LONG_POLL_SECONDS.

        metadata_only: of a large result, its size. ApiError as of `get`.
        """
        promise = self.get(request_id)
        await asyncio.wait([promise.result], timeout=LONG_POLL_SECONDS)
        if not promise.result.done():
            state = promise.queue_state
            return json_reply({"type": "try_again", "request_id": request_id, "queue_state": state})
        reply = promise.result.result()
        size = len(reply.content)
        if metadata_only and size > LARGE_RESULT:
            return json_reply({"status": "complete_metadata", "response_payload_size": size})
        self._keep(promise, size + PROMISE_BYTES)
        return reply

    def _keep(self, promise: Promise, size: int) -> None:
        """Keep a result that was fetched among the last ones, and forget what is then too much."""
        if promise.request_id not in self._by_id:  # its session ended meanwhile
            return
        self._fetched_bytes += size - self._fetched.pop(promise.request_id, 0)
        self._fetched[promise.request_id] = size
        while self._fetched_bytes > KEPT_BYTES:
            oldest = next(iter(self._fetched))
            self._forget(self._by_id[oldest])

    def _forget(self, promise: Promise) -> None:
        del self._by_id[promise.request_id]
        if self._by_key.get(promise.key) is promise:
            del self._by_key[promise.key]
        self._fetched_bytes -= self._fetched.pop(promise.request_id, 0)

    def end(self, owners: set[str]) -> None:
        """Forget all promises of models and samplers that are gone; whoever waits for one gets an error."""
        for promise in [p for p in self._by_id.values() if p.key[0] in owners]:
            promise.settle(ApiError(410, "the session has ended"))
            self._forget(promise)
