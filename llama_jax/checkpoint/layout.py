"""Between stored tensors and the model's arrays, a tensor at a time, in both directions.

Reading: each device's part of each array is read from the files as a slice, so a process reads
only what its devices hold, and the host holds about one tensor. Writing: canonical tensors are
taken off the model one by one. The invariant: every leaf is filled once and every stored tensor
is used, else the error names what is missing, surplus or misshapen.
"""

import math

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


def check_tensors(cfg: LlamaConfig, source: Source, where: str) -> None:
    """Raise ValueError naming the first tensor that is missing, surplus or of another shape."""
    expected = canonical_shapes(cfg)
    for name, shape in expected.items():
        if name not in source.tensors:
            raise ValueError(f"{where}: tensor {name} is missing")
        if tuple(source.tensors[name].shape) != shape:
            raise ValueError(
                f"{where}: tensor {name} has shape {tuple(source.tensors[name].shape)}, the config says {shape}"
            )
    for name in source.tensors:
        tied_head = cfg.tie_embeddings and name == "lm_head.weight"
        if name not in expected and not tied_head and not name.endswith(_IGNORED_SUFFIXES):
            raise ValueError(f"{where}: tensor {name} is not part of a Llama of this config")


def read_model(cfg: LlamaConfig, source: Source, *, dtype: DTypeLike, layout: Layout = "stacked") -> Llama:
    """A model on the ambient mesh, filled from a source whose tensors have been checked."""
    abstract = jax.eval_shape(lambda: Llama(cfg, rngs=nnx.Rngs(0), layout=layout))
    leaves, tree = jax.tree.flatten_with_path(abstract)
    return jax.tree.unflatten(tree, [_read_leaf(cfg, source, path, leaf, dtype) for path, leaf in leaves])


def _read_leaf(cfg: LlamaConfig, source: Source, path, leaf: jax.ShapeDtypeStruct, dtype: DTypeLike) -> Array:
    weights, stacked = stored_weights(jax.tree_util.keystr(path, simple=True, separator="."), cfg.num_layers)
    assert leaf.sharding is not None
    sharding = NamedSharding(get_mesh(), leaf.sharding.spec)
    parts: dict[tuple, np.ndarray] = {}  # replicas of one slice are read once

    def read_part(index: tuple[slice, ...]) -> np.ndarray:
        key = tuple(s.indices(dim) for s, dim in zip(index, leaf.shape, strict=True))
        if key not in parts:
            if stacked:
                layers = [_read_weight(source, w, leaf.shape[1:], index[1:], dtype) for w in weights[index[0]]]
                parts[key] = np.stack(layers)
            else:
                parts[key] = _read_weight(source, weights[0], leaf.shape, index, dtype)
        return parts[key]

    return jax.make_array_from_callback(leaf.shape, sharding, read_part)


def _read_weight(
    source: Source, weight: StoredWeight, shape: tuple[int, ...], index: tuple[slice, ...], dtype: DTypeLike
) -> np.ndarray:
    """The part `index` of a model weight of this shape, in dtype."""
    if weight.num_inputs == 0:
        return _read_table(source, weight.name, shape, index, dtype)
    n = weight.num_inputs
    columns, rows = matrix_slices(shape[:n], index[:n]), matrix_slices(shape[n:], index[n:])
    matrix = np.block([[source.read(weight.name, (r, c)) for c in columns] for r in rows]).astype(dtype, copy=False)
    part = [len(range(*s.indices(dim))) for s, dim in zip(index, shape, strict=True)]
    outputs, inputs = len(shape) - n, len(shape)
    order = (*range(outputs, inputs), *range(outputs))
    return np.ascontiguousarray(matrix.reshape(part[n:] + part[:n]).transpose(order))


def _read_table(source: Source, name: str, shape, index: tuple[slice, ...], dtype: DTypeLike) -> np.ndarray:
    """Part of an array that is stored as it is; rows that pad the vocabulary are zeros."""
    rows = source.tensors[name].shape[0]
    start, stop, _ = index[0].indices(shape[0])
    stored = slice(min(start, rows), min(stop, rows))
    values = source.read(name, (stored, *index[1:])).astype(dtype, copy=False)
    padding = (stop - start) - values.shape[0]
    return np.pad(values, [(0, padding)] + [(0, 0)] * (values.ndim - 1)) if padding else values


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
