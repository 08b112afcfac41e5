"""Who may ask, how much and how many at a time: API keys, sizes of bodies, requests in flight.

The invariant: what is refused here has cost neither a token nor a page.
"""

import asyncio
import hmac
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infer.api.errors import ApiError, overloaded

_BODY_SECONDS = 60.0


@dataclass
class Limits:
    """What the server allows.

    api_keys: one of them must come as a bearer token; none: everybody may ask. max_body_bytes: of a request.
    max_per_key: requests in flight of one key (of all clients together without keys); 0: no bound.
    max_choices: of n and best_of. max_new_tokens: of one answer; None: what the context holds. timeout_seconds: of
    one request; 0: no bound.
    """

    api_keys: Sequence[str] = ()
    max_body_bytes: int = 8 << 20
    max_per_key: int = 0
    max_choices: int = 16
    max_new_tokens: int | None = None
    timeout_seconds: float = 600.0
    _in_flight: Counter[str] = field(default_factory=Counter)

    def key_of(self, authorization: str | None) -> str:
        """The key of an Authorization header. Raises ApiError 401 if it is not one of ours."""
        if not self.api_keys:
            return ""
        scheme, _, given = (authorization or "").partition(" ")
        known = [key for key in self.api_keys if hmac.compare_digest(key.encode(), given.strip().encode())]
        if scheme.lower() != "bearer" or not known:
            raise ApiError(
                "no valid API key: send one of the server's as `Authorization: Bearer KEY`",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return known[0]

    @contextmanager
    def one_more(self, key: str) -> Iterator[None]:
        """A request in flight. Raises ApiError 429 if that is one too many."""
        if self.max_per_key and self._in_flight[key] >= self.max_per_key:
            raise overloaded(f"{self.max_per_key} requests of yours are in flight already; wait for one to end", 1)
        self._in_flight[key] += 1
        try:
            yield
        finally:
            self._in_flight[key] -= 1
            if not self._in_flight[key]:
                del self._in_flight[key]


class BodyLimit:
    """Middleware that refuses bodies of more than so many bytes, whatever their headers say, and those that crawl."""

    def __init__(self, app: ASGIApp, max_bytes: int):
        """Wraps an application."""
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._max_bytes:
            return await self._refuse(scope, receive, send)
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                body = await self._read(receive)
        except TimeoutError:
            error = ApiError(f"the request was not all there after {_BODY_SECONDS:g} seconds", status=408)
            return await error.response()(scope, receive, send)
        if body is None:
            return None
        if len(body) > self._max_bytes:
            return await self._refuse(scope, receive, send)
        await self._app(scope, _replaying(bytes(body), receive), send)

    async def _read(self, receive: Receive) -> bytearray | None:
        """The body, or somewhat more than is allowed of it; None if the client has gone."""
        body, more = bytearray(), True
        while more and len(body) <= self._max_bytes:
            message: Message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
        return body

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = ApiError(f"the request has more than {self._max_bytes} bytes", status=413, code="request_too_large")
        await error.response()(scope, receive, send)


def _replaying(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the body that was read already, and then what follows."""
    pending: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay
