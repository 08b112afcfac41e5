"""Orbax checkpoints: a flat tree from canonical name to array in canonical shape.

Written through orbax-checkpoint, so that any user of Orbax can restore them; read with tensorstore,
on which Orbax stands, because Orbax restores arrays and not slices. The one invariant: Orbax and this
module see the same bits in either's checkpoint.
"""

import contextlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from llama_jax.checkpoint.safetensors import expect_end, next_tensor
from llama_jax.checkpoint.source import TensorSpec
from llama_jax.paths import as_path, is_remote, kvstore_spec, remove_directory, vacant_directory

_CHUNK_BYTES = 4 * 2**20  # a slice reads whole chunks, so small ones leave little to be read twice
_CHUNKS_IN_FLIGHT = 64
_OBJECT_BYTES = 2**28  # of a data file in an object store, which is sent in one piece out of memory
_CACHE_BYTES = 2**29  # decoded chunks that the next slice may need too, and the tree's nodes
_ARRAYS = ("jax.Array", "np.ndarray", "scalar")  # Orbax's names for what tensorstore holds


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

    @contextlib.contextmanager
    def _blaming(self, name: str) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            reason = f"array {name!r} is damaged or was never finished: {_first_words(error)}"
            raise ValueError(f"{self.directory}: {reason}") from None


def write_orbax(
    directory: str | os.PathLike, specs: Mapping[str, TensorSpec], tensors: Iterable[tuple[str, np.ndarray]]
):
    """Writes a checkpoint from one process, which holds one tensor and a few of its chunks at a time.

    The directory must be absent or empty and appears when it is complete. tensors yields (name,
    array) in the order of specs; each is let go before the next is asked for. Raises ValueError if
    one differs from its spec or there are more processes, FileExistsError if the directory is in use,
    OSError if the disk fails.
    """
    if jax.process_count() > 1:
        raise ValueError(f"{directory}: tensors are streamed from one process, not {jax.process_count()}")
    types = ocp.type_handlers
    registry = types.create_type_handler_registry(
        (jax.ShapeDtypeStruct, _StreamHandler(specs, iter(tensors))), (jax.Array, types.get_type_handler(jax.Array))
    )
    leaves = {name: jax.ShapeDtypeStruct(spec.shape, spec.dtype) for name, spec in specs.items()}
    handler = ocp.PyTreeCheckpointHandler(use_zarr3=True, type_handler_registry=registry)
    if _is_s3(directory):
        handler.finalize = lambda directory: None  # there is nothing to merge
    _save(directory, leaves, handler)


def save_arrays(directory: str | os.PathLike, arrays: Mapping[str, jax.Array]):
    """Writes arrays, each process the shards that it holds; every process calls this.

    The directory must be absent or empty and appears when it is complete. Raises FileExistsError, and
    ValueError for s3 from several processes, because Orbax does not write there.
    """
    if _is_s3(directory):
        specs = {name: TensorSpec(array.shape, np.dtype(array.dtype)) for name, array in arrays.items()}
        return write_orbax(directory, specs, ((name, np.asarray(array)) for name, array in arrays.items()))
    _save(directory, dict(arrays), ocp.PyTreeCheckpointHandler())


class _StreamHandler(ocp.type_handlers.NumpyHandler):
    """Writes a tree whose leaves only announce the arrays that a stream will bring."""

    def __init__(self, specs: Mapping[str, TensorSpec], stream: Iterator[tuple[str, np.ndarray]]):
        super().__init__()
        self._specs, self._stream = specs, stream

    async def serialize(self, values, infos, args=None):
        """Called once for all leaves. Orbax merges what it finds under its processes' names, but not in s3."""
        del values, args
        directory = infos[0].parent_dir
        kvstore = {
            "driver": "ocdbt",
            "base": _directory_spec(directory if _is_s3(directory) else directory / "ocdbt.process_0"),
            "config": {"max_inline_value_bytes": 1024},  # array descriptions lie within the tree's nodes
        }
        if is_remote(directory):
            kvstore["target_data_file_size"] = _OBJECT_BYTES
        context = ts.Context()
        for name, spec in self._specs.items():
            tensor = next_tensor(self._stream, name, spec)
            try:
                _write_tensor(kvstore | {"path": name}, tensor, context)
            except ValueError as error:  # so tensorstore calls a full disk
                raise OSError(f"array {name!r} could not be written: {_first_words(error)}") from None
            del tensor  # or it would live on while the next one is made
        expect_end(self._stream)
        return []


def _write_tensor(kvstore: dict[str, Any], tensor: np.ndarray, context: ts.Context):
    """Stores one array in chunks of equal shape, a few of them in flight at a time."""
    chunk = _chunk_shape(tensor.shape, tensor.dtype.itemsize)
    spec = {
        "driver": "zarr3",
        "kvstore": kvstore,
        # Orbax takes a chunk that is not there for a damaged checkpoint, also where it would be zeros.
        "store_data_equal_to_fill_value": True,
        "metadata": {
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            # A checksum and no compression, which saves a quarter of bfloat16 weights at best and slows loading.
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        },
    }
    store = ts.open(spec, create=True, dtype=tensor.dtype.name, shape=tensor.shape, context=context).result()
    sides = [
        [slice(at, min(at + step, size)) for at in range(0, size, step)]
        for size, step in zip(tensor.shape, chunk, strict=True)
    ]
    boxes = list(itertools.product(*sides))
    for first in range(0, len(boxes), _CHUNKS_IN_FLIGHT):
        writes = [
            store[box].write(tensor[box], can_reference_source_data_indefinitely=True)
            for box in boxes[first : first + _CHUNKS_IN_FLIGHT]
        ]
        for write in writes:
            write.result()


def _chunk_shape(shape: tuple[int, ...], itemsize: int) -> list[int]:
    """The shape halved along its longest side until it fits: slices of either side then read little else."""
    chunk = [max(1, size) for size in shape]
    while math.prod(chunk) * itemsize > _CHUNK_BYTES:
        longest = chunk.index(max(chunk))
        chunk[longest] = -(-chunk[longest] // 2)
    return chunk


def _save(directory: str | os.PathLike, tree: Mapping[str, Any], handler: ocp.PyTreeCheckpointHandler):
    """Saves under Orbax's own staging, in an object store in place, and removes what a failure would leave of it."""
    directory = vacant_directory(directory)
    staging, staged = None, directory.with_name(directory.name + ocp.utils.TMP_DIR_SUFFIX)
    if is_remote(directory):
        staging, staged = ocp.path.atomicity.CommitFileTemporaryPath, directory
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        directory.rmdir()  # Orbax makes it itself
    try:
        with ocp.Checkpointer(handler, temporary_path_class=staging) as checkpointer:
            checkpointer.save(directory, args=ocp.args.PyTreeSave(tree))
    except BaseException:
        with contextlib.suppress(OSError):
            remove_directory(staged)
        raise


def _directory_spec(directory: str | os.PathLike) -> dict[str, Any]:
    """Tensorstore's description of what lies below a directory."""
    spec = kvstore_spec(directory)
    return spec | {"path": f"{spec['path']}/"}


def _is_s3(path: str | os.PathLike) -> bool:
    return kvstore_spec(as_path(path))["driver"] == "s3"


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
