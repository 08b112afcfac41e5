"""Where text comes from: SOURCE arguments to parts that workers read on their own, and parts to documents.

A SOURCE is PATH or NAME=PATH; a PATH is a file, a folder with all below it but hidden files, or a glob, on a
disk, in gs:// or s3://, or hf://datasets/NAME[:SPLIT][@CONFIG], which the datasets library streams. The suffix
tells the kind: .jsonl and .json (a document a line) and .parquet (a document a row); any other is a text file
(one document). All but .parquet may end in .gz or .zst.

The one invariant: which parts there are, their order and that of their documents follow from the arguments and the
files alone; read one after the other they are the text, each document once.
"""

import contextlib
import gzip
import hashlib
import importlib
import io
import itertools
import json
import os
import platform
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from llama_jax.paths import as_path, is_remote
from train.preparation.corpus import Document, python_library

DEFAULT_NAME = "text"
RESERVED_NAME = "recall"  # the synthetic source
PART_BYTES = 16 * 2**20  # seconds of work, so that a kill loses little and every worker has some
_NAME = re.compile(r"[a-z0-9_-][a-z0-9_.-]*(/[a-z0-9_-][a-z0-9_.-]*)*")
_HUB = "hf://"
_HUB_URL = re.compile(r"hf://datasets/([^:@]+)(?::([^@]+))?(?:@(.+))?")
_PYTHON = "python"


@dataclass(frozen=True)
class Extent:
    """A file, bytes start to stop of a .jsonl file (the lines that begin there), or shard start of stop of the hub's.

    stamp: changes with the file's content.
    """

    path: str
    size: int
    stamp: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Part:
    """About PART_BYTES of one source, or one file that cannot be divided; field is where records hold their text."""

    source: str
    extents: tuple[Extent, ...]
    field: str


