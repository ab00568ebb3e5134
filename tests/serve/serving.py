"""A server in a thread of the test's process, over an engine that the test can ask, too."""

import argparse
import asyncio
import threading
from contextlib import contextmanager

from seal_engine.cli.serve import _adapters, serve_arguments
from seal_engine.serve import setup
from seal_engine.serve.server import serve
from seal_engine.tiny import MODEL


class Running:
    """url, service; `stop` as SIGTERM would."""

    def __init__(self, engine, *arguments, key=None, chat_template=None):
        parser = argparse.ArgumentParser()
        serve_arguments(parser)
        base = ["--model", str(MODEL), "--port", "0", "--kv-blocks", "2000", "--drain-seconds", "5"]
        options = parser.parse_args([*base, *map(str, arguments)])
        self.settings = setup.server_settings(options.host, options.port, key, options)
        self.service = setup.make_service(engine, options, chat_template, _adapters(options.adapter))
        self.seal = setup.make_seal(self.service, options, self.settings.key)
        self.url = ""
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(30)

    def _run(self):
        asyncio.run(self._serve())

    async def _serve(self):
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        await serve(self.service, self.settings, self._set_ready, self.seal, self._stopping)

    def _set_ready(self, url):
        self.url = url
        self._ready.set()

    def begin_stop(self):
        self._loop.call_soon_threadsafe(self._stopping.set)

    def stop(self):
        if self._thread.is_alive():
            self.begin_stop()
        self._thread.join(30)
        assert not self._thread.is_alive()


@contextmanager
def running(engine, *arguments, **options):
    server = Running(engine, *arguments, **options)
    try:
        yield server
    finally:
        server.stop()


def idle(server):
    """Nothing runs, and no block is held."""
    worker = server.service.worker
    pool = worker.sampler.cache.pool
    return not worker.busy and pool.num_available == pool.num_blocks and not worker._samples
