"""The endpoint client against a server on this machine that answers, fails, hangs, drops connections and lies."""

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from seal_engine import InputError
from seal_engine.domains.knowledge import endpoint as module
from seal_engine.domains.knowledge.endpoint import Endpoint, Reply, complete, count_errors
from seal_engine.domains.knowledge.grading import make_grader

KEY = "sk-test/1234567890abcdef"


def answer(text: str | None) -> dict:
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


class Handler(BaseHTTPRequestHandler):
    """Does what the server's script says for the prompt: the n-th time it is asked, the n-th thing in its list."""

    protocol_version = "HTTP/1.1"
    server: "Server"  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
        with self.server.lock:
            self.server.requests.append((self.path, dict(self.headers), body))
            number = self.server.times[prompt]
            self.server.times[prompt] += 1
        steps = self.server.script.get(prompt, [answer(f"re: {prompt}")])
        step = steps[min(number, len(steps) - 1)]
        step(self) if callable(step) else self.reply(step)

    def reply(self, value, status: int = 200, **headers: str) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format, *args):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: dict[str, list] = {}
        self.requests: list[tuple[str, dict, dict]] = []
        self.times: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.closing = threading.Event()

    def handle_error(self, request, client_address):
        pass  # a client that hung up

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("SEAL_TEST_KEY", KEY)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def endpoint(server):
    return Endpoint(server.url, "judge", "SEAL_TEST_KEY", timeout=5.0, attempts=3, backoff=0.001)


def fails(status: int, value=None, **headers: str):
    return lambda handler: handler.reply(value or {"error": {"message": "why"}}, status, **headers)


def hangs(handler: Handler) -> None:
    handler.server.closing.wait(20)


def drops(handler: Handler) -> None:
    with contextlib.suppress(OSError):
        handler.connection.shutdown(socket.SHUT_RDWR)


