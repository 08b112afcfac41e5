"""Torch's checkpoint files (.pth, .pt), read and written without torch.

Since torch 1.6 such a file is an uncompressed zip: <archive>/data.pkl describes the tensors and each
<archive>/data/<key> is one raw storage that tensors are views of (torch/serialization.py). The one
invariant: nothing that a file names is imported or run. The pickle may name the globals listed here
and no other, and each of them becomes a plain record.
"""

import io
import math
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from llama_jax.checkpoint.ranges import RemoteArray, RemoteFile
from llama_jax.checkpoint.source import TensorSpec
from llama_jax.paths import as_path, is_remote, open_file, staged_file

# The dtype of a tensor is said by the class of its storage or, for dtypes that came later, by itself.
_DTYPES = {
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
    "torch.float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "torch.float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_UNTYPED_STORAGE = "torch.storage.UntypedStorage"
_REBUILD_TYPED = "torch._utils._rebuild_tensor_v2"
_REBUILD_UNTYPED = "torch._utils._rebuild_tensor_v3"

_ZIP_MAGIC = b"PK\x03\x04"  # begins the file and the header of each member
_HEADER_BYTES = 30  # of a member's header, without its name and extra fields
_ALIGNMENT = 64  # bytes, torch's own; lets torch.load(mmap=True) hand out aligned tensors


class _Storage(NamedTuple):
    kind: str
    key: str


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str | None


class _Rebuild:
    """Stands for both rebuild functions. Holds no state, so a pickle has nothing here to change."""

    __slots__ = ()

    def __call__(self, storage, offset, shape, strides, requires_grad, hooks, dtype=None, metadata=None) -> _Tensor:
        # Version 2 has no dtype: its seventh argument is the metadata (a conjugate bit, say).
        if metadata or not isinstance(dtype, str | None):
            raise ValueError(f"tensors with metadata are not supported: {metadata or dtype!r}")
        return _Tensor(storage, offset, tuple(shape), tuple(strides), dtype)


class _Unpickler(pickle.Unpickler):
    """Reads data.pkl: plain containers and the records above, no other object."""

    def find_class(self, module: str, name: str):
        """What a global in the pickle becomes. Raises ValueError for one that is not listed."""
        wanted = f"{module}.{name}"
        if wanted == "collections.OrderedDict":
            return OrderedDict
        if wanted in (_REBUILD_TYPED, _REBUILD_UNTYPED):
            return _Rebuild()
        if wanted in _DTYPES or wanted == _UNTYPED_STORAGE:
            return wanted
        raise ValueError(f"refused global {wanted}: only plain tensors are read and no code is run")

    def persistent_load(self, pid) -> _Storage:
        """A reference to a storage: ("storage", class, key, device, number of elements)."""
        _, kind, key, _, _ = pid
        return _Storage(str(kind), str(key))


class PthFile:
    """The tensors of one .pth file, a Source. Bytes are read when a slice is asked for."""

    def __init__(self, path: str | os.PathLike):
        """Reads the zip directory and data.pkl. Raises ValueError naming the file and what is wrong."""
        self.path = as_path(path)
        self._members, self._root, data_pkl = _read_zip(self.path)
        self._records = self._unpickle(data_pkl)
        self.tensors = {name: self._spec(name, record) for name, record in self._records.items()}
        self._bytes = RemoteFile(self.path) if is_remote(self.path) else np.memmap(self.path, mode="r")

    def view(self, name: str) -> np.ndarray | RemoteArray:
        """The tensor as a read-only array over the file: indexing it reads what is indexed."""
        if name not in self.tensors:
            raise ValueError(f"{self.path}: no tensor {name!r}")
        record, (shape, dtype) = self._records[name], self.tensors[name]
        member = self._members[self._member(record)]
        header = self._header(member.header_offset)
        name_bytes, extra_bytes = struct.unpack("<26xHH", header)  # the zip's directory does not say the second
        start = member.header_offset + _HEADER_BYTES + name_bytes + extra_bytes
        short = isinstance(self._bytes, np.ndarray) and start + member.file_size > self._bytes.size
        if short or not header.startswith(_ZIP_MAGIC):
            raise ValueError(f"{self.path}: tensor {name!r}: the file is truncated or damaged; fetch it again")
        start += record.offset * dtype.itemsize
        if isinstance(self._bytes, np.ndarray):
            return np.ndarray(shape, dtype, self._bytes.data, start, [dtype.itemsize * s for s in record.strides])
        if record.strides != _row_major(shape):
            raise ValueError(f"{self.path}: tensor {name!r} is not stored row by row; copy the file to a disk")
        return RemoteArray(self._bytes, start, shape, dtype)

    def _header(self, offset: int) -> bytes:
        stop = offset + _HEADER_BYTES
        if isinstance(self._bytes, RemoteFile):
            return self._bytes.read([(offset, stop)])[0]
        return self._bytes[offset:stop].tobytes().ljust(_HEADER_BYTES)

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """A copy of the tensor, or of its slice, in its stored dtype."""
        return np.array(self.view(name)[index or ()], order="C")

    def _member(self, record: _Tensor) -> str:
        return f"{self._root}data/{record.storage.key}"

    def _unpickle(self, data: bytes) -> dict[str, _Tensor]:
        try:
            records = _Unpickler(io.BytesIO(data)).load()
        except Exception as error:  # a malformed pickle can raise nearly anything
            raise ValueError(f"{self.path}: data.pkl: {error}") from error
        if not isinstance(records, dict):
            raise ValueError(f"{self.path}: expected a dict of tensors, found {type(records).__name__}")
        for name, record in records.items():
            if isinstance(record, dict):
                raise ValueError(f"{self.path}: {name!r} is a nested state dict; save that dict by itself")
            if not isinstance(name, str) or not isinstance(record, _Tensor):
                raise ValueError(f"{self.path}: {name!r} is not a tensor; save a dict of tensors only")
        return records

    def _spec(self, name: str, record: _Tensor) -> TensorSpec:
        """Shape and dtype, once the record is known to stay inside its storage."""
        where = f"{self.path}: tensor {name!r}"
        if not isinstance(record.storage, _Storage):
            raise ValueError(f"{where} has no storage")
        named = record.dtype or record.storage.kind
        if named not in _DTYPES:
            raise ValueError(f"{where} is of type {named}, which is not supported")
        dtype = _DTYPES[named]
        member = self._members.get(self._member(record))
        if member is None:
            raise ValueError(f"{where}: its storage {self._member(record)!r} is missing from the zip")
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{where}: its storage is compressed; save it again with torch.save")
        shape, strides = record.shape, record.strides
        numbers = (record.offset, *shape, *strides)
        if len(shape) != len(strides) or not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError(f"{where} has shape {shape}, strides {strides}, offset {record.offset}")
        last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if all(shape) else -1
        if (record.offset + last + 1) * dtype.itemsize > member.file_size:
            raise ValueError(f"{where} of shape {shape} is out of bounds of its storage of {member.file_size} bytes")
        return TensorSpec(shape, dtype)


def _read_zip(path: Path) -> tuple[dict[str, zipfile.ZipInfo], str, bytes]:
    """The zip's members, the folder in it that holds everything, and data.pkl."""
    with open_file(path) as file:
        if file.read(4) != _ZIP_MAGIC:
            raise ValueError(
                f"{path}: not a zip, so not torch's or from before torch 1.6: torch.load it and torch.save it again"
            )
    try:
        with open_file(path) as file, zipfile.ZipFile(file) as archive:
            members = {member.filename: member for member in archive.infolist()}
            pickles = [name for name in members if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise ValueError(f"{path}: a zip with {len(pickles)} data.pkl, expected 1: not a torch checkpoint")
            root = pickles[0].removesuffix("data.pkl")
            if f"{root}byteorder" in members and archive.read(f"{root}byteorder") != b"little":
                raise ValueError(f"{path}: byte order is not little; save it again on a little-endian machine")
            return members, root, archive.read(pickles[0])
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: truncated or damaged ({error}); fetch it again") from error


def write_pth(
    path: str | os.PathLike,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    shared: Mapping[str, str] | None = None,
) -> None:
    """Writes a file that torch.load reads (also weights_only=True, mmap=True), one tensor in memory at a time.

    It appears when it is complete. specs says what comes; tensors brings each once, in any order.
    shared: further names, each for the storage of a tensor in specs. Raises ValueError naming the
    tensor that is missing, surplus, not as its spec says, or of a dtype that torch's files do not hold.
    """
    keys = {name: str(i) for i, name in enumerate(specs)}
    entries = {name: (keys[name], spec) for name, spec in specs.items()}
    entries |= {name: entries[owner] for name, owner in (shared or {}).items()}
    data_pkl = _pickle_entries(entries)
    with staged_file(path) as staged, open(staged, "wb") as file, zipfile.ZipFile(file, "w") as archive:
        for name, content in (("data.pkl", data_pkl), ("byteorder", b"little"), ("version", b"3\n")):
            _write_member(file, archive, name, content)
        for name, array in tensors:
            if name not in keys:
                raise ValueError(f"{path}: tensor {name!r} came twice or is not in the specs")
            if TensorSpec(array.shape, array.dtype) != specs[name]:
                raise ValueError(f"{path}: tensor {name!r} is {array.dtype}{array.shape}, expected {specs[name]}")
            _write_member(file, archive, f"data/{keys.pop(name)}", _raw_bytes(array))
        if keys:
            raise ValueError(f"{path}: tensor {min(keys)!r} is in the specs and never came")


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _raw_bytes(array: np.ndarray) -> memoryview:
    """The values in row-major order, little endian (numpy has no buffer for ml_dtypes, so as uint8)."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _write_member(file: BinaryIO, archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    member = zipfile.ZipInfo(f"archive/{name}")
    # Before the content: the header, the name, zip64's sizes (20 bytes), and 4 bytes and padding in a field of our own.
    padding = -(file.tell() + _HEADER_BYTES + len(member.filename) + 20 + 4) % _ALIGNMENT
    member.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    with archive.open(member, "w", force_zip64=True) as out:
        out.write(content)


def _pickle_entries(entries: Mapping[str, tuple[str, TensorSpec]]) -> bytes:
    """data.pkl: name -> the call that makes torch rebuild that tensor over storage `key`."""
    parts = [pickle.PROTO + b"\x02", pickle.EMPTY_DICT, pickle.MARK]
    for name, (key, spec) in entries.items():
        parts += [_pickle_plain(name), *_pickle_tensor(name, key, spec)]
    return b"".join([*parts, pickle.SETITEMS, pickle.STOP])


def _pickle_tensor(name: str, key: str, spec: TensorSpec) -> list[bytes]:
    if spec.dtype not in _NAMES:
        raise ValueError(f"tensor {name!r}: torch's files hold no dtype {spec.dtype}")
    size = math.prod(spec.shape)
    rebuild, storage, dtype_argument = _REBUILD_TYPED, _NAMES[spec.dtype], []
    if not storage.endswith("Storage"):
        rebuild, storage, dtype_argument = _REBUILD_UNTYPED, _UNTYPED_STORAGE, [_pickle_global(storage)]
        size *= spec.dtype.itemsize
    shape = tuple(map(int, spec.shape))
    strides = _row_major(shape)
    reference = [*map(_pickle_plain, (key, "cpu", size)), pickle.TUPLE, pickle.BINPERSID]
    no_hooks = [_pickle_global("collections.OrderedDict"), pickle.EMPTY_TUPLE, pickle.REDUCE]
    return [
        *(_pickle_global(rebuild), pickle.MARK),
        *(pickle.MARK, _pickle_plain("storage"), _pickle_global(storage), *reference),
        *map(_pickle_plain, (0, shape, strides, False)),
        *(*no_hooks, *dtype_argument, pickle.TUPLE, pickle.REDUCE),
    ]


def _pickle_plain(value: str | int | tuple[int, ...]) -> bytes:
    return pickle.dumps(value, protocol=2)[2:-1]  # without PROTO and STOP


def _pickle_global(path: str) -> bytes:
    module, _, name = path.rpartition(".")
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()
