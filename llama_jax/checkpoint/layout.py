"""Between stored tensors and the model's arrays, a tensor at a time, in both directions.

Reading: the processes share the bytes of the files, so that each byte is read once, and exchange
what they have read where their devices hold the same or other parts. Writing: canonical tensors
are taken off the model one by one. The invariant: every leaf is filled once and every stored
tensor is used, else the error names what is missing, surplus or misshapen.
"""

import itertools
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec, get_mesh, reshard
from jax.typing import DTypeLike

from llama_jax.checkpoint.names import StoredWeight, canonical_shapes, stored_weights
from llama_jax.checkpoint.quantized.keeping import KeptSource
from llama_jax.checkpoint.source import Source, TensorSpec
from llama_jax.config import LlamaConfig
from llama_jax.model import Llama
from llama_jax.outputs_first import OutputsFirst
from llama_jax.progress import progress
from llama_jax.quantize import QuantizedArray, block_spec, multiplies_itself
from llama_jax.rounding import num_blocks, quantize_weight
from llama_jax.schemes import INPUT_DIMS, Quantization, Scheme
from llama_jax.tree import leaf_name

# "decoding": as "layers", on CPUs with the outputs of its float weights first (llama_jax/outputs_first.py).
ReadLayout = Literal["stacked", "layers", "decoding"]

# Buffers that old exporters wrote beside the weights; they follow from the config.
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)

# Rows that are transposed at a time: the cache holds them, which is four times as fast as all at once.
_TILE = 64

_NUM_THREADS = 8  # a disk is at its full speed when several wait for it
_BLOCK_BYTES = 16 * 2**20
_HOST_BYTES = 2**30
_ALIGNMENT = 64  # bytes, XLA's own


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


def read_model(
    cfg: LlamaConfig, source: Source, *, dtype: DTypeLike, layout: ReadLayout = "stacked", scheme: Scheme | None = None
) -> Llama:
    """A model on the ambient mesh, filled from a source whose tensors have been checked, quantized by a scheme.

    Of a KeptSource it holds the weights that are stored in few bits as they are, where model and mesh let it.

    Threads read, cast and transpose blocks of several leaves at once, while finished leaves go to
    the devices in order. The host holds 1 GiB of parts, or one leaf's if those are larger; where
    processes exchange what they have read, a device holds its part of one leaf twice meanwhile. What is to be
    quantized is a leaf a layer, which is float on the devices only until it is.
    """
    groups, tree = _plan(cfg, source, np.dtype(dtype), layout, scheme)
    leaves = [leaf for group in groups for leaf in group]
    total = sum(leaf.num_stored_bytes(source) for leaf in leaves)
    arrays, started = [], deque[tuple[_Leaf, list[np.ndarray], list[Future[int]]]]()

    def finish_first() -> None:
        leaf, parts, blocks = started.popleft()
        for block in blocks:
            bar.update(block.result())
        arrays.append(leaf.to_devices(parts))

    pool = ThreadPoolExecutor(_NUM_THREADS)
    try:
        with progress(total, desc="loading", shown=jax.process_index() == 0) as bar:
            for leaf in leaves:
                while started and leaf.nbytes + sum(other.nbytes for other, *_ in started) > _HOST_BYTES:
                    finish_first()
                started.append((leaf, *leaf.start(source, pool)))
            while started:
                finish_first()
    finally:
        pool.shutdown(cancel_futures=True)
    weights = iter(arrays)
    return jax.tree.unflatten(tree, [_together(group, [next(weights) for _ in group]) for group in groups])


def kept_weights(
    cfg: LlamaConfig, source: Source, *, dtype: DTypeLike, layout: ReadLayout
) -> list[jax.ShapeDtypeStruct]:
    """The arrays, with their shardings, that `read_model` will hold."""
    groups, _ = _plan(cfg, source, np.dtype(dtype), layout, None)
    return [leaf.abstract for group in groups for leaf in group]


def _plan(
    cfg: LlamaConfig, source: Source, dtype: np.dtype, layout: ReadLayout, scheme: Scheme | None
) -> "tuple[list[list[_Leaf]], Any]":
    """What is read for each leaf of the model, and the tree of these."""
    of_model = "stacked" if layout == "stacked" else "layers"
    abstract = jax.eval_shape(lambda: Llama(cfg, rngs=nnx.Rngs(0), layout=of_model))
    found, tree = jax.tree.flatten_with_path(abstract)
    turned = layout == "decoding" and get_mesh().devices.flat[0].platform == "cpu"
    groups = []
    for path, leaf in found:
        kept = _kept(cfg, path, leaf, source) if isinstance(source, KeptSource) and scheme is None else None
        groups.append(kept or _leaves(cfg, path, leaf, dtype, scheme, turned=turned))
    return groups, tree


