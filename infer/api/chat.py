"""POST /v1/chat/completions: the assistant's turn in a dialog, with calls of tools."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from infer.api.answers import STREAMED, answered, chat_logprobs, events, new_id, usage
from infer.api.constraints import asked_for
from infer.api.errors import ApiError
from infer.api.schemas import ChatRequest, Message, Tool
from infer.api.server import Server
from infer.api.tools import may_be_call, parse_calls
from infer.request import Request
from llama_jax.chat import encode_chat


def router(server: Server) -> APIRouter:
    """The endpoint."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions", response_model=None, responses=STREAMED)
    async def chat(body: ChatRequest, http: HttpRequest) -> Response:
        """Say what the assistant says next."""
        return await answered(
            server,
            http,
            lambda: begin(server, body),
            num_requests=server.num_choices(body)[1],
            stream=bool(body.stream),
        )

    return routes


async def begin(server: Server, body: ChatRequest) -> "Answer":
    """The answer that a body asks for, its requests not submitted yet. Raises ApiError 400."""
    tools = [] if body.tool_choice == "none" else body.tools or []
    prompt = await asyncio.to_thread(dialog_tokens, server, body.messages, tools)
    limit = body.max_completion_tokens or body.max_tokens
    params = server.params(body, limit, logprobs=body.top_logprobs or 0)
    choices = server.num_choices(body)[1]
    requests = await server.requests(body.model, [prompt], params, choices, asked_for(body))
    return Answer(server, body, requests, [tool.function.name for tool in tools])


def dialog_tokens(server: Server, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
    """The token ids of a dialog up to the assistant's turn. Raises ApiError for what the format does not take."""
    try:
        dialog = [message.as_dict() for message in messages]
        schemas = [tool.model_dump(exclude_none=True) for tool in tools]
        return encode_chat(server.tokenizer, dialog, tools=schemas or None)
    except ValueError as error:
        raise ApiError(str(error), param="messages") from None


class Answer:
    """What is told of some turns of the assistant, whole or in chunks."""

    def __init__(self, server: Server, body: ChatRequest, requests: list[Request], tools: list[str]):
        """Calls of these tools are told as calls."""
        self._server, self._body, self.requests, self._tools = server, body, requests, tools
        self._head = {
            "id": new_id("chatcmpl"),
            "created": int(time.time()),
            "model": server.check_model(body.model),
        }

    def whole(self) -> dict[str, Any]:
        """The answer to the end."""
        choices = []
        for index, request in enumerate(self.requests):
            text = request.result.text or ""
            calls = self.calls(text)
            message = {"role": "assistant", "content": None if calls else text, "refusal": None}
            if calls:
                message["tool_calls"] = calls
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": self._logprobs(request, 0, len(request.result.tokens)),
                    "finish_reason": "tool_calls" if calls else request.result.finish_reason,
                }
            )
        return self._head | {"object": "chat.completion", "choices": choices, "usage": self._usage()}

    def events(self) -> AsyncGenerator[str, None]:
        """The answer as it comes."""
        return events(self._chunks())

    async def _chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """The objects of its events. What may be a call is held back until it is one or is not."""
        turns = [Turn(request) for request in self.requests]
        async with contextlib.aclosing(self._server.stream(self.requests)) as deltas:
            for index in range(len(turns)):
                yield self._chunk(index, {"role": "assistant", "content": ""})
            async for delta in deltas:
                turn, index = turns[delta.index], delta.index
                calls = self.calls(turn.request.result.text or "") if delta.finished else []
                text = "" if calls else turn.release(delta.text, delta.finished, holds_calls=bool(self._tools))
                if text or self._body.logprobs:
                    logprobs = self._logprobs(turn.request, turn.num_told, delta.num_tokens)
                    turn.num_told = delta.num_tokens
                    yield self._chunk(index, {"content": text}, logprobs=logprobs)
                if calls:
                    listed = [{"index": i} | call for i, call in enumerate(calls)]
                    yield self._chunk(index, {"tool_calls": listed})
                if delta.finished:
                    reason = "tool_calls" if calls else turn.request.result.finish_reason
                    yield self._chunk(index, {}, reason)
        options = self._body.stream_options
        if options and options.include_usage:
            yield self._head | {"object": "chat.completion.chunk", "choices": [], "usage": self._usage()}

    def _chunk(self, index: int, delta: dict, reason: str | None = None, logprobs: dict | None = None) -> dict:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._head | {"object": "chat.completion.chunk", "choices": [choice]}

    def calls(self, text: str) -> list[dict[str, Any]]:
        """The calls that a whole text is."""
        calls = parse_calls(text, self._tools) if self._tools else []
        if self._body.parallel_tool_calls is False:
            calls = calls[:1]
        return [
            {
                "id": new_id("call"),
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
            }
            for call in calls
        ]

    def _logprobs(self, request: Request, start: int, stop: int) -> dict[str, Any] | None:
        return chat_logprobs(self._server.tokenizer, request.result, start, stop) if self._body.logprobs else None

    def _usage(self) -> dict[str, Any]:
        results = [request.result for request in self.requests]
        return usage(results[:1], results)


class Turn:
    """How far one turn has been told."""

    def __init__(self, request: Request):
        """Nothing is told yet."""
        self.request, self.num_told = request, 0
        self._held, self._is_text = "", False

    def release(self, text: str, finished: bool, *, holds_calls: bool) -> str:
        """The text that may be told now."""
        self._held += text
        if holds_calls and not (finished or self._is_text) and may_be_call(self._held):
            return ""
        text, self._held, self._is_text = self._held, "", True
        return text
