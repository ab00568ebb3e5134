"""The process: worker, HTTP server and SEAL's socket, from the first request to the last."""

import asyncio
import gc
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn

from seal_engine.serve.app import make_app
from seal_engine.serve.guard import Key, is_loopback
from seal_engine.serve.seal_socket import SealSocket
from seal_engine.serve.service import Service
from seal_engine.types import InputError, require

log = logging.getLogger("seal_engine")


@dataclass(frozen=True)
class ServerSettings:
    """Where to listen, who may come in, and what is too much."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: a free one
    key: Key | None = None
    max_body: int = 2**25  # bytes
    drain_seconds: float = 30.0  # that running requests have after SIGTERM

    def validate(self) -> None:
        """InputError for a host that others can reach, without a key."""
        require(0 <= self.port <= 65535, "--port", self.port, "a port from 0 to 65535")
        if self.key is None:
            require(is_loopback(self.host), "--host", self.host, "a loopback address, or --api-key-env NAME beside it")


class Server(uvicorn.Server):
    """uvicorn's server, which leaves signals to `serve`: it would end the process with the signal's status."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """No signals."""
        yield


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. InputError naming host and port."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # The protocol is spelled out: asyncio turns Nagle's delay off only where it is.
        with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(1024)
            return listener.dup()
    except OSError as error:
        raise InputError(f"--port: {host}:{port}: {error.strerror or error}") from None


async def serve(
    service: Service,
    settings: ServerSettings,
    ready: Callable[[str], None],
    seal: SealSocket | None = None,
    stopping: asyncio.Event | None = None,
) -> None:
    """Serve until SIGTERM, SIGINT or `stopping`; then take nothing new, finish or end what runs, and return.

    ready: called with the URL once requests are answered. seal: a SealSocket, bound already.
    """
    stopping = asyncio.Event() if stopping is None else stopping
    loop = asyncio.get_running_loop()
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
    except (RuntimeError, ValueError):  # not the main thread: a test's
        log.debug("signals are left to the main thread")
    listener = listen(settings.host, settings.port)
    requests = seal.running if seal is not None else list
    config = uvicorn.Config(
        make_app(service, settings.key, settings.max_body, requests),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=10,
        timeout_keep_alive=75,  # seconds: longer than clients keep a connection, so that they close it
        server_header=False,
        lifespan="off",
    )
    server = Server(config)
    gc.collect()
    gc.freeze()  # what there is now stays: to look at 200,000 objects again would stop all threads for 0.1 s at a time
    service.worker.start()
    tasks = [asyncio.create_task(server.serve([listener]))]
    if seal is not None:
        tasks.append(asyncio.create_task(seal.serve()))
    try:
        while not server.started and not tasks[0].done():
            await asyncio.sleep(0.01)
        if server.started:
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            ready(f"http://{host}:{listener.getsockname()[1]}")
        waiting = asyncio.create_task(stopping.wait())
        await asyncio.wait({waiting, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        await _drain(service, settings.drain_seconds)
    finally:
        service.tinker.close()
        server.should_exit = True
        if seal is not None:
            await seal.close()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                log.error("the server ended with an error", exc_info=outcome)
        await asyncio.to_thread(service.worker.stop)


async def _drain(service: Service, seconds: float) -> None:
    """Take nothing new; wait for what runs, at most so long, then end it."""
    worker = service.worker
    worker.refuse_new()
    deadline = asyncio.get_running_loop().time() + seconds
    while worker.busy and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.02)
    worker.abort()