def _kept(cfg: LlamaConfig, path: Any, abstract: jax.ShapeDtypeStruct, source: KeptSource) -> "list[_Leaf] | None":
    """What is read to hold a weight in few bits as it is stored; None where model or mesh do not let it."""
    name = leaf_name(path)
    weights, stacked = stored_weights(name, cfg.num_layers)
    forms = {source.forms.get(weight.name) for weight in weights}
    form = forms.pop()
    if form is None or forms or abstract.sharding is None:
        return None
    whole, spec = abstract.shape[stacked:], abstract.sharding.spec
    try:
        counts = num_blocks(whole, form.group, INPUT_DIMS[name.rpartition(".")[2]])
        split = PartitionSpec(*spec[:stacked], *block_spec(counts, spec[stacked:]))
    except (KeyError, ValueError):  # the embedding, or groups that the mesh or a head divides
        return None
    by_group = jax.ShapeDtypeStruct(
        (*abstract.shape[:stacked], *counts), jnp.float32, sharding=NamedSharding(get_mesh(), split)
    )
    leaves = [
        _Leaf(cfg, name, abstract, form.dtype, part="values"),
        _Leaf(cfg, name, by_group, form.scale_dtype, part="scales"),
    ]
    if form.has_zeros:
        leaves.append(_Leaf(cfg, name, by_group, np.dtype(np.int8), part="zeros"))
    leaves[0].rest = form.rest
    return leaves


def _leaves(
    cfg: LlamaConfig, path: Any, abstract: jax.ShapeDtypeStruct, dtype: np.dtype, scheme: Scheme | None, *, turned: bool
) -> "list[_Leaf]":
    """What is read to fill a leaf of the model: it, or where it stacks what is to be quantized each layer's part.

    turned: with its outputs first, as it is stored, where it stays float.
    """
    name = leaf_name(path)
    if scheme is None or not scheme.covers(name, cfg.num_layers):
        return [_Leaf(cfg, name, abstract, dtype, turned=turned)]
    if not stored_weights(name, cfg.num_layers)[1]:
        return [_Leaf(cfg, name, abstract, dtype, scheme)]
    assert abstract.sharding is not None
    sharding = NamedSharding(get_mesh(), PartitionSpec(*abstract.sharding.spec[1:]))
    one = jax.ShapeDtypeStruct(abstract.shape[1:], abstract.dtype, sharding=sharding)
    names = [name.replace("layers.", f"layers.{layer}.", 1) for layer in range(cfg.num_layers)]
    return [_Leaf(cfg, layer, one, dtype, scheme) for layer in names]


@jax.jit
def _stacked(layers: list[Any]) -> Any:
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)


def _together(leaves: "list[_Leaf]", arrays: list[Any]) -> Any:
    """The leaf of the model that was read in parts."""
    if leaves[0].rest is not None:
        values, scales, *zeros = arrays
        return QuantizedArray(values, scales, *zeros, rest=leaves[0].rest)
    if leaves[0].num_inputs:
        return OutputsFirst(arrays[0], leaves[0].num_inputs)
    return arrays[0] if len(arrays) == 1 else _stacked(arrays)


