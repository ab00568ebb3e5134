"""The HTTP application: routes, errors in one form, the guard before them, the page."""

import logging
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from seal_engine.serve.errors import ApiError, as_api_error, error_body, error_headers, first_mistake
from seal_engine.serve.guard import Guard, Key
from seal_engine.serve.openai_api import make_routes
from seal_engine.serve.service import Service
from seal_engine.serve.stats import describe, make_registry
from seal_engine.serve.tinker.routes import make_tinker_routes

PAGE = Path(__file__).parent / "page.html"
log = logging.getLogger("seal_engine")


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: int


class ErrorResponse(BaseModel):
    """The body of every error."""

    error: ErrorDetail


STATUSES = (400, 401, 403, 404, 413, 429, 500, 503)
ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorResponse} for status in STATUSES}


def make_app(
    service: Service,
    key: Key | None = None,
    max_body: int = 2**25,
    seal_requests: Callable[[], list[dict[str, Any]]] = list,
) -> FastAPI:
    """The application over a service. max_body: bytes of a request. seal_requests: what runs of SEAL's inner loop."""
    app = FastAPI(title="seal_engine", version=package_version(), docs_url=None, redoc_url=None)
    app.add_middleware(Guard, key=key, max_body=max_body)
    app.include_router(make_routes(service, ERRORS))
    app.include_router(make_tinker_routes(service))
    registry = make_registry(service)

    @app.get("/health", responses=ERRORS)
    async def health() -> Response:
        """200 while requests are accepted."""
        if service.worker.closed or not service.worker.alive:
            raise ApiError(503, "the server is shutting down")
        return Response()

    @app.get("/version", responses=ERRORS)
    async def show_version() -> dict[str, str]:
        """The package's version."""
        return {"version": package_version()}

    @app.get("/metrics", responses=ERRORS, response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Numbers for Prometheus."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/stats", responses=ERRORS)
    async def stats() -> dict[str, Any]:
        """What the page shows."""
        return describe(service, seal_requests())

    @app.get("/", responses=ERRORS, response_class=HTMLResponse)
    async def page() -> str:
        """The page."""
        return _page()

    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(HTTPException)(_http_error)
    app.exception_handler(Exception)(_error)
    for kind in (ApiError, ValueError, RuntimeError, LookupError):
        app.exception_handler(kind)(_error)
    return app


@cache
def _page() -> str:
    return PAGE.read_text("utf-8")


def package_version() -> str:
    """The version of the installed package."""
    try:
        return version("seal-engine")
    except PackageNotFoundError:  # a checkout on the path
        return "unknown"


def _response(error: ApiError) -> JSONResponse:
    return JSONResponse(error_body(error), error.status, error_headers(error))


async def _error(_: Request, error: Exception) -> JSONResponse:
    known = as_api_error(error)
    if known.status == 500:
        log.error("a request failed", exc_info=error)
    return _response(known)


async def _http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return _response(ApiError(error.status_code, str(error.detail)))


async def _invalid(_: Request, error: Exception) -> JSONResponse:
    """The first mistake in a body, by its field."""
    assert isinstance(error, RequestValidationError)
    field_name, message = first_mistake([{**mistake, "loc": mistake["loc"][1:]} for mistake in error.errors()])
    return _response(ApiError(400, f"{field_name or 'body'}: {message}", field_name or None))
