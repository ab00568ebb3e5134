"""A server for the Tinker SDK, its clients, and the data that its tests train on."""

import itertools
import socket
import threading
import time
from contextlib import contextmanager, suppress

import pytest
from serving import idle, running

from seal_engine.tiny import MODEL

tinker = pytest.importorskip("tinker", reason="the Tinker SDK is not installed")
BASE = str(MODEL)
# The SDK never closes the connection that it reads its settings by, nor those of its
# RestClient; see `collect` in conftest.
SDK_CONNECTIONS = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")


@contextmanager
def tinker_server(engine, directory, *arguments):
    with running(engine, "--tinker-dir", directory, *arguments) as server:
        yield server


def becomes_idle(server):
    """Whether nothing runs, and no block is held, once the worker has heard of what was cancelled."""
    deadline = time.monotonic() + 20
    while not idle(server) and time.monotonic() < deadline:
        time.sleep(0.02)
    return idle(server)


def shifted(ids, **inputs):
    """A datum that predicts every next token; a weight each where no inputs are given."""
    inputs = inputs or {"weights": [1.0] * (len(ids) - 1)}
    return tinker.Datum(
        model_input=tinker.types.ModelInput.from_ints(list(ids[:-1])),
        loss_fn_inputs={"target_tokens": list(ids[1:]), **inputs},
    )


def prompt(ids):
    return tinker.types.ModelInput.from_ints(list(ids))


def sampling(max_tokens=6, **fields):
    return tinker.SamplingParams(max_tokens=max_tokens, **fields)


def logprobs(output):
    """The log-probabilities of each datum, as lists."""
    return [record["logprobs"].tolist() for record in output.loss_fn_outputs]


def ids_of(count, length, seed):
    """Sequences of token ids, all different."""
    cycle = itertools.count(seed * 7919)
    return [[3 + (next(cycle) * 104729) % 900 for _ in range(length + i % 3)] for i in range(count)]


class CuttingProxy:
    """Passes bytes between clients and a server; some responses it swallows, and cuts the connection instead."""

    def __init__(self, url, cut):
        """cut: the numbers of responses that are swallowed."""
        host, port = url.removeprefix("http://").split(":")
        self.server, self.cut, self.count, self.lock = (host, int(port)), cut, 0, threading.Lock()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                server = socket.create_connection(self.server)
                for pair in ((client, server, False), (server, client, True)):
                    threading.Thread(target=self._pass, args=pair, daemon=True).start()

    def _pass(self, source, target, is_response):
        with suppress(OSError), source, target:
            while content := source.recv(65536):
                with self.lock:
                    self.count += is_response
                    swallowed = is_response and self.count in self.cut
                if swallowed:
                    target.shutdown(socket.SHUT_RDWR)
                    return
                target.sendall(content)

    def close(self):
        self.listener.close()