class _Leaf:
    """An array of the model on its way from the files to the devices of this process, where a scheme quantizes it."""

    rest: Quantization | None = None  # of the first of the arrays that are one quantized weight
    num_inputs = 0  # dimensions of a weight that has its outputs first

    def __init__(
        self,
        cfg: LlamaConfig,
        name: str,
        abstract: jax.ShapeDtypeStruct,
        dtype: np.dtype,
        scheme: Scheme | None = None,
        *,
        part: str = "",
        turned: bool = False,
    ):
        self._weights, self._stacked = stored_weights(name, cfg.num_layers)
        if part:
            self._weights = [weight._replace(name=f"{weight.name}:{part}") for weight in self._weights]
        assert abstract.sharding is not None
        self._shape, self._spec, self._dtype = abstract.shape, abstract.sharding.spec, dtype
        if turned and self._weights[0].transposed:
            (weight,) = self._weights
            self.num_inputs = weight.num_leading
            outputs, inputs = weight.sides(self._shape)
            self._shape = *outputs, *inputs
            self._spec = PartitionSpec(*itertools.chain(*weight.sides(tuple(self._spec))))
            self._weights = [weight._replace(num_leading=len(outputs), transposed=False)]
        self._name, self._scheme = name, scheme
        mesh = get_mesh()
        spec = reading_spec(self._shape, self._spec, self._weights[0], self._stacked, mesh)
        self._reading = NamedSharding(mesh, spec)
        self._holders = defaultdict(list)  # replicas of one part are read once
        for device, index in self._reading.addressable_devices_indices_map(self._shape).items():
            bounds = tuple(s.indices(dim)[:2] for s, dim in zip(index or (), self._shape, strict=True))
            self._holders[bounds].append(device)
        self.size = sum(math.prod(stop - start for start, stop in bounds) for bounds in self._holders)
        self.nbytes = self.size * dtype.itemsize

    @property
    def abstract(self) -> jax.ShapeDtypeStruct:
        """The array on the devices."""
        sharding = NamedSharding(self._reading.mesh, self._spec)
        return jax.ShapeDtypeStruct(self._shape, self._dtype, sharding=sharding)

    def num_stored_bytes(self, source: Source) -> int:
        """What this process reads of it."""
        return self.size * source.tensors[self._weights[0].name].dtype.itemsize

    def start(self, source: Source, pool: Executor) -> tuple[list[np.ndarray], list[Future[int]]]:
        """The parts, one for each distinct slice, and the work that fills them a block at a time."""
        indices = [tuple(slice(*bound) for bound in bounds) for bounds in self._holders]
        parts = [_empty([s.stop - s.start for s in index], self._dtype) for index in indices]
        blocks = []
        for layer, weight in enumerate(self._weights):  # outside, so that the slices of a tensor are read together
            for index, part in zip(indices, parts, strict=True):
                shape, out = self._shape, part
                if self._stacked:
                    if not index[0].start <= layer < index[0].stop:
                        continue
                    shape, out, index = shape[1:], part[layer - index[0].start], index[1:]
                blocks += [
                    pool.submit(_read_block, source, weight.name, stored, block)
                    for stored, block in _blocks(weight, shape, index, out)
                ]
        return parts, blocks

    def to_devices(self, parts: list[np.ndarray]) -> Any:
        """The weight once its parts are filled; every process must ask for the same one."""
        arrays = [
            jax.device_put(part, device)
            for part, devices in zip(parts, self._holders.values(), strict=True)
            for device in devices
        ]
        array = jax.make_array_from_single_device_arrays(self._shape, self._reading, arrays)
        target = NamedSharding(self._reading.mesh, self._spec)
        if not self._reading.is_equivalent_to(target, len(self._shape)):
            array = reshard(array, target)
        weight = array if self._scheme is None else quantize_weight(array, self._name, self._scheme)
        return jax.block_until_ready(weight)


def reading_spec(
    shape: tuple[int, ...], spec: PartitionSpec, weight: StoredWeight, stacked: bool, mesh: Mesh
) -> PartitionSpec:
    """How processes share the reading of an array that will be split by spec.

    Mesh axes that span processes and that spec leaves out (replicas) or puts on columns of the
    stored matrix (scattered bytes, of which a disk reads the pages around) go to layers or rows, as
    far as they divide them. So each byte is read by one process. Norms are read by each.
    """
    first = int(stacked)
    if len(shape) - first == 1:
        return spec
    axes: list[tuple[str, ...]] = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in spec]
    of_weight = range(first, len(shape))
    rows, columns = weight.sides(of_weight) if weight.num_leading else (of_weight[:1], of_weight[1:])
    dims = [*range(first), *rows]
    for axis in _axes_between_processes(mesh):
        home = next((dim for dim, names in enumerate(axes) if axis in names), None)
        if home in dims:
            continue
        for dim in dims if home is not None else [*dims, *columns]:
            if shape[dim] % math.prod(mesh.shape[name] for name in (*axes[dim], axis)) == 0:
                if home is not None:
                    axes[home] = tuple(name for name in axes[home] if name != axis)
                axes[dim] += (axis,)
                break
    return PartitionSpec(*(names or None for names in axes))