def breaks_off(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n" + json.dumps(answer("yes")).encode())
    drops(handler)


def trickles(start: bytes):
    """A byte now and then, for ever: no single read times out."""

    def step(handler: Handler) -> None:
        with contextlib.suppress(OSError):
            handler.wfile.write(start)
            while not handler.server.closing.wait(0.05):
                handler.wfile.write(b" ")

    return step


def timed(endpoint: Endpoint, prompts: list[str], **arguments) -> tuple[list[Reply], float]:
    start = time.monotonic()
    return complete(endpoint, prompts, **arguments), time.monotonic() - start


# What is sent and what comes back


def test_replies_come_in_order(server, endpoint):
    def late(handler: Handler) -> None:
        time.sleep(0.02)
        handler.reply(answer("late"))

    prompts = [f"prompt {i}" for i in range(40)]
    server.script = {prompt: [late] for prompt in prompts[::3]}
    expected = [Reply("late" if i % 3 == 0 else f"re: prompt {i}") for i in range(40)]
    assert complete(endpoint, prompts) == expected
    assert server.times == Counter(prompts)


def test_what_is_sent(server, endpoint):
    assert complete(endpoint, ["é \ud800?"], max_tokens=7, temperature=0.5) == [Reply("re: é \ufffd?")]
    ((path, headers, body),) = server.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert headers["Content-Type"] == "application/json"
    assert body == {
        **{"model": "judge", "max_tokens": 7, "temperature": 0.5},
        "messages": [{"role": "user", "content": "é \ud800?"}],
    }


def test_fields_are_added_replaced_and_removed(server, endpoint):
    fields = {"max_tokens": None, "max_completion_tokens": 9, "top_p": 0.95, "temperature": 1}
    complete(replace(endpoint, fields=fields), ["a"])
    assert {name: value for name, value in server.requests[0][2].items() if name != "messages"} == {
        **{"model": "judge", "max_completion_tokens": 9, "top_p": 0.95, "temperature": 1}
    }


def test_plain_completions_without_a_key(server, endpoint):
    server.script = {"a": [{"choices": [{"text": "b"}]}]}
    plain = replace(endpoint, base_url=server.url + "/", chat=False, key_variable=None)
    assert complete(plain, ["a"], max_tokens=None) == [Reply("b")]
    ((path, headers, body),) = server.requests
    assert path == "/v1/completions"
    assert "Authorization" not in headers
    assert body == {"model": "judge", "prompt": "a", "temperature": 0.0}
    assert complete(replace(plain, key_variable=""), ["a"]) == [Reply("b")]


def test_empty_lists_and_texts(server, endpoint):
    assert complete(endpoint, []) == []
    server.script = {"": [answer("")]}
    assert complete(endpoint, [""]) == [Reply("")]


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_requests_at_once_than_allowed(server, endpoint, concurrency):
    """As many as are allowed meet in the server, again and again. A request counts until its reply begins: the client
    may send the next one before this one's handler has returned."""
    meeting, lock, working, counts = threading.Barrier(concurrency), threading.Lock(), set(), []

    def reply_after_meeting(handler):
        with lock:
            working.add(handler)
            counts.append(len(working))
        meeting.wait(10)
        time.sleep(0.02)  # in which one too many would come
        with lock:
            working.remove(handler)
        handler.reply(answer("x"))

    server.script = {f"{i}": [reply_after_meeting] for i in range(12)}
    assert complete(replace(endpoint, concurrency=concurrency), list(server.script)) == [Reply("x")] * 12
    assert max(counts) == concurrency


# What goes wrong

# name: (what the server does, the text or the error that comes of it, requests made)
TROUBLE = {
    "500, then well": ([fails(500), answer("ok")], "ok", 2),
    "503 twice, then well": ([fails(503), fails(503), answer("ok")], "ok", 3),
    "500 for ever": ([fails(500)], 'HTTP 500: {"error": {"message": "why"}}', 3),
    "429, then well": ([fails(429), answer("ok")], "ok", 2),
    "429 for ever": ([fails(429)], "HTTP 429: ", 3),
    "408": ([fails(408), answer("ok")], "ok", 2),
    "dropped, then well": ([drops, answer("ok")], "ok", 2),
    "dropped for ever": ([drops], "no response: ", 3),
    "broken off, then well": ([breaks_off, answer("ok")], "ok", 2),
    "broken off for ever": ([breaks_off], "no response: IncompleteRead", 3),
    "no HTTP": ([lambda h: (h.wfile.write(b"SSH-2.0-x\r\n"), drops(h))], "no response: BadStatusLine", 3),
    "400": ([fails(400)], "HTTP 400: ", 1),
    "401": ([fails(401)], "HTTP 401: ", 1),
    "404": ([fails(404)], "HTTP 404: ", 1),
    "an error of nothing": ([fails(400, b"")], "HTTP 400: ", 1),
    "an error in no encoding": ([fails(418, b"\xff\xfe\n\n x")], "HTTP 418: \ufffd\ufffd x", 1),
    "202": ([fails(202, answer("yes"))], "HTTP 202: ", 1),
    "a page": ([b"<html>yes</html>"], "response is not JSON: 16 bytes", 1),
    "nothing": ([b""], "response is not JSON: 0 bytes", 1),
    "half of JSON": ([b'{"choices": ['], "response is not JSON", 1),
    "bytes": ([b"\xff\x00\xff"], "response is not JSON", 1),
    "nested deeply": ([b"[" * 10**5], "response is not JSON", 1),
    "another shape": ([{"text": "yes"}], "response without text: no choices.0.message.content", 1),
    "a list": ([["yes"]], "response without text", 1),
    "null": ([b"null"], "response without text", 1),
    "no choices": ([{"choices": []}], "response without text", 1),
    "choices by name": ([{"choices": {"message": {"content": "yes"}}}], "response without text", 1),
    "content that is null": ([answer(None)], "response without text", 1),
    "content that is a list": ([{"choices": [{"message": {"content": ["yes"]}}]}], "response without text", 1),
    "an error with 200": ([{"error": {"message": "yes"}}], "response without text", 1),
    "too much": ([b" " * (2**24 + 1)], "response too large", 1),
}


@pytest.mark.parametrize("name", TROUBLE)
def test_trouble(server, endpoint, name):
    steps, outcome, requests = TROUBLE[name]
    server.script = {"bad": steps}
    replies, seconds = timed(endpoint, ["good", "bad", "well"])
    assert [replies[0], replies[2]] == [Reply("re: good"), Reply("re: well")]
    if outcome == "ok":
        assert replies[1] == Reply("ok")
    else:
        assert replies[1].text is None
        assert (replies[1].error or "").startswith(outcome)
    assert server.times["bad"] == requests
    assert seconds < 3


@pytest.mark.parametrize(
    "step",
    [hangs, trickles(b""), trickles(b"HTTP/1.1 200 OK\r\nX:"), trickles(b"HTTP/1.1 200 OK\r\n\r\n{")],
    ids=["silence", "before", "header", "body"],
)
def test_a_server_that_takes_for_ever(server, endpoint, step):
    server.script = {"slow": [step]}
    replies, seconds = timed(replace(endpoint, timeout=0.3, attempts=2), ["slow", "good"])
    assert replies == [Reply(error="no response within 0.3 s"), Reply("re: good")]
    assert server.times["slow"] == 2
    assert 0.6 <= seconds < 2


def test_a_late_answer_is_taken_on_the_next_attempt(server, endpoint):
    server.script = {"slow": [hangs, answer("ok")]}
    replies, seconds = timed(replace(endpoint, timeout=0.3), ["slow"])
    assert replies == [Reply("ok")]
    assert 0.3 <= seconds < 2


def test_nobody_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    replies, seconds = timed(Endpoint(address, "m", None, attempts=3, backoff=0.001), ["a", "b"])
    assert all((reply.error or "").startswith("no response: ConnectionRefusedError") for reply in replies)
    assert seconds < 2


def test_no_such_host(monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    replies = complete(Endpoint("https://host.invalid/v1", "m", None, attempts=2, backoff=0.001), ["a"])
    assert (replies[0].error or "").startswith("no response: gaierror: ")


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        ("0", 0, 1),
        ("0.4", 0.4, 2),
        ("1", 1, 2.5),
        ("3600", 1.5, 3),  # as long as max_wait allows
        ("later", 0, 1),
        ("-5", 0, 1),
        ("9" * 400, 0, 1),  # no number of seconds
        ("Wed, 32 Jan 2020 99:00:00 GMT", 0, 1),
        ("Wed, 01 Jan 2020 00:00:00 GMT", 0, 1),
        ("a date", 1.5, 3),
    ],
)
def test_retry_after(server, endpoint, header, least, most):
    if header == "a date":
        header = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    server.script = {"a": [fails(429, Retry_After=header), answer("ok")]}
    replies, seconds = timed(replace(endpoint, max_wait=1.5), ["a"])
    assert replies == [Reply("ok")]
    assert least <= seconds < most


def test_waits_double_and_are_bounded(server, endpoint, monkeypatch):
    waits = []
    monkeypatch.setattr(threading.Event, "wait", lambda event, timeout=None: waits.append(timeout))
    call = module._Call(replace(endpoint, backoff=1.0, attempts=9, max_wait=20.0), None)
    monkeypatch.setattr(call, "_post", lambda body: (503, None, b""))
    assert call.ask(b"").error == "HTTP 503: "
    assert len(waits) == 8
    for i, wait in enumerate(waits):
        assert min(2**i / 2, 20) <= wait <= min(2**i, 20)


# Many failures


def test_a_dead_endpoint_is_not_asked_for_ever(server, endpoint):
    prompts = [f"{i}" for i in range(200)]
    server.script = {p: [fails(401)] for p in prompts}
    replies = complete(replace(endpoint, concurrency=2), prompts)
    assert all(reply.text is None for reply in replies)
    assert len(server.requests) < 25
    counts = count_errors(replies)
    assert list(counts) == ["not sent", "HTTP 401"]
    assert sum(counts.values()) == 200


@pytest.mark.parametrize("status", [400, 413, 422])
def test_bad_prompts_do_not_keep_good_ones_back(server, endpoint, status):
    prompts = [f"{i}" for i in range(60)]
    server.script = {p: [fails(status)] for p in prompts}
    replies = complete(replace(endpoint, concurrency=2), [*prompts, "good"])
    assert replies[-1] == Reply("re: good")
    assert count_errors(replies) == {f"HTTP {status}": 60}


def test_failures_among_successes_keep_nothing_back(server, endpoint):
    prompts = [f"{i}" for i in range(60)]
    server.script = {p: [fails(500)] for p in prompts[::2]}
    replies = complete(replace(endpoint, concurrency=1, attempts=1), prompts)
    assert count_errors(replies) == {"HTTP 500": 30}


def test_interrupted_no_more_is_sent(server, endpoint, monkeypatch):
    def interrupt(self, body):
        raise KeyboardInterrupt

    monkeypatch.setattr(module._Call, "ask", interrupt)
    with pytest.raises(KeyboardInterrupt):
        complete(endpoint, [f"{i}" for i in range(50)])
    assert server.requests == []


