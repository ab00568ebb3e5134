"""Calls from the worker's thread to the event loop, which is woken once for all that have come."""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any


class LoopCalls:
    """Functions that run on one event loop. A step of the worker that ends 64 requests wakes it once: every further
    call would hand it the interpreter while the worker still has requests to end."""

    def __init__(self):
        self._loop = asyncio.get_running_loop()
        self._calls: deque[Callable[[], None]] = deque()
        self._waking = False

    def put(self, call: Callable[[], None]) -> None:
        """Run a function on the loop, after those that were put before; from any thread."""
        self._calls.append(call)
        if not self._waking:
            self._waking = True
            self._loop.call_soon_threadsafe(self._run)

    def _run(self) -> None:
        self._waking = False
        for _ in range(len(self._calls)):
            self._loop.call_soon(self._calls.popleft())  # one that fails is reported, and the others run

    def wait(self, future: "Future[Any]") -> "asyncio.Future[Any]":
        """The loop's future for one that a thread settles."""
        waiter = self._loop.create_future()
        future.add_done_callback(lambda done: self.put(partial(_copy, done, waiter)))
        return waiter


def _copy(done: "Future[Any]", waiter: "asyncio.Future[Any]") -> None:
    if waiter.done():  # nobody waits any more
        return
    error = done.exception()
    if error is None:
        waiter.set_result(done.result())
    else:
        waiter.set_exception(error)
