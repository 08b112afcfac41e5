"""POST /v1/completions: prompts continued as they are."""

import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from infer.api.answers import STREAMED, answered, best, completion_logprobs, events, new_id, usage
from infer.api.constraints import asked_for
from infer.api.errors import ApiError
from infer.api.schemas import CompletionRequest
from infer.api.server import Server
from infer.request import Request

_MOST_REQUESTS = 1024  # of all prompts and choices of one body


def router(server: Server) -> APIRouter:
    """The endpoint."""
    routes = APIRouter()

    @routes.post("/v1/completions", response_model=None, responses=STREAMED)
    async def completions(body: CompletionRequest, http: HttpRequest) -> Response:
        """Continue one prompt or several, n times each."""
        num_requests = len(_prompts(body)) * server.num_choices(body, body.best_of)[1]
        return await answered(
            server, http, lambda: begin(server, body), num_requests=num_requests, stream=bool(body.stream)
        )

    return routes


async def begin(server: Server, body: CompletionRequest) -> "Answer":
    """The answer that a body asks for, its requests not submitted yet. Raises ApiError 400."""
    prompts, (shown, made) = _prompts(body), server.num_choices(body, body.best_of)
    if len(prompts) * made > _MOST_REQUESTS:
        raise ApiError(f"{len(prompts) * made} continuations in one request, {_MOST_REQUESTS} allowed")
    if body.max_tokens == 0 and not body.echo:
        raise ApiError("max_tokens=0 continues nothing: it is for echo=true", param="max_tokens")
    more = {"prompt_logprobs": body.logprobs} if body.echo else {}
    limit = None if body.max_tokens is None else max(body.max_tokens, 1)
    params = server.params(body, limit, logprobs=body.logprobs or 0, **more)
    return Answer(server, body, await server.requests(body.model, prompts, params, made, asked_for(body)), shown, made)


def _prompts(body: CompletionRequest) -> Sequence[Any]:
    prompt = body.prompt
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


class Answer:
    """What is told of some requests, whole or in chunks: of every `made` of a prompt the best `shown`."""

    def __init__(self, server: Server, body: CompletionRequest, requests: list[Request], shown: int, made: int):
        """The requests are in the order of their prompts."""
        self.requests, self._shown, self._made = requests, shown, made
        self._server, self._body, self._tokenizer = server, body, server.tokenizer
        self._head = {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": server.check_model(body.model),
        }

    def whole(self) -> dict[str, Any]:
        """The answer to the end."""
        groups = [self.requests[i : i + self._made] for i in range(0, len(self.requests), self._made)]
        choices = []
        for index, request in enumerate(r for group in groups for r in best(group, self._shown)):
            text = "" if self._body.max_tokens == 0 else request.result.text or ""
            text = self._prompt_text(request) + text
            choices.append(self._choice(index, text, request, 0, len(request.result.tokens)))
        results = [request.result for request in self.requests]
        return self._head | {"choices": choices, "usage": usage(results[:: self._made], results)}

    def events(self) -> AsyncGenerator[str, None]:
        """The answer as it comes."""
        return events(self._chunks())

    async def _chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """The objects of its events."""
        told = [0] * len(self.requests)
        begun = [False] * len(self.requests)
        options = self._body.stream_options
        async with contextlib.aclosing(self._server.stream(self.requests)) as deltas:
            async for delta in deltas:
                request, start = self.requests[delta.index], told[delta.index]
                text = "" if self._body.max_tokens == 0 else delta.text
                if not begun[delta.index]:
                    text, begun[delta.index] = self._prompt_text(request) + text, True
                told[delta.index] = delta.num_tokens
                if text or delta.finished or self._body.logprobs is not None:
                    choice = self._choice(delta.index, text, request, start, delta.num_tokens)
                    yield self._head | {"choices": [choice]}
        if options and options.include_usage:
            results = [request.result for request in self.requests]
            yield self._head | {"choices": [], "usage": usage(results[:: self._made], results)}

    def _prompt_text(self, request: Request) -> str:
        if not self._body.echo:
            return ""
        if isinstance(request.result.prompt, str):
            return request.result.prompt
        return self._tokenizer.decode(request.result.prompt_tokens)

    def _choice(self, index: int, text: str, request: Request, start: int, stop: int) -> dict[str, Any]:
        """One choice, with the log-probabilities of its tokens from start to stop, and of the prompt's if echoed."""
        result, logprobs = request.result, None
        if self._body.logprobs is not None:
            if self._body.max_tokens == 0:
                start = stop
            tokens, values = result.tokens[start:stop], list(result.logprobs[start:stop])
            tops = list(result.top_logprobs[start:stop]) or [[]] * len(tokens)
            if self._body.echo and start == 0 or self._body.max_tokens == 0:
                tokens = result.prompt_tokens + tokens
                values = list(result.prompt_logprobs or ()) + values
                tops = list(result.prompt_top_logprobs or ()) + tops
            logprobs = completion_logprobs(self._tokenizer, tokens, values, tops)
        reason = "length" if self._body.max_tokens == 0 else result.finish_reason
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
