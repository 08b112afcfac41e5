"""Tool calls in the text of Llama 3.1 and later, found and made into OpenAI's.

Source: Meta's prompt_format.md (llama-models, models/llama3_1 and llama3_3) and the templates of the public
checkpoints. A call is the whole message: JSON {"name", "parameters"} (several apart by ";" or a new line), after
<|python_tag|> a built-in's `brave_search.call(query="...")` or code for the interpreter, or
<function=NAME>{...}</function>. The invariant: text that is no call of a tool on offer stays text.
"""

import ast
import json
import re
from collections.abc import Collection
from typing import Any, NamedTuple

PYTHON_TAG = "<|python_tag|>"
INTERPRETER = "code_interpreter"

_BUILT_IN = re.compile(r"^(\w+)\.call\((.*)\)$", re.DOTALL)
_TAGGED = re.compile(r"<function=([\w.-]+)>(.*?)</function>", re.DOTALL)
_BETWEEN = re.compile(r"[;\s]*")
_BEGINNINGS = ("{", PYTHON_TAG, "<function=")


class Call(NamedTuple):
    """A function's name and its arguments."""

    name: str
    arguments: dict[str, Any]


def may_be_call(text: str) -> bool:
    """Whether text, so far, can be the beginning of a call."""
    text = text.lstrip()
    return any(text.startswith(start) or start.startswith(text) for start in _BEGINNINGS)


def parse_calls(text: str, offered: Collection[str]) -> list[Call]:
    """The calls that a whole message is; none if it is text, or calls something that is not on offer."""
    text = text.strip()
    tagged = text.startswith(PYTHON_TAG)
    text = text.removeprefix(PYTHON_TAG).strip()
    calls = _json_calls(text) or _function_tags(text)
    if not calls and tagged:
        calls = _built_in(text) or [Call(INTERPRETER, {"code": text})]
    return calls if calls and all(call.name in offered for call in calls) else []


def _json_calls(text: str) -> list[Call]:
    decoder, calls, at = json.JSONDecoder(), [], 0
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return []
        for item in value if isinstance(value, list) else [value]:
            if not isinstance(item, dict) or not isinstance(item.get("name"), str):
                return []
            arguments = item.get("parameters", item.get("arguments", {}))
            if not isinstance(arguments, dict):
                return []
            calls.append(Call(item["name"], arguments))
        at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]
    return calls


def _function_tags(text: str) -> list[Call]:
    if _TAGGED.sub("", text).strip(" ;\n"):
        return []
    calls = []
    for name, arguments in _TAGGED.findall(text):
        try:
            value = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            return []
        if not isinstance(value, dict):
            return []
        calls.append(Call(name, value))
    return calls


def _built_in(text: str) -> list[Call]:
    """`brave_search.call(query="...")`: keyword arguments that are literals."""
    found = _BUILT_IN.match(text)
    if not found:
        return []
    try:
        (statement,) = ast.parse(f"f({found[2]})").body
        call = statement.value  # type: ignore[attr-defined]
        arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, AttributeError, RecursionError, MemoryError):
        return []
    return [] if call.args or None in arguments else [Call(found[1], arguments)]
