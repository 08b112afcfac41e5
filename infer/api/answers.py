"""How an answer is sent, whole or as events, and the pieces of OpenAI's: ids, usage and log-probabilities."""

import contextlib
import json
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from typing import Any, Protocol

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from infer.api.errors import ApiError
from infer.api.server import Server, unless_gone
from infer.request import Request, Result
from llama_jax.tokenizer import Tokenizer

# What the description of the API says of answers that may come in pieces.
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
LOWEST = -9999.0  # JSON has no -inf


def new_id(prefix: str) -> str:
    """An id that nothing else has."""
    return f"{prefix}-{secrets.token_hex(12)}"


def usage(prompts: Iterable[Result], results: Iterable[Result]) -> dict[str, Any]:
    """Tokens of the prompts, each counted once, and of all continuations."""
    prompts = list(prompts)
    num_prompt = sum(len(result.prompt_tokens) for result in prompts)
    num_new = sum(len(result.tokens) for result in results)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_new,
        "total_tokens": num_prompt + num_new,
        "prompt_tokens_details": {"cached_tokens": sum(result.cached_tokens for result in prompts)},
    }


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token by itself; what is half a character becomes U+FFFD, and one that only the model knows nothing."""
    return token_bytes(tokenizer, token).decode("utf-8", "replace")


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes of a token."""
    return tokenizer.token_bytes[token] if token < tokenizer.vocab_size else b""


def chat_logprobs(tokenizer: Tokenizer, result: Result, start: int, stop: int) -> dict[str, Any]:
    """Those of the tokens from start to stop, as /v1/chat/completions shows them."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes(tokenizer, token)
        return {
            "token": raw.decode("utf-8", "replace"),
            "logprob": max(logprob, LOWEST),
            "bytes": list(raw),
        }

    content = []
    for i in range(start, stop):
        tops = result.top_logprobs[i] if result.top_logprobs else []
        top = [entry(*pair) for pair in tops]
        content.append(entry(result.tokens[i], result.logprobs[i]) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    logprobs: Sequence[float | None],
    tops: Sequence[Sequence[tuple[int, float]]],
    offset: int = 0,
) -> dict[str, Any]:
    """As /v1/completions shows them; offset is where in the text the first of these tokens begins."""
    texts, offsets = [token_text(tokenizer, token) for token in tokens], []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [None if logprob is None else max(logprob, LOWEST) for logprob in logprobs],
        "top_logprobs": [
            {token_text(tokenizer, token): max(logprob, LOWEST) for token, logprob in reversed(top)} or None
            for top in tops
        ],
        "text_offset": offsets,
    }


class Answer(Protocol):
    """What an endpoint tells of requests: whole once they have ended, or as events while they run."""

    requests: list[Request]

    def whole(self) -> dict[str, Any]:
        """The answer to the end."""
        ...

    def events(self) -> AsyncGenerator[str, None]:
        """The answer as it comes; running the requests is its part."""
        ...


async def answered(
    server: Server, http: HttpRequest, begin: Callable[[], Awaitable[Answer]], *, num_requests: int, stream: bool
) -> Response:
    """The response to a request that is let in, which counts until its answer has ended, however it does.

    begin makes the answer of num_requests continuations, or raises ApiError.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(server.admitted(http, num_requests))
        answer = await begin()
        if stream:
            return EventStream(answer.events(), stack.pop_all().close)
        await unless_gone(http, lambda: server.finish(answer.requests))
        return JSONResponse(answer.whole())


class EventStream(StreamingResponse):
    """Server-sent events, and what must happen when they end, however they do."""

    def __init__(self, events: AsyncGenerator[str, None], close: Callable[[], Any]):
        """What close does is done even if the client goes before the first event."""
        self._events, self._close = events, close
        super().__init__(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One answer."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()  # a client that goes while an event is sent leaves it standing
            self._close()


async def events(objects: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[str, None]:
    """Each object as an event, [DONE] at the end; an error in between is an event, too, and the last."""
    try:
        async with contextlib.aclosing(objects):
            async for item in objects:
                yield event(item)
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield event(error.body)


def event(item: dict[str, Any], name: str | None = None) -> str:
    """One event of a stream."""
    data = json.dumps(item, ensure_ascii=False, separators=(",", ":"))
    return (f"event: {name}\n" if name else "") + f"data: {data}\n\n"


def best(requests: Sequence[Request], shown: int) -> list[Request]:
    """The continuations of one prompt with the highest mean log-probability, the best first."""

    def mean(request: Request) -> float:
        logprobs = request.result.logprobs
        return sum(logprobs) / max(1, len(logprobs))

    return sorted(requests, key=mean, reverse=True)[:shown] if len(requests) > shown else list(requests)