def test_an_interrupted_wait_ends(server, endpoint):
    call = module._Call(replace(endpoint, backoff=100.0, max_wait=100.0), KEY)
    server.script = {"a": [fails(500)]}
    replies = []
    body = json.dumps({"prompt": "a"}).encode()
    thread = threading.Thread(target=lambda: replies.append(call.ask(body)))
    thread.start()
    while not server.requests:
        time.sleep(0.01)
    call.stop.set()
    thread.join(5)
    assert [(reply.error or "").partition(":")[0] for reply in replies] == ["HTTP 500"]


def test_an_interrupt_does_not_wait_for_the_time_out(server, endpoint):
    """Ctrl-C while the endpoint is silent: the time-out here is as long as a test may take."""
    server.script = {"a": [hangs]}
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        complete(replace(endpoint, timeout=15.0), ["a", "b"])
    assert time.monotonic() - start < 5


def test_half_a_surrogate_is_no_text(server, endpoint):
    """JSON can spell it, UTF-8 and tokenizers cannot hold it: it once ended a run. A whole pair is one character."""
    content = rb'{"choices": [{"message": {"content": "a \ud83d b \ud83d\ude00"}}]}'
    server.script = {"a": [content]}
    assert complete(endpoint, ["a"]) == [Reply("a \ufffd b \U0001f600")]


def test_a_proxy_of_the_environment_is_used(server, endpoint, monkeypatch):
    port = server.server_address[1]
    far = replace(endpoint, base_url="http://example.invalid/v1")
    monkeypatch.setenv("http_proxy", f"http://user:pass@127.0.0.1:{port}")
    monkeypatch.setenv("no_proxy", "")
    assert complete(far, ["a"]) == [Reply("re: a")]
    path, headers, _ = server.requests[-1]
    assert path == "http://example.invalid/v1/chat/completions"
    assert headers["Proxy-Authorization"] == "Basic dXNlcjpwYXNz"
    assert headers["Host"] == "example.invalid"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert complete(endpoint, ["b"]) == [Reply("re: b")]
    assert server.requests[-1][0] == "/v1/chat/completions"


def test_counts():
    replies = [
        Reply("a"),
        Reply(error="HTTP 500: x"),
        Reply(error="no response within 1 s"),
        Reply(error="HTTP 500: y"),
    ]
    assert count_errors(replies) == {"HTTP 500": 2, "no response within 1 s": 1}
    assert count_errors([]) == {}


def test_what_could_not_be_had_is_ungraded_not_wrong(server, endpoint, caplog):
    steps = {"a": [fails(500)], "b": [answer("no")], "c": [b"yes"], "d": [answer("Yes.")], "e": [answer("Who knows?")]}
    server.script = {f"{name} G P": step for name, step in steps.items()}
    grader = make_grader("endpoint", endpoint=endpoint, template="{question} {answer} {prediction}")
    assert grader([(name, "G", "P") for name in steps]) == [None, 0.0, None, 1.0, None]
    (line,) = caplog.messages
    line, first = line.split("; ")
    assert first == 'the first: HTTP 500: {"error": {"message": "why"}}'
    assert line.startswith("3 of 5 answers are ungraded: ")
    assert {"HTTP 500 (1)", "response is not JSON (1)", "neither yes nor no (1)"} == set(
        line.split(": ")[1].split(", ")
    )


# The key


def test_the_key_is_in_no_error(server, endpoint, monkeypatch, caplog, capfd):
    """Whatever the server says, and however long before it says it."""
    padding = "x" * (200 - len("HTTP 401: ") - 5)  # so that a cut falls into the key
    echo = {
        "plain": [fails(401, f"bad key {KEY}".encode())],
        "escaped": [fails(403, json.dumps({"message": f"bad {KEY}"}).replace("/", "\\/").encode())],
        "cut": [fails(400, f"{padding}{KEY}".encode())],
        "no HTTP": [lambda h: (h.wfile.write(f"{KEY}\r\n".encode()), drops(h))],
        "shape": [{"key": KEY}],
    }
    server.script = echo
    replies = complete(endpoint, list(echo))
    shown = [repr(replies), repr(endpoint), str(count_errors(replies)), caplog.text, *capfd.readouterr()]
    for text in shown:
        assert KEY not in text
        assert "1234567890" not in text
        assert KEY[:8] not in text
    assert replies[0].error == "HTTP 401: bad key (key)"
    assert replies[1].error == 'HTTP 403: {"message": "bad (key)"}'


