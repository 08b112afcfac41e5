"""Documents to train on: the text that comes with every Python, or the user's own files.

The default corpus is the language reference in `pydoc_data.topics` and the standard library's
sources, whole and as documentation strings (PSF licence). The sources are read, never imported.

The one invariant: the documents, their order and their split depend on the texts alone, never on
paths, clocks or the machine, so that one corpus hash means one set of bytes.
"""

import ast
import hashlib
import json
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_jax.paths import as_path

# Linux distributions ship these apart from Python itself, so not every machine has them.
_OPTIONAL = frozenset(
    "__pycache__ dist-packages distutils ensurepip idle_test idlelib lib2to3 macholib site-packages "
    "test tests tkinter turtledemo venv".split()
)
# The topics once more, as escaped string literals.
_TOPICS_MODULE = "pydoc_data/topics.py"


@dataclass(frozen=True)
class Document:
    """A text with its name and the kind of source that it is counted under.

    origin: the `text_hash` of the text that this one was extracted from, "" for an original. Both
        fall into the same split, or the held-out loss would be measured on text that was trained.
    """

    id: str
    text: str
    source: str
    origin: str = ""


@dataclass(frozen=True)
class Corpus:
    """Documents in their order, no text twice. `dropped` counts those left out, by reason."""

    documents: tuple[Document, ...]
    dropped: dict[str, int]

    def split(self, name: str, holdout: float) -> list[Document]:
        """The documents of one split, "train" or "heldout", in order; holdout is the fraction of `is_held_out`.

        Raises ValueError if it is not from 0 to below 1.
        """
        if not 0 <= holdout < 1:
            raise ValueError(f"holdout={holdout} is not a fraction from 0 to below 1")
        wanted = name == "heldout"
        return [d for d in self.documents if is_held_out(d.origin or text_hash(d.text), holdout) == wanted]


def text_hash(text: str) -> str:
    """sha256 of the text in UTF-8, 64 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def corpus_hash(documents: Iterable[Document]) -> str:
    """sha256 over the hashes of the texts in order, 64 hexadecimal digits."""
    return hashlib.sha256("".join(text_hash(document.text) for document in documents).encode()).hexdigest()


def is_held_out(text_hash: str, fraction: float) -> bool:
    """Whether the document with this sha256 is held out, when `fraction` of all documents are.

    It depends on nothing else: other documents, their order and the tokenizer do not move it, and a
    larger fraction keeps all that a smaller one held out.
    """
    return int(text_hash[:16], 16) < fraction * 2**64


def read(paths: Sequence[str | Path] = ()) -> Corpus:
    """The corpus in these files, or without any the default one, held in memory.

    Raises ValueError for a file that is not UTF-8 or not JSON lines, and if no text is left; OSError
    for one that cannot be read.
    """
    dropped = Counter(unreadable=0, blank=0, duplicate=0)
    unreadable: list[str] = []
    documents: dict[str, Document] = {}
    for document in files(paths) if paths else python_library(unreadable):
        if not document.text.strip():
            dropped["blank"] += 1
        elif documents.setdefault(text_hash(document.text), document) is not document:
            dropped["duplicate"] += 1
    dropped["unreadable"] = len(unreadable)
    if not documents:
        where = ", ".join(map(str, paths)) or sysconfig.get_path("stdlib")
        raise ValueError(f"no text in {where}; give text or .jsonl files with at least one document")
    return Corpus(tuple(documents.values()), dict(dropped))


def files(paths: Iterable[str | Path]) -> Iterator[Document]:
    """One document a text file, and one a line of a .jsonl file (its field `text`), in the given order.

    Raises ValueError naming the file (and line) that is not UTF-8 or not such JSON; OSError for a
    path that is no readable file.
    """
    for path in map(as_path, paths):
        if path.suffix == ".jsonl":
            yield from _json_lines(path)
            continue
        try:
            yield Document(str(path), path.read_bytes().decode(), "files")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def _json_lines(path: Path) -> Iterator[Document]:
    with path.open("rb") as lines:  # bytes: only a line feed ends a line, as JSON lines has it
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode())
                text = record.get("text") if isinstance(record, dict) else None
                if not isinstance(text, str):
                    raise ValueError("not an object with a string under 'text'")
                text.encode()  # JSON can spell half a surrogate pair, which is no text
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
            yield Document(f"{path}:{number}", text, "files")


def python_library(unreadable: list[str] | None = None) -> Iterator[Document]:
    """The default corpus: every topic, then for each module its documentation strings and its source.

    Names of modules that are not readable UTF-8 Python are appended to `unreadable`.
    """
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document(f"topics/{name}", topics[name], "topics")
    library = Path(sysconfig.get_path("stdlib"))
    for name in sorted(path.relative_to(library).as_posix() for path in library.rglob("*.py")):
        if not _is_everywhere(name):
            continue
        try:
            source = (library / name).read_bytes().decode()
            documentation = _docstrings(source)
        except (OSError, SyntaxError, ValueError):
            if unreadable is not None:
                unreadable.append(name)
            continue
        if documentation:
            yield Document(f"docstrings/{name}", documentation, "docstrings", origin=text_hash(source))
        yield Document(f"sources/{name}", source, "sources")


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
