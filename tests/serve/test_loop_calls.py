"""Calls from a thread to the event loop."""

import asyncio
import threading
from concurrent.futures import Future

import pytest

from seal_engine.serve.loop_calls import LoopCalls


def in_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_many_calls_wake_the_loop_once(monkeypatch):
    """The loop does not run while the thread is waited for, so one wake-up serves all, and they run in order."""

    async def main():
        loop, done, wakes = asyncio.get_running_loop(), [], []
        wake = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda call: (wakes.append(call), wake(call)))
        calls = LoopCalls()
        for start in (0, 100):  # the second time, too: it is woken again
            in_thread(lambda start=start: [calls.put(lambda i=i: done.append(i)) for i in range(start, start + 100)])
            await asyncio.sleep(0.01)
        return done, len(wakes)

    assert asyncio.run(main()) == (list(range(200)), 2)


def test_futures_of_threads_can_be_awaited():
    """Result, error, and one that nobody waits for any more, which hurts nobody."""

    async def main():
        calls, futures = LoopCalls(), [Future() for _ in range(3)]
        result, error, left = (calls.wait(future) for future in futures)
        left.cancel()

        def settle():
            futures[0].set_result(5)
            futures[1].set_exception(ValueError("no"))
            futures[2].set_result(6)

        in_thread(settle)
        assert await result == 5
        with pytest.raises(ValueError, match="no"):
            await error
        assert left.cancelled()

    asyncio.run(main())
