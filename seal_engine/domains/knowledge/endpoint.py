"""A client for any OpenAI-compatible endpoint. Whatever goes wrong takes bounded time and becomes a reply's error.

The key comes from an environment variable, goes to the endpoint's host alone (redirects are errors), and is cut out of
every error: an endpoint may repeat what it was sent.
"""

import json
import os
import queue
import random
import re
import socket
import threading
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPSConnection, IncompleteRead
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from seal_engine.files import show
from seal_engine.types import InputError, is_integer, is_number, require

MAX_BYTES = 2**24  # of a response
OWN_FAULT = (400, 413, 422)  # a prompt's own: says nothing about the next one
RETRIED = (408, 429)  # and 5xx


@dataclass(frozen=True)
class Reply:
    """An endpoint's answer to a prompt: text, or the error that it failed with. The error's kind ends at its colon."""

    text: str | None = None
    error: str | None = None


def count_errors(replies: Iterable[Reply]) -> dict[str, int]:
    """How many replies failed with each kind of error, the most frequent first."""
    return dict(Counter(reply.error.partition(":")[0] for reply in replies if reply.error is not None).most_common())


def first_error(replies: Iterable[Reply]) -> str:
    """The first error in full, as the end of a sentence: what the server said of it; "" if there is none."""
    return next((f"; the first: {reply.error}" for reply in replies if reply.error is not None), "")


@dataclass(frozen=True)
class Endpoint:
    """Where a model is served and how to ask it. Raises InputError when built with a field out of range."""

    base_url: str  # http://localhost:8000/v1: without /chat/completions
    model: str
    key_variable: str | None = "OPENAI_API_KEY"  # environment variable with the key; None or "": send none
    concurrency: int = 8  # requests at once
    timeout: float = 60.0  # seconds that a request may take in all
    attempts: int = 5  # requests for one prompt
    backoff: float = 1.0  # seconds before the second attempt, twice that before the third, ..., less up to half of it
    max_wait: float = 60.0  # seconds between two attempts, whatever the endpoint asks for
    chat: bool = True  # POST /chat/completions, a prompt being a user's message; False: /completions
    fields: Mapping[str, Any] = field(default_factory=dict)  # more of each request, such as top_p; None removes one

    def __post_init__(self):
        require(isinstance(self.model, str) and self.model != "", "endpoint.model", self.model, "a model's name")
        key_variable = self.key_variable  # never shown if it is no variable's name: it may be the key itself
        named = isinstance(key_variable, str) and re.fullmatch("([A-Z_][A-Z0-9_]*)?", key_variable)
        accepted = "None, or the name of an environment variable in capitals"
        require(key_variable is None or bool(named), "endpoint.key_variable", "something else (not shown)", accepted)
        for name in ("concurrency", "attempts"):
            value = getattr(self, name)
            require(is_integer(value) and 1 <= value <= 1000, f"endpoint.{name}", value, "an integer from 1 to 1000")
        for name, least in (("timeout", 0.001), ("backoff", 0), ("max_wait", 0)):
            value = getattr(self, name)
            usable = is_number(value) and least <= value <= 86400
            require(usable, f"endpoint.{name}", value, f"seconds from {least} to 86400")
        require(isinstance(self.chat, bool), "endpoint.chat", self.chat, "True or False")
        require(isinstance(self.fields, Mapping), "endpoint.fields", self.fields, "fields of a request")
        self._check_url()

    def _check_url(self) -> None:
        url = self.base_url
        if isinstance(url, str) and re.fullmatch(r"[\x21-\x7e]+", url):
            require("@" not in url, "endpoint.base_url", "a user or password (not shown)", "a URL without them")
            with suppress(ValueError):  # a port that is no number, half a bracket
                parts = urlsplit(url)
                whole = parts.scheme in ("http", "https") and parts.hostname and not ("?" in url or "#" in url)
                if whole and parts.port != 0:
                    return
        accepted = "http:// or https://, a host and a path, without query and fragment"
        raise InputError(f"endpoint.base_url: found {show(url)}; accepted: {accepted}")


