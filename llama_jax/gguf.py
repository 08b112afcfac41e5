"""GGUF files, in which llama.cpp keeps a model: metadata and tensors of blocks, read and written.

Source: docs/gguf.md of ggml-org/ggml and gguf/constants.py of its Python package. All numbers are little endian; a
shape is stored with the fastest dimension first. The one invariant: nothing is allocated by what a file says of
itself before the file is known to be long enough for it, and nothing in it is run.
"""

import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from llama_jax.paths import as_path, open_file

MAGIC = b"GGUF"


class BlockType(NamedTuple):
    """How values of a row are stored: so many together, in so many bytes."""

    name: str
    number: int
    num_values: int
    num_bytes: int


BLOCK_TYPES = {
    block.number: block
    for block in (
        BlockType("F32", 0, 1, 4),
        BlockType("F16", 1, 1, 2),
        BlockType("Q4_0", 2, 32, 18),
        BlockType("Q4_1", 3, 32, 20),
        BlockType("Q5_0", 6, 32, 22),
        BlockType("Q5_1", 7, 32, 24),
        BlockType("Q8_0", 8, 32, 34),
        BlockType("Q4_K", 12, 256, 144),
        BlockType("Q5_K", 13, 256, 176),
        BlockType("Q6_K", 14, 256, 210),
        BlockType("BF16", 30, 1, 2),
    )
}
TYPES_BY_NAME = {block.name: block for block in BLOCK_TYPES.values()}
_OTHER_TYPES = {
    **{9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S"},
    **{20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"},
    **{29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"},
}

# Types of metadata: number to struct's letter.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_METADATA = 2**28  # bytes; the largest vocabularies have some 10 MB
_MAX_DIMS = 4
_ALIGNMENT = 32


class StoredTensor(NamedTuple):
    """Shape (slowest dimension first), type and place in bytes of the file of one tensor."""

    shape: tuple[int, ...]
    block: BlockType
    start: int

    @property
    def row_bytes(self) -> int:
        """Bytes of the fastest dimension."""
        return self.shape[-1] // self.block.num_values * self.block.num_bytes

    @property
    def num_bytes(self) -> int:
        """Bytes of all."""
        return int(np.prod(self.shape[:-1], dtype=object)) * self.row_bytes


class GgufFile:
    """A GGUF file: its metadata by key, and where its tensors are."""

    def __init__(self, path: str | os.PathLike):
        """Reads all but the tensors. Raises ValueError, naming the file, if it is no sound GGUF file."""
        self.path = as_path(path)
        with open_file(self.path) as file:
            try:
                self.metadata, self.tensors = _read(_Cursor(file))
            except ValueError as error:
                raise ValueError(f"{self.path}: {error}") from None


class _Cursor:
    """The front of a file, read piece by piece. Raises ValueError where it ends before what it says."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.size = file.seek(0, os.SEEK_END)
        file.seek(0)
        self.place = 0

    def take(self, num_bytes: int) -> bytes:
        """The next bytes."""
        left = min(self.size, _MAX_METADATA) - self.place
        if num_bytes > left:
            raise ValueError(f"truncated or damaged: {num_bytes} bytes were expected at {self.place}, {left} are left")
        self.place += num_bytes
        return self._file.read(num_bytes)

    def number(self, letter: str) -> Any:
        """The next number of this kind."""
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}")))[0]

    def text(self) -> str:
        """The next string. What is no UTF-8 in it becomes U+FFFD."""
        return self.take(self.number("Q")).decode("utf-8", "replace")

    def value(self, kind: int, *, nested: bool = False) -> Any:
        """The next value: a number, a string, or a numpy array or list of them."""
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY or nested:
            raise ValueError(f"metadata of type {kind}{' within an array' if nested else ''} is not supported")
        kind, count = self.number("I"), self.number("Q")
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind]).newbyteorder("<")
            return np.frombuffer(self.take(count * dtype.itemsize), dtype)
        if kind == _STRING and count * 8 > self.size - self.place:
            raise ValueError(f"truncated or damaged: {count} strings do not fit the file")
        return [self.value(kind, nested=True) for _ in range(count)]


def _read(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    if cursor.size < 24 or cursor.take(4) != MAGIC:
        raise ValueError("not a GGUF file")
    version, num_tensors, num_entries = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
    if version not in (2, 3):
        raise ValueError(f"GGUF version {version} is not supported, only 2 and 3")
    metadata: dict[str, Any] = {}
    for _ in range(num_entries):
        key = cursor.text()
        if key in metadata:
            raise ValueError(f"metadata {key!r:.80} appears twice")
        metadata[key] = cursor.value(cursor.number("I"))
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment={alignment!r:.80}; a power of two was expected")
    tensors: dict[str, StoredTensor] = {}
    for _ in range(num_tensors):
        name, tensor = _read_tensor(cursor, alignment)
        if name in tensors:
            raise ValueError(f"tensor {name!r:.80} appears twice")
        tensors[name] = tensor
    data = -(-cursor.place // alignment) * alignment
    tensors = {name: tensor._replace(start=data + tensor.start) for name, tensor in tensors.items()}
    _check_extents(tensors, cursor.size)
    return metadata, tensors


def _read_tensor(cursor: _Cursor, alignment: int) -> tuple[str, StoredTensor]:
    """Name and tensor, its start counted from where the data begins."""
    name, num_dims = cursor.text(), cursor.number("I")
    if not 1 <= num_dims <= _MAX_DIMS:
        raise ValueError(f"tensor {name!r:.80} has {num_dims} dimensions; 1 to {_MAX_DIMS} were expected")
    shape = tuple(cursor.number("Q") for _ in range(num_dims))[::-1]
    number, start = cursor.number("I"), cursor.number("Q")
    if number not in BLOCK_TYPES:
        kind = _OTHER_TYPES.get(number, f"unknown type {number}")
        raise ValueError(
            f"tensor {name!r:.80} is {kind}, which is not supported; these are: {', '.join(TYPES_BY_NAME)}"
        )
    block = BLOCK_TYPES[number]
    if 0 in shape or shape[-1] % block.num_values or start % alignment:
        raise ValueError(f"tensor {name!r:.80} of {block.name} has shape {shape} at byte {start} of the data")
    return name, StoredTensor(shape, block, start)


def _check_extents(tensors: Mapping[str, StoredTensor], size: int) -> None:
    """Raises ValueError unless the tensors lie in the file one after another."""
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start < end:
            raise ValueError(f"tensor {name!r:.80} overlaps the tensor before it")
        end = tensor.start + tensor.num_bytes
        if end > size:
            raise ValueError(f"truncated: tensor {name!r:.80} ends at byte {end} of {size}; copy or download it again")


def write_gguf(
    path: Path, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[tuple[int, ...], BlockType]], rows: Iterable
) -> None:
    """Write a file: metadata of str, bool, int (as uint32), float (float32) and lists of str, int or float.

    rows gives for each tensor, in the order of shapes, its bytes in pieces.
    """
    with open(path, "wb") as file:
        file.write(MAGIC + struct.pack("<IQQ", 3, len(shapes), len(metadata)))
        for key, value in metadata.items():
            file.write(_text(key) + _tagged(value))
        place = 0
        for name, (shape, block) in shapes.items():
            file.write(_text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape)))
            file.write(struct.pack("<IQ", block.number, place))
            place += -(-StoredTensor(shape, block, 0).num_bytes // _ALIGNMENT) * _ALIGNMENT
        for pieces in rows:
            file.write(bytes(-file.tell() % _ALIGNMENT))
            for piece in pieces:
                file.write(piece)
        file.write(bytes(-file.tell() % _ALIGNMENT))


def _text(text: str) -> bytes:
    encoded = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(encoded)) + encoded


def _tagged(value: Any) -> bytes:
    """A value of metadata with its type before it."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, list):
        if value and isinstance(value[0], str):
            return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_text, value))
        kind, dtype = (5, "<i4") if all(isinstance(number, int) for number in value) else (6, "<f4")
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + np.array(value, dtype).tobytes()
    kind = 7 if isinstance(value, bool) else 4 if isinstance(value, int) else 6
    return struct.pack(f"<I{_SCALARS[kind]}", kind, value)
