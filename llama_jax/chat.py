"""Dialogs to token ids: through the tokenizer's own Jinja chat template, else in Meta's format.

Sources: transformers' rendering of chat templates (utils/chat_template_utils.py), Meta's prompt_format.md and
ChatFormat (llama-models, models/llama3). The one invariant: special tokens come from the template or the
format, never from what a message, a tool or a variable says.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llama_jax.template import render
from llama_jax.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "ipython", "tool")

_TOOLS_PROMPT = """Answer the user's question by making use of the following functions if needed.
If none of the function can be used, please say so.
Here is a list of functions in JSON format:
{functions}

Return function calls in JSON format."""


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> list[int]:
    """The ids of a dialog, by default with the header after which the assistant speaks.

    messages: each {"role": one of ROLES, "content": str}. An assistant that calls tools has "tool_calls",
        [{"function": {"name": str, "arguments": dict or its JSON}}], and may leave content out.
    tools: JSON schemas of functions, [{"type": "function", "function": {...}}].
    variables: what else the template reads, such as date_string="26 Jul 2024".

    Raises ValueError if a message is malformed, the template refuses it or asks for more than templates may, or the
    tokenizer knows no chat format.
    """
    if not messages:
        raise ValueError("messages is empty: a chat needs at least one message")
    checked = [_checked(message, f"messages[{i}]") for i, message in enumerate(messages)]
    tools = list(tools or ())
    try:
        said = json.dumps([checked, tools, variables], ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"messages, tools and template variables must be JSON values: {error}") from error
    template = (tokenizer.tool_template if tools else None) or tokenizer.chat_template
    if template is None:
        if variables:
            raise ValueError(f"no chat template reads {', '.join(variables)}: the tokenizer has none")
        return _encode_meta(tokenizer, checked, tools, add_generation_prompt)
    # The names and defaults that transformers gives a template; no tools is None there, not an empty list.
    inputs = {"messages": checked, "tools": tools or None, "documents": None, **variables}
    inputs["add_generation_prompt"] = add_generation_prompt
    # A character that nobody wrote, for _encode_template to mark what they did.
    mark = next(char for char in map(chr, range(0xF0000, 0xFFFFE)) if char not in said and char not in template)
    return _encode_template(tokenizer, template, inputs, mark)


def _checked(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The message without its empty fields, which templates take for given, and with tool arguments as objects."""
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} is a {type(message).__name__}, expected a dict with role and content")
    if message.get("role") not in ROLES:
        raise ValueError(f"{where} has role {message.get('role')!r}, expected one of {', '.join(ROLES)}")
    checked = {key: value for key, value in message.items() if value is not None}
    calls = checked.pop("tool_calls", None)
    if calls:
        if checked["role"] != "assistant" or not isinstance(calls, Sequence):
            raise ValueError(f"{where} has tool_calls: only an assistant has, and as a list")
        checked["tool_calls"] = [_checked_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    content = checked.get("content")
    if not isinstance(content, str) and (content is not None or not calls):
        raise ValueError(f"{where} has content of type {type(content).__name__}, expected str")
    return checked


def _checked_call(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f'{where} is not {{"function": {{"name": str, "arguments": dict}}}}')
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:  # OpenAI's clients send JSON, templates expect the object
            arguments = json.loads(arguments)
        except ValueError:
            raise ValueError(f"{where} has arguments that are not JSON: {arguments!r}") from None
    return {**call, "function": {**function, "arguments": arguments}}


def _encode_meta(tokenizer: Tokenizer, messages: list[dict], tools: list, add_generation_prompt: bool) -> list[int]:
    """<|start_header_id|>role<|end_header_id|>, a blank line, the content, <|eot_id|>, once a message."""

    def special(name: str) -> int:
        if name not in tokenizer.special_tokens:
            raise ValueError(f"no chat format: the tokenizer has no chat template and no {name} token")
        return tokenizer.special_tokens[name]

    def header(role: str) -> list[int]:
        name = tokenizer.encode("ipython" if role == "tool" else role)
        return [special("<|start_header_id|>"), *name, special("<|end_header_id|>"), *tokenizer.encode("\n\n")]

    ids = [special("<|begin_of_text|>")]
    for message in _with_tools(messages, tools):
        ids += header(message["role"]) + tokenizer.encode(message.get("content", "").strip())
        calls = message.get("tool_calls", [])
        if len(calls) > 1:
            raise ValueError(f"a message has {len(calls)} tool calls: Llama 3.1 makes one at a time")
        for call in calls:
            ids += [special("<|python_tag|>"), *tokenizer.encode(_call_text(call["function"]))]
        ids.append(special("<|eom_id|>" if calls else "<|eot_id|>"))
    return ids + header("assistant") if add_generation_prompt else ids


def _with_tools(messages: list[dict], tools: list) -> list[dict]:
    """The messages with tools offered as Meta does: an environment for the system, the functions from the user."""
    if not tools:
        return messages
    has_system = messages[0]["role"] == "system"
    system = "\n\n".join(["Environment: ipython"] + [messages[0]["content"].strip()] * has_system)
    functions = "\n".join(json.dumps(tool, indent=4, ensure_ascii=False) for tool in tools)
    offer = _TOOLS_PROMPT.format(functions=functions)
    return [{"role": "system", "content": system}, {"role": "user", "content": offer}, *messages[has_system:]]


def _call_text(function: dict) -> str:
    call = {"type": "function", "name": function["name"], "parameters": function["arguments"]}
    return json.dumps(call, ensure_ascii=False)


def _encode_template(tokenizer: Tokenizer, template: str, inputs: dict[str, Any], mark: str) -> list[int]:
    """Renders the template and makes tokens of the special tokens that it wrote itself.

    The mark goes behind the first character of every special token in the inputs, so that it is not found in the
    rendered text, and is taken out once the template's own are found. (A template that put two inputs side by side
    could still let them spell one together; Llama's do not.)
    """
    special = _any_of(tuple(tokenizer.special_tokens))
    first = re.compile(f"(?=(?:{special})).", re.DOTALL)
    ends = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    variables = {name: tokenizer.decode([token_id]) for name, token_id in ends.items() if token_id is not None}
    variables |= _map_strings(lambda text: first.sub(lambda found: found[0] + mark, text), inputs)
    try:
        rendered = render(template, variables)
    except ValueError as error:
        raise ValueError(str(error).replace(mark, "")) from error
    return _with_special(tokenizer, rendered, mark)


def encode_written(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text whose special tokens are written out in it, as in what transformers renders of a dialog.

    Not for what others may write: they could write special tokens, too.
    """
    return _with_special(tokenizer, text)


def _with_special(tokenizer: Tokenizer, text: str, mark: str = "") -> list[int]:
    """Token ids, with those of the special tokens in the text that no mark follows; marks are taken out."""
    special, ids = _any_of(tuple(tokenizer.special_tokens)), []
    unmarked = f"(?!{mark})" if mark else ""
    for i, piece in enumerate(re.split(f"({special}){unmarked}", text)):
        ids += [tokenizer.special_tokens[piece]] if i % 2 else tokenizer.encode(piece.replace(mark, ""))
    return ids


@functools.lru_cache(maxsize=8)
def _any_of(names: tuple[str, ...]) -> str:
    """A regular expression for any of the names, of two that begin alike the longer."""
    return "|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)"


def _map_strings(change: Callable[[str], str], value: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_strings(change, key): _map_strings(change, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(change, item) for item in value]
    return value