def test_a_redirect_is_not_followed(server, endpoint):
    """Neither to another host, which must not see the key, nor to the same."""
    other = Server()
    thread = threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        for status in (301, 302, 303, 307, 308):
            server.script[f"{status}"] = [fails(status, Location=f"{other.url}/chat/completions")]
        server.script["same"] = [fails(307, Location="/v1/chat/completions")]
        replies = complete(endpoint, list(server.script))
        assert [(reply.error or "")[:9] for reply in replies] == [
            *(f"HTTP {status}:" for status in (301, 302, 303, 307, 308, 307)),
        ]
        assert other.requests == []
        assert len(server.requests) == 6
    finally:
        other.shutdown()
        thread.join()
        other.server_close()


@pytest.mark.parametrize("value", ["", "  ", "sk-1\nX-Evil: 1", "sk 1", "sk-é", "sk-\x7f"])
def test_keys_that_no_header_can_hold(server, endpoint, monkeypatch, value):
    monkeypatch.setenv("SEAL_TEST_KEY", value)
    with pytest.raises(InputError, match=r"^environment variable SEAL_TEST_KEY: found .*; accepted: a key") as caught:
        complete(endpoint, ["a"])
    assert "sk" not in str(caught.value)
    assert server.requests == []


def test_a_key_that_is_not_set(server, endpoint, monkeypatch):
    monkeypatch.delenv("SEAL_TEST_KEY")
    with pytest.raises(InputError, match="SEAL_TEST_KEY: found nothing"):
        complete(endpoint, ["a"])
    monkeypatch.setenv("SEAL_TEST_KEY", f" {KEY}\n")  # as `export KEY=$(cat file)` may leave it
    assert complete(endpoint, ["a"]) == [Reply("re: a")]
    assert server.requests[0][1]["Authorization"] == f"Bearer {KEY}"


# What is refused when built or called

BUILT = {
    "base_url": [
        *("", "localhost:8000/v1", "ftp://h/v1", "http://", "http:///v1", "http://h:port/v1", "http://h:99999/v1"),
        *("http://h:0", "http://[::1/v1", "http://h/v1?x=1", "http://h/v1#x", "http://h/v 1", "http://h/\n", 5, None),
        *("http://user:sk-secret@h/v1", "http://é/v1"),
    ],
    "model": ["", None, 5],
    "key_variable": ["sk-secret-123", "0KEY", "MY KEY", "secretsecret", 5, b"KEY"],
    "concurrency": [0, -1, 1.5, True, None, 10**6],
    "attempts": [0, 1.0, 10**9, "5"],
    "timeout": [0, -1, float("inf"), float("nan"), "60", None],
    "backoff": [-0.1, float("inf"), None],
    "max_wait": [-1, 10**6, "1"],
    "chat": [1, None],
    "fields": [None, [("top_p", 1)], "top_p"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BUILT.items() for value in values])
def test_endpoints_that_cannot_be(name, value):
    with pytest.raises(InputError, match=f"^endpoint.{name}: found .*; accepted: ") as caught:
        Endpoint(**{"base_url": "http://localhost:8000/v1", "model": "m", name: value})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://localhost:8000/v1", "https://h", "http://[::1]:80/", "HTTPS://a.b/c/d/"])
def test_endpoints_that_can_be(url):
    endpoint = Endpoint(url, "m")
    assert endpoint.key_variable == "OPENAI_API_KEY"
    with pytest.raises(AttributeError):
        endpoint.model = "other"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("prompts", "arguments", "message"),
    [
        ("text", {}, "prompts: found str 'text'; accepted: a list of texts"),
        (5, {}, "prompts: found int 5"),
        (["a", 5], {}, r"prompts\[1\]: found 5; accepted: text"),
        (["a"], {"max_tokens": 0}, "max_tokens: found 0"),
        (["a"], {"max_tokens": 1.5}, "max_tokens: found 1.5"),
        (["a"], {"temperature": -1}, "temperature: found -1"),
        (["a"], {"temperature": float("nan")}, "temperature: found nan"),
    ],
)
def test_calls_that_are_refused(server, endpoint, prompts, arguments, message):
    with pytest.raises(InputError, match=message):
        complete(endpoint, prompts, **arguments)
    assert server.requests == []


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, object()])
def test_fields_that_json_cannot_hold(server, endpoint, value):
    with pytest.raises(InputError, match=r"endpoint\.fields: .*; accepted: what JSON can hold"):
        complete(replace(endpoint, fields={"top_p": value}), ["a"])
    assert server.requests == []