def _axes_between_processes(mesh: Mesh) -> list[str]:
    processes = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
    return [name for dim, name in enumerate(mesh.axis_names) if np.diff(processes, axis=dim).any()]


def _empty(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """An array at an address that a CPU device takes as it is; any other it would copy."""
    raw = np.empty(math.prod(shape) * dtype.itemsize + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : raw.size - _ALIGNMENT + start].view(dtype).reshape(shape)


def _blocks(
    weight: StoredWeight, shape: tuple[int, ...], index: tuple[slice, ...], out: np.ndarray
) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """Slices of a stored tensor, and the views of out, the part `index` of a weight of this shape, that take them."""
    sides = weight.ranges(shape, index)
    out = weight.as_matrix(out)
    row_bytes = max(1, out[:1].nbytes)
    steps = [max(_TILE, _BLOCK_BYTES // row_bytes), max(out.shape)]
    placed = [list(_placed(ranges, step)) for ranges, step in zip(sides, steps, strict=False)]
    for box in itertools.product(*placed):
        yield tuple(stored for stored, _ in box), out[tuple(here for _, here in box)]


def _placed(ranges: list[slice], step: int) -> Iterator[tuple[slice, slice]]:
    """The ranges in steps, each with its place when they are laid end to end."""
    end = 0
    for whole in ranges:
        for start in range(whole.start, whole.stop, step):
            stop = min(start + step, whole.stop)
            begin, end = end, end + stop - start
            yield slice(start, stop), slice(begin, end)


def _read_block(source: Source, name: str, index: tuple[slice, ...], out: np.ndarray) -> int:
    """Fill out, whose dims lie in any order in memory, in its dtype; how many bytes that was in the files."""
    block = source.read(name, index)
    stored = out[: len(block)]
    for start in range(0, len(block), _TILE):
        tile = slice(start, start + _TILE)
        stored[tile] = block[tile].astype(out.dtype, copy=False)
    out[len(block) :] = 0  # rows that pad the vocabulary
    return out.size * block.itemsize


class ModelSource:
    """The weights of a model as canonical tensors, so that every writer takes a model or a file alike."""

    def __init__(self, model: Llama):
        """Reads through to the model; nothing is copied until a tensor is asked for."""
        self._vocab_size = model.cfg.vocab_size
        self._weights: dict[str, tuple[Any, int | None, StoredWeight]] = {}
        for path, leaf in jax.tree.leaves_with_path(model, is_leaf=multiplies_itself):
            if isinstance(leaf, QuantizedArray):
                raise ValueError(
                    "a model that was quantized when it was loaded is not written; "
                    "quantize the files: python -m llama_jax.convert SRC DST --quantize ..."
                )
            weights, stacked = stored_weights(leaf_name(path), model.cfg.num_layers)
            for i, weight in enumerate(weights):
                self._weights[weight.name] = (leaf, i if stacked else None, weight)
        shapes = canonical_shapes(model.cfg)
        self.tensors = {name: TensorSpec(shape, self._weights[name][0].dtype) for name, shape in shapes.items()}

    def array(self, name: str) -> Array:
        """The tensor on the devices in its canonical shape, split as far as that shape allows."""
        leaf, layer, weight = self._weights[name]
        leaf = leaf.in_own_order() if isinstance(leaf, OutputsFirst) else leaf
        return _to_canonical(leaf if layer is None else leaf[layer], weight, self._vocab_size)

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor, or its slice, on the host; in several processes all must ask."""
        array = self.array(name)
        whole = np.asarray(reshard(array, PartitionSpec(*(None,) * array.ndim)))
        return whole if index is None else whole[index]


def _to_canonical(x: Array, weight: StoredWeight, vocab_size: int) -> Array:
    n = weight.num_leading
    if n == 0:
        if x.ndim == 1 or x.shape[0] == vocab_size:
            return x
        return reshard(x, PartitionSpec(None, jax.typeof(x).sharding.spec[1]))[:vocab_size]
    # A matrix side keeps the split of its first dimension; the others are gathered before they merge.
    spec = [axes if i in (0, n) else None for i, axes in enumerate(jax.typeof(x).sharding.spec)]
    x = jnp.reshape(
        reshard(x, PartitionSpec(*spec)),
        (math.prod(x.shape[:n]), -1),
        out_sharding=PartitionSpec(spec[0], spec[n]),
    )
    return x.T if weight.transposed else x
