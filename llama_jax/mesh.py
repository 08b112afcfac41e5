"""Devices as a mesh, and which mesh axes every dimension of the model is split over.

A mesh has the axes `data` (batch), `fsdp` (batch and weights), `context` (sequence, and weights in
training) and `tensor` (heads, MLP width, vocabulary). `tensor` is built as one sub-axis per prime
factor, because a mesh is made before the model is known: the model takes k = gcd(tensor,
num_kv_heads) of it for KV heads and the rest, g = tensor / k, for the query heads that share one.
The invariant: nothing is repeated or padded among heads, so every device holds different weights.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from llama_jax.config import LlamaConfig

AXES = ("data", "fsdp", "context", "tensor")

MeshAxes = tuple[str, ...]


def prime_factors(number: int) -> list[int]:
    """Prime factors in rising order, with multiplicity; [] for 1."""
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors


def parse_mesh(spec: str, num_devices: int) -> dict[str, int]:
    """Sizes of the four axes from text such as "fsdp=2,tensor=4"; -1 for one axis takes what is left.

    Raises ValueError for an unknown, doubled or malformed axis, and for a product that is not
    num_devices.
    """
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    seen = set()
    for part in filter(None, (part.strip() for part in spec.split(","))):
        axis, _, size = (text.strip() for text in part.partition("="))
        if axis not in AXES:
            raise ValueError(f"unknown mesh axis {axis!r} in {spec!r}; the axes are {', '.join(AXES)}")
        if axis in seen:
            raise ValueError(f"mesh axis {axis!r} is given twice in {spec!r}")
        if not size.lstrip("-").isdigit() or (int(size) < 1 and int(size) != -1):
            raise ValueError(f"mesh axis {part!r} needs a positive size, or -1 for what is left; e.g. {axis}=2")
        seen.add(axis)
        sizes[axis] = int(size)
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"only one mesh axis can be -1, {spec!r} has {', '.join(free)}")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
        if num_devices % fixed:
            raise ValueError(f"mesh {spec!r}: {num_devices} devices are not a multiple of {fixed}")
        sizes[free[0]] = num_devices // fixed
    elif fixed > num_devices:
        raise ValueError(f"mesh {spec!r} needs {fixed} devices, but there are {num_devices}; use smaller axes")
    return sizes


def make_mesh(spec: str, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with explicit axes data, fsdp, context, tensor0, tensor1, ... from text.

    A mesh smaller than the number of devices takes the first ones, if they belong to one process. Over several
    slices of TPUs, which a slower network joins, `data` runs, outermost; all other axes lie within one.
    Raises ValueError if the text does not fit the devices, or if the slices do not divide `data`.
    """
    devices = list(jax.devices()) if devices is None else list(devices)
    sizes = parse_mesh(spec, len(devices))
    count = math.prod(sizes.values())
    if count < len(devices) and len({device.process_index for device in devices}) > 1:
        raise ValueError(
            f"mesh {spec!r} uses {count} of {len(devices)} devices of several processes; "
            "every process must take part: give one axis -1"
        )
    slices = tpu_slices(devices[:count])
    if sizes["data"] % len(slices):
        raise ValueError(
            f"mesh {spec!r}: data={sizes['data']} cannot run over {len(slices)} slices; "
            f'give data={len(slices)} and the rest within a slice, as in "data={len(slices)},fsdp=-1"'
        )
    # The torus is laid out for the four whole axes; splitting tensor into its factors keeps neighbours.
    shape = (sizes["data"] // len(slices), *(sizes[axis] for axis in AXES[1:]))
    grids = [mesh_utils.create_device_mesh(shape, part, allow_split_physical_axes=True) for part in slices]
    factors = prime_factors(sizes["tensor"])
    names = AXES[:3] + tuple(f"tensor{i}" for i in range(len(factors)))
    grid = np.concatenate(grids).reshape(sizes["data"], *shape[1:3], *factors)
    return Mesh(grid, names, axis_types=(AxisType.Explicit,) * len(names))


def tpu_slices(devices: Sequence[Any]) -> list[list[Any]]:
    """The devices of each slice of TPUs, in the order of the slices; any other devices are one slice.

    Raises ValueError if the slices are not of one size.
    """
    slices: dict[int, list[Any]] = {}
    for device in devices:
        # On GPUs jax counts a node as a slice, but there `fsdp` may well run over nodes; a lone slice has no number.
        index = getattr(device, "slice_index", 0) if device.platform == "tpu" else 0
        slices.setdefault(index, []).append(device)
    if len({len(part) for part in slices.values()}) > 1:
        counts = ", ".join(f"slice {index} has {len(part)}" for index, part in sorted(slices.items()))
        raise ValueError(f"a mesh needs slices of the same number of devices: {counts}; use equal ones")
    return [part for _, part in sorted(slices.items())]


@contextlib.contextmanager
def use_mesh(spec: str | None = None, devices: Sequence[Any] | None = None) -> Iterator[Mesh]:
    """Enter a mesh: "fsdp=2,tensor=2", or every device along fsdp when no text is given."""
    mesh = make_mesh("fsdp=-1" if spec is None else spec, devices)
    with jax.set_mesh(mesh):
        yield mesh


def current_mesh() -> AbstractMesh:
    """The ambient mesh. Raises ValueError if there is none or its axes are not this project's."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ValueError("no mesh is set; wrap the call in `with llama_jax.use_mesh():`")
    foreign = [n for n in mesh.axis_names if n not in AXES[:3] and n.rstrip("0123456789") != "tensor"]
    if foreign or any(axis_type != AxisType.Explicit for axis_type in mesh.axis_types):
        raise ValueError(
            f"the ambient mesh has axes {mesh.axis_names} of types {mesh.axis_types}; make it with llama_jax.use_mesh"
        )
    return mesh


def platform(mesh: Mesh | AbstractMesh | None = None) -> str:
    """Of the devices of a mesh, by default the ambient one, which need not be here: "cpu", "gpu" or "tpu"."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return mesh.abstract_mesh.abstract_device.platform


def tensor_axes(mesh: Mesh | AbstractMesh) -> MeshAxes:
    """The sub-axes of `tensor`, in order."""
    return tuple(name for name in mesh.axis_names if name.startswith("tensor"))


def mesh_text(mesh: Mesh | AbstractMesh) -> str:
    """Every axis with more than one device, as `parse_mesh` takes them: "data=2,tensor=4"."""
    sizes = {axis: mesh.shape[axis] for axis in AXES[:3]}
    sizes["tensor"] = math.prod(mesh.shape[axis] for axis in tensor_axes(mesh))
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "tensor=1"


def legal_tensor_sizes(cfg: LlamaConfig, limit: int) -> list[int]:
    """Sizes up to limit that `tensor` may have for this model: what divides its heads."""
    return [
        size
        for size in range(1, min(limit, cfg.num_heads) + 1)
        if cfg.num_groups % (size // math.gcd(size, cfg.num_kv_heads)) == 0
    ]


def inference_mesh_spec(cfg: LlamaConfig, num_devices: int, num_local: int | None = None) -> str:
    """The mesh that inference takes when none is asked for: the largest legal tensor, the rest data.

    tensor stays among the num_local devices of a process (default: all), whose connections are fast.
    """
    local = num_devices if num_local is None else num_local
    tensor = max(size for size in legal_tensor_sizes(cfg, local) if local % size == 0)
    return f"data={num_devices // tensor},tensor={tensor}"


@dataclass(frozen=True)
class ShardingRules:
    """Mesh axes of every logical axis, for one model on one mesh; calling it gives a PartitionSpec.

    rules("batch", None, "mlp") -> PartitionSpec(("data", "fsdp"), None, ("tensor0",)). Axes of size
    one are left out, so that on one device every spec is trivial. residual splits the sequence between
    the blocks of a training step, columns the width of the embedding. vocab_multiple is what the rows
    of the embedding and of the head are padded to; sequence_multiple counts two chunks a device (see
    kernels/two_ended.py).
    """

    batch: MeshAxes
    sequence: MeshAxes
    residual: MeshAxes
    embed: MeshAxes
    columns: MeshAxes
    kv_heads: MeshAxes
    q_groups: MeshAxes
    mlp: MeshAxes
    vocab: MeshAxes
    cache_sequence: MeshAxes
    batch_multiple: int
    sequence_multiple: int
    residual_multiple: int
    cache_multiple: int
    vocab_multiple: int

    def __call__(self, *axes: str | None) -> PartitionSpec:
        """PartitionSpec of an array whose dimensions have these logical axes; None is not split."""
        return PartitionSpec(*((getattr(self, axis) or None) if axis else None for axis in axes))


def sharding_rules(cfg: LlamaConfig, mesh: Mesh | AbstractMesh | None = None) -> ShardingRules:
    """The rules of a model on a mesh, by default the ambient one.

    Raises ValueError, naming what would work, if the mesh cannot split this model.
    """
    mesh = current_mesh() if mesh is None else mesh
    sizes = dict(mesh.shape)
    tensor = tensor_axes(mesh)
    size = math.prod(sizes[axis] for axis in tensor)
    _check(cfg, sizes, size)

    def dividing(dim: int) -> MeshAxes:
        """The tensor sub-axes whose product divides dim (3B's MLP of 8,192 on tensor=12: the 2s)."""
        axes, left = [], math.gcd(dim, size)
        for axis in tensor:
            if left % sizes[axis] == 0:
                axes.append(axis)
                left //= sizes[axis]
        return tuple(axes)

    def present(*axes: str) -> MeshAxes:
        return tuple(axis for axis in axes if sizes.get(axis, 1) > 1)

    def count(axes: MeshAxes) -> int:
        return math.prod(sizes[axis] for axis in axes)

    batch, sequence, embed = present("data", "fsdp"), present("context"), present("fsdp", "context")
    kv_heads = dividing(cfg.num_kv_heads)
    q_groups = tuple(axis for axis in tensor if axis not in kv_heads)
    return ShardingRules(
        batch=batch,
        sequence=sequence,
        residual=sequence + tensor,
        embed=embed,
        columns=dividing(cfg.embed_dim // count(embed))
        + embed[::-1],  # inner ones are exchanged whenever outer ones are
        kv_heads=kv_heads,
        q_groups=q_groups,
        mlp=dividing(cfg.mlp_dim),
        vocab=tensor,
        cache_sequence=sequence + q_groups,
        batch_multiple=count(batch),
        sequence_multiple=2 * count(sequence) if sequence else 1,
        residual_multiple=count(sequence + tensor),
        cache_multiple=count(sequence + q_groups),
        vocab_multiple=size,
    )


def _check(cfg: LlamaConfig, sizes: dict[str, int], tensor: int) -> None:
    """Raise ValueError if heads or model width do not divide."""
    legal = legal_tensor_sizes(cfg, max(2 * tensor, 8))
    if tensor not in legal:
        near = sorted(legal, key=lambda size: (abs(size - tensor), size))[:3]
        raise ValueError(
            f"tensor={tensor} cannot split {cfg.num_heads} query heads over {cfg.num_kv_heads} KV heads; "
            f"the nearest that can: tensor={', '.join(str(size) for size in sorted(near))}"
        )
    weights = sizes["fsdp"] * sizes["context"]
    if cfg.embed_dim % weights:
        legal = [size for size in range(1, weights) if cfg.embed_dim % size == 0]
        raise ValueError(
            f"fsdp * context = {weights} does not divide embed_dim={cfg.embed_dim}; the nearest that does: {legal[-1]}"
        )
