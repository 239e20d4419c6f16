"""The FastAPI application: every path that the server answers, and what each gives."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from onegraph.serve import chat, completions, profiles
from onegraph.serve.access import ApiKeys, BodyLimit
from onegraph.serve.answers import ChatCompletion, Completion, ErrorAnswer, Facts, ModelCard, ModelList
from onegraph.serve.api_errors import ApiError, install, not_ready
from onegraph.serve.engine_client import EngineClient
from onegraph.serve.metrics import CountErrors
from onegraph.serve.protocol import ChatCompletionRequest, CompletionRequest
from onegraph.serve.settings import ServeSettings
from onegraph.version import __version__

FIELDS = {
    completions.PATH: CompletionRequest.model_fields,
    chat.PATH: ChatCompletionRequest.model_fields,
    profiles.PATH: profiles.ProfileRequest.model_fields,
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer} for status in (400, 401, 404, 408, 409, 413, 429, 500, 503, 504)
}


def make_app(client: EngineClient, settings: ServeSettings, *, names: tuple[str, ...], root: str) -> FastAPI:
    """The application for one engine. `names` are the model's in the API, `root` where it came from."""
    app = FastAPI(
        title="onegraph",
        version=__version__,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    install(app, FIELDS)
    started_at = int(time.time())

    def served(name: str | None) -> str:
        """The name under which the answer goes. Raises ApiError (404) for a model that isn't here."""
        if name is not None and name not in names:
            known = ", ".join(names)
            raise ApiError(
                404, f"there is no model {name[:200]!r}; served: {known}", param="model", code="model_not_found"
            )
        return name or names[0]

    def card(name: str) -> ModelCard:
        started = client.thread.started
        length = None if started is None else started.limits.max_model_len
        return ModelCard(id=name, created=started_at, root=root, max_model_len=length)

    @app.post(completions.PATH, response_model=Completion, responses=ERRORS)
    async def complete(request: Request, body: CompletionRequest) -> Response:
        """Continues prompts; with `stream` as server-sent events."""
        return await completions.complete(client, request, body, model=served(body.model), max_n=settings.max_n)

    @app.post(chat.PATH, response_model=ChatCompletion, responses=ERRORS)
    async def chat_completions(request: Request, body: ChatCompletionRequest) -> Response:
        """Answers a conversation; with `stream` as server-sent events."""
        return await chat.chat(client, request, body, model=served(body.model), max_n=settings.max_n)

    @app.get("/v1/models", responses=ERRORS)
    async def models() -> ModelList:
        """The names under which the model is served."""
        return ModelList(data=[card(name) for name in names])

    @app.get("/v1/models/{name:path}", responses=ERRORS)
    async def model(name: str) -> ModelCard:
        """One of these names."""
        return card(served(name))

    @app.get("/explain", responses=ERRORS)
    async def explain() -> Facts:
        """How the model was compiled, and the effective settings with why."""
        return client.started.compiled.explain().to_dict()

    @app.get(profiles.PATH, responses=ERRORS)
    async def profile(request: Request, asked: Annotated[profiles.ProfileRequest, Query()]) -> Response:
        """Where the time of the next steps goes, of the requests that are served meanwhile."""
        return await profiles.profile(client, request, asked)

    @app.get("/health", responses=ERRORS)
    async def health() -> Response:
        """200 while requests are answered, 503 before that and after the engine has failed."""
        state = client.state
        return JSONResponse({"status": state}, 200 if state in ("ready", "draining") else 503)

    @app.get("/ready", responses=ERRORS)
    async def ready() -> Response:
        """200 while new requests are taken and nothing is left to compile, 503 else."""
        if client.state != "ready":
            raise not_ready(client.state)
        return JSONResponse({"status": "ready"})

    @app.get("/version")
    async def version() -> Facts:
        """The server's version."""
        return {"version": __version__}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(client.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_middleware(ApiKeys, keys=settings.api_key)
    app.add_middleware(CountErrors, metrics=client.metrics, endpoints=frozenset(FIELDS) | {"/v1/models", "/explain"})
    return app
