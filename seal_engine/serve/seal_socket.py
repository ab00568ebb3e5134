"""SEAL's socket: a ZMQ ROUTER that many drivers (REQ sockets) talk to at once. JSON, one reply for each request.

A driver that has vanished gets no reply, and nothing waits for it. A request that is sent once more while the first one
runs, as drivers do after a time-out, joins it where trainings have a fixed seed.
"""

import asyncio
import hashlib
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from time import monotonic
from typing import Any

import zmq
import zmq.asyncio

from seal_engine.serve.backend import WorkerBackend
from seal_engine.serve.guard import Key
from seal_engine.serve.requests import CancelledError, ClosedError, FailedError, QueueFullError
from seal_engine.serve.seal_loop import SealLoop, read_request
from seal_engine.types import InputError

MAX_REQUESTS = 64  # that run at once; more wait
EXPECTED = (InputError, CancelledError, ClosedError, FailedError, QueueFullError)
log = logging.getLogger("seal_engine")


class SealSocket:
    """Bound to 127.0.0.1 when built: the protocol has no encryption. `serve` until `close`."""

    def __init__(self, loop: SealLoop, port: int, key: Key | None = None, max_message: int = 2**25):
        """port: 0 for a free one. key: requests must bring it as `api_key`. InputError for a port that is taken."""
        self.loop = loop
        self.key = key
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.MAXMSGSIZE, max_message)
        self._socket.setsockopt(zmq.LINGER, 1000)  # ms: for the last replies
        try:
            self._socket.bind(f"tcp://127.0.0.1:{port or '*'}")
        except zmq.ZMQError as error:
            self._context.destroy(0)
            raise InputError(f"--seal-port: {port}: {error}; accepted: a free port") from None
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._threads = ThreadPoolExecutor(MAX_REQUESTS, "seal request")
        self._tasks: set[asyncio.Task[None]] = set()
        self._same: dict[bytes, asyncio.Future[dict[str, Any]]] = {}  # running requests with a fixed seed
        self._entries: dict[int, tuple[WorkerBackend, float, int, int]] = {}
        self._number = 0

    @property
    def port(self) -> int:
        """The port that the socket is bound to."""
        return int(self.address.rpartition(":")[2])

    def running(self) -> list[dict[str, Any]]:
        """The requests that run, for the page."""
        now = monotonic()
        return [
            {"number": n, "state": backend.state, "seconds": now - start, "sequences": sequences, "questions": asked}
            for n, (backend, start, sequences, asked) in self._entries.items()
        ]

    async def serve(self) -> None:
        """Answer requests until the socket is closed."""
        while True:
            try:
                frames = await self._socket.recv_multipart()
            except (zmq.ZMQError, asyncio.CancelledError):  # closed
                return
            task = asyncio.create_task(self._answer(frames))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Send the replies that are due, and close the socket."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5)
        self._socket.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._context.term)

    async def _answer(self, frames: list[bytes]) -> None:
        """Reply to one message; the frames before the last say to whom."""
        try:
            reply = await self._reply(frames[-1])
        except EXPECTED as error:
            reply = {"error": str(error)}
        except Exception as error:
            log.exception("a request of SEAL's failed")
            reply = {"error": f"internal error: {type(error).__name__}"}
        with suppress(zmq.ZMQError):  # closed meanwhile
            await self._socket.send_multipart([*frames[:-1], json.dumps(reply).encode()])

    async def _reply(self, payload: bytes) -> dict[str, Any]:
        message = _read_json(payload)
        if self.key is not None:
            sent = message.get("api_key") if isinstance(message, dict) else None
            if not self.key.matches(sent if isinstance(sent, str) else None):
                raise InputError("api_key: a key is required")
        if isinstance(message, dict) and message.get("cmd") == "shutdown":
            return {"status": "bye"}  # the driver ends; the server goes on for the others
        digest = hashlib.sha256(payload).digest()
        if digest in self._same:
            return await asyncio.shield(self._same[digest])
        work = asyncio.ensure_future(self._run(message))
        if self.loop.seed is None and "seed" not in message:
            return await work
        self._same[digest] = work
        try:
            return await asyncio.shield(work)
        finally:
            self._same.pop(digest, None)

    async def _run(self, message: Any) -> dict[str, Any]:
        """A request on a thread of its own, which waits for the worker."""
        request = read_request(message, self.loop.seed)
        backend = WorkerBackend(self.loop.worker)
        self._number += 1
        number, job = self._number, request.job
        self._entries[number] = backend, monotonic(), len(job.sequences) if job else 0, len(request.questions)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, self.loop.reply, request, backend)
        finally:
            del self._entries[number]


def _read_json(payload: bytes) -> Any:
    try:
        return json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise InputError(f"request: not JSON: {error}; accepted: a JSON object") from None
