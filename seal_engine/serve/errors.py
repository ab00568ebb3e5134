"""What goes wrong, as HTTP says it: {"error": {"message", "type", "param", "code"}}, the code being the status."""

import re
from collections.abc import Sequence
from typing import Any

from seal_engine.serve.requests import CancelledError, ClosedError, FailedError, QueueFullError
from seal_engine.types import InputError

FIELD = re.compile(r"[A-Za-z_][\w.\[\]]*")
TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    410: "GoneError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    503: "ServiceUnavailableError",
}
RETRY_AFTER = {429: "1", 503: "5"}  # seconds


class ApiError(Exception):
    """A request that gets an error as its response."""

    def __init__(self, status: int, message: str, param: str | None = None):
        super().__init__(message)
        self.status = status
        self.param = param


class UnknownModelError(LookupError):
    """No model or adapter of this name is served."""


def as_api_error(error: Exception) -> ApiError:
    """What an exception is as a response. One that nobody expected says no more than its type."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        field_name, colon, _ = str(error).partition(":")
        return ApiError(400, str(error), field_name if colon and FIELD.fullmatch(field_name) else None)
    if isinstance(error, UnknownModelError):
        return ApiError(404, str(error), "model")
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error))
    if isinstance(error, ClosedError):
        return ApiError(503, str(error))
    if isinstance(error, FailedError | CancelledError):
        return ApiError(500, str(error))
    return ApiError(500, f"internal error: {type(error).__name__}")


def first_mistake(mistakes: Sequence[Any]) -> tuple[str, str]:
    """The field of the first of pydantic's mistakes, "" for the whole, and what is wrong with it."""
    location, message = mistakes[0]["loc"], mistakes[0]["msg"]
    return ".".join(str(part) for part in location if str(part).isidentifier() or isinstance(part, int)), message


def error_body(error: ApiError) -> dict[str, Any]:
    """The response's JSON."""
    kind = TYPES.get(error.status, "InternalServerError" if error.status >= 500 else "BadRequestError")
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.status}}


def error_headers(error: ApiError) -> dict[str, str]:
    """Headers of the response."""
    headers = {"Retry-After": RETRY_AFTER[error.status]} if error.status in RETRY_AFTER else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = 'Bearer, Basic realm="seal-engine"'
    return headers
