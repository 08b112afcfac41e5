"""A chat template rendered: foreign code that comes with a checkpoint.

It runs in jinja2's immutable sandbox, with the filters and methods that chats need, and under a meter. The
invariant: what a template makes is counted before it is made, so that time and memory are bounded.
"""

import functools
import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from types import CodeType
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.sandbox
import jinja2.utils
import jinja2.visitor
from jinja2 import nodes

# Limits on templates, in characters but for the last. Those in use have up to 20,000, and a context of 131,072
# tokens holds half a million. Hostile ones are stopped after a second or two.
_MAX_TEMPLATE = 50_000
_MAX_TEXT = 5_000_000  # of one value, and of the whole dialog
_MAX_WORK = 100_000_000  # of everything that is made on the way
_MAX_SECONDS = 10.0  # for what the count may have missed
_STEP = 50  # what a step of a loop, a call or an element of a list counts

# What makes text out of numbers (center, format, lipsum), is slow (sum, round) or of no use in a chat is not here.
_FILTERS = """abs capitalize count d default dictsort e escape first float int items last length list lower map max
min reject rejectattr reverse safe select selectattr sort string title unique upper""".split()
_METHODS = """capitalize casefold changed count cycle endswith find get index isalnum isalpha isdecimal isdigit islower
isnumeric isspace isupper items join keys lower lstrip next partition removeprefix removesuffix replace rfind rindex
rpartition rsplit rstrip split splitlines startswith strip swapcase title upper values""".split()


def render(template: str, variables: Mapping[str, Any]) -> str:
    """The text that a template makes of its variables.

    Raises ValueError if it is too large, makes too much, takes too long, or refuses.
    """
    if len(template) > _MAX_TEMPLATE:
        raise ValueError(f"the chat template has {len(template):,} characters; at most {_MAX_TEMPLATE:,} are read")
    try:
        code, sandbox = _compiled(template), _Sandbox()
        rendered = jinja2.Template.from_code(sandbox, code, sandbox.make_globals(None)).render(variables)
        sandbox.spend(len(rendered))
    except Exception as error:  # foreign code may raise anything
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the chat template refuses these messages: {reason[:200]}") from error
    return rendered


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> CodeType:
    """The code of a template, metered."""
    sandbox = _Sandbox()
    return sandbox.compile(_Metering().visit(sandbox.parse(template)))


