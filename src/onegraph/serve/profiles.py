"""/profile: where the time of the next steps goes, while requests are served as ever.

Takes: how many steps, how long to wait for them, and in what form. Gives: the profile as JSON, as a timeline for
ui.perfetto.dev, or as a picture. One is made at a time; a client that leaves ends it.
"""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from onegraph.errors import EngineError
from onegraph.ir.step_profile import StepProfile
from onegraph.profile_picture import profile_svg
from onegraph.serve.api_errors import ApiError, not_ready
from onegraph.serve.engine_client import EngineClient
from onegraph.serve.generation import CLIENT_CLOSED_REQUEST, hung_up

PATH = "/profile"


class ProfileRequest(BaseModel):
    """The query of a request: it waits for `steps`, for at most `timeout_s` seconds."""

    model_config = ConfigDict(extra="forbid")
    steps: int = Field(20, ge=1, le=1000)
    timeout_s: float = Field(60.0, gt=0, le=3600, allow_inf_nan=False)
    format: Literal["json", "perfetto", "svg"] = "json"


async def profile(client: EngineClient, request: Request, asked: ProfileRequest) -> Response:
    """Profiles the next steps. Raises ApiError: 408 where there were none, 409 while another profile is made."""
    if client.state != "ready":
        raise not_ready(client.state)
    loop = asyncio.get_running_loop()
    made: asyncio.Future[StepProfile | None] = loop.create_future()

    def give(found: StepProfile | None) -> None:
        if not made.done():
            made.set_result(found)

    def told(found: StepProfile | None) -> None:
        loop.call_soon_threadsafe(give, found)

    try:
        end = client.thread.profile(asked.steps, told)
    except EngineError as error:
        raise not_ready(client.state) from error
    if end is None:
        raise ApiError(409, "another profile is being made; try again when it is done", code="profile_running")
    leaving = asyncio.ensure_future(hung_up(request))
    waited: set[asyncio.Future[Any]] = {made, leaving}
    try:
        await asyncio.wait(waited, timeout=asked.timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if leaving.done():
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        end()  # where its time is over, it is made of what there is
        found = await made
    finally:
        end()
        leaving.cancel()
    if found is None:
        raise ApiError(500, "no profile could be made; the server's log says why", code="internal")
    if found.num_steps == 0 and client.state != "ready":
        raise not_ready(client.state)
    if found.num_steps == 0:
        raise ApiError(
            408,
            f"no step ran within {asked.timeout_s:g} s: a profile is of requests that are served meanwhile; send some",
            param="timeout_s",
            code="no_traffic",
        )
    return _answer(found, asked.format)


def _answer(found: StepProfile, form: str) -> Response:
    if form == "perfetto":
        headers = {"Content-Disposition": 'attachment; filename="onegraph-profile.json"'}
        return Response(found.perfetto_text(), media_type="application/json", headers=headers)
    if form == "svg":
        return Response(profile_svg(found.to_dict()), media_type="image/svg+xml")
    return JSONResponse(found.to_dict())
