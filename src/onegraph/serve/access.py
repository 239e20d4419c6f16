"""What stands before the endpoints: API keys and the limit on a request's body, as plain ASGI middleware."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from onegraph.serve.api_errors import ApiError

PROTECTED = ("/v1/", "/explain/", "/profile/")
BODY_TIMEOUT_S = 60


class ApiKeys:
    """Lets requests to PROTECTED paths through that bring one of the keys; the others are for probes and are open.

    Each key is compared, and in constant time, so that the time tells nothing about any of them.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._expected = [f"Bearer {key}".encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._expected and f"{scope['path']}/".startswith(PROTECTED):
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            matches = [hmac.compare_digest(given, expected) for expected in self._expected]
            if not any(matches):
                message = "no API key was given" if not given else "the API key is wrong"
                hint = "send the header `Authorization: Bearer KEY`"
                await ApiError(401, f"{message}; {hint}", code="invalid_api_key")(scope, receive, send)
                return
        await self._app(scope, receive, send)


class BodyLimit:
    """Refuses bodies over a number of bytes with 413, whether or not their length is declared.

    One whose next part doesn't come is given up with 408.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        too_large = ApiError(413, f"the body has more than {self._max_bytes} bytes (--max-body-bytes)")
        if declared.isdigit() and int(declared[:20]) > self._max_bytes:
            await too_large(scope, receive, send)
            return
        received, whole = 0, False

        async def limited() -> Message:
            nonlocal received, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout(BODY_TIMEOUT_S):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, f"the body didn't come within {BODY_TIMEOUT_S} s") from None
            received += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if received > self._max_bytes:
                raise too_large
            return message

        await self._app(scope, limited, send)