class _GenerationBlock(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, which training templates put around what the assistant says."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's, but not written out: two that hold each other twice would double at every step."""

    __repr__ = object.__repr__


class _Metering(jinja2.visitor.NodeTransformer):
    """Leads through the meter what a template loops over, writes, joins, compares or gathers; calls pass it anyway."""

    def generic_visit(self, node: nodes.Node) -> nodes.Node:
        super().generic_visit(node)
        match node:
            case nodes.For():
                node.iter = _metered(node.iter, "steps")
            case nodes.Output() | nodes.Concat():
                node.nodes = [_metered(item) for item in node.nodes]
            case nodes.Compare() | nodes.Operand():
                node.expr = _metered(node.expr)
            case nodes.List() | nodes.Dict() | nodes.Tuple(ctx="load") | nodes.Getitem(arg=nodes.Slice()):
                return _metered(node)
        return node


def _metered(node: nodes.Node, through: str = "metered") -> nodes.Expr:
    return nodes.Filter(node, through, [], [], None, None, lineno=node.lineno)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """What transformers gives a template, for one rendering, and a meter that ends it.

    Whatever a template makes counts with the characters that writing it out takes, before it is made where it may be
    much larger than what it is made of; a step of a loop, a call and an element count _STEP. So time and memory are
    bounded in every thread, on every platform and for the same messages alike.
    """

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # it would compute constants before the rendering
            extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
        )
        self.left = _MAX_WORK
        self.deadline = time.monotonic() + _MAX_SECONDS
        own = {"indent": self._indent, "join": self._join, "replace": self._replace}
        own |= {"tojson": self._tojson, "trim": self._trim}
        given = {name: jinja2.filters.FILTERS[name] for name in _FILTERS} | own
        self.filters = {name: self._counted(function) for name, function in given.items()}
        self.filters |= {"metered": self._metered, "steps": self._steps}
        self.globals = {"range": jinja2.sandbox.safe_range, "dict": dict, "namespace": _Namespace}
        self.globals |= {"cycler": jinja2.utils.Cycler, "joiner": jinja2.utils.Joiner}
        self.globals |= {"raise_exception": _raise, "strftime_now": lambda layout: datetime.now().strftime(layout)}

    def spend(self, characters: int) -> None:
        """Count them; raises jinja2.TemplateRuntimeError if they are too many."""
        self.left -= characters + _STEP
        if characters > _MAX_TEXT or self.left < 0:
            limit = _MAX_TEXT if characters > _MAX_TEXT else _MAX_WORK
            raise jinja2.TemplateRuntimeError(f"it makes more than {limit:,} characters")
        if time.monotonic() > self.deadline:
            raise jinja2.TemplateRuntimeError(f"it takes longer than {_MAX_SECONDS} seconds")

    def size(self, value: Any) -> int:
        """The characters of a value written out, or some number above the limit."""
        total, parts = 0, [value]
        while parts and total <= _MAX_TEXT:
            part = parts.pop()
            total += _STEP
            if isinstance(part, str):
                total += len(part)
            elif isinstance(part, int):
                total += part.bit_length() ** 2 // 1000  # dividing takes the square
            elif isinstance(part, Collection):
                total += len(part)  # before as many are gone through
                if total <= _MAX_TEXT:
                    parts += [*part.keys(), *part.values()] if isinstance(part, Mapping) else part
        return total

    def count(self, value: Any) -> Any:
        """The value, counted."""
        self.spend(self.size(value))
        return value

    @jinja2.pass_context  # or jinja2 would write it out at compile time where the value is constant
    def _metered(self, _: jinja2.runtime.Context, value: Any) -> Any:
        return self.count(value)

    def _steps(self, iterable: Iterable) -> Iterator:
        for item in iterable:
            self.spend(0)
            yield item

    def _counted(self, function: Callable) -> Callable:
        @functools.wraps(function)
        def counted(*args, **kwargs):
            return self.count(function(*args, **kwargs))

        return counted

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return super().is_safe_attribute(obj, attr, value) and (attr in _METHODS or not callable(value))

    def wrap_str_format(self, value: Any) -> None:
        """jinja2's would be let through; without it, format is one of the methods that are not offered."""

    def call(self, context: jinja2.runtime.Context, obj: Any, /, *args, **kwargs) -> Any:
        text, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(text, str) and name == "join":
            obj = functools.partial(self._join, d=text)
        elif isinstance(text, str) and name == "replace":
            obj = functools.partial(self._replace, text)
        elif isinstance(text, str) and name in ("strip", "lstrip", "rstrip"):
            self.spend(len(text) * len(str(*args)))
        elif isinstance(obj, jinja2.runtime.LoopContext):  # of a recursive loop
            args = tuple(map(self._steps, args))
        return self.count(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            raise jinja2.TemplateRuntimeError(f"{operator} of {type(left).__name__} is not offered to templates")
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(value, str | Sequence):
                    self.spend(max(0, times) * (len(value) if isinstance(value, str) else self.size(value)))
        return self.count(super().call_binop(context, operator, left, right))

    def _indent(self, text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        self.spend((len(str(text).splitlines()) + 1) * (width if isinstance(width, int) else len(width)))
        return jinja2.filters.do_indent(text, width, first, blank)

    def _join(self, parts: Iterable, d: str = "", attribute: str | int | None = None) -> str:
        get = (lambda part: part) if attribute is None else jinja2.filters.make_attrgetter(self, attribute)
        parts = [get(part) for part in parts]
        self.count(parts)
        self.spend(len(parts) * len(str(d)))
        return str(d).join(map(str, parts))

    def _replace(self, text: str, old: str, new: str, count: int | None = None) -> str:
        text, old, new = str(text), str(old), str(new)
        self.spend(text.count(old) * len(new))
        return text.replace(old, new, -1 if count is None else count)

    def _trim(self, text: str, chars: str | None = None) -> str:
        self.spend(len(str(text)) * len(chars or ""))
        return str(text).strip(chars)

    def _tojson(self, value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        width = indent if isinstance(indent, int) else len(indent or "")
        if width > 16 or len("".join(separators or ())) > 16:
            raise jinja2.TemplateRuntimeError("tojson takes at most 16 characters of indent and of separators")
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        return "".join(map(self.count, encoder.iterencode(value)))


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
