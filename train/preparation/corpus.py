"""The default corpus: the text that comes with every Python, and what a document is.

It is the language reference in `pydoc_data.topics` and the standard library's sources, whole and as
documentation strings (PSF licence). The sources are read, never imported.

The one invariant: the documents, their order and their split depend on the texts alone, never on
paths, clocks or the machine, so that one corpus hash means one set of bytes.
"""

import ast
import hashlib
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Linux distributions ship these apart from Python itself, so not every machine has them.
_OPTIONAL = frozenset(
    "__pycache__ dist-packages distutils ensurepip idle_test idlelib lib2to3 macholib site-packages "
    "test tests tkinter turtledemo venv".split()
)
# The topics once more, as escaped string literals.
_TOPICS_MODULE = "pydoc_data/topics.py"


@dataclass(frozen=True)
class Document:
    """A text and the source that it is counted under.

    origin: the `text_hash` of the text that this one was extracted from, "" for an original. Both
        fall into the same split, or the held-out loss would be measured on text that was trained.
    """

    text: str
    source: str
    origin: str = ""


def text_hash(text: str) -> str:
    """sha256 of the text in UTF-8, 64 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def is_held_out(text_hash: str, fraction: float) -> bool:
    """Whether the document with this sha256 is held out, when `fraction` of all documents are.

    It depends on nothing else: other documents, their order and the tokenizer do not move it, and a
    larger fraction keeps all that a smaller one held out.
    """
    return int(text_hash[:16], 16) < fraction * 2**64


def python_library() -> Iterator[Document]:
    """The topics of the language reference, then for each module its documentation strings and its source.

    Modules that are not readable UTF-8 Python are left out.
    """
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document(topics[name], "topics")
    library = Path(sysconfig.get_path("stdlib"))
    for name in sorted(path.relative_to(library).as_posix() for path in library.rglob("*.py")):
        if not _is_everywhere(name):
            continue
        try:
            source = (library / name).read_bytes().decode()
            documentation = _docstrings(source)
        except (OSError, SyntaxError, ValueError):
            continue
        if documentation:
            yield Document(documentation, "docstrings", origin=text_hash(source))
        yield Document(source, "sources")


def _is_everywhere(name: str) -> bool:
    """Whether a file of the library is a part of Python wherever Python is.

    The list of standard modules leaves out what a distribution or a build puts beside them.
    """
    first, *rest = name.removesuffix(".py").split("/")
    is_optional = not _OPTIONAL.isdisjoint([first, *rest[:-1]])
    return first in sys.stdlib_module_names and not is_optional and name != _TOPICS_MODULE


def _docstrings(source: str) -> str:
    """The documentation strings of a module, its classes and functions, in the order of the source."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in someone else's string literals
        tree = ast.parse(source)
    found: list[str] = []

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):  # holds no definitions, and most of the tree
                continue
            name = prefix
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{prefix}.{child.name}" if prefix else child.name
                if text := ast.get_docstring(child):
                    found.append(f"{name}\n\n{text}")
            visit(child, name)

    if text := ast.get_docstring(tree):
        found.append(text)
    visit(tree, "")
    return "\n\n\n".join(found)
