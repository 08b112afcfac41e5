"""The application: OpenAI's endpoints, health, metrics and the page, behind limits and one log line a request."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi import Request as HttpRequest
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import llama_jax
from infer.api import chat, completions, embeddings, responses
from infer.api.answers import new_id
from infer.api.errors import ApiError, ErrorBody, add_error_handlers, unavailable
from infer.api.limits import BodyLimit
from infer.api.schemas import DetokenizeRequest, TokenizeRequest
from infer.api.server import Server
from infer.throughput import guesses_text

LOG = logging.getLogger("infer.serve")
PAGE = Path(__file__).parent / "page.html"
PAGE_POLICY = (  # what it has in itself, requests to this server, and nothing else
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def make_app(
    server: Server,
    *,
    warm_up: Callable[[], None] | None = None,
    grace_seconds: float = 30.0,
) -> FastAPI:
    """The application of a server. It starts the worker, and drains it for at most grace_seconds at the end."""

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        server.worker.start(warm_up)
        yield
        if not await server.worker.drain(grace_seconds):
            LOG.warning("requests were cut off after %g seconds", grace_seconds)
        if guesses := guesses_text(server.engine.stats()):
            LOG.info(guesses)

    # FastAPI's own /docs would load its scripts from elsewhere.
    app = FastAPI(
        title="llama_jax",
        version=llama_jax.__version__,
        lifespan=life,
        docs_url=None,
        redoc_url=None,
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )
    add_error_handlers(app)
    for part in (completions, chat, responses, embeddings):
        app.include_router(part.router(server))
    app.include_router(_state(server))
    app.include_router(_models_and_tokens(server))
    app.add_middleware(BodyLimit, max_bytes=server.limits.max_body_bytes)
    app.add_middleware(RequestLog, server=server)
    return app


def _state(server: Server) -> APIRouter:
    """The page, and how the server is."""
    routes = APIRouter()

    @routes.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE, media_type="text/html", headers={"Content-Security-Policy": PAGE_POLICY})

    @routes.get("/health")
    async def health() -> dict[str, str]:
        """Whether the server is alive."""
        if server.worker.failure is not None:
            server.worker.check_open()
        return {"status": "alive"}

    @routes.get("/ready")
    async def ready() -> dict[str, str]:
        """Whether all is compiled and requests are taken."""
        server.worker.check_open()
        if not server.worker.ready.is_set():
            raise unavailable("the engine is starting")
        return {"status": "ready"}

    @routes.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(server.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return routes


def _models_and_tokens(server: Server) -> APIRouter:
    """What is served, and its tokenizer."""
    routes = APIRouter()

    @routes.get("/v1/models")
    async def models(http: HttpRequest) -> dict[str, Any]:
        """The models that are served."""
        server.limits.key_of(http.headers.get("authorization"))
        return {"object": "list", "data": [_model(server, name) for name in server.model_names]}

    @routes.get("/v1/models/{name:path}")
    async def model(name: str, http: HttpRequest) -> dict[str, Any]:
        """One of them."""
        server.limits.key_of(http.headers.get("authorization"))
        return _model(server, server.check_model(name))

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeRequest, http: HttpRequest) -> dict[str, Any]:
        """Token ids of a text or a dialog."""
        server.limits.key_of(http.headers.get("authorization"))
        server.check_model(body.model)
        if body.messages is not None:
            tokens = await asyncio.to_thread(chat.dialog_tokens, server, body.messages)
        else:
            bos = body.add_special_tokens and server.tokenizer.bos_id is not None
            tokens = await asyncio.to_thread(server.tokenizer.encode, body.prompt or "", bos=bos)
        return {"tokens": tokens, "count": len(tokens), "max_model_len": server.engine.max_seq_len}

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeRequest, http: HttpRequest) -> dict[str, str]:
        """The text of token ids."""
        server.limits.key_of(http.headers.get("authorization"))
        server.check_model(body.model)
        try:
            return {"prompt": await asyncio.to_thread(server.tokenizer.decode, body.tokens)}
        except ValueError as error:
            raise ApiError(str(error), param="tokens") from None

    return routes


def _model(server: Server, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": server.created,
        "owned_by": "llama_jax",
        "max_model_len": server.engine.max_seq_len,
    }


class RequestLog:
    """Middleware: an id for each request, its status and time in the log and the metrics, never what it says."""

    def __init__(self, app: ASGIApp, server: Server):
        """Wraps an application."""
        self._app, self._server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request_id, began, status = new_id("req"), time.perf_counter(), 499

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        self._server.metrics.in_flight.inc()
        try:
            await self._app(scope, receive, tell)
        except Exception:
            LOG.exception("%s failed", request_id)
            if status != 499:  # half an answer is out already
                raise
            await JSONResponse(ApiError("internal error", status=500).body, 500)(scope, receive, tell)
        finally:
            self._server.metrics.in_flight.dec()
            seconds = time.perf_counter() - began
            route = scope.get("route")
            path = getattr(route, "path", "other")
            self._server.metrics.answered(path, status, seconds)
            # Probes come every few seconds, and would hide the rest.
            level = logging.DEBUG if path in ("/health", "/ready", "/metrics") else logging.INFO
            LOG.log(level, "%s %s %s %d %.3f s", request_id, scope["method"], path, status, seconds)
