"""Between stored tensors and the model's arrays, a tensor at a time, in both directions.

Reading: each device's part of each array is read from the files as a slice, so a process reads
only what its devices hold, and the host holds one such part. Writing: canonical tensors are
taken off the model one by one. The invariant: every leaf is filled once and every stored tensor
is used, else the error names what is missing, surplus or misshapen.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec, get_mesh, reshard
from jax.typing import DTypeLike

from llama_jax.checkpoint.names import StoredWeight, canonical_shapes, matrix_slices, stored_weights
from llama_jax.checkpoint.source import Source, TensorSpec
from llama_jax.config import LlamaConfig
from llama_jax.model import Layout, Llama

# Buffers that old exporters wrote beside the weights; they follow from the config.
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)

# Rows that are transposed at a time: the cache holds them, which is four times as fast as all at once.
_TILE = 128


def check_tensors(cfg: LlamaConfig, source: Source, file_of: Callable[[str], Path]) -> None:
    """Raise ValueError naming file and tensor for the first that is missing, surplus, misshapen or not of floats."""
    expected = canonical_shapes(cfg)
    for name, shape in expected.items():
        if name not in source.tensors:
            raise ValueError(f"{file_of(name)}: tensor {name} is missing")
        stored = source.tensors[name]
        if tuple(stored.shape) != shape:
            raise ValueError(f"{file_of(name)}: tensor {name} has shape {stored.shape}, the config says {shape}")
        if not jnp.issubdtype(stored.dtype, jnp.floating):
            raise ValueError(f"{file_of(name)}: tensor {name} holds {stored.dtype}; only floats are supported")
    for name in source.tensors:
        tied_head = cfg.tie_embeddings and name == "lm_head.weight"
        if name not in expected and not tied_head and not name.endswith(_IGNORED_SUFFIXES):
            raise ValueError(f"{file_of(name)}: tensor {name} is not part of a Llama of this config")


def read_model(cfg: LlamaConfig, source: Source, *, dtype: DTypeLike, layout: Layout = "stacked") -> Llama:
    """A model on the ambient mesh, filled from a source whose tensors have been checked."""
    abstract = jax.eval_shape(lambda: Llama(cfg, rngs=nnx.Rngs(0), layout=layout))
    leaves, tree = jax.tree.flatten_with_path(abstract)
    return jax.tree.unflatten(tree, [_read_leaf(cfg, source, path, leaf, dtype) for path, leaf in leaves])


def _read_leaf(cfg: LlamaConfig, source: Source, path, leaf: jax.ShapeDtypeStruct, dtype: DTypeLike) -> Array:
    weights, stacked = stored_weights(jax.tree_util.keystr(path, simple=True, separator="."), cfg.num_layers)
    assert leaf.sharding is not None
    sharding = NamedSharding(get_mesh(), leaf.sharding.spec)
    holders = defaultdict(list)  # replicas of one part are read once
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        bounds = tuple(s.indices(dim)[:2] for s, dim in zip(index or (), leaf.shape, strict=True))
        holders[bounds].append(device)
    arrays = []
    for bounds, devices in holders.items():
        part = np.empty([stop - start for start, stop in bounds], dtype)
        index = tuple(slice(*bound) for bound in bounds)
        if stacked:
            for weight, out in zip(weights[index[0]], part, strict=True):
                _read_weight(source, weight, leaf.shape[1:], index[1:], out)
        else:
            _read_weight(source, weights[0], leaf.shape, index, part)
        arrays += [jax.device_put(part, device) for device in devices]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)


def _read_weight(
    source: Source, weight: StoredWeight, shape: tuple[int, ...], index: tuple[slice, ...], out: np.ndarray
) -> None:
    """Fill out, contiguous, with the part `index` of a model weight of this shape, in its own dtype."""
    n = weight.num_inputs
    if n == 0:
        values = source.read(weight.name, index)
        out[: len(values)] = values
        out[len(values) :] = 0  # rows that pad the vocabulary
        return
    matrix = out.reshape(math.prod(out.shape[:n]), math.prod(out.shape[n:]))
    row = 0
    for outputs in matrix_slices(shape[n:], index[n:]):
        column = 0
        for inputs in matrix_slices(shape[:n], index[:n]):
            block = source.read(weight.name, (outputs, inputs))
            for start in range(0, len(block), _TILE):
                tile = block[start : start + _TILE].astype(out.dtype, copy=False)
                matrix[column : column + tile.shape[1], row + start : row + start + len(tile)] = tile.T
            column += block.shape[1]
        row += len(block)


class ModelSource:
    """The weights of a model as canonical tensors, so that every writer takes a model or a file alike."""

    def __init__(self, model: Llama):
        """Reads through to the model; nothing is copied until a tensor is asked for."""
        self._vocab_size = model.cfg.vocab_size
        self._weights: dict[str, tuple[Array, int | None, StoredWeight]] = {}
        for path, leaf in jax.tree.leaves_with_path(model):
            weights, stacked = stored_weights(
                jax.tree_util.keystr(path, simple=True, separator="."), model.cfg.num_layers
            )
            for i, weight in enumerate(weights):
                self._weights[weight.name] = (leaf, i if stacked else None, weight)
        shapes = canonical_shapes(model.cfg)
        self.tensors = {name: TensorSpec(shape, self._weights[name][0].dtype) for name, shape in shapes.items()}

    def array(self, name: str) -> Array:
        """The tensor on the devices in its canonical shape, split as far as that shape allows."""
        leaf, layer, weight = self._weights[name]
        return _to_canonical(leaf if layer is None else leaf[layer], weight, self._vocab_size)

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor, or its slice, on the host; in several processes all must ask."""
        array = self.array(name)
        whole = np.asarray(reshard(array, PartitionSpec(*(None,) * array.ndim)))
        return whole if index is None else whole[index]


def _to_canonical(x: Array, weight: StoredWeight, vocab_size: int) -> Array:
    n = weight.num_inputs
    if n == 0:
        if x.ndim == 1 or x.shape[0] == vocab_size:
            return x
        return reshard(x, PartitionSpec(None, jax.typeof(x).sharding.spec[1]))[:vocab_size]
    # A matrix side keeps the split of its first dimension; the others are gathered before they merge.
    spec = [axes if i in (0, n) else None for i, axes in enumerate(jax.typeof(x).sharding.spec)]
    x = reshard(x, PartitionSpec(*spec)).transpose(*range(n, x.ndim), *range(n))
    outputs = x.ndim - n
    return jnp.reshape(
        x,
        (math.prod(x.shape[:outputs]), math.prod(x.shape[outputs:])),
        out_sharding=PartitionSpec(spec[n], spec[0]),
    )
