"""A client of the Tinker SDK, for tests and benchmarks."""

from contextlib import contextmanager, suppress

import pytest

tinker = pytest.importorskip("tinker", reason="the Tinker SDK is not installed")
CLOSE_SECONDS = 10.0


@contextmanager
def service_client(url):
    """A client as users have it; its session ends with the block.

    Closing may never return in tinker 0.38: it cancels the client's heartbeat and waits for it, but a heartbeat that is
    on its way may miss that (5 of 300 clients that were closed ten seconds after they began).
    """
    client = tinker.ServiceClient(base_url=url, api_key="tml-test")
    try:
        yield client
    finally:
        with suppress(TimeoutError):
            client.close("success").result(CLOSE_SECONDS)
