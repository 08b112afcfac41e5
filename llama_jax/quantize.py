"""Weights in few bits: one representation, and the one einsum through which every weight of the model is multiplied.

A quantized weight sits in the model where a float array would, split over the mesh in the same way, and the model
never asks what a weight is made of. Sources: LLM.int8() (arXiv 2208.07339), QLoRA for NF4 (2305.14314), GPTQ for the
order of inputs (2210.17323), The Llama 3 Herd of Models section 6.2 for FP8. The invariant: a product with a quantized
weight is the product with its `dequantize`d form, up to the rounding of activations that the weight itself asks for,
and to float rounding.
"""

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec, reshard
from jax.typing import DTypeLike

from llama_jax.kernels import narrow, narrow_cpu
from llama_jax.mesh import platform
from llama_jax.schemes import Quantization

# On CPUs of how many rows at most and with a weight of how many values at least it is the left operand of a product:
# with smaller ones, as with a single row and with many, both orders are as fast (docs/performance.md, "Few rows").
_FEW_ROWS, _LARGE = 64, 2**20

_DEPTH = 64  # of products on TPUs, by docs/plan.md: half of the matrix unit's


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedArray:
    """A weight as (values - zeros) * scales, or with code "nf4" as NF4[values + 8] * scales.

    values int8, int4 or float8_e4m3fn have the shape of the weight. scales are floats or themselves quantized, of the
    same rank, and each dimension of values is a multiple of theirs: a block, split by no mesh. zeros are integers of
    the shape of the scales, or None. order int32, or None: the weight's inputs, flattened, were put in this order.
    """

    values: Any
    scales: Any
    zeros: Any = None
    order: Any = None
    rest: Quantization = field(default=Quantization(), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight."""
        return self.values.shape

    def __getitem__(self, index: Any) -> "QuantizedArray":
        """Itself for `...`, by which modules take the value of a parameter; stacked weights are sliced leaf by leaf."""
        if index is not ...:
            raise TypeError("a quantized weight is not indexed; take slices of its arrays with jax.tree.map")
        return self

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> Array:
        """The whole weight as floats, computed in float32; its inputs are in `order` still."""
        return narrow.widen(self.plain()).astype(dtype)

    def plain(self) -> narrow.Narrow:
        """Its arrays, with the scales as floats."""
        scales = self.scales.dequantize() if isinstance(self.scales, QuantizedArray) else self.scales
        return narrow.Narrow(self.values, scales, self.zeros, self.rest.code)

    def product(
        self, subscripts: str, x: Array, *, out_sharding: PartitionSpec, out_dtype: DTypeLike | None = None
    ) -> Array:
        """`einsum` with this weight; its gradient to x is as if no activation were rounded, to itself zero."""
        how = _Product(subscripts, jax.typeof(x).sharding.spec, out_sharding, x.dtype, jnp.dtype(out_dtype or x.dtype))
        return _product(how, x, self)


def block_spec(shape: Sequence[int], spec: Sequence[Any]) -> PartitionSpec:
    """How an array of this many blocks along each dimension is split where the weight is split by spec.

    Raises ValueError for a mesh that splits a block.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    for dim, axes in enumerate(spec):
        num_parts = math.prod(sizes[axis] for axis in jax.tree.leaves(axes))
        if shape[dim] > 1 and shape[dim] % num_parts:
            raise ValueError(
                f"the mesh splits {shape[dim]} groups of quantized weights into {num_parts} parts along "
                f"{axes}; use a mesh that divides {shape[dim]}, or smaller groups"
            )
    return PartitionSpec(*(axes if size > 1 else None for size, axes in zip(shape, spec, strict=True)))


class _Product(NamedTuple):
    """What of a product is known when it is compiled."""

    subscripts: str
    x_spec: PartitionSpec
    out_spec: PartitionSpec
    dtype: np.dtype
    out_dtype: np.dtype

    @property
    def letters(self) -> tuple[str, str, str]:
        """Those of x, of the weight and of the result."""
        operands, result = self.subscripts.split("->")
        x, weight = operands.split(",")
        return x, weight, result

    @property
    def inputs(self) -> list[str]:
        """The contracted letters as they stand in x, which are its last."""
        x, _, result = self.letters
        return [letter for letter in x if letter not in result]

    @property
    def axes(self) -> dict[str, Any]:
        """The mesh axes of each letter."""
        x, _, result = self.letters
        return dict(zip(result, self.out_spec, strict=True)) | dict(zip(x, self.x_spec, strict=True))

    def weight_specs(self, weight: QuantizedArray) -> QuantizedArray:
        """How a weight must be split for each device to multiply what it holds of x."""
        letters = self.letters[1]

        def spec(array: Any) -> Any:
            if array is None or isinstance(array, QuantizedArray):
                return array and self.weight_specs(array)
            return block_spec(array.shape, [self.axes[letter] for letter in letters])

        return QuantizedArray(spec(weight.values), spec(weight.scales), spec(weight.zeros), None, weight.rest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(how: _Product, x: Array, weight: QuantizedArray) -> Array:
    return _multiply(how, x, weight, forward=True)


def _product_forward(how: _Product, x: Array, weight: QuantizedArray) -> tuple[Array, QuantizedArray]:
    return _product(how, x, weight), weight


def _product_backward(how: _Product, weight: QuantizedArray, gradient: Array) -> tuple[Array, Any]:
    letters, result = how.letters[1:]
    sizes = dict(zip(letters, weight.shape, strict=True)) | dict(zip(result, gradient.shape, strict=True))
    mesh = jax.sharding.get_abstract_mesh()
    x = jax.ShapeDtypeStruct(
        [sizes[letter] for letter in how.letters[0]], how.dtype, sharding=jax.NamedSharding(mesh, how.x_spec)
    )
    (of_x,) = jax.linear_transpose(lambda x: _multiply(how, x, weight, forward=False), x)(gradient)

    def none(array: Array) -> Any:
        if jnp.issubdtype(array.dtype, jnp.integer):
            return np.zeros(array.shape, jax.dtypes.float0)
        return jnp.zeros_like(array)

    return of_x, jax.tree.map(none, weight)


_product.defvjp(_product_forward, _product_backward)


def _multiply(how: _Product, x: Array, weight: QuantizedArray, *, forward: bool) -> Array:
    """The product on every device of what it holds, summed over those that split the inputs.

    forward: with activations rounded as the weight or the device wants it; else linear in x.
    """
    num_inputs = len(how.inputs)
    if weight.order is not None:
        x = _in_order(x, weight.order, num_inputs, how.x_spec)
    scale, rest = None, weight.rest
    if forward and rest.inputs is not None:
        if rest.scale is None:
            x, scale = narrow.round_inputs(x, num_inputs, rest.inputs, rest.bound)
        else:
            x, scale = narrow.round_inputs_alike(x, rest.inputs, rest.scale, rest.zero), jnp.float32(rest.scale)
    weight_specs = how.weight_specs(weight)
    weight = jax.tree.map(
        reshard, QuantizedArray(weight.values, weight.scales, weight.zeros, None, weight.rest), weight_specs
    )
    split_inputs = tuple(jax.tree.leaves([how.axes[letter] for letter in how.inputs]))

    on = platform()
    if scale is not None and on == "cpu":
        # Two products of int8 by int8 at once end the process (jaxlib 0.10.2, 2048 x 8192): whole numbers as floats.
        x = x.astype(jnp.float32)

    def local(x: Array, scale: Array | None, weight: QuantizedArray) -> Array:
        plain = weight.plain()
        if forward and on == "cpu" and narrow_cpu.suits(how.subscripts, x, plain):
            out = narrow_cpu.product(how.subscripts, x, plain)
        else:
            out = narrow.product(how.subscripts, x, plain, depth=_DEPTH if on == "tpu" else 0)
        if scale is not None:
            out = out * scale.reshape(*scale.shape, *(1,) * (out.ndim - scale.ndim))
        out = out.astype(how.out_dtype)
        return jax.lax.psum(out, split_inputs) if split_inputs else out

    scale_spec = None if scale is None else PartitionSpec(*how.x_spec[: scale.ndim])
    run = jax.shard_map(local, in_specs=(how.x_spec, scale_spec, weight_specs), out_specs=how.out_spec)
    return run(x, scale, weight)


def _in_order(x: Array, order: Array, num_inputs: int, spec: PartitionSpec) -> Array:
    """X with its last num_inputs dimensions, flattened, put in an order; gathered for it where the mesh splits them."""
    rows, inputs = x.shape[: x.ndim - num_inputs], x.shape[x.ndim - num_inputs :]
    whole = PartitionSpec(*spec[: len(rows)], *(None,) * num_inputs)
    flat = jnp.reshape(reshard(x, whole), (*rows, -1), out_sharding=PartitionSpec(*whole[: len(rows) + 1]))
    flat = flat.at[..., order].get(out_sharding=PartitionSpec(*whole[: len(rows) + 1]))
    return reshard(jnp.reshape(flat, (*rows, *inputs), out_sharding=whole), spec)


def einsum(
    subscripts: str,
    x: Array,
    weight: Any,
    *,
    out_sharding: PartitionSpec,
    out_dtype: DTypeLike | None = None,
) -> Array:
    """Product of an activation [B, T, ...] with a weight, computed in the dtype of x.

    subscripts name batch and sequence "BT" in x and in the result, and further dimensions in the weight's
    order. out_sharding places the result, and with it the reduction over a contracted axis that the mesh
    splits. Returns out_dtype, by default the dtype of x; sums are float32 inside the product. A weight that
    is no array multiplies itself: it has a method `product` that takes all the rest.
    """
    if not isinstance(weight, Array):
        return weight.product(subscripts, x, out_sharding=out_sharding, out_dtype=out_dtype)
    subscripts = narrow.in_weight_order(subscripts)
    of_x, of_weight, of_result = re.split(",|->", subscripts)
    specs = jax.typeof(x).sharding.spec, jax.typeof(weight).sharding.spec, out_sharding
    joined = _joined((of_x, of_weight, of_result), specs)
    on, num_rows = platform(), x.shape[0] * x.shape[1]
    if on == "tpu" and x.shape[1] > 1:
        # Rows stay apart where their tokens lie along the lanes, as attention reads them: joined, the batch is between.
        joined -= {"T"}

    def matrix(array: Array, letters: str, spec: PartitionSpec) -> Array:
        shape, axes = [], []
        for letter, dim, axis in zip(letters, array.shape, spec, strict=True):
            if letter in joined:
                shape[-1] *= dim
            else:
                shape.append(dim)
                axes.append(axis)
        return jnp.reshape(array, shape, out_sharding=PartitionSpec(*axes))

    multiply = jnp.einsum
    if on == "cpu" and of_weight[0] in of_result and 1 < num_rows <= _FEW_ROWS and weight.size >= _LARGE:
        multiply = _weight_on_the_left
    out = multiply(
        subscripts.translate(dict.fromkeys(map(ord, joined))),
        matrix(x, of_x, specs[0]),
        matrix(weight, of_weight, specs[1]).astype(x.dtype),
        out_sharding=PartitionSpec(
            *(axis for letter, axis in zip(of_result, out_sharding, strict=True) if letter not in joined)
        ),
        preferred_element_type=out_dtype or x.dtype,
    )
    sizes = dict(zip(of_x, x.shape, strict=True)) | dict(zip(of_weight, weight.shape, strict=True))
    return jnp.reshape(out, [sizes[letter] for letter in of_result], out_sharding=out_sharding)


def multiplies_itself(node: Any) -> bool:
    """Whether a node of a model's tree is a weight that is no array."""
    return hasattr(type(node), "product")  # a parameter has the attributes of its value


def _weight_on_the_left(
    subscripts: str, x: Array, weight: Array, *, out_sharding: PartitionSpec, preferred_element_type: DTypeLike
) -> Array:
    """`jnp.einsum` of few rows with a weight that has its outputs first, which XLA:CPU reads best on the left."""
    of_x, of_weight, of_result = re.split(",|->", subscripts)
    turned = "".join(sorted(of_result, key=lambda letter: letter in of_x))
    axes = dict(zip(of_result, out_sharding, strict=True))
    out = jnp.einsum(
        f"{of_weight},{of_x}->{turned}",
        weight,
        x,
        out_sharding=PartitionSpec(*(axes[letter] for letter in turned)),
        preferred_element_type=preferred_element_type,
    )
    # The barrier keeps XLA from turning the operands round again.
    return jax.lax.optimization_barrier(out).transpose([turned.index(letter) for letter in of_result])


def _joined(operands: tuple[str, str, str], specs: tuple[PartitionSpec, ...]) -> set[str]:
    """Letters whose dimension makes one with that before it: both are in the same operands, and no mesh axis splits it.

    So a product is of matrices. Of more dimensions XLA:CPU transposes activations where a weight's gradient
    contracts two, a quarter of a step, and at every decode step the weight that has its outputs first.
    """
    split = {
        letter
        for letters, spec in zip(operands, specs, strict=True)
        for letter, axis in zip(letters, spec, strict=True)
        if axis
    }

    def where(letter: str) -> list[bool]:
        return [letter in letters for letters in operands]

    pairs = (pair for letters in operands[:2] for pair in pairwise(letters))
    return {after for before, after in pairs if after not in split and where(before) == where(after)}
