"""Safetensors files: read in slices, on a disk through a memory map; written one tensor at a time.

Format: eight bytes of little-endian header length, a JSON header, then the tensors back to back
(github.com/huggingface/safetensors); several files are tied by Hugging Face's index. The one
invariant: a file whose header does not account for every byte is refused when it is opened.
"""

import contextlib
import json
import math
import mmap
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llama_jax.checkpoint.ranges import RemoteArray, RemoteFile
from llama_jax.checkpoint.source import TensorSpec
from llama_jax.paths import as_path, is_remote, make_directory, open_file, staged_file

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the reference reader
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class SafetensorsFile:
    """One safetensors file as a Source; `metadata` holds its strings.

    Opening reads the header alone. Raises ValueError, naming file and tensor, if the header does
    not describe the file exactly.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = as_path(path)
        self._remote = RemoteFile(self.path) if is_remote(self.path) else None
        header, data_start, self._size = _read_header(self.path)
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self.tensors: dict[str, TensorSpec] = {}
        self._offsets: dict[str, int] = {}
        self._mapped: Callable[[], mmap.mmap | None] = lambda: None
        extents = []
        for name, fields in header.items():
            self.tensors[name], start, stop = _parse_fields(f"{self.path}: tensor {name!r}", fields)
            self._offsets[name] = data_start + start
            extents.append((start, stop, name))
        _check_extents(self.path, extents, self._size - data_start)

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor, or its slice: read-only, on a disk a view of the file whose bytes come in as they are used."""
        shape, dtype = self.tensors[name]
        if self._remote:
            return RemoteArray(self._remote, self._offsets[name], shape, dtype)[index or ()]
        tensor = np.ndarray(shape, dtype, buffer=self._map(), offset=self._offsets[name])
        return np.require(tensor[index or ...], requirements="A")  # an odd header length would leave it unaligned

    def _map(self) -> mmap.mmap:
        """The file in memory: one map while any view of it lives, and its pages given back after the last."""
        mapped = self._mapped()
        if mapped is None:
            with open(self.path, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._mapped = weakref.ref(mapped)
        if len(mapped) != self._size:
            raise ValueError(f"{self.path} changed from {self._size} to {len(mapped)} bytes while it was in use")
        return mapped


class SafetensorsDirectory:
    """A directory with model.safetensors, or model.safetensors.index.json and its shards, as a Source.

    Opening reads the header of every shard. Raises ValueError if there is neither, if a shard is
    missing or damaged, or if index and shards disagree.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = directory = as_path(directory)
        weight_map = _read_index(directory)
        self.tensors: dict[str, TensorSpec] = {}
        self._files: dict[str, SafetensorsFile] = {}
        for shard in sorted(set(weight_map.values())) or [_SINGLE]:
            file = SafetensorsFile(directory / shard)
            for name, spec in file.tensors.items():
                if name in self._files:
                    first = self._files[name].path.name
                    raise ValueError(f"{directory}: tensor {name!r} is in both {first} and {shard}")
                self.tensors[name], self._files[name] = spec, file
        for name, shard in weight_map.items():
            if name not in self._files or self._files[name].path.name != shard:
                raise ValueError(f"{directory / shard}: tensor {name!r} is not in it, though {_INDEX} says so")

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor, or its slice, read-only."""
        return self._files[name].read(name, index)

    def file_of(self, name: str) -> Path:
        """The shard that holds a tensor, the directory if none does."""
        return self._files[name].path if name in self._files else self.directory


def write_safetensors(
    path: str | os.PathLike,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    metadata: Mapping[str, str] | None = None,
):
    """Writes one file, which appears when it is complete.

    tensors yields (name, array) in the order of specs; each array is written and let go before the
    next is asked for. Raises ValueError if one differs from its spec or has a dtype that the format
    does not know.
    """
    stream = iter(tensors)
    with staged_file(path) as staged:
        _write(staged, specs, stream, metadata)
        expect_end(stream)


def write_sharded(
    directory: str | os.PathLike,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    max_shard_bytes: int = 5_000_000_000,
):
    """Writes Hugging Face's files into a directory: one model.safetensors, or shards and their index.

    They appear together when all are complete, the index last; in an object store each shard appears
    by itself, and this disk holds one at a time. tensors as in write_safetensors. A tensor larger than
    max_shard_bytes has a shard to itself. Raises FileExistsError if the directory holds a model
    already, and ValueError as write_safetensors does.
    """
    directory = as_path(directory)
    make_directory(directory)
    if old := sorted(directory.glob("model*.safetensors*")):
        raise FileExistsError(f"{directory} already holds {old[0].name}; remove it or choose another destination")
    shards = _split(specs, max_shard_bytes)
    count = len(shards)
    files = [_SINGLE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    stream = iter(tensors)
    with contextlib.ExitStack() as last, contextlib.ExitStack() as stack:
        if count > 1:
            weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
            index = {"metadata": {"total_size": sum(map(num_bytes, specs.values()))}, "weight_map": weight_map}
            staged = last.enter_context(staged_file(directory / _INDEX))
            staged.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        for file, shard in zip(files, shards, strict=True):
            staged = stack.enter_context(staged_file(directory / file))
            _write(staged, shard, stream, {"format": "pt"})
            if is_remote(directory):
                stack.close()
        expect_end(stream)


def num_bytes(spec: TensorSpec) -> int:
    """Bytes of the tensor's values."""
    return math.prod(spec.shape) * spec.dtype.itemsize


def next_tensor(stream: Iterator[tuple[str, np.ndarray]], name: str, spec: TensorSpec) -> np.ndarray:
    """The next tensor of a stream. Raises ValueError unless it is the announced one."""
    got = next(stream, None)
    if got is None:
        raise ValueError(f"the tensors ended where {name!r} was expected")
    if (got[0], got[1].shape, got[1].dtype) != (name, *spec):
        raise ValueError(
            f"expected tensor {name!r} of shape {spec.shape} and dtype {spec.dtype}, "
            f"got {got[0]!r} of shape {got[1].shape} and dtype {got[1].dtype}"
        )
    return got[1]


def expect_end(stream: Iterator[tuple[str, np.ndarray]]):
    """Raises ValueError if the stream holds a tensor more than was announced."""
    extra = next(stream, None)
    if extra is not None:
        raise ValueError(f"tensor {extra[0]!r} came after the last one that was announced")


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The parsed header, the offset of the data and the size of the file in bytes."""
    with open_file(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size >= 8 and length > _MAX_HEADER_BYTES:
            raise ValueError(f"{path}: a header of {length} bytes is absurd (a Git LFS pointer?); download it again")
        if size < 8 + length:
            raise ValueError(f"{path}: truncated within the header at {size} bytes; copy or download it again")
        text = file.read(length)
    try:
        header = _parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: the header is not valid JSON: {error}") from None
    return header, 8 + length, size


def _parse_json(text: bytes) -> dict[str, Any]:
    """A JSON object. Raises ValueError if it is none or has a key twice."""

    def unique(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} appears twice")
        return found

    try:
        value = json.loads(text.decode(), object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError(f"an object was expected, got {type(value).__name__}")
    return value


def _parse_fields(where: str, fields: Any) -> tuple[TensorSpec, int, int]:
    """The spec of one header entry, and the offsets in the data where it starts and stops."""
    try:
        code, shape, (start, stop) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{where} needs dtype, shape and two data_offsets, got {fields!r:.200}") from None
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"{where} has unknown dtype {code!r}; known are {', '.join(DTYPES)}")
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise ValueError(f"{where} has shape {shape} at bytes {start} to {stop}; whole numbers from 0 up were expected")
    spec = TensorSpec(shape, DTYPES[code])
    if stop - start != num_bytes(spec):
        raise ValueError(f"{where} has {stop - start} bytes where {code} {list(shape)} takes {num_bytes(spec)}")
    return spec, start, stop


def _check_extents(path: Path, extents: list[tuple[int, int, str]], num_data_bytes: int):
    """Raises ValueError unless the tensors lie back to back and fill the data."""
    end = 0
    for start, stop, name in sorted(extents):
        if start != end:
            fault = "overlaps the tensor before it" if start < end else "leaves a gap before it"
            raise ValueError(f"{path}: tensor {name!r} starts at byte {start} of the data, not {end}: it {fault}")
        if stop > num_data_bytes:
            raise ValueError(
                f"{path}: truncated: tensor {name!r} ends at byte {stop} of the data and there are only "
                f"{num_data_bytes}; copy or download it again"
            )
        end = stop
    if end != num_data_bytes:
        raise ValueError(f"{path}: {num_data_bytes - end} bytes after the last tensor belong to none")


def _read_index(directory: Path) -> dict[str, str]:
    """Tensor name -> shard file as the index says; empty where one file holds all."""
    if (directory / _SINGLE).is_file():
        return {}
    path = directory / _INDEX
    if not path.is_file():
        raise ValueError(f"{directory} has neither {_SINGLE} nor {_INDEX}; give a directory that has")
    try:
        weight_map = _parse_json(path.read_bytes())["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: a JSON object with a weight_map of file names was expected: {error!r}") from None
    strange = [shard for shard in shards if not isinstance(shard, str) or Path(shard).name != shard]
    if strange or not shards:
        raise ValueError(f"{path}: weight_map must name files in its own directory, got {strange}")
    missing = [shard for shard in shards if not (directory / shard).is_file()]
    if missing:
        raise ValueError(f"{path} names {', '.join(missing)}, which {directory} does not have; copy or download again")
    return weight_map


def _split(specs: Mapping[str, TensorSpec], max_shard_bytes: int) -> list[dict[str, TensorSpec]]:
    """The specs in order, cut where the next tensor would take a shard beyond max_shard_bytes."""
    shards, filled = [{}], 0
    for name, spec in specs.items():
        if shards[-1] and filled + num_bytes(spec) > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = spec
        filled += num_bytes(spec)
    return shards


def _write(path: Path, specs: Mapping[str, TensorSpec], stream: Iterator, metadata: Mapping[str, str] | None):
    header, offsets = _lay_out(specs, metadata)
    with open(path, "wb") as file:
        file.write(header)
        for name, spec in specs.items():
            tensor = next_tensor(stream, name, spec)
            file.seek(offsets[name])
            file.write(tensor.reshape(-1).view(np.uint8).data)
            del tensor  # or it would live on while the next one is made


def _lay_out(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None) -> tuple[bytes, dict[str, int]]:
    """The bytes before the data, and where in the file each tensor goes.

    The widest dtypes come first and spaces pad the header to 8 bytes, so that every tensor is
    aligned to its own width, as the reference writer has it.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    starts, end = {}, 0
    for name in sorted(specs, key=lambda name: -specs[name].dtype.itemsize):
        shape, dtype = specs[name]
        if dtype not in _CODES:
            raise ValueError(f"tensor {name!r} has dtype {dtype}, which safetensors does not know")
        starts[name], end = end, end + num_bytes(specs[name])
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + start for name, start in starts.items()}
