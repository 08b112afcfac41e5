"""Orbax checkpoints: a flat tree from canonical name to array in canonical shape.

Described by orbax-checkpoint, so that any user of Orbax can restore them; read and written with
tensorstore, on which Orbax stands, because Orbax knows arrays and not slices. The one invariant: Orbax
and this module see the same bits in either's checkpoint.
"""

import contextlib
import itertools
import json
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from llama_jax.checkpoint.safetensors import expect_end, next_tensor
from llama_jax.checkpoint.source import TensorSpec
from llama_jax.paths import as_path, is_remote, kvstore_spec, staged_directory

_CHUNK_BYTES = 4 * 2**20  # a slice reads whole chunks, so small ones leave little to be read twice
_BYTES_IN_FLIGHT = 2**28
_OBJECT_BYTES = 2**28  # of a data file in an object store, which is sent in one piece out of memory
_CACHE_BYTES = 2**29  # decoded chunks that the next slice may need too, and the tree's nodes
_ARRAYS = ("jax.Array", "np.ndarray", "scalar")  # Orbax's names for what tensorstore holds
_PROCESS = "ocdbt.process_"  # Orbax's, too

Box = tuple[slice, ...]


class OrbaxSource:
    """The arrays of an Orbax PyTree checkpoint as a Source, whatever number of processes wrote it.

    A nested tree's names are its keys joined by dots; those that start with prefix are listed,
    without it. Raises ValueError if the checkpoint is damaged or was never finished.
    """

    def __init__(self, directory: str | os.PathLike, prefix: str = ""):
        self.directory = as_path(directory)
        metadata, names = _read_metadata(self.directory)
        kvstore = {
            "driver": "ocdbt",
            "base": _directory_spec(self.directory),
        }
        spec = {
            "driver": "zarr3" if metadata.get("use_zarr3") else "zarr",
            "fill_missing_data_reads": not metadata.get("store_array_data_equal_to_fill_value"),
            "recheck_cached_data": "open",  # a finished checkpoint does not change
        }
        context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
        opening = {
            name: ts.open(spec | {"kvstore": kvstore | {"path": name}}, context=context)
            for name in names
            if name.startswith(prefix)
        }
        if not opening:
            raise ValueError(f"{self.directory} has no array under {prefix!r}; it has {', '.join(names[:5]) or 'none'}")
        self._stores: dict[str, ts.TensorStore] = {}
        for name, future in opening.items():
            with self._blaming(name):
                self._stores[name.removeprefix(prefix)] = future.result()
        self.tensors = {name: TensorSpec(store.shape, store.dtype.numpy_dtype) for name, store in self._stores.items()}

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor, or its slice. Raises ValueError if its bytes are missing or damaged."""
        store = self._stores[name]
        bounds = [part.indices(size)[:2] for part, size in zip(index or (), store.shape, strict=False)]
        with self._blaming(name):
            return store[tuple(slice(start, max(start, stop)) for start, stop in bounds)].read().result()

    def check(self) -> None:
        """Read all that is stored, each of several processes its share. Raises ValueError for what is damaged."""
        for name in list(self._stores)[jax.process_index() :: jax.process_count()]:
            store = self._stores[name]
            step = store.chunk_layout.read_chunk_template.shape  # so that no chunk is read twice
            for start in range(0, store.shape[0], step[0]) if step else [0]:
                self.read(name, tuple(slice(start, start + rows) for rows in step[:1]))

    @contextlib.contextmanager
    def _blaming(self, name: str) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            reason = f"array {name!r} is damaged or was never finished: {_first_words(error)}"
            raise ValueError(f"{self.directory}: {reason}") from None


class TreeWriter:
    """Writes parts of a tree's arrays, several on their way at a time; every process has its own for its parts.

    chunks: by name, the shape in which an array is cut (see chunk_shape); parts of two processes share no chunk.
    A context: what left it well is on the disk, and after an error nothing is on its way. The tree is a
    checkpoint once `finish_tree` has joined what all have written.
    """

    def __init__(
        self,
        directory: Path,
        specs: Mapping[str, TensorSpec],
        chunks: Mapping[str, Sequence[int]],
        process: int = 0,
    ):
        self._chunks = chunks
        kvstore: dict[str, Any] = {
            "driver": "ocdbt",
            "base": _directory_spec(directory / f"{_PROCESS}{process}"),
            "config": {"max_inline_value_bytes": 1024},  # array descriptions lie within the tree's nodes
        }
        if is_remote(directory):
            kvstore["target_data_file_size"] = _OBJECT_BYTES
        context = ts.Context()
        # All at once, because each that is waited for is a commit of its own.
        self._stores = {
            name: ts.open(
                _array_spec(chunks[name]) | {"kvstore": kvstore | {"path": name}},
                create=True,
                dtype=dtype.name,
                shape=shape,
                context=context,
            )
            for name, (shape, dtype) in specs.items()
        }
        self._writes: deque[tuple[str, int, ts.WriteFutures]] = deque()
        self._num_bytes = 0

    def __enter__(self) -> "TreeWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is None:
            return self.flush()
        for pending in (*self._stores.values(), *(write for *_, write in self._writes)):
            with contextlib.suppress(ValueError):
                pending.result()

    def write(self, name: str, box: Box, part: np.ndarray) -> None:
        """Send a part off, the box of the array; it must stay as it is until it is flushed.

        Raises OSError if the disk fails, maybe for an earlier part.
        """
        with _failing_to_write(name):
            store = self._stores[name].result()
        sides = [
            [slice(at, min(at + step, side.stop)) for at in range(side.start, side.stop, step)]
            for side, step in zip(box, self._chunks[name], strict=True)
        ]
        starts = [side.start for side in box]
        for chunk in itertools.product(*sides):
            here = tuple(slice(s.start - start, s.stop - start) for s, start in zip(chunk, starts, strict=True))
            while self._num_bytes > _BYTES_IN_FLIGHT:
                self._finish_first()
            write = store[chunk].write(part[here], can_reference_source_data_indefinitely=True)
            self._writes.append((name, part[here].nbytes, write))
            self._num_bytes += part[here].nbytes

    def flush(self) -> None:
        """Wait until all so far is on the disk. Raises OSError if that fails."""
        while self._writes:
            self._finish_first()
        for name, store in self._stores.items():
            with _failing_to_write(name):
                store.result()

    def _finish_first(self) -> None:
        name, num_bytes, write = self._writes.popleft()
        self._num_bytes -= num_bytes
        with _failing_to_write(name):
            write.result()


def _array_spec(chunk: Sequence[int]) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        # Orbax takes a chunk that is not there for a damaged checkpoint, also where it would be zeros.
        "store_data_equal_to_fill_value": True,
        "metadata": {
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
            # A checksum and no compression, which saves a quarter of bfloat16 weights at best and slows loading.
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        },
    }


@contextlib.contextmanager
def _failing_to_write(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:  # so tensorstore calls a full disk
        raise OSError(f"array {name!r} could not be written: {_first_words(error)}") from None


def finish_tree(directory: Path, specs: Mapping[str, TensorSpec], num_processes: int = 1) -> None:
    """Join what the processes have written into one Orbax checkpoint; one of them calls this when all are done."""
    types, alone = ocp.type_handlers, ocp.options.MultiprocessingOptions(0, {0}, "finish")
    registry = types.create_type_handler_registry(
        (jax.ShapeDtypeStruct, _Written()), (jax.Array, types.get_type_handler(jax.Array))
    )
    handler = ocp.PyTreeCheckpointHandler(use_zarr3=True, type_handler_registry=registry, multiprocessing_options=alone)
    leaves = {name: jax.ShapeDtypeStruct(spec.shape, spec.dtype) for name, spec in specs.items()}
    handler.save(epath.Path(directory), args=ocp.args.PyTreeSave(leaves))
    # As Orbax's own finalize does, which knows no s3.
    context = ts.Context()

    def opened(path: Path) -> ts.KvStore:
        return ts.KvStore.open({"driver": "ocdbt", "base": _directory_spec(path)}, context=context).result()

    with _failing_to_write(directory.name), ts.Transaction(atomic=True) as transaction:
        whole = opened(directory).with_transaction(transaction)
        for process in range(num_processes):
            opened(directory / f"{_PROCESS}{process}").experimental_copy_range_to(whole).result()


class _Written(ocp.type_handlers.NumpyHandler):
    """Has Orbax describe a tree whose leaves only announce arrays that are written already."""

    async def serialize(self, values, infos, args=None):
        """Nothing is left to do."""
        del values, infos, args
        return []


def write_orbax(
    directory: str | os.PathLike, specs: Mapping[str, TensorSpec], tensors: Iterable[tuple[str, np.ndarray]]
):
    """Writes a checkpoint from one process, which holds one tensor at a time.

    The directory must be absent or empty and appears when it is complete. tensors yields (name,
    array) in the order of specs; each is let go before the next is asked for. Raises ValueError if
    one differs from its spec or there are more processes, FileExistsError if the directory is in use,
    OSError if the disk fails.
    """
    if jax.process_count() > 1:
        raise ValueError(f"{directory}: tensors are streamed from one process, not {jax.process_count()}")
    stream = iter(tensors)
    with staged_directory(directory) as staged:
        chunks = {name: chunk_shape(spec.shape, spec.dtype.itemsize) for name, spec in specs.items()}
        with TreeWriter(staged, specs, chunks) as writer:
            for name, spec in specs.items():
                tensor = next_tensor(stream, name, spec)
                writer.write(name, tuple(slice(0, size) for size in spec.shape), tensor)
                writer.flush()
                del tensor  # or it would live on while the next one is made
        expect_end(stream)
        finish_tree(staged, specs)


def chunk_shape(shape: Sequence[int], itemsize: int, grain: Sequence[int] | None = None) -> list[int]:
    """Chunks of at most 4 MiB: the shape halved along its longest side, so that slices of any side read little else.

    grain: by side, what all parts that several processes write begin and end at multiples of.
    """
    grain = shape if grain is None else grain
    chunk = [max(1, size) for size in grain]
    while math.prod(chunk) * itemsize > _CHUNK_BYTES:
        # An uneven half of a grain would reach into another process's.
        sides = [i for i, size in enumerate(chunk) if size > 1 and (size % 2 == 0 or grain[i] == shape[i])]
        if not sides:
            break
        longest = max(sides, key=lambda i: chunk[i])
        chunk[longest] = -(-chunk[longest] // 2)
    return chunk


def _directory_spec(directory: str | os.PathLike) -> dict[str, Any]:
    """Tensorstore's description of what lies below a directory."""
    spec = kvstore_spec(directory)
    return spec | {"path": f"{spec['path']}/"}


def _first_words(error: ValueError) -> str:
    return str(error).split(" [")[0]  # tensorstore appends its whole specification


def _read_metadata(directory: Path) -> tuple[dict[str, Any], list[str]]:
    """Orbax's description of the tree, and the names of its arrays."""
    for file in ("_METADATA", "manifest.ocdbt"):
        if not (directory / file).is_file():
            raise ValueError(f"{directory} is no finished Orbax checkpoint: it has no {file}")
    try:
        metadata = json.loads((directory / "_METADATA").read_text())
        return metadata, [
            ".".join(str(part["key"]) for part in entry["key_metadata"])
            for entry in metadata["tree_metadata"].values()
            if entry["value_metadata"]["value_type"] in _ARRAYS
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{directory / '_METADATA'} is damaged: {error!r}") from None