def complete(
    endpoint: Endpoint, prompts: Sequence[str], max_tokens: int | None = 256, temperature: float = 0.0
) -> list[Reply]:
    """A reply for each prompt, in their order.

    Tried again: no connection, a lost one, a timeout, 408, 429 and 5xx. A prompt takes at most `attempts` requests of
    `timeout` seconds and as many waits of `max_wait`. Once 2 x concurrency prompts in a row, at least 16, have failed
    for no fault of their own, the rest are not sent. InputError for prompts that are no texts, and for a missing key.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise InputError(f"prompts: found {show(prompts)}; accepted: a list of texts")
    for i, prompt in enumerate(prompts):
        require(isinstance(prompt, str), f"prompts[{i}]", prompt, "text")
    usable = max_tokens is None or (is_integer(max_tokens) and max_tokens >= 1)
    require(usable, "max_tokens", max_tokens, "None or an integer >= 1")
    require(is_number(temperature) and temperature >= 0, "temperature", temperature, "a finite number >= 0")
    fields = {"model": endpoint.model, "max_tokens": max_tokens, "temperature": temperature, **endpoint.fields}
    fields = {name: value for name, value in fields.items() if value is not None}
    asked = [{"messages": [{"role": "user", "content": p}]} if endpoint.chat else {"prompt": p} for p in prompts]
    try:
        bodies = [json.dumps({**one, **fields}, allow_nan=False).encode() for one in asked]
    except (TypeError, ValueError) as error:
        raise InputError(f"endpoint.fields: {error}; accepted: what JSON can hold") from None
    call = _Call(endpoint, read_key(endpoint.key_variable))
    replies: list[Reply | BaseException | None] = [None] * len(bodies)
    due = queue.SimpleQueue()
    for item in enumerate(bodies):
        due.put(item)

    def work() -> None:
        with suppress(queue.Empty):
            while not call.stop.is_set():
                i, body = due.get_nowait()
                try:
                    replies[i] = call.ask(body)
                except BaseException as error:
                    replies[i] = error
                    call.stop.set()

    # Daemons: an interrupted program does not wait for the responses that are still to come.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(endpoint.concurrency, len(bodies)))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:  # also when interrupted: nothing more is sent then
        call.stop.set()
    for reply in replies:
        if isinstance(reply, BaseException):
            raise reply
    return [reply for reply in replies if isinstance(reply, Reply)]


def read_key(variable: str | None) -> str | None:
    if not variable:
        return None
    key = os.environ.get(variable, "").strip()
    if not re.fullmatch(r"[\x21-\x7e]+", key):  # http.client would print a header that it cannot send
        found = "nothing" if not key else "something else (not shown)"
        raise InputError(f"environment variable {variable}: found {found}; accepted: a key, or key_variable=None")
    return key


class _NoAnswerError(Exception):
    """A response that is no answer. Its text is a reply's error."""

    def __init__(self, reason: str, retry: bool = False, wait: float | None = None, own_fault: bool = False):
        super().__init__(reason)
        self.retry, self.wait, self.own_fault = retry, wait, own_fault


