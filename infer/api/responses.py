"""POST /v1/responses, without state: one turn of a dialog that comes whole with each request.

It is /v1/chat/completions in other words: what is asked is asked of `infer.api.chat`.
"""

import contextlib
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from pydantic import ValidationError
from starlette.responses import Response

from infer.api import chat
from infer.api.answers import STREAMED, answered, event, new_id
from infer.api.errors import ApiError
from infer.api.schemas import ChatRequest, ResponsesItem, ResponsesMessage, ResponsesRequest, ResponsesToolChoice
from infer.api.server import Server

_ANY_TEXT = {"format": {"type": "text"}}


def router(server: Server) -> APIRouter:
    """The endpoint."""
    routes = APIRouter()

    @routes.post("/v1/responses", response_model=None, responses=STREAMED)
    async def responses(body: ResponsesRequest, http: HttpRequest) -> Response:
        """Answer a dialog."""
        return await answered(server, http, lambda: begin(server, body), num_requests=1, stream=bool(body.stream))

    return routes


async def begin(server: Server, body: ResponsesRequest) -> "Answer":
    """The answer that a body asks for, its request not submitted yet. Raises ApiError 400."""
    choice = body.tool_choice
    if isinstance(choice, ResponsesToolChoice):
        choice = {"type": "function", "function": {"name": choice.name}}
    functions = [tool.model_dump(exclude={"type"}) for tool in body.tools or ()]
    try:
        asked = ChatRequest(
            model=body.model,
            messages=_messages(body),  # type: ignore[arg-type]
            max_completion_tokens=body.max_output_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            response_format=body.text.format.as_chat if body.text else None,
            tools=[{"type": "function", "function": function} for function in functions] or None,  # type: ignore[arg-type]
            tool_choice=choice,  # type: ignore[arg-type]
            parallel_tool_calls=body.parallel_tool_calls,
        )
    except ValidationError as error:
        raise ApiError(str(error.errors()[0]["msg"])) from None
    return Answer(server, body, await chat.begin(server, asked))


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    said = [{"role": "system", "content": body.instructions}] if body.instructions else []
    if isinstance(body.input, str):
        return [*said, {"role": "user", "content": body.input}]
    return [*said, *map(_message, body.input)]


def _message(item: ResponsesItem) -> dict[str, Any]:
    if isinstance(item, ResponsesMessage):
        return {"role": item.role, "content": item.content}
    if item.type == "function_call":
        function = {"name": item.name, "arguments": item.arguments}
        return {"role": "assistant", "tool_calls": [{"id": item.call_id, "function": function}]}
    return {"role": "tool", "tool_call_id": item.call_id, "content": item.output}


class Answer:
    """The object that tells of one turn, and the events by which it grows."""

    def __init__(self, server: Server, body: ResponsesRequest, turn: chat.Answer):
        """The turn is chat's."""
        self._server, self._body, self._turn, self.requests = server, body, turn, turn.requests
        self._id, self._message_id, self._created = new_id("resp"), new_id("msg"), int(time.time())
        self._model = server.check_model(body.model)
        self._num_events = 0

    def whole(self) -> dict[str, Any]:
        """The response as it stands: in progress, completed or cut off."""
        (request,), body = self.requests, self._body
        result = request.result
        status = {None: "in_progress", "stop": "completed"}.get(result.finish_reason, "incomplete")
        num_prompt, num_new = len(result.prompt_tokens), len(result.tokens)
        usage = {
            "input_tokens": num_prompt,
            "input_tokens_details": {"cached_tokens": result.cached_tokens},
            "output_tokens": num_new,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": num_prompt + num_new,
        }
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._model,
            "output": [] if status == "in_progress" else self._output(status, result.text or ""),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "temperature": request.params.temperature,
            "top_p": request.params.top_p,
            "text": body.text.model_dump(by_alias=True, exclude_none=True) if body.text else _ANY_TEXT,
            "tool_choice": body.model_dump()["tool_choice"] or "auto",
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "store": False,
            "usage": None if status == "in_progress" else usage,
        }

    def _output(self, status: str, text: str) -> list[dict[str, Any]]:
        """Calls of functions, or what the assistant says."""
        calls = self._turn.calls(text)
        return [
            {"id": new_id("fc"), "type": "function_call", "status": "completed", "call_id": call["id"]}
            | call["function"]
            for call in calls
        ] or [self._message(status, [_part(text)])]

    async def events(self) -> AsyncGenerator[str, None]:
        """The stream of events, with names and numbers."""
        turn, begun = chat.Turn(self.requests[0]), False
        place = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        try:
            yield self._event("response.created", response=self.whole())
            yield self._event("response.in_progress", response=self.whole())
            async with contextlib.aclosing(self._server.stream(self.requests)) as deltas:
                async for delta in deltas:
                    text = turn.release(delta.text, delta.finished, holds_calls=bool(self._body.tools))
                    if delta.finished and self._turn.calls(turn.request.result.text or ""):
                        break
                    if text and not begun:
                        begun = True
                        for begin in self._begin_message(place):
                            yield begin
                    if text:
                        yield self._event("response.output_text.delta", **place, delta=text, logprobs=[])
            whole = self.whole()
            for index, item in enumerate(whole["output"]):
                is_call = item["type"] == "function_call"
                for told in self._call(index, item) if is_call else self._end(item, place, begun):
                    yield told
            yield self._event(f"response.{whole['status']}", response=whole)
        except ApiError as error:
            told = error.body["error"]
            yield self._event("error", code=told["code"], message=told["message"], param=None)

    def _begin_message(self, place: dict[str, Any]) -> Iterator[str]:
        yield self._event("response.output_item.added", output_index=0, item=self._message("in_progress", []))
        yield self._event("response.content_part.added", **place, part=_part(""))

    def _end(self, item: dict[str, Any], place: dict[str, Any], begun: bool) -> Iterator[str]:
        """A message is whole."""
        if not begun:
            yield from self._begin_message(place)
        (part,) = item["content"]
        yield self._event("response.output_text.done", **place, text=part["text"], logprobs=[])
        yield self._event("response.content_part.done", **place, part=part)
        yield self._event("response.output_item.done", output_index=0, item=item)

    def _call(self, index: int, item: dict[str, Any]) -> Iterator[str]:
        """A call, which is told when it is whole."""
        place, arguments = {"item_id": item["id"], "output_index": index}, item["arguments"]
        begin = item | {"status": "in_progress", "arguments": ""}
        yield self._event("response.output_item.added", output_index=index, item=begin)
        yield self._event("response.function_call_arguments.delta", **place, delta=arguments)
        yield self._event("response.function_call_arguments.done", **place, name=item["name"], arguments=arguments)
        yield self._event("response.output_item.done", output_index=index, item=item)

    def _event(self, kind: str, /, **fields: Any) -> str:
        item = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return event(item, kind)

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._message_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
