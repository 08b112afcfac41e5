"""A model's shards on the host, and what they are among the canonical tensors.

Each process copies what its devices hold (of replicas one), so that the devices may go on while
threads write it. The one invariant: over all processes every element is written once, and no two
of them write into one chunk.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from llama_jax.checkpoint.formats import write_model_file
from llama_jax.checkpoint.names import StoredWeight, canonical_shapes, stored_weights
from llama_jax.checkpoint.orbax import Box, TreeWriter, chunk_shape, finish_tree
from llama_jax.checkpoint.source import TensorSpec
from llama_jax.checkpoint.together import write_together
from llama_jax.model import Llama
from llama_jax.outputs_first import in_own_order
from llama_jax.tree import leaf_name

_NUM_THREADS = 4  # to copy; one alone does not fill the memory's bandwidth

Part = tuple[str, Box, np.ndarray]


class Snapshot:
    """What this process stores of a model: `specs` of all tensors, the `chunks` they are cut in, its `parts`."""

    def __init__(self, model: Llama):
        """Waits until the arrays are on the host; they may be donated then."""
        shapes = canonical_shapes(model.cfg)
        self.specs: dict[str, TensorSpec] = {}
        self.chunks: dict[str, list[int]] = {}
        self._weights, shards = [], []
        for path, leaf in jax.tree.leaves_with_path(in_own_order(model)):
            weights, stacked = stored_weights(leaf_name(path), model.cfg.num_layers)
            indices = leaf.sharding.devices_indices_map(leaf.shape).values()
            boxes = [_bounds(index, leaf.shape)[stacked:] for index in indices]
            stored, weight = shapes[weights[0].name], weights[0]
            sides = [weight.ranges(leaf.shape[stacked:], box) for box in boxes]
            chunk = chunk_shape(stored, leaf.dtype.itemsize, _grain(sides, stored))
            for weight in weights:
                self.specs[weight.name] = TensorSpec(shapes[weight.name], np.dtype(leaf.dtype))
                self.chunks[weight.name] = chunk
            for shard in leaf.addressable_shards:
                if shard.replica_id == 0:
                    shard.data.copy_to_host_async()
                    shards.append(shard)
                    self._weights.append((weights, stacked, leaf.shape, _bounds(shard.index, leaf.shape)))
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            self._held = list(pool.map(_on_host, shards))

    def parts(self) -> Iterator[Part]:
        """Name, box and values of each part of a tensor that this process holds."""
        for (weights, stacked, shape, index), data in zip(self._weights, self._held, strict=True):
            layers = zip(weights[index[0]], data, strict=True) if stacked else [(weights[0], data)]
            for weight, layer in layers:
                for box, part in _parts(weight, shape[stacked:], index[stacked:], layer):
                    stored = self.specs[weight.name].shape  # the model's vocabulary may be padded
                    box = tuple(slice(s.start, min(s.stop, size)) for s, size in zip(box, stored, strict=True))
                    if all(s.start < s.stop for s in box):
                        yield weight.name, box, part[tuple(slice(s.stop - s.start) for s in box)]

    def write(self, directory: Path, parts: Iterable[Part] | None = None) -> None:
        """Write this process's parts, or others of the same boxes, as a tree for `finish_tree`."""
        with TreeWriter(directory, self.specs, self.chunks, jax.process_index()) as writer:
            for part in self.parts() if parts is None else parts:
                writer.write(*part)


def save_together(model: Llama, path: Path) -> None:
    """Write a checkpoint of the project's own form from all processes; see `llama_jax.save`."""
    snapshot = Snapshot(model)

    def finish(staged: Path) -> None:
        finish_tree(staged / "params", snapshot.specs, jax.process_count())
        write_model_file(staged, model.cfg, {})

    write_together(path, lambda staged: snapshot.write(staged / "params"), finish)


def _bounds(index: Box, shape: tuple[int, ...]) -> Box:
    return tuple(slice(*s.indices(dim)[:2]) for s, dim in zip(index, shape, strict=True))


def _on_host(shard: jax.Shard) -> np.ndarray:
    host = np.asarray(shard.data)
    return host.copy() if shard.device.platform == "cpu" else host  # a CPU gives a view of what will be donated


def _grain(held: list[list[list[slice]]], stored: tuple[int, ...]) -> list[int]:
    """By side of the stored tensor, the largest number that divides all bounds of what devices hold."""
    bounds = [set() for _ in stored]
    for sides in held:
        for found, ranges in zip(bounds, sides, strict=True):
            found.update(bound for s in ranges for bound in (s.start, s.stop))
    return [math.gcd(*(b for b in found if b < size)) or size for found, size in zip(bounds, stored, strict=True)]


def _parts(
    weight: StoredWeight, shape: tuple[int, ...], index: Box, data: np.ndarray
) -> Iterator[tuple[Box, np.ndarray]]:
    """Boxes of the stored tensor, each with its view of the data, the part `index` of a weight of the model."""
    data = weight.as_matrix(data)
    for box in itertools.product(*map(_placed, weight.ranges(shape, index))):
        yield tuple(stored for stored, _ in box), data[tuple(here for _, here in box)]


def _placed(ranges: list[slice]) -> Iterator[tuple[slice, slice]]:
    """Ranges, each with its place when they are laid end to end."""
    end = 0
    for s in ranges:
        begin, end = end, end + s.stop - s.start
        yield s, slice(begin, end)
