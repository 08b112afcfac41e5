"""POST /v1/responses, without state: one turn of a dialog that comes whole with each request."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from infer.api.answers import STREAMED, EventStream, event, new_id
from infer.api.chat import dialog_tokens
from infer.api.constraints import of_format
from infer.api.errors import ApiError
from infer.api.schemas import Message, ResponsesRequest, Sampling
from infer.api.server import Server, unless_gone
from infer.request import Request

_ANY_TEXT = {"format": {"type": "text"}}


def router(server: Server) -> APIRouter:
    """The endpoint."""
    routes = APIRouter()

    @routes.post("/v1/responses", response_model=None, responses=STREAMED)
    async def responses(body: ResponsesRequest, http: HttpRequest) -> Response:
        """Answer a dialog."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(server.admitted(http))
            answer = await begin(server, body)
            if body.stream:
                return EventStream(answer.events(), stack.pop_all().close)
            await unless_gone(http, lambda: server.finish(answer.requests))
            return JSONResponse(answer.whole())

    return routes


async def begin(server: Server, body: ResponsesRequest) -> "Answer":
    """The answer that a body asks for, its request not submitted yet. Raises ApiError 400."""
    prompt = await asyncio.to_thread(dialog_tokens, server, _messages(body))
    sampling = Sampling(temperature=body.temperature, top_p=body.top_p)
    params = server.params(sampling, body.max_output_tokens)
    build = of_format(body.text.format.as_chat) if body.text else None
    return Answer(server, body, await server.requests(body.model, [prompt], params, 1, build))


def _messages(body: ResponsesRequest) -> list[Message]:
    said = [Message(role="user", content=body.input)] if isinstance(body.input, str) else []
    if not isinstance(body.input, str):
        said = [Message(role=message.role, content=message.content) for message in body.input]
    return ([Message(role="system", content=body.instructions)] if body.instructions else []) + said


class Answer:
    """The object that tells of one turn, and the events by which it grows."""

    def __init__(self, server: Server, body: ResponsesRequest, requests: list[Request]):
        """There is one request."""
        self._server, self._body, self.requests = server, body, requests
        (self._request,) = requests
        self._id, self._message_id, self._created = new_id("resp"), new_id("msg"), int(time.time())
        self._model = server.check_model(body.model)
        self._num_events = 0

    def whole(self) -> dict[str, Any]:
        """The response as it stands: in progress, completed or cut off."""
        result = self._request.result
        status = {None: "in_progress", "stop": "completed"}.get(result.finish_reason, "incomplete")
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        num_prompt, num_new = len(result.prompt_tokens), len(result.tokens)
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": cut,
            "instructions": self._body.instructions,
            "max_output_tokens": self._body.max_output_tokens,
            "metadata": self._body.metadata or {},
            "model": self._model,
            "output": [] if status == "in_progress" else [self._item(status, result.text or "")],
            "parallel_tool_calls": False,
            "temperature": self._request.params.temperature,
            "top_p": self._request.params.top_p,
            "text": self._body.text.model_dump(by_alias=True, exclude_none=True) if self._body.text else _ANY_TEXT,
            "tool_choice": "none",
            "tools": [],
            "store": False,
            "usage": None
            if status == "in_progress"
            else {
                "input_tokens": num_prompt,
                "input_tokens_details": {"cached_tokens": result.cached_tokens},
                "output_tokens": num_new,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": num_prompt + num_new,
            },
        }

    async def events(self) -> AsyncGenerator[str, None]:
        """The stream of events, with names and numbers."""
        place = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        try:
            yield self._event("response.created", response=self.whole())
            yield self._event("response.in_progress", response=self.whole())
            item = self._item("in_progress") | {"content": []}
            yield self._event("response.output_item.added", output_index=0, item=item)
            yield self._event("response.content_part.added", **place, part=_part(""))
            async with contextlib.aclosing(self._server.stream(self.requests)) as deltas:
                async for delta in deltas:
                    if delta.text:
                        yield self._event("response.output_text.delta", **place, delta=delta.text, logprobs=[])
            text, whole = self._request.result.text or "", self.whole()
            yield self._event("response.output_text.done", **place, text=text, logprobs=[])
            yield self._event("response.content_part.done", **place, part=_part(text))
            yield self._event("response.output_item.done", output_index=0, item=whole["output"][0])
            yield self._event(f"response.{whole['status']}", response=whole)
        except ApiError as error:
            told = error.body["error"]
            yield self._event("error", code=told["code"], message=told["message"], param=None)

    def _event(self, name: str, **fields: Any) -> str:
        item = {"type": name, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return event(item, name)

    def _item(self, status: str, text: str = "") -> dict[str, Any]:
        return {
            "id": self._message_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [_part(text)],
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
