"""Who may come in and with how much: the key, the Host header, the size of a body. Plain ASGI, before any route."""

import base64
import hmac
import json
from binascii import Error as Base64Error
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any

from seal_engine.serve.errors import ApiError, error_body, error_headers

OPEN_PATHS = ("/health",)  # says that the process answers, and nothing else


def is_loopback(host: str) -> bool:
    """Whether a name or address means this machine alone."""
    name = host.strip("[]").lower()
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


class Key:
    """The server's key. Comparisons take the same time whatever is wrong."""

    def __init__(self, key: str):
        self._key = key.encode()

    def __repr__(self) -> str:
        return "Key(not shown)"

    def matches(self, key: str | None) -> bool:
        """Whether this is the key."""
        return hmac.compare_digest((key or "").encode("utf-8", "surrogatepass"), self._key)

    def admits(self, headers: Mapping[str, str]) -> bool:
        """Whether a request's headers carry the key: as Bearer, as X-API-Key, or as the password of Basic, by which
        a browser asks for it."""
        scheme, _, value = headers.get("authorization", "").partition(" ")
        candidates = [headers.get("x-api-key")]
        if scheme.lower() == "bearer":
            candidates.append(value.strip())
        elif scheme.lower() == "basic":
            try:
                login = base64.b64decode(value.strip(), validate=True).decode()
            except (Base64Error, UnicodeDecodeError, ValueError):
                login = ""
            candidates.append(login.partition(":")[2])
        return any(self.matches(candidate) for candidate in candidates if candidate)


class Guard:
    """ASGI middleware. key None: requests must come under a loopback name, or a page in this machine's browser that has
    been led to its own address could send some."""

    def __init__(self, app: Any, key: Key | None, max_body: int):
        self.app = app
        self.key = key
        self.max_body = max_body

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        error = self._refusal(scope["path"], headers)
        if error is not None:
            await _send_error(send, error)
            return
        left, too_large, begun = self.max_body, False, False

        async def bounded() -> dict[str, Any]:
            nonlocal left, too_large
            message = await receive()
            if message["type"] == "http.request":
                left -= len(message.get("body", b""))
                if left < 0:
                    too_large = True
                    raise ApiError(413, f"body: found more; accepted: at most {self.max_body} bytes")
            return message

        async def watched(message: dict[str, Any]) -> None:
            nonlocal begun
            if too_large and not begun:  # whatever the route made of the interrupted body
                begun = True
                await _send_error(send, ApiError(413, f"body: found more; accepted: at most {self.max_body} bytes"))
            elif not too_large:
                begun = True
                await send(message)

        await self.app(scope, bounded, watched)

    def _refusal(self, path: str, headers: Mapping[str, str]) -> ApiError | None:
        length = headers.get("content-length", "")
        if self.key is not None:
            if path not in OPEN_PATHS and not self.key.admits(headers):
                return ApiError(401, "a key is required: Authorization: Bearer KEY")
        elif not is_loopback(_host_name(headers.get("host", "localhost"))):
            return ApiError(403, "Host: accepted: a loopback name; with --api-key-env any")
        if length.isdecimal() and int(length[:20]) > self.max_body:
            return ApiError(413, f"body: found {length[:20]} bytes; accepted: at most {self.max_body}")
        return None


def _host_name(host: str) -> str:
    """The Host header without its port."""
    if host.startswith("["):
        return host.partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


async def _send_error(send: Any, error: ApiError) -> None:
    body = json.dumps(error_body(error)).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **error_headers(error)}
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
