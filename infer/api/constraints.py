"""What an answer must be, as a constraint on its tokens: response_format, tool_choice and vLLM's structured_outputs.

The invariant: what a request asks for is followed to the token, or refused before anything is generated.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from infer.api.errors import ApiError
from infer.api.schemas import ChatRequest, ResponseFormat, Sampling, StructuredOutputs, Tool
from infer.grammar import Constraint, Grammars

# Builds a constraint; may take a while.
Build = Callable[[Grammars], Constraint]


def asked_for(body: Sampling) -> Build | None:
    """The constraint that a body asks for, None if any text will do. Raises ApiError for two at a time."""
    found = [_of_outputs(body.structured_outputs)]
    if isinstance(body, ChatRequest):
        found += [of_format(body.response_format), _of_tools(body)]
    builds = [build for build in found if build is not None]
    if len(builds) > 1:
        raise ApiError("response_format, structured_outputs and a tool that must be called exclude each other")
    return builds[0] if builds else None


def of_format(format: ResponseFormat | None) -> Build | None:
    """The constraint of a response_format."""
    if format is None or format.type == "text":
        return None
    if format.json_schema is None:
        return Grammars.json_object
    schema = format.json_schema.schema_
    return lambda grammars: grammars.json_schema(schema)


def _of_outputs(outputs: StructuredOutputs | None) -> Build | None:
    if outputs is None:
        return None
    if outputs.json_ is not None:
        schema = _parsed(outputs.json_) if isinstance(outputs.json_, str) else outputs.json_
        return lambda grammars: grammars.json_schema(schema)
    if outputs.choice is not None:
        pattern = "|".join(re.escape(choice) for choice in outputs.choice)
        return lambda grammars: grammars.regex(pattern)
    if outputs.regex is not None:
        return lambda grammars: grammars.regex(outputs.regex or "")
    return lambda grammars: grammars.lark(outputs.grammar or "")


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"structured_outputs.json is not JSON: {error}", param="structured_outputs") from None


def _of_tools(body: ChatRequest) -> Build | None:
    """A call that must come, or, where a tool is strict, a text or a call that fits."""
    tools, choice = body.tools or [], body.tool_choice
    if choice == "none" or not tools:
        return None
    if choice in (None, "auto"):
        if not any(tool.function.strict for tool in tools):
            return None
        return lambda grammars: grammars.lark(_TEXT_OR_CALL % json.dumps(_call_schema(tools)))
    if choice != "required":
        tools = [tool for tool in tools if tool.function.name == choice.function.name]  # type: ignore[union-attr]
        if not tools:
            raise ApiError(f"tool_choice names {choice.function.name!r}, which is not in tools", param="tool_choice")  # type: ignore[union-attr]
    return lambda grammars: grammars.json_schema(_call_schema(tools))


_TEXT_OR_CALL = """start: text | call
text: /([^{](.|\n)*)?/
call: %%json %s
"""


def _call_schema(tools: Sequence[Tool]) -> dict[str, Any]:
    """JSON of one call, in the form that Llama writes it."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "parameters": tool.function.parameters or {"type": "object"},
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}