def require(module: str, purpose: str) -> Any:
    """The module of an optional library. Raises ValueError saying how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        library = module.partition(".")[0]
        raise ValueError(
            f'{purpose} needs {library}, which is not installed: python -m pip install "llama_jax[data]"'
        ) from None


def find_parts(sources: Sequence[str | os.PathLike], field: str = "text") -> list[Part]:
    """The parts of all sources in the given order, files by name; without any, the default corpus as one part.

    Raises ValueError for a name or a scheme that is not allowed, FileNotFoundError for a path without files,
    OSError for one that cannot be reached.
    """
    if not sources:
        return [Part(_PYTHON, (Extent(_PYTHON, 0, platform.python_version()),), field)]
    named = []
    for name, path in (_name_and_path(os.fspath(source)) for source in sources):
        extents = _hub_shards(path) if path.startswith(_HUB) else _file_extents(path)
        named += [(name, extent) for extent in extents]
    return [
        Part(name, together, field)
        for name, neighbours in itertools.groupby(named, key=lambda pair: pair[0])
        for together in _grouped(extent for _, extent in neighbours)
    ]


def _name_and_path(source: str) -> tuple[str, str]:
    name, equals, path = source.partition("=")
    if not equals or "://" in name or Path(source).exists():
        return DEFAULT_NAME, source
    if not _NAME.fullmatch(name):
        raise ValueError(f"{source}: {name!r} is not a name of a source; expected a-z, 0-9, _, - and ., grouped by /")
    if name.split("/")[0] == RESERVED_NAME:
        raise ValueError(f"{source}: the name {RESERVED_NAME} is kept for the synthetic source; choose another")
    return name, path


def _file_extents(path: str) -> Iterator[Extent]:
    where = os.fspath(as_path(path))
    scheme = where[:2] if is_remote(where) else "file"
    filesystem = fsspec.filesystem(scheme)
    found: dict[str, dict] = filesystem.find(where, detail=True)
    if not found and re.search(r"[*?[]", path):
        for match in sorted(filesystem.glob(where)):
            found |= filesystem.find(match, detail=True)
    shown = {name: info for name, info in found.items() if not _is_hidden(name, where)}
    if not shown:
        raise FileNotFoundError(f"{path}: no such file; expected a file, a folder that holds some, or a glob of some")
    for name, info in sorted(shown.items()):
        stamp = hashlib.sha256(repr(sorted(info.items())).encode()).hexdigest()
        file = name if scheme == "file" else f"{scheme}://{name}"
        size = info["size"]
        if not file.endswith((".jsonl", ".json")):
            yield Extent(file, size, stamp)
            continue
        for start in range(0, size, PART_BYTES):
            stop = min(start + PART_BYTES, size)
            yield Extent(file, stop - start, stamp, start, stop)


def _is_hidden(name: str, root: str) -> bool:
    """Whether a part of the name has a leading dot that the root, a folder or a glob, does not have."""
    return name.count("/.") > root.count("/.")


def _hub_shards(url: str) -> Iterator[Extent]:
    num_shards = _hub_dataset(url).num_shards
    return (Extent(url, PART_BYTES, "", shard, num_shards) for shard in range(num_shards))


def _grouped(extents: Iterable[Extent]) -> Iterator[tuple[Extent, ...]]:
    """Neighbours together as long as they do not exceed PART_BYTES."""
    together: list[Extent] = []
    for extent in extents:
        if together and sum(other.size for other in together) + extent.size > PART_BYTES:
            yield tuple(together)
            together = []
        together.append(extent)
    if together:
        yield tuple(together)


def read_part(part: Part) -> Iterator[Document]:
    """The documents of a part, in order; one that holds nothing has the text "".

    Raises ValueError naming the file (and line) that is not UTF-8, damaged or without the field; OSError for one
    that cannot be read.
    """
    for extent in part.extents:
        if extent.path == _PYTHON:
            yield from python_library()
        else:
            yield from (Document(text, part.source) for text in _texts(extent, part.field))


def _texts(extent: Extent, field: str) -> Iterator[str]:
    suffix = kind(extent.path)
    if extent.path.startswith(_HUB):
        shard = _hub_dataset(extent.path).shard(num_shards=extent.stop, index=extent.start)
        for number, row in enumerate(shard, 1):
            yield _field_text(row, field, f"{extent.path}, shard {extent.start}, row {number}")
    elif suffix == ".parquet":
        yield from _parquet_texts(extent.path, field)
    elif suffix in (".jsonl", ".json"):
        yield from _json_texts(extent, field)
    else:
        with open_text(extent.path) as file:
            try:
                yield file.read().decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"{extent.path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def kind(path: str) -> str:
    """The suffix of a file before that of its compression."""
    return os.path.splitext(path.removesuffix(".gz").removesuffix(".zst"))[1]


@contextlib.contextmanager
def open_text(path: str) -> Iterator[BinaryIO]:
    """A local or remote file open for reading, decompressed if its name ends in .gz or .zst.

    Raises ValueError if what is read is damaged or cut short, OSError if it cannot be read.
    """
    with as_path(path).open("rb") as file:
        if not path.endswith((".gz", ".zst")):
            yield file
            return
        try:
            if path.endswith(".gz"):
                stream = gzip.GzipFile(fileobj=file)
            else:  # not the library zstandard, which takes a file that is cut short for a whole one
                stream = io.BufferedReader(require("pyarrow", path).CompressedInputStream(file, "zstd"))
            with stream:
                yield stream  # type: ignore[misc]
        except (EOFError, zlib.error, OSError) as error:
            raise ValueError(f"{path}: damaged or cut short ({error}); fetch it again") from None


def _json_texts(extent: Extent, field: str) -> Iterator[str]:
    """Of the lines that begin in the extent, apart from blank ones."""
    with open_text(extent.path) as lines:  # bytes: only a line feed ends a line, as JSON lines has it
        position = extent.start
        if position:  # the line that holds the byte before belongs to the extent before
            lines.seek(position - 1)
            position += len(lines.readline()) - 1
        for line in lines:
            if extent.stop is not None and position >= extent.stop:
                return
            if line.strip():
                try:
                    record = json.loads(line.decode())
                    text = _field_text(record, field, "")
                except ValueError as error:
                    place = f"{extent.path}, line {_line_number(extent.path, position)}"
                    raise ValueError(f"{place}: {str(error).removeprefix(': ')}") from None
                yield text
            position += len(line)


def _line_number(path: str, position: int) -> int:
    """The number, from 1, of the line that begins at this byte."""
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            if position <= 0:
                return number
            position -= len(line)
    return 1


def _parquet_texts(path: str, field: str) -> Iterator[str]:
    parquet = require("pyarrow.parquet", path)
    with open_text(path) as file:
        try:
            table = parquet.ParquetFile(file)
        except ValueError as error:
            raise ValueError(f"{path}: not a Parquet file ({error})") from None
        if field not in table.schema_arrow.names:
            names = ", ".join(table.schema_arrow.names)
            raise ValueError(f"{path} has no column {field!r}; it has {names}; choose with --text-field")
        number = 0
        for batch in table.iter_batches(batch_size=256, columns=[field]):
            for row in batch.to_pylist():
                number += 1
                yield _field_text(row, field, f"{path}, row {number}")


def _hub_dataset(url: str) -> Any:
    """The data set of a URL of the hub, streamed."""
    match = _HUB_URL.fullmatch(url)
    if match is None:
        raise ValueError(f"{url}: expected hf://datasets/NAME[:SPLIT][@CONFIG]")
    name, split, config = match.groups()
    datasets = require("datasets", url)
    try:
        return datasets.load_dataset(name, config, split=split or "train", streaming=True)
    except Exception as error:  # the hub's, those of its protocol and those of the formats
        raise OSError(f"{url} cannot be read: {' '.join(str(error).split())}") from None


def _field_text(record: Any, field: str, place: str) -> str:
    """The text of a record, "" for null. Raises ValueError saying where there is none."""
    if not isinstance(record, dict):
        raise ValueError(f"{place}: expected an object with the field {field!r}, not a {type(record).__name__}")
    if field not in record:
        raise ValueError(f"{place}: no field {field!r}; it has {', '.join(record)}; choose with --text-field")
    text = record[field]
    if not isinstance(text, str | None):
        raise ValueError(f"{place}: {field!r} is of type {type(text).__name__}, not text; choose with --text-field")
    text = text or ""
    text.encode()  # JSON can spell half a surrogate pair, which is no text
    return text
