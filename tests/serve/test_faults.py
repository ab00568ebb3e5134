"""Clients that vanish, requests that make no sense, signals: the server goes on, or ends as it should."""

import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from urllib.parse import urlsplit

import httpx
import pytest
from serving import idle, running

from seal_engine.serve.requests import SampleRequest
from seal_engine.tiny import MODEL

ROOT = Path(__file__).parents[2]
LONG = {"prompt": "A", "max_tokens": 3000, "ignore_eos": True, "seed": 1}
SHORT = {"prompt": "What does Ann collect?", "max_tokens": 8, "temperature": 0}


def wait_until(condition, seconds=30):
    deadline = monotonic() + seconds
    while not condition() and monotonic() < deadline:
        sleep(0.02)
    assert condition()


def send(server, body, path="/v1/completions"):
    """A connection on which a request was sent and no response was read."""
    url = urlsplit(server.url)
    connection = socket.create_connection((url.hostname, url.port))
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    connection.sendall(head.encode() + b"\r\n\r\n" + content)
    return connection


def test_200_random_disconnects(server):
    """Whole and streamed, before and in the middle of a response, half a body: nothing keeps running, every block is
    free, and the next request has its right answer."""
    generator = random.Random(0)
    before = httpx.post(f"{server.url}/v1/completions", json=SHORT).json()["choices"]
    for number in range(200):
        body = {**LONG, "n": generator.choice([1, 2]), "stream": generator.random() < 0.5, "seed": number}
        connection = send(server, body)
        if generator.random() < 0.2 and body["stream"]:
            connection.recv(10)
        elif generator.random() < 0.2:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset, not a close
        if generator.random() < 0.3:
            sleep(generator.random() / 50)
        connection.close()
    for _ in range(20):
        half = send(server, SHORT)
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n{")
        half.close()
    wait_until(lambda: idle(server))
    assert httpx.post(f"{server.url}/v1/completions", json=SHORT).json()["choices"] == before
    server.service.worker.call(lambda _: server.service.worker.sampler.check_integrity()).result(30)


def test_a_slow_reader_holds_nobody_up(server):
    """Its tokens are sampled and wait in its own queue; others are answered meanwhile."""
    slow = send(server, {**LONG, "n": 4, "stream": True})
    start = monotonic()
    for _ in range(5):
        assert httpx.post(f"{server.url}/v1/completions", json=SHORT, timeout=20).status_code == 200
    assert monotonic() - start < 15
    slow.close()
    wait_until(lambda: idle(server))


GARBAGE = [
    *(b"", b"{", b"[]", b"null", b"5", b'"text"', b"\xff", b"{}", b"[" * 5000, b'{"prompt": NaN}'),
    *(b'{"prompt": 1e999}', b'{"prompt": "\\ud800"}', b'{"prompt": {"a": 1}}', b'{"prompt": [[["a"]]]}'),
    *(b'{"prompt": "A", "max_tokens": 99999999999999999999}', b'{"prompt": "A", "temperature": 1e308}'),
    *(b'{"prompt": "A", "seed": 1e400}', b'{"prompt": "A", "n": -1}', b'{"prompt": "A", "top_k": 9999999999999}'),
    *(b'{"prompt": "A", "stop": [1]}', b'{"prompt": "A", "model": "../../etc/passwd"}', b'{"prompt": [true]}'),
    b'{"prompt": "A", "seed": ' + b"9" * 5000 + b"}",
]
ROUTES = ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize"]
ROUTES += ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"]


@pytest.mark.parametrize("route", ROUTES)
def test_garbage_is_a_4xx(server, route):
    """Or is served, where it happens to make sense; never a 5xx, and always in the one form of errors."""
    with httpx.Client(base_url=server.url) as client:
        for content in GARBAGE:
            reply = client.post(route, content=content, headers={"Content-Type": "application/json"})
            assert reply.status_code < 500, (content[:60], reply.text)
            if reply.status_code != 200:
                assert reply.json()["error"]["message"], content[:60]
        assert client.post(route, content=b"a=1", headers={"Content-Type": "text/plain"}).status_code == 400
        assert client.get(route).status_code == 405


def test_schemathesis(server):
    """Requests that it makes of the OpenAPI page, valid ones and broken ones: no 5xx, only documented responses."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import status_code_conformance

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=12,
                database=None,
                derandomize=True,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            def check(case):
                if isinstance(case.body, dict):
                    case.body.pop("max_tokens", None)  # so that no example samples thousands of tokens
                    case.body.pop("max_completion_tokens", None)
                    case.body.setdefault("max_tokens", 2)
                    case.body.setdefault("max_output_tokens", 2)
                response = case.call(timeout=60)
                case.validate_response(response, checks=[not_a_server_error, status_code_conformance])

            try:
                check()
            except Unsatisfiable:  # a route without a body has no broken one
                assert operation.method == "get"
    wait_until(lambda: idle(server))


# The process


@contextmanager
def process(*arguments):
    """seal-engine serve as a process: (process, url)."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-m", "seal_engine", "serve", "--model", str(MODEL), "--json", "--quiet"]
    started = subprocess.Popen(
        [*command, "--kv-blocks", "1000", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield started, json.loads(started.stdout.readline())["url"]
    finally:
        started.kill()
        started.communicate()


def test_sigterm_lets_running_requests_end(tmp_path):
    """A stream that runs gets its last token; a new request is refused; the process ends with 0 and without a word."""
    with process("--port", "0", "--drain-seconds", "30") as (server, url):
        body = {**LONG, "max_tokens": 800, "stream": True}
        with httpx.Client(base_url=url) as client, client.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            keep = http.client.HTTPConnection(urlsplit(url).netloc)
            keep.connect()
            server.send_signal(signal.SIGTERM)
            sleep(0.1)
            with pytest.raises((httpx.HTTPError, AssertionError)):
                assert httpx.post(f"{url}/v1/completions", json=SHORT).status_code == 200
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            keep.close()
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        assert server.wait(30) == 0
        assert server.stderr.read() == ""


def test_sigterm_tells_those_that_take_too_long():
    """After --drain-seconds: an error event in the stream, 503 for a whole response, exit status 0."""
    with process("--port", "0", "--drain-seconds", "0.2") as (server, url):
        replies = []

        def ask():
            replies.append(httpx.post(f"{url}/v1/completions", json={**LONG, "n": 8}, timeout=60))

        thread = threading.Thread(target=ask)
        with httpx.Client(base_url=url) as client:
            thread.start()
            with client.stream("POST", "/v1/completions", json={**LONG, "n": 8, "stream": True}) as stream:
                lines = stream.iter_lines()
                next(lines)
                server.send_signal(signal.SIGTERM)
                events = [line for line in lines if line]
        thread.join(30)
        assert server.wait(30) == 0
    assert json.loads(events[-2][6:])["error"]["code"] == 503
    assert events[-1] == "data: [DONE]"
    assert replies[0].status_code == 503
    assert replies[0].json()["error"]["type"] == "ServiceUnavailableError"


def test_after_kill_9_the_next_one_serves():
    """In the middle of requests, on the same port: nothing on disk or in the system stands in the way."""
    with process("--port", "0") as (first, url):
        port = urlsplit(url).port
        expected = httpx.post(f"{url}/v1/completions", json=SHORT).json()["choices"]
        with (
            httpx.Client(base_url=url) as client,
            client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as stream,
        ):
            lines = stream.iter_lines()
            next(lines)
            first.kill()
            with pytest.raises(httpx.HTTPError):
                list(lines)
        first.wait(30)
        with process("--port", port) as (_, url):
            assert httpx.post(f"{url}/v1/completions", json=SHORT).json()["choices"] == expected


def test_stopping_ends_what_the_worker_has(engine):
    """The same within a process: every future has an end."""
    with running(engine, "--drain-seconds", "0.1") as server:
        from seal_engine import SamplingParams

        request = SampleRequest([5, 6], SamplingParams(max_tokens=3000, ignore_eos=True))
        server.service.worker.sample([request])
        connection = send(server, {**LONG, "stream": True})
        assert connection.recv(5)
        server.stop()
        text = b""
        while piece := connection.recv(65536):
            text += piece
        connection.close()
    assert re.search(rb'"code":503', text)
    assert request.future.exception() is not None