class _Call:
    """What the requests of one call share."""

    def __init__(self, endpoint: Endpoint, key: str | None):
        self.endpoint = endpoint
        self._key = key
        self.stop = threading.Event()
        self._failed_in_a_row = 0  # threads may lose a count: then it takes one failure more

    def ask(self, body: bytes) -> Reply:
        """The reply to a request, after as many attempts as it takes and the endpoint allows."""
        if self._failed_in_a_row >= max(16, 2 * self.endpoint.concurrency):
            return Reply(error=f"not sent: {self._failed_in_a_row} prompts before this one failed")
        failure = _NoAnswerError("not sent: interrupted", own_fault=True)
        for attempt in range(self.endpoint.attempts):
            if attempt:
                backoff = self.endpoint.backoff * 2 ** (attempt - 1) * random.uniform(0.5, 1)
                self.stop.wait(min(backoff if failure.wait is None else failure.wait, self.endpoint.max_wait))
            if self.stop.is_set():
                break
            try:
                text = self._text(*self._post(body))
            except _NoAnswerError as error:
                failure = error
                if not failure.retry:
                    break
            else:
                self._failed_in_a_row = 0
                return Reply(text)
        self._failed_in_a_row = 0 if failure.own_fault else self._failed_in_a_row + 1
        return Reply(error=self._without_key(str(failure))[:300])

    def _without_key(self, text: str) -> str:
        for form in {self._key, json.dumps(self._key)[1:-1], self._key.replace("/", r"\/")} if self._key else ():
            text = text.replace(form, "(key)")
        return text

    def _post(self, body: bytes) -> tuple[int, str | None, bytes]:
        """Status, Retry-After and body of one request's response. _NoAnswerError if there is none in time."""
        url, timeout = urlsplit(self.endpoint.base_url), self.endpoint.timeout
        path = f"{url.path.rstrip('/')}/{'chat/' if self.endpoint.chat else ''}completions"
        connection, target, proxy_headers = _connection(url, path, timeout)
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Connection": "close"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        headers |= proxy_headers
        start, late, watchdog = time.monotonic(), threading.Event(), None
        try:
            connection.connect()
            # A socket's own timeout starts again with each byte: a response that trickles is ended from outside.
            watchdog = threading.Timer(start + timeout - time.monotonic(), _hang_up, (connection.sock, late))
            watchdog.daemon = True
            watchdog.start()
            connection.request("POST", target, body, headers)
            with connection.getresponse() as response:
                content = response.read(MAX_BYTES + 1)
                if response.length and len(content) <= MAX_BYTES:  # read(n) takes a lost connection for the end
                    raise IncompleteRead(b"", response.length)
            if not late.is_set():
                return response.status, response.headers.get("Retry-After"), content
        except (OSError, HTTPException, ValueError) as error:
            if not (late.is_set() or isinstance(error, TimeoutError)):
                raise _NoAnswerError(f"no response: {type(error).__name__}: {error}", retry=True) from None
        finally:
            if watchdog is not None:
                watchdog.cancel()
            connection.close()
        raise _NoAnswerError(f"no response within {timeout:g} s", retry=True)

    def _text(self, status: int, retry_after: str | None, content: bytes) -> str:
        """The text in a response. _NoAnswerError if it has none."""
        if status != 200:
            retry = status in RETRIED or status >= 500
            wait = _seconds(retry_after) if retry else None
            # Without the key before anything is cut off: a part of the key must not remain.
            message = self._without_key(" ".join(content.decode("utf-8", "replace").split()))[:200]
            raise _NoAnswerError(f"HTTP {status}: {message}", retry, wait, status in OWN_FAULT)
        if len(content) > MAX_BYTES:
            raise _NoAnswerError("response too large")
        try:
            value = json.loads(content)
        except (ValueError, RecursionError):
            raise _NoAnswerError(f"response is not JSON: {len(content)} bytes") from None
        steps = ("choices", 0, "message", "content") if self.endpoint.chat else ("choices", 0, "text")
        try:
            for step in steps:
                value = value[step]
        except (KeyError, IndexError, TypeError):
            value = None
        if not isinstance(value, str):
            raise _NoAnswerError(f"response without text: no {'.'.join(map(str, steps))}")
        # JSON can spell half a surrogate pair, which is no text: what stands alone becomes a replacement character.
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _connection(url: SplitResult, path: str, timeout: float) -> tuple[HTTPConnection, str, dict[str, str]]:
    """A connection to the endpoint, or to the proxy that the environment names for it (http_proxy, https_proxy, and
    no_proxy against it); the target of the request, and headers for the proxy."""
    kind = HTTPSConnection if url.scheme == "https" else HTTPConnection
    proxy = getproxies().get(url.scheme)
    if not proxy or proxy_bypass(url.hostname or ""):
        return kind(url.hostname or "", url.port, timeout=timeout), path, {}
    through = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    login = f"{unquote(through.username or '')}:{unquote(through.password or '')}"
    headers = {"Proxy-Authorization": f"Basic {b64encode(login.encode()).decode()}"} if through.username else {}
    connection = kind(through.hostname or "", through.port or 80, timeout=timeout)
    if url.scheme == "https":
        connection.set_tunnel(url.hostname or "", url.port, headers)
        return connection, path, {}
    return connection, f"http://{url.netloc}{path}", headers


def _hang_up(sock: socket.socket, late: threading.Event) -> None:
    late.set()
    with suppress(OSError):  # it is closed already
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # not an SSLSocket's own, which takes its reader's state away


def _seconds(retry_after: str | None) -> float | None:
    """Seconds from a Retry-After header: a number, or a date. None if it is missing or neither."""
    text = (retry_after or "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError, IndexError, TypeError):
        return None
