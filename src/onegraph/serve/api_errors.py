"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}` and an HTTP status.

Takes: what the endpoints raise, what FastAPI refuses, and what nobody expected. Gives: a JSON answer that names the
field. Values never reach a log: a message of ours that quotes a request goes to its sender alone.
"""

from __future__ import annotations

import asyncio
import re
import traceback
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from onegraph.errors import ConfigError, nearest
from onegraph.log import get_logger

log = get_logger(__name__)

RETRY_AFTER_S = 1
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
CODES = {408: "body_timeout", 413: "body_too_large", 415: "unsupported_media_type", 429: "queue_full", 504: "timeout"}


class ApiError(HTTPException):
    """An answer with an error. `param` is the request's field that is wrong, `code` a stable word for programs."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(status, message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code or CODES.get(status)

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer; one that may be tried again says when."""
        headers = {"Retry-After": str(RETRY_AFTER_S)} if self.status in (429, 503) else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), status_code=self.status, headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The answer as an ASGI application."""
        await self.response()(scope, receive, send)


def of_config_error(error: ConfigError, fields: Iterable[str], *, param: str | None = None) -> ApiError:
    """What the engine refuses, as a 400 for the first of these fields that its message names."""
    named = next((name for name in fields if re.search(rf"\b{name}\b", error.message)), param)
    hint = f"; {error.hint}" if error.hint else ""
    return ApiError(400, f"{error.message}{hint}", param=named)


def of_validation(error: RequestValidationError, fields: Iterable[str]) -> ApiError:
    """What the protocol refuses: the first wrong field, and what is wrong with it."""
    found = error.errors()
    # Of a field that may be of several kinds, the error that lies deepest is of the kind that was meant.
    first = max((one for one in found if one["loc"][:2] == found[0]["loc"][:2]), key=lambda one: len(one["loc"]))
    parts = (part for part in first["loc"] if part not in ("body", "query"))
    place = [str(part)[:100].encode(errors="replace").decode() for part in parts]
    if first["type"] == "json_invalid":
        why = first.get("ctx", {}).get("error", "it ends too early")
        return ApiError(400, f"the body isn't JSON: {why}", code="bad_json")
    if not place:
        return ApiError(400, f"the body must be a JSON object, sent as application/json: {first['msg']}")
    if first["type"] == "extra_forbidden":
        close = f"; {nearest(place[0], fields)}" if len(place) == 1 else ""
        return ApiError(400, f"this server doesn't take the field {'.'.join(place)!r}{close}", param=place[0])
    return ApiError(400, f"{'.'.join(place)}: {first['msg']}", param=place[0])


def install(app: FastAPI, fields: Mapping[str, Iterable[str]]) -> None:
    """Has the app answer every error in this shape. `fields` are those of each path's body."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def validation(request: Request, error: RequestValidationError) -> JSONResponse:
        return of_validation(error, fields.get(request.url.path, ())).response()

    @app.exception_handler(StarletteHTTPException)
    async def http(request: Request, error: StarletteHTTPException) -> JSONResponse:
        message = {404: f"there is no {request.url.path}", 405: f"{request.method} isn't for {request.url.path}"}
        answer = ApiError(error.status_code, message.get(error.status_code, str(error.detail))).response()
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return internal(error).response()  # Starlette raises it again: `Quiet` logs it


def not_ready(state: str) -> ApiError:
    """A 503 for an engine in this state."""
    return ApiError(503, f"the engine is {state} and takes no requests", code=f"engine_{state}")


def internal(error: BaseException) -> ApiError:
    """The answer for a failure of our own."""
    return ApiError(500, f"unexpected {type(error).__name__}", code="internal")


def log_unexpected(error: BaseException) -> None:
    """Logs a failure of our own by type and place, without the message, which may hold a prompt."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    places = " < ".join(f"{frame.filename}:{frame.lineno}" for frame in reversed(frames))
    log.error("unexpected %s at %s", type(error).__name__, places)


class Quiet:
    """The outermost application: nothing gets past it to a log that would print messages."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:
            log.warning("an answer was cut off: the server was ended at once")
        except Exception as error:  # noqa: BLE001 - it has been answered with 500 as far as that was possible
            log_unexpected(error)
